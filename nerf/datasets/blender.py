"""Blender scenes (NeRF synthetic): transforms_{train,val,test}.json beside RGBA pictures."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nerf.cameras import orbit_path
from nerf.datasets.images import inside, read_images
from nerf.datasets.scene import SPLITS, Scene
from nerf.datasets.store import Store, as_tensor

NEAR, FAR = 2.0, 6.0  # the synthetic cameras stand 4 units from objects about 1.5 units in radius


class Frames(NamedTuple):
    """What a transforms file holds."""

    content: dict[str, Any]  # the whole JSON object
    frames: list[dict[str, Any]]  # its "frames", perhaps only every n-th
    poses: list[np.ndarray]  # c2w [3, 4] of each frame


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number of 5000 digits
        reason = str(error).split(";")[0]
        raise ValueError(f"{path}: is not valid JSON ({reason}); export it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def number(content: dict[str, Any], key: str, where: str) -> float:
    """content[key] as a finite float. ValueError begins with ``where``, names key and value."""
    if key not in content:
        raise ValueError(f'{where}: has no "{key}"; expected a number')
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError(f'{where}: "{key}" is {value!r}; expected a finite number')
    return float(value)


def table(rows: object) -> np.ndarray | None:
    """Nested lists of numbers as a float64 array; None if ``rows`` is anything else."""
    try:
        values = np.array(rows)
    except ValueError:  # rows of different lengths
        return None
    return values.astype(np.float64) if values.dtype.kind in "if" else None


def read_frames(path: Path, skip: int) -> Frames:
    """A transforms file with every ``skip``-th of its frames. ValueError if any is malformed."""
    content = read_json(path)
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f'{path}: "frames" is missing or empty; expected a list of views')
    frames, poses = frames[::skip], []
    for index, frame in enumerate(frames):
        where = f"{path}: frame {index * skip}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise ValueError(f'{where} has no "file_path"; expected the picture\'s path')
        matrix = table(frame.get("transform_matrix"))
        if matrix is None or matrix.shape not in ((3, 4), (4, 4)):
            raise ValueError(
                f'{where} ({frame["file_path"]}): "transform_matrix" is not a 4x4 table of numbers'
            )
        poses.append(matrix[:3])
    return Frames(content, frames, poses)


def read_splits(datadir: Path, testskip: int) -> dict[str, Frames]:
    """Split name -> content of transforms_<split>.json in ``datadir``, for the files that exist.

    testskip: keep every n-th val and test view (0 or 1: all). Only the train file is required.
    """
    found = {}
    for split in SPLITS:
        path = datadir / f"transforms_{split}.json"
        if path.exists():
            found[split] = read_frames(path, 1 if split == "train" else max(1, testskip))
    if "train" not in found:
        raise ValueError(
            f"{datadir}: has no transforms_train.json, which a Blender-format scene needs; check "
            "--datadir and --dataset_type"
        )
    return found


def load(
    datadir: Path,
    *,
    testskip: int,
    downscale: int,
    background: float,
    store: Store | None = None,
) -> Scene:
    """The scene at ``datadir``; its val and test splits may be missing.

    testskip: keep every n-th val and test view (0 or 1: all). downscale: make pictures this many
    times smaller by area averaging. background: gray level in [0, 1] behind transparent pixels.
    store: see ``read_images``.
    """
    splits = read_splits(datadir, testskip)
    angle = number(
        splits["train"].content, "camera_angle_x", str(datadir / "transforms_train.json")
    )
    if not 0 < angle < np.pi:
        raise ValueError(f"{datadir}: camera_angle_x is {angle:g}; expected radians in (0, pi)")
    files: list[Path] = []
    poses: list[np.ndarray] = []
    numbers: dict[str, list[int]] = {}
    for split, (content, frames, split_poses) in splits.items():
        own = content.get("camera_angle_x", angle)
        if not isinstance(own, int | float) or abs(own - angle) > 1e-4 * angle:
            raise ValueError(
                f"{datadir}/transforms_{split}.json: camera_angle_x is {own!r}, in the train file "
                f"{angle:g}; use --dataset_type transforms, which allows a camera per file"
            )
        numbers[split] = list(range(len(files), len(files) + len(frames)))
        files += [picture_path(datadir, frame["file_path"]) for frame in frames]
        poses += split_poses
    images = read_images(files, factor=downscale, store=store)
    focal = 0.5 * images.shape[2] / np.tan(0.5 * angle)
    intrinsics = torch.tensor([focal, focal, 0.5 * images.shape[2], 0.5 * images.shape[1]])
    return Scene(
        images=as_tensor(images),
        stored=isinstance(images, np.memmap),
        c2w=torch.tensor(np.stack(poses), dtype=torch.float32),
        intrinsics=intrinsics.float().repeat(len(files), 1),
        splits=numbers,
        names=[str(file.relative_to(datadir).with_suffix("")) for file in files],
        near=NEAR,
        far=FAR,
        render_poses=torch.tensor(orbit_path(), dtype=torch.float32),
        background=background,
    )


def picture_path(datadir: Path, file_path: str) -> Path:
    """The picture of a frame's "file_path"; without an extension it is a .png."""
    path = inside(datadir, file_path, f"{datadir}: file_path")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        path = path.with_name(path.name + ".png")
    return path
