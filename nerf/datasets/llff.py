"""LLFF captures: poses_bounds.npy and images/; images_N/ caches pictures N times smaller.

A row of poses_bounds.npy [V, 17] holds a 3x5 matrix, row by row, whose columns are the camera's
down, right and backward axis, its position, and (height, width, focal) in pixels; then the nearest
and the farthest depth.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from nerf.cameras import average_pose, recenter, spherify, spiral_path
from nerf.datasets import pictures as choice
from nerf.datasets.arrays import with_alpha
from nerf.datasets.caches import other_factors, source_of, why_stale, write_fingerprints
from nerf.datasets.images import (
    IMAGE_SUFFIXES,
    Size,
    list_images,
    picture_sizes,
    read_image,
    read_images,
    why_unreadable,
)
from nerf.datasets.llff_rows import files_of_rows
from nerf.datasets.masks import find_masks, refuse_with_store, usable_pixels
from nerf.datasets.scene import Scene, check_pose
from nerf.datasets.store import Store, as_tensor
from nerf.datasets.stored_file import file_of
from nerf.training.files import unfinished_folder

# The nearest depth is scaled to 1 / 0.75, so that NDC's near plane at 1 lies in front of it.
BOUND_FACTOR = 0.75
Warn = Callable[[str], object]


def load(
    datadir: Path,
    *,
    factor: int,
    llffhold: int,
    ndc: bool,
    spherical: bool,
    background: float,
    near: float = 0.0,
    far: float = 0.0,
    warn: Warn = print,
    store: Store | None = None,
) -> Scene:
    """The capture at ``datadir``, its pictures ``factor`` times smaller.

    llffhold: every n-th view is held out (0: only the most central one); the val and test splits
    are the same views. ndc: normalized device coordinates, for forward-facing captures. spherical:
    a capture all around something; camera centers are scaled to a unit sphere. near, far: in scene
    units, not with ndc; 0: from the file. background: gray level in [0, 1] behind transparent
    pixels. store: see ``read_images``.
    """
    poses, sizes, bounds = read_poses_bounds(datadir / "poses_bounds.npy")
    found = read_pictures(datadir, factor, poses, sizes[0, :2], warn, store)
    images, names = found.images, [file.stem for file in found.files]
    poses, sizes, bounds = (rows[found.kept] for rows in (poses, sizes, bounds))
    masks = find_masks(datadir, found.files, warn)
    if isinstance(images, np.memmap):
        refuse_with_store(masks, datadir)
    for name, pose in zip(names, poses, strict=True):  # a bad pose would spoil the average below
        check_pose(pose, f"{datadir}/poses_bounds.npy: {name}")
    original = poses.copy()
    scale = 1.0 / (bounds.min() * BOUND_FACTOR)
    poses[:, :, 3] *= scale
    bounds = bounds * scale
    poses = recenter(poses)
    if spherical:
        try:
            poses, path, bounds = spherify(poses, bounds)
        except np.linalg.LinAlgError:
            raise ValueError(
                f"{datadir}: all cameras look in exactly the same direction, and --spherify is for "
                "cameras around an object; leave it out"
            ) from None
    else:
        path = spiral_path(poses, bounds.min(), bounds.max())
    intrinsics = _intrinsics(sizes, images.shape[1:3], names, f"{datadir}/poses_bounds.npy")
    return Scene(
        images=as_tensor(images),
        stored=file_of(images),
        c2w=torch.tensor(poses, dtype=torch.float32),
        intrinsics=torch.tensor(intrinsics, dtype=torch.float32),
        splits=_splits(poses, llffhold),
        names=names,
        near=0.0 if ndc else near or float(bounds.min()) * 0.9,
        far=1.0 if ndc else far or float(bounds.max()),
        render_poses=torch.tensor(path, dtype=torch.float32),
        background=background,
        ndc=ndc,
        usable=usable_pixels(masks, *images.shape[1:3]),
        to_world=torch.tensor(similarity(poses, original, scale)),
    )


def similarity(scene: np.ndarray, world: np.ndarray, scale: float) -> np.ndarray:
    """The similarity [4, 4] that maps cameras [V, 3, 4] of the scene to those of the file's world.

    scale: scene units per unit of the file's world, where the cameras' positions are too close to
    each other to show it.
    """
    turn = world[0, :, :3] @ scene[0, :, :3].T
    here, there = scene[:, :, 3], world[:, :, 3]
    spread = np.sqrt(((here - here.mean(0)) ** 2).sum())
    ratio = np.sqrt(((there - there.mean(0)) ** 2).sum()) / spread if spread > 1e-9 else 1 / scale
    matrix = np.eye(4)
    matrix[:3, :3] = ratio * turn
    matrix[:3, 3] = there.mean(0) - matrix[:3, :3] @ here.mean(0)
    return matrix


def _splits(poses: np.ndarray, llffhold: int) -> dict[str, list[int]]:
    """Every llffhold-th view for val and test (0: the most central one), the others for train."""
    if llffhold > 0:
        test = list(range(0, len(poses), llffhold))
    else:
        center = average_pose(poses)[:, 3]
        test = [int(np.argmin(((poses[:, :, 3] - center) ** 2).sum(-1)))]
    train = [view for view in range(len(poses)) if view not in set(test)]
    return {"train": train, "val": list(test), "test": list(test)}


def _intrinsics(
    sizes: np.ndarray, shape: tuple[int, ...], names: list[str], where: str
) -> np.ndarray:
    """fx fy cx cy [V, 4] for pictures of ``shape`` (height, width), from rows of the pose file.

    sizes: [V, 3] height, width, focal. ValueError if the proportions of any row differ.
    """
    height, width = shape
    # One pixel of difference comes from rounding when pictures are reduced.
    wrong = np.abs(sizes[:, 0] * width / sizes[:, 1] - height) > 1.0
    wrong &= np.abs(sizes[:, 1] * height / sizes[:, 0] - width) > 1.0
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{where}: row {row} is for pictures of {sizes[row, 1]:g}x"
            f"{sizes[row, 0]:g}, {names[row]} is {width}x{height}; expected the same proportions"
        )
    focal = sizes[:, 2] * width / sizes[:, 1]
    center = np.broadcast_to([0.5 * width, 0.5 * height], (len(sizes), 2))
    return np.concatenate([np.stack([focal, focal], -1), center], axis=-1)


def read_poses_bounds(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c2w [V, 3, 4] in the axes of ``nerf.rays``, (height, width, focal) [V, 3], bounds [V, 2]."""
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; make it with LLFF's imgs2poses") from None
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: is not a plain numpy array ({error})") from None
    if not isinstance(rows, np.ndarray):
        raise ValueError(f"{path}: is an archive; expected one numpy array")
    if rows.ndim != 2 or rows.shape[1] != 17 or len(rows) == 0 or rows.dtype.kind != "f":
        raise ValueError(f"{path}: holds {rows.dtype}{list(rows.shape)}; expected floats [V, 17]")
    rows = rows.astype(np.float64)
    matrices, bounds = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    down, right, back, position, sizes = np.moveaxis(matrices, 2, 0)
    bad = ~(np.isfinite(rows).all(1) & (bounds[:, 0] > 1e-9) & (bounds[:, 0] < bounds[:, 1]))
    bad |= bounds[:, 1] > 1e9
    bad |= ~(sizes > 0).all(1)
    if bad.any():
        raise ValueError(
            f"{path}: row {int(np.argmax(bad))} holds NaN, a size <= 0 or bounds "
            f"{bounds[bad][0].tolist()}; expected finite numbers and 0 < near < far < 1e9"
        )
    return np.stack([right, -down, back, position], axis=-1), sizes, bounds


class Pictures(NamedTuple):
    """The pictures of a capture."""

    images: np.ndarray  # uint8 [V, H, W, 3], or 4 channels if any pixel is transparent
    files: list[Path]  # V
    kept: list[int]  # V: the rows of the pose file that they belong to


def read_pictures(
    datadir: Path,
    factor: int,
    poses: np.ndarray,
    full_size: np.ndarray,
    warn: Warn,
    store: Store | None = None,
) -> Pictures:
    """The pictures, ``factor`` = N times smaller; ``warn`` names those that are left out.

    poses: of the rows, see ``files_of_rows``. images_N/ is used if it holds a picture for each row
    whose size is ``full_size`` (height and width in the pose file) divided by N, and was made from
    the pictures in images/. Otherwise pictures are reduced from images/, and kept in images_N/ if
    that does not exist or was made here.
    """
    if factor < 1:
        raise ValueError(f"--factor {factor}; expected 1 (full size) or more")
    originals = choice.existing(datadir / "images")
    size = (full_size[1], full_size[0])  # decides whether poses include the EXIF rotation
    cache, complaint, rebuild = datadir / f"images_{factor}", None, False
    if factor > 1 and cache.is_dir():
        files = list_images(cache)
        complaint = _why_unusable(files, len(poses), full_size / factor, originals.is_dir())
        if not complaint and originals.is_dir():
            complaint = why_stale(files, list_images(originals))
            rebuild = complaint is not None and source_of(files) is not None
        if not complaint:
            kept = _whole(files, originals, warn)
            files = [files[row] for row in kept]
            return Pictures(
                _without_opaque_alpha(read_images(files, size, store=store)), files, kept
            )
        if not originals.is_dir():
            raise ValueError(f"{cache}: {complaint}, and {originals} does not exist to rebuild it")
        again = "it is made again" if rebuild else "delete the folder to have it rebuilt"
        warn(f"{cache} is ignored: {complaint}; {again}")
    if factor > 1 and store is not None and store.kind == "mmap":
        raise ValueError(
            f"{cache}: does not exist, and --data_store mmap needs it; create it by one run with "
            "--data_store memory on a machine with enough memory, or use --factor 1"
        )
    rows = files_of_rows(datadir, poses, _originals(originals), warn)
    kept = choice.readable(rows, None, str(originals), warn)
    found = [picture_sizes(rows[row]) for row in kept]
    kept = [kept[i] for i in choice.of_one_size([rows[row] for row in kept], found, warn)]
    files = [rows[row] for row in kept]
    if factor == 1:
        return Pictures(_without_opaque_alpha(read_images(files, size, store=store)), files, kept)
    reduced = [_reduced(file, factor, size) for file in files]
    if len({picture.shape[:2] for picture in reduced}) > 1:
        read_images(files, size)  # raises ValueError with the name of the file that differs
    if (not complaint or rebuild) and len(files) == len(poses):
        _write_cache(cache, files, reduced, warn, replace=rebuild)
    if any(picture.shape[-1] == 4 for picture in reduced):
        reduced = [with_alpha(picture) for picture in reduced]
    return Pictures(np.stack(reduced), files, kept)


def _whole(reduced: list[Path], originals: Path, warn: Warn) -> list[int]:
    """The numbers of the reduced pictures that can be read and were not taken out of ``originals``.

    Only where reduced pictures have the names of the originals can one see which were taken out.
    """
    kept = choice.readable(reduced, None, str(reduced[0].parent), warn)
    if not originals.is_dir():
        return kept
    there = {file.stem for file in list_images(originals)}
    gone = [row for row in kept if reduced[row].stem not in there]
    if not gone or not there < {file.stem for file in reduced}:
        return kept
    choice.leave_out(reduced, gone, warn, f"no longer in {originals.name}/")
    return [row for row in kept if reduced[row].stem in there]


def _without_opaque_alpha(images: np.ndarray) -> np.ndarray:
    """The pictures [V, H, W, 3|4], without the alpha channel if all pixels are opaque."""
    if images.shape[-1] == 4 and all(int(picture[..., 3].min()) == 255 for picture in images):
        return images[..., :3]
    return images


def _originals(folder: Path) -> list[Path]:
    """The pictures at full size. ValueError if there are none."""
    files = list_images(folder) if folder.is_dir() else []
    if not files:
        raise ValueError(
            f"{folder}: holds no pictures; put the capture's {'/'.join(IMAGE_SUFFIXES)} files there"
            f"{other_factors(folder.parent)}"
        )
    return files


def _why_unusable(
    files: list[Path], count: int, expected_size: np.ndarray, replaceable: bool
) -> str | None:
    """Why reduced pictures do not fit the poses (number, height and width); None if they do.

    replaceable: the originals exist, so that one unreadable picture is a reason.
    """
    if len(files) != count:
        return f"it holds {len(files)} pictures for {count} poses"
    broken = {file: why for file in files if (why := why_unreadable(file))}
    if broken and (replaceable or len(broken) == count):
        file, why = next(iter(broken.items()))
        return f"its {file.name} cannot be read ({why})"
    first = next(file for file in files if file not in broken)
    height, width = read_image(first, (expected_size[1], expected_size[0])).shape[:2]
    if np.abs(np.array([height, width]) - expected_size).max() > 1.0:
        want = f"{expected_size[1]:g}x{expected_size[0]:g}"
        return f"its pictures are {width}x{height} where the poses expect {want}"
    return None


def _reduced(file: Path, factor: int, size: Size) -> np.ndarray:
    """One picture, uint8 [H, W, 3|4], ``factor`` times smaller: averages weighted by alpha.

    size: as in ``read_image``.
    """
    picture = Image.fromarray(_without_opaque_alpha(read_image(file, size)[None])[0])
    small = (round(picture.width / factor), round(picture.height / factor))
    if min(small) < 1:
        raise ValueError(
            f"{file}: {picture.width}x{picture.height} is too small for --factor {factor}; lower it"
        )
    return np.asarray(picture.resize(small, Image.Resampling.BOX, reducing_gap=None))


def _write_cache(
    cache: Path,
    files: Sequence[Path],
    pictures: Sequence[np.ndarray],
    warn: Warn,
    *,
    replace: bool,
) -> None:
    """Write the pictures to a temporary folder and rename it, so a cache is never half-written.

    replace: of an old folder, which this function made from other pictures.
    """
    complete = False
    try:
        with unfinished_folder(cache) as temporary:
            reduced, old = temporary / "reduced", temporary / "old"
            reduced.mkdir()
            for file, picture in zip(files, pictures, strict=True):
                Image.fromarray(picture).save(reduced / f"{file.stem}.png")
            if replace and cache.is_dir():
                os.rename(cache, old)
            # Before the folder has its name: without them nobody knows who made it.
            write_fingerprints(cache, list_images(reduced), files)
            os.rename(reduced, cache)
            complete = True
    except OSError as error:
        if not complete and not cache.is_dir():  # else another process wrote it first
            warn(f"{cache} cannot be written ({error.strerror}); pictures are reduced in every run")
