"""Losses on the shape of an object (text to 3D). All take float32 and return a scalar.

Means over rays, so that a weight means the same at any resolution and batch size.
"""

from torch import Tensor


def opacity_loss(opacity: Tensor) -> Tensor:
    """sqrt(o^2 + 0.01): favors empty space (DreamFusion, appendix A.2). opacity [R] -> []."""
    return (opacity.square() + 0.01).sqrt().mean()


def entropy_loss(opacity: Tensor) -> Tensor:
    """Binary entropy in nats: rays should hit or miss, not see fog. opacity [R] -> []."""
    # Where fog is all there is or none is left the slope is infinite; 1e-3 keeps it below 7.
    o = opacity.clamp(1e-3, 1 - 1e-3)
    return -(o * o.log() + (1 - o) * (1 - o).log()).mean()


def orientation_loss(backfacing: Tensor) -> Tensor:
    """Visible normals face the camera (Ref-NeRF; DreamFusion, appendix A.2): [R] -> []."""
    return backfacing.mean()


def spread_loss(spread: Tensor, opacity: Tensor) -> Tensor:
    """Variance of depth along rays that hit (HiFA's z-variance): [R], [R] -> []."""
    return (spread * opacity.detach()).mean()
