"""LLFF captures: poses_bounds.npy and images/, with images_N/ as a cache of N-times smaller ones.

Row layout of poses_bounds.npy [V, 17]: a 3x5 matrix, row by row, whose columns are the camera's
down, right and backward axis, its position, and (height, width, focal) in pixels; then the nearest
and farthest depth.
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nerf.cameras import average_pose, recenter, spherify, spiral_path
from nerf.datasets.images import IMAGE_SUFFIXES, list_images, read_image, read_images
from nerf.datasets.scene import Scene, check_pose
from nerf.datasets.store import as_tensor

BOUND_FACTOR = 0.75  # the nearest depth is scaled to 1 / 0.75: NDC's near plane at 1 is in front


def load(
    datadir: Path,
    *,
    factor: int,
    llffhold: int,
    ndc: bool,
    spherical: bool,
    background: float,
    warn=print,
    store=None,
) -> Scene:
    """The capture at ``datadir``, its pictures ``factor`` times smaller.

    llffhold: every n-th view is for testing (0: the most central one); val is the same views.
    ndc: forward-facing rays. spherical: 360 degrees, camera centers scaled to a unit sphere.
    """
    poses, sizes, bounds = read_poses_bounds(datadir / "poses_bounds.npy")
    images, names = read_pictures(datadir, factor, len(poses), sizes[0, :2], warn, store)
    if len(images) != len(poses):
        raise ValueError(
            f"{datadir}: {len(images)} pictures but {len(poses)} poses in poses_bounds.npy; "
            "remove the pictures that were not registered, or make the poses again"
        )
    for name, pose in zip(names, poses, strict=True):  # before one bad pose spoils the average
        check_pose(pose, f"{datadir}/poses_bounds.npy: {name}")
    scale = 1.0 / (bounds.min() * BOUND_FACTOR)
    poses[:, :, 3] *= scale
    bounds = bounds * scale
    poses = recenter(poses)
    if spherical:
        poses, path, bounds = spherify(poses, bounds)
    else:
        path = spiral_path(poses, bounds.min(), bounds.max())
    numbers = np.arange(len(poses))
    if llffhold > 0:
        test = numbers[::llffhold]
    else:
        center = average_pose(poses)[:, 3]
        test = [int(np.argmin(((poses[:, :, 3] - center) ** 2).sum(-1)))]
    height, width = images.shape[1:3]
    # A pixel more or less comes from rounding when pictures are reduced.
    off = np.abs(sizes[:, 0] * width / sizes[:, 1] - height) > 1.0
    off &= np.abs(sizes[:, 1] * height / sizes[:, 0] - width) > 1.0
    if off.any():
        row = int(np.argmax(off))
        raise ValueError(
            f"{datadir}/poses_bounds.npy: row {row} is for pictures of {sizes[row, 1]:g}x"
            f"{sizes[row, 0]:g}, {names[row]} is {width}x{height}; expected the same proportions"
        )
    focal = sizes[:, 2] * width / sizes[:, 1]
    center = np.broadcast_to([0.5 * width, 0.5 * height], (len(poses), 2))
    intrinsics = np.concatenate([np.stack([focal, focal], -1), center], axis=-1)
    return Scene(
        images=as_tensor(images),
        stored=isinstance(images, np.memmap),
        c2w=torch.tensor(poses, dtype=torch.float32),
        intrinsics=torch.tensor(intrinsics, dtype=torch.float32),
        splits={
            "train": [int(i) for i in numbers if i not in test],
            "val": [int(i) for i in test],
            "test": [int(i) for i in test],
        },
        names=names,
        near=0.0 if ndc else float(bounds.min()) * 0.9,
        far=1.0 if ndc else float(bounds.max()),
        render_poses=torch.tensor(path, dtype=torch.float32),
        background=background,
        ndc=ndc,
    )


def read_poses_bounds(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c2w [V, 3, 4] in our axes, (height, width, focal) [V, 3], depth bounds [V, 2]."""
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; make it with LLFF's imgs2poses") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
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


def read_pictures(
    datadir, factor, count, full_size, warn, store=None
) -> tuple[np.ndarray, list[str]]:
    """uint8 [V, H, W, 3] at 1 / factor of their size, and their names.

    images_N/ is used when it holds ``count`` pictures of the size that ``full_size`` (height,
    width) of the pose file asks for. Otherwise pictures are made from images/ and cached there.
    """
    if factor < 1:
        raise ValueError(f"--factor {factor}; expected 1 (full size) or more")
    originals = datadir / "images"
    size = (full_size[1], full_size[0])  # a rotation in EXIF data may be in the poses, or not
    if factor == 1:
        files = _originals(originals)
        return read_images(files, size, store=store)[..., :3], [file.stem for file in files]
    cache, complaint = datadir / f"images_{factor}", None
    if cache.is_dir():
        files = list_images(cache)
        complaint = _unusable(files, count, full_size / factor)
        if not complaint:
            return read_images(files, size, store=store)[..., :3], [file.stem for file in files]
        if not originals.is_dir():
            raise ValueError(f"{cache}: {complaint}, and there is no images/ to make it from")
        warn(f"{cache} is ignored: {complaint}; delete it and it will be made again")
    if store is not None and store.kind == "mmap":
        raise ValueError(
            f"{cache}: not there yet, and --data_store mmap reads it; make it once with "
            "--data_store memory where memory is large enough, or use --factor 1"
        )
    files = _originals(originals)
    pictures = [_reduced(file, factor, size) for file in files]
    if len({picture.size for picture in pictures}) > 1:
        read_images(files, size)  # says which file differs
    if not complaint and len(files) == count:
        _write_cache(cache, files, pictures, warn)
    return np.stack([np.asarray(picture) for picture in pictures]), [file.stem for file in files]


def _originals(folder: Path) -> list[Path]:
    files = list_images(folder)
    if not files:
        raise ValueError(
            f"{folder}: holds no pictures; put the capture's {'/'.join(IMAGE_SUFFIXES)}"
        )
    return files


def _unusable(files: list[Path], count: int, expected_size: np.ndarray) -> str | None:
    if len(files) != count:
        return f"it holds {len(files)} pictures for {count} poses"
    height, width = read_image(files[0], tuple(expected_size[::-1])).shape[:2]
    if np.abs(np.array([height, width]) - expected_size).max() > 1.0:
        want = f"{expected_size[1]:g}x{expected_size[0]:g}"
        return f"its pictures are {width}x{height} where the poses expect {want}"
    return None


def _reduced(file: Path, factor: int, size: tuple[float, float]) -> Image.Image:
    picture = Image.fromarray(read_image(file, size)[..., :3])
    size = (round(picture.width / factor), round(picture.height / factor))
    if min(size) < 1:
        raise ValueError(f"{file}: {picture.width}x{picture.height} is too small for --factor")
    return picture.resize(size, Image.Resampling.BOX, reducing_gap=None)


def _write_cache(cache: Path, files, pictures, warn) -> None:
    """All pictures under a temporary name, then one rename: a cache is whole or not there."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{cache.name}.", dir=cache.parent))
    except OSError as error:
        warn(f"{cache} is not cached ({error.strerror}); pictures are reduced at every start")
        return
    try:
        for file, picture in zip(files, pictures, strict=True):
            picture.save(temporary / f"{file.stem}.png")
        os.chmod(temporary, 0o755)
        os.rename(temporary, cache)
    except OSError as error:
        if not cache.is_dir():  # another process may have been quicker
            warn(f"{cache} is not cached ({error.strerror})")
    finally:  # also when interrupted
        shutil.rmtree(temporary, ignore_errors=True)
