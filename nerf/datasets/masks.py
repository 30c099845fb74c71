"""Masks of pictures, in every form that exporters write: which pixels count.

* ``mask_path`` of a frame (nerfstudio): white where a pixel counts.
* ``masks/`` beside ``images/``: ``<picture's file name>.png`` (COLMAP) or the picture's name with
  any suffix; white where a pixel counts.
* ``masks/`` beside the picture's own folder, likewise (DeepVoxels' rgb/).
* ``dynamic_mask_<name>.png`` beside a picture (instant-ngp): white where a pixel does not count.

A mask may hold its values in its colors or in its alpha.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from nerf.datasets.images import IMAGE_SUFFIXES, read_image, why_unreadable
from nerf.datasets.pictures import Names, existing, some

DYNAMIC = "dynamic_mask_"
OTHER_FOLDERS = ("mask", "mattes", "segmentation", "segmentations", "silhouettes")


class Mask(NamedTuple):
    """One mask of a picture."""

    path: Path
    inverted: bool = False  # white pixels do not count
    broken: bool = False  # it cannot be read: no pixel counts, and the picture is left out


Masks = tuple[Mask, ...]  # of one picture: a pixel counts where all of them agree


def find_masks(
    datadir: Path,
    files: Sequence[Path],
    warn: Callable[[str], object],
    named: Sequence[Path | None] | None = None,
) -> list[Masks]:
    """The masks of each picture of ``files``; ``warn`` reports those that no frame names.

    named: the mask that a frame names, or None. A mask that is missing or cannot be read is named
    and marked as broken.
    """
    found: list[Masks] = []
    used: dict[Path, int] = {}  # folder -> number of pictures with a mask in it
    broken: list[str] = []
    dynamic, names = 0, Names()
    for file, path in zip(files, named or [None] * len(files), strict=True):
        masks = [Mask(path)] if path is not None else []
        for folder, relative in () if masks else _places(datadir, file):
            if (other := _in_folder(folder / relative, names)) is not None:
                masks.append(Mask(other))
                used[folder] = used.get(folder, 0) + 1
                break
        moving = file.with_name(f"{DYNAMIC}{file.stem}.png")
        if moving.is_file():
            masks.append(Mask(moving, inverted=True))
            dynamic += 1
        for index, mask in enumerate(masks):
            why = why_unreadable(mask.path) if mask.path.is_file() else "missing"
            if why:
                masks[index] = mask._replace(broken=True)
                broken.append(f"{mask.path.relative_to(datadir)} ({why})")
        found.append(tuple(masks))
    for folder, count in used.items():
        rest = f"; {len(files) - count} pictures have none" * (count < len(files))
        warn(f"masks of {count} pictures in {folder}: their black pixels are left out{rest}")
    if dynamic:
        warn(f"{DYNAMIC}*.png of {dynamic} pictures: their white pixels are left out")
    if broken:
        warn(f"{len(broken)} masks cannot be read: {some(broken)}")
    _name_unused(datadir, [mask.path for masks in found for mask in masks], warn)
    return found


def _name_unused(datadir: Path, used: Sequence[Path], warn: Callable[[str], object]) -> None:
    """Warn about folders of masks of which none is among ``used``."""
    for name in ("masks", *OTHER_FOLDERS):
        folder = datadir / name
        if not folder.is_dir() or any(path.is_relative_to(folder) for path in used):
            continue
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*")):
            why = "no mask there has the name of a picture that needs one"
            if name != "masks":
                why = "masks are read from masks/ only, white where a pixel counts"
            warn(f"{folder}: not used, {why}")


def _places(datadir: Path, file: Path) -> list[tuple[Path, Path]]:
    """Where the mask of a picture may lie: folders, and the picture's name in each."""
    try:
        relative = file.relative_to(datadir)
    except ValueError:
        return []
    if relative.parts[0].lower().startswith("images"):
        relative = Path(*relative.parts[1:])
    places = [(datadir / "masks", relative)]
    beside = file.parent.parent / "masks"
    # Not masks/r_0.png for train/r_0.png: val/r_0.png and test/r_0.png are other pictures.
    if beside.is_relative_to(datadir) and beside.parent != datadir:
        places.append((beside, Path(file.name)))
    return [place for place in places if place[0].is_dir()]


def _in_folder(place: Path, names: Names) -> Path | None:
    """The mask of a picture that would itself lie at ``place``; None without one."""
    for name in [place.name + ".png", *(place.stem + suffix for suffix in IMAGE_SUFFIXES)]:
        found = existing(place.with_name(name), names)
        if found.is_file():
            return found
    return None


def read_masks(masks: Masks, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: the pixels that count, at ``size`` (height, width)."""
    usable = np.ones(size, bool)
    for mask in masks:
        if mask.broken:
            return np.zeros(size, bool)
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
    """bool [V, H, W], the pixels that count, for pictures of one size; None: all of them.

    Views of which no pixel counts are left out later, by ``checks``.
    """
    if not any(masks):
        return None
    usable = torch.ones(len(masks), height, width, dtype=torch.bool)
    for view, own in enumerate(masks):
        if own:
            usable[view] = torch.from_numpy(read_masks(own, (height, width)))
    return None if bool(usable.all()) else usable


def refuse_with_store(masks: Sequence[Masks], where: Path) -> None:
    """ValueError if there are masks: a mapped file is drawn from without exceptions."""
    if any(masks):
        raise ValueError(
            f"{where}: has masks; a mapped picture file cannot leave pixels out, use "
            "--data_store memory"
        )
