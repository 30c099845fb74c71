"""Picture files -> uint8 arrays, one documented conversion per kind of file.

Grey becomes RGB; palette and CMYK become RGB (RGBA where transparent); grey with alpha becomes
RGBA; 16-bit grey is scaled to 8 bits, 16-bit RGB keeps its high byte. Alpha stays straight (not
multiplied in). Anything else is refused by name.
"""

from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def list_images(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name; hidden files are left out."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with {'/'.join(IMAGE_SUFFIXES)}")
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def read_image(path: Path) -> np.ndarray:
    """One picture as uint8 [H, W, 3] or, when it has transparency, [H, W, 4]."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image; is the data folder complete?") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace it") from None
    if image.mode.startswith(("I", "F")):
        wide = np.asarray(image)
        if wide.dtype == np.float32 or wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"{path}: floating-point pixels; expected 8- or 16-bit integers")
        grey = np.round(wide / 257.0).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return np.array(image.convert("RGBA" if transparent else "RGB"))


def read_images(paths: list[Path]) -> np.ndarray:
    """Pictures of one common size as uint8 [V, H, W, C].

    C is 4 if any has alpha; pictures without alpha are opaque then.
    """
    pictures: list[np.ndarray] = []
    for path in paths:
        picture = read_image(path)
        if pictures and picture.shape[:2] != pictures[0].shape[:2]:
            (h, w), (h0, w0) = picture.shape[:2], pictures[0].shape[:2]
            raise ValueError(
                f"{path}: is {w}x{h} pixels but {paths[0].name} is {w0}x{h0}; "
                "all pictures of a scene must have one size"
            )
        pictures.append(picture)
    if any(picture.shape[-1] == 4 for picture in pictures):
        pictures = [with_alpha(picture) for picture in pictures]
    return np.stack(pictures)


def with_alpha(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3|4] -> [H, W, 4]; a picture without alpha becomes opaque."""
    if picture.shape[-1] == 4:
        return picture
    return np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1)


def shrink(picture: np.ndarray, factor: int, name: str = "picture") -> np.ndarray:
    """Area average over factor x factor pixels: uint8 [H, W, C] -> [H / factor, W / factor, C].

    Colours are weighted by alpha while averaging, so a transparent pixel's colour never bleeds
    into an edge.
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
