"""Masks of pictures, in every form that exporters write: which pixels count.

* ``mask_path`` of a frame (nerfstudio): white where a pixel counts.
* ``masks/`` beside ``images/``: ``<picture's file name>.png`` (COLMAP) or the picture's name with
  any suffix; white where a pixel counts.
* ``dynamic_mask_<name>.png`` beside a picture (instant-ngp): white where a pixel does not count.

A mask may hold its values in its colors or in its alpha.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from nerf.datasets.images import IMAGE_SUFFIXES, read_image

DYNAMIC = "dynamic_mask_"


class Mask(NamedTuple):
    """One mask of a picture."""

    path: Path
    inverted: bool = False  # white pixels do not count


Masks = tuple[Mask, ...]  # of one picture: a pixel counts where all of them agree


def find_masks(
    datadir: Path,
    files: Sequence[Path],
    warn: Callable[[str], object],
    named: Sequence[Path | None] | None = None,
) -> list[Masks]:
    """The masks of each picture of ``files``; ``warn`` reports those that no frame names.

    named: the mask that a frame names, or None.
    """
    found: list[Masks] = []
    folder = datadir / "masks"
    from_folder = dynamic = 0
    stored = folder.is_dir() and any(
        path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*")
    )
    for index, file in enumerate(files):
        masks = []
        path = named[index] if named is not None else None
        if path is not None:
            masks.append(Mask(path))
        elif stored and (other := _in_folder(datadir, folder, file)) is not None:
            masks.append(Mask(other))
            from_folder += 1
        moving = file.with_name(f"{DYNAMIC}{file.stem}.png")
        if moving.is_file():
            masks.append(Mask(moving, inverted=True))
            dynamic += 1
        found.append(tuple(masks))
    if from_folder:
        warn(f"masks of {from_folder} pictures in {folder}: their black pixels are left out")
    elif stored and not any(named or ()):
        warn(f"{folder}: not used, no mask there has the name of a picture")
    if dynamic:
        warn(f"{DYNAMIC}*.png of {dynamic} pictures: their white pixels are left out")
    return found


def _in_folder(datadir: Path, folder: Path, file: Path) -> Path | None:
    """The mask in ``folder`` of a picture below ``datadir``; None without one."""
    try:
        relative = file.relative_to(datadir)
    except ValueError:
        return None
    if relative.parts[0].startswith("images"):
        relative = Path(*relative.parts[1:])
    place = folder / relative
    names = [place.name + ".png", *(place.stem + suffix for suffix in IMAGE_SUFFIXES)]
    for name in names:
        if place.with_name(name).is_file():
            return place.with_name(name)
    return None


def read_masks(masks: Masks, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: the pixels that count, at ``size`` (height, width)."""
    usable = np.ones(size, bool)
    for mask in masks:
        usable &= _read_mask(mask.path, size) != mask.inverted
    return usable


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: where the mask is white, after reduction to ``size`` (height, width)."""
    picture = read_image(path, size[::-1])
    level = picture[..., 0]
    if picture.shape[-1] == 4 and picture[..., 3].min() < 255:
        if int(level.max()) - int(level.min()) < 2:
            level = picture[..., 3]  # one color: the values are in the alpha
        else:
            level = (level.astype(np.uint16) * picture[..., 3] // 255).astype(np.uint8)
    gray = Image.fromarray(level)
    if abs(gray.width * size[0] / size[1] - gray.height) > 1 + 0.02 * gray.height:
        raise ValueError(
            f"{path}: is {gray.width}x{gray.height}; expected the proportions of its picture, "
            f"{size[1]}x{size[0]}"
        )
    if gray.size != size[::-1]:
        gray = gray.resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(gray) > 127


def usable_pixels(masks: Sequence[Masks], height: int, width: int) -> torch.Tensor | None:
    """bool [V, H, W], the pixels that count, for pictures of one size; None: all of them."""
    if not any(masks):
        return None
    usable = torch.ones(len(masks), height, width, dtype=torch.bool)
    for view, own in enumerate(masks):
        if own:
            usable[view] = torch.from_numpy(read_masks(own, (height, width)))
            if not usable[view].any():
                raise ValueError(
                    f"{own[0].path}: leaves no pixel of its picture; change the mask, or leave "
                    "the picture out"
                )
    return None if bool(usable.all()) else usable


def refuse_with_store(masks: Sequence[Masks], where: Path) -> None:
    """ValueError if there are masks: a mapped file is drawn from without exceptions."""
    if any(masks):
        raise ValueError(
            f"{where}: has masks; a mapped picture file cannot leave pixels out, use "
            "--data_store memory"
        )
