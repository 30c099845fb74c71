"""Text guidance: score distillation from a frozen diffusion model."""
