"""Pictures as arrays: uint8 [H, W, C], reduced, with alpha, or together in one array."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def padded(pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One array uint8 [V, H, W, C] with each picture at its top left, and the sizes [V, 2]."""
    sizes = np.array([picture.shape[:2] for picture in pictures])
    height, width = sizes.max(0)
    images = np.zeros((len(pictures), height, width, pictures[0].shape[-1]), np.uint8)
    for row, picture in zip(images, pictures, strict=True):
        row[: picture.shape[0], : picture.shape[1]] = picture
    return images, sizes


@contextmanager
def must_fit(count: int) -> Iterator[None]:
    """Inside the block, in which ``count`` pictures are read, used-up memory is a ValueError."""
    try:
        yield
    except MemoryError:
        raise ValueError(
            f"{count} pictures do not fit into memory; --data_store mmap keeps them in a file, "
            "--factor or --downscale makes them smaller"
        ) from None


def with_alpha(picture: np.ndarray) -> np.ndarray:
    """The picture, uint8 [H, W, 3|4], as [H, W, 4]; without alpha it becomes opaque."""
    if picture.shape[-1] == 4:
        return picture
    return np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1)


def shrink(picture: np.ndarray, factor: int, name: str = "picture") -> np.ndarray:
    """The average over blocks of factor x factor pixels: uint8 [H / factor, W / factor, C].

    picture: uint8 [H, W, C]. Colors are weighted by alpha, so a transparent pixel's color never
    bleeds into an edge. ValueError, beginning with ``name``, if factor does not divide both sides.
    """
    height, width, channels = picture.shape
    if factor == 1:
        return picture
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"{name}: {width}x{height} pixels cannot be reduced {factor} times; "
            "the factor must divide both sides"
        )
    blocks = picture.reshape(height // factor, factor, width // factor, factor, channels)
    blocks = blocks.astype(np.float32)
    if channels == 3:
        return np.round(blocks.mean((1, 3))).astype(np.uint8)
    alpha = blocks[..., 3:]
    mass = alpha.sum((1, 3))
    rgb = (blocks[..., :3] * alpha).sum((1, 3)) / np.maximum(mass, 1.0)
    mean_alpha = mass / factor**2
    return np.round(np.concatenate([rgb, mean_alpha], axis=-1)).astype(np.uint8)
