"""DeepVoxels scenes: {train,validation,test}/<shape>/{intrinsics.txt, pose/*.txt, rgb/*.png}.

Poses are camera-to-world in OpenCV axes (x right, y down, z forward). As in nerf-pytorch, the
picture's center is used as principal point.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nerf.datasets import pictures
from nerf.datasets.images import list_images, picture_sizes, read_images
from nerf.datasets.masks import find_masks, refuse_with_store, usable_pixels
from nerf.datasets.scene import Scene
from nerf.datasets.store import Store, as_tensor
from nerf.datasets.stored_file import file_of

FOLDERS = {"train": "train", "val": "validation", "test": "test"}
OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def load(
    datadir: Path,
    *,
    shape: str,
    testskip: int,
    background: float,
    near: float = 0.0,
    far: float = 0.0,
    factor: int = 1,
    warn: Callable[[str], object] = print,
    store: Store | None = None,
) -> Scene:
    """The object ``shape`` under ``datadir``; its validation and test splits may be missing.

    testskip: keep every n-th val and test view (0 or 1: all). near, far: in scene units; 0: one
    unit before and behind the origin, by the cameras' mean distance. factor: make pictures this
    many times smaller. background: gray level in [0, 1] behind transparent pixels. store: see
    ``read_images``.
    """
    if not (datadir / "train" / shape).is_dir():
        found = sorted(path.parent.name for path in datadir.glob("train/*/pose"))
        there = f"it holds {', '.join(found)}" if found else "expected train/<shape>/pose and rgb"
        raise ValueError(f"{datadir / 'train' / shape}: no such folder; {there} (--shape)")
    files: list[Path] = []
    poses: list[Path] = []
    numbers: dict[str, list[int]] = {}
    for split, folder in FOLDERS.items():
        base = datadir / folder / shape
        if split != "train" and not base.is_dir():
            continue
        pairs = _pairs(base, warn)[:: 1 if split == "train" else max(1, testskip)]
        numbers[split] = list(range(len(files), len(files) + len(pairs)))
        files += [picture for picture, _ in pairs]
        poses += [pose for _, pose in pairs]
    kept = pictures.readable(files, numbers, str(datadir), warn)
    sizes = [picture_sizes(files[view]) for view in kept]
    kept = [kept[i] for i in pictures.of_one_size([files[view] for view in kept], sizes, warn)]
    files, poses = [files[view] for view in kept], [poses[view] for view in kept]
    numbers = pictures.renumbered(numbers, kept)
    masks = find_masks(datadir, files, warn)
    images = read_images(files, factor=factor, store=store)
    if isinstance(images, np.memmap):
        refuse_with_store(masks, datadir)
    height, width = images.shape[1:3]
    focal = read_focal(datadir / "train" / shape / "intrinsics.txt", height)
    c2w = np.stack([read_pose(path) for path in poses])
    radius = float(np.linalg.norm(c2w[:, :, 3], axis=-1).mean())
    render = c2w[numbers["test"]] if "test" in numbers else c2w
    return Scene(
        images=as_tensor(images),
        stored=file_of(images),
        c2w=torch.tensor(c2w, dtype=torch.float32),
        intrinsics=torch.tensor([focal, focal, 0.5 * width, 0.5 * height]).repeat(len(files), 1),
        splits=numbers,
        names=[f"{file.parts[-4]}_{file.stem}" for file in files],
        near=near or max(0.0, radius - 1.0),
        far=far or radius + 1.0,
        render_poses=torch.tensor(render, dtype=torch.float32),
        background=background,
        usable=usable_pixels(masks, height, width),
        to_world=torch.eye(4, dtype=torch.float64),
    )


def _pairs(base: Path, warn: Callable[[str], object]) -> list[tuple[Path, Path]]:
    """The pictures and poses in rgb/ and pose/ of the same name, in the order of their names.

    A pose without a picture comes with the path of one that does not exist. ``warn`` names pictures
    without a pose. ValueError where there are no poses, or no picture has one.
    """
    found = {path.stem: path for path in list_images(base / "rgb")}
    poses = {path.stem: path for path in sorted((base / "pose").glob("*.txt"))}
    if not found.keys() & poses.keys():
        raise ValueError(
            f"{base}: {len(found)} pictures and {len(poses)} pose files, none of the same name; "
            "expected rgb/000000.png with pose/000000.txt"
        )
    alone = [path.name for stem, path in found.items() if stem not in poses]
    if alone:
        warn(
            f"{base}: {len(alone)} of {len(found)} pictures have no pose file and are left out: "
            f"{pictures.some(alone)}"
        )
    return [(found.get(stem, base / "rgb" / f"{stem}.png"), pose) for stem, pose in poses.items()]


def read_numbers(path: Path) -> list[list[float]]:
    """The numbers of a text file, by line. ValueError if it holds anything else."""
    try:
        return [
            [float(word) for word in line.split()]
            for line in path.read_text(encoding="utf-8-sig").splitlines()
        ]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as numbers ({error})") from None


def read_pose(path: Path) -> np.ndarray:
    """A pose file of 16 numbers -> c2w [3, 4] in the axes of ``nerf.rays``."""
    values = np.array([value for line in read_numbers(path) for value in line])
    if values.size != 16:
        raise ValueError(f"{path}: holds {values.size} numbers; expected a 4x4 matrix")
    return (values.reshape(4, 4) @ OPENCV_TO_OPENGL)[:3]


def read_focal(path: Path, height: int) -> float:
    """Focal length in pixels, for pictures of ``height`` pixels.

    The lines of the file: "f cx cy 0", grid center, near plane, scale, "height width".
    """
    lines = read_numbers(path)
    if len(lines) < 5 or len(lines[0]) < 3 or len(lines[4]) < 2:
        raise ValueError(f'{path}: expected five lines, "f cx cy" first and "height width" fifth')
    focal, file_height = lines[0][0], lines[4][0]
    if not (focal > 0 and file_height > 0):
        raise ValueError(f"{path}: focal length {focal:g}, height {file_height:g}; expected > 0")
    return focal * height / file_height
