"""Random numbers: a global seed for initial weights, a generator per step for all else."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. The same on every rank: it decides the initial weights.

    Draws of the training loop never come from these global states, see ``step_generator``.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_generator(seed: int, step: int, device) -> torch.Generator:
    """The source of every random number of one step: a pure function of (seed, step).

    Resuming needs no saved state. All ranks draw the same global batch and keep their share, so
    the result does not depend on how many there are.
    """
    generator = torch.Generator(device=device)
    # Consecutive seeds are unrelated in Philox (CUDA) but not in the CPU's Mersenne twister, whose
    # seeding mixes 32 bits; spread (seed, step) over them (Knuth's multiplicative hash).
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64
    mixed ^= mixed >> 29
    return generator.manual_seed(mixed % 2**63)
