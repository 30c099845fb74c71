"""Random numbers: a global seed for the initial weights, a generator per step for the rest."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch for the initial weights, with the same seed on every rank.

    The training loop never draws from these global generators, see ``step_generator``.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_generator(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """The generator of all random numbers of one step: a pure function of (seed, step).

    So checkpoints hold no generator state. All ranks draw the same global batch and keep their
    shard, so results do not depend on the number of ranks.
    """
    generator = torch.Generator(device=device)
    # Consecutive seeds give unrelated numbers in Philox (CUDA) but not in the CPU's Mersenne
    # twister, which is seeded with 32 bits: spread (seed, step) over them (Knuth's multiplicative
    # hash).
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64
    mixed ^= mixed >> 29
    return generator.manual_seed(mixed % 2**63)


def host_generator(generator: torch.Generator) -> torch.Generator:
    """A generator on the CPU for what the host must know of a step; ``generator`` if it is one.

    A number drawn on a GPU can be read only when all its work is done.
    """
    if generator.device.type == "cpu":
        return generator
    return torch.Generator().manual_seed(generator.initial_seed())
