"""LINEMOD scenes: Blender-style transforms files with an intrinsic matrix per frame and bounds."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nerf.cameras import orbit_path
from nerf.datasets import pictures
from nerf.datasets.frame_cameras import number, table
from nerf.datasets.frames import read_splits
from nerf.datasets.images import inside, picture_sizes, read_images
from nerf.datasets.masks import find_masks, refuse_with_store, usable_pixels
from nerf.datasets.scene import Scene
from nerf.datasets.store import Store, as_tensor
from nerf.datasets.stored_file import file_of


def load(
    datadir: Path,
    *,
    testskip: int,
    downscale: int,
    background: float,
    near: float = 0.0,
    far: float = 0.0,
    warn: Callable[[str], object] = print,
    store: Store | None = None,
) -> Scene:
    """The scene at ``datadir``; its pictures, named by absolute or relative paths, must lie in it.

    One intrinsic matrix is used for all views, as in nerf-pytorch: that of the last split's first
    frame. Unlike in nerf-pytorch it is scaled when pictures are reduced.
    testskip: keep every n-th val and test view (0 or 1: all). downscale: make pictures this many
    times smaller. near, far: in scene units; 0: from the file. background: gray level in [0, 1]
    behind transparent pixels. store: see ``read_images``.
    """
    splits = read_splits(datadir, testskip)
    files: list[Path] = []
    poses: list[np.ndarray] = []
    numbers: dict[str, list[int]] = {}
    names = pictures.Names()
    for split, (_, frames, split_poses) in splits.items():
        numbers[split] = list(range(len(files), len(files) + len(frames)))
        files += [_picture_path(datadir, frame["file_path"], names) for frame in frames]
        poses += split_poses
    last_split = list(splits)[-1]
    where = f"{datadir}/transforms_{last_split}.json"
    matrix = table(splits[last_split].frames[0].get("intrinsic_matrix"))
    if matrix is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise ValueError(f'{where}: frame 0 needs "intrinsic_matrix", a 3x3 table of numbers')
    bounded = [name for name in ("train", "test") if name in splits]
    stated = [
        [number(splits[name].content, key, f"{datadir}/transforms_{name}.json") for name in bounded]
        for key in ("near", "far")
    ]
    low, high = float(np.floor(min(stated[0]))), float(np.ceil(max(stated[1])))
    kept = pictures.readable(files, numbers, str(datadir), warn)
    sizes = [picture_sizes(files[view]) for view in kept]
    kept = [kept[i] for i in pictures.of_one_size([files[view] for view in kept], sizes, warn)]
    files, poses = [files[view] for view in kept], [poses[view] for view in kept]
    numbers = pictures.renumbered(numbers, kept)
    masks = find_masks(datadir, files, warn)
    images = read_images(files, factor=downscale, store=store)
    if isinstance(images, np.memmap):
        refuse_with_store(masks, datadir)
    intrinsics = np.array([matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]) / downscale
    return Scene(
        images=as_tensor(images),
        stored=file_of(images),
        c2w=torch.tensor(np.stack(poses), dtype=torch.float32),
        intrinsics=torch.tensor(intrinsics, dtype=torch.float32).repeat(len(files), 1),
        splits=numbers,
        names=[f"{file.parent.name}/{file.stem}" for file in files],
        near=near or low,
        far=far or high,
        render_poses=torch.tensor(orbit_path(), dtype=torch.float32),
        background=background,
        usable=usable_pixels(masks, *images.shape[1:3]),
        to_world=torch.eye(4, dtype=torch.float64),
    )


def _picture_path(datadir: Path, file_path: str, names: pictures.Names) -> Path:
    """The picture of a frame, inside ``datadir``.

    ``file_path`` is relative to the working directory, as in nerf-pytorch, or to ``datadir``.
    names: shared by all frames.
    """
    # Not Path.exists, which raises OSError for names that are too long.
    if not Path(file_path).is_absolute() and os.path.exists(file_path):
        file_path = str(Path(file_path).absolute())
    return pictures.existing(inside(datadir, file_path, f"{datadir}: file_path"), names)
