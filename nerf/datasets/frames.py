"""Read transforms*.json, whatever program wrote it: frames, poses, splits, cameras and masks.

NeRF synthetic, instant-ngp, nerfstudio, BlenderNeRF and others write the same kind of file with
different keys. This is the one reader for all of them. A key may stand at the top level or in a
frame. What a frame states replaces every spelling of that quantity at the top level: a frame's
camera_angle_x replaces the top level's fl_x, fl_y and camera_angle_y.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nerf.datasets import capture, pictures
from nerf.datasets.exporters import check_keys, name_unused
from nerf.datasets.frame_cameras import CENTER, LENS, SIZE, camera_of, table
from nerf.datasets.images import IMAGE_SUFFIXES, inside
from nerf.datasets.masks import find_masks
from nerf.datasets.scene import SPLITS
from nerf.training.plain_text import one_line

# The spellings of one quantity: if a frame has one of them, those at the top level do not count.
SPELLINGS = (
    ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y"),
    LENS,
    ("camera_model", "is_fisheye"),
)
NGP_KEYS = ("aabb_scale", "scale", "offset")
FEW = 0.1  # part of the pictures that may be of wrong proportions by mistake
Splits = dict[str, list[int]]
Warn = Callable[[str], object]


class Frames(NamedTuple):
    """What a transforms file holds."""

    content: dict[str, Any]  # the whole JSON object
    frames: list[dict[str, Any]]  # its "frames", perhaps only every n-th
    poses: list[np.ndarray]  # c2w [3, 4] of each frame


class Capture(NamedTuple):
    """The content of one or several transforms files."""

    top: dict[str, Any]  # top-level keys of the first file
    frames: list[dict[str, Any]]  # each with its file's top-level keys, and "where" for messages
    poses: np.ndarray  # c2w [V, 3, 4]
    splits: Splits | None  # None: the files name none


# ------------------------------------------------------------------------------------ the files


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_bytes())  # UTF-8, 16 or 32, with or without a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number of 5000 digits
        reason = str(error).split(";")[0]
        raise ValueError(f"{path}: is not valid JSON ({reason}); export it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _shown(frame: dict[str, Any]) -> str:
    """The file_path of a frame for a message: on one line, whatever it holds."""
    return one_line(frame["file_path"])


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
                f'{where} ({_shown(frame)}): "transform_matrix" is not a 4x4 table of numbers'
            )
        if len(matrix) == 4 and matrix[3, :3].any() and not matrix[:3, 3].any():
            raise ValueError(
                f'{where} ({_shown(frame)}): "transform_matrix" is transposed: the position stands '
                "in its last row; expected it in the last column"
            )
        poses.append(matrix[:3])
    return Frames(content, frames, poses)


def read_splits(datadir: Path, testskip: int) -> dict[str, Frames]:
    """Split name -> content of transforms_<split>.json in ``datadir``, for the files that exist.

    testskip: keep every n-th val and test view (0 or 1: all). Only the train file is required; a
    val or test file without frames counts as none.
    """
    found = {}
    for split in SPLITS:
        path = datadir / f"transforms_{split}.json"
        if path.exists() and (split == "train" or read_json(path).get("frames") != []):
            found[split] = read_frames(path, 1 if split == "train" else max(1, testskip))
    if "train" not in found:
        raise ValueError(
            f"{datadir}: has no transforms_train.json, which a Blender-format scene needs; check "
            "--datadir and --dataset_type"
        )
    return found


def read(datadir: Path, testskip: int, *, splits_first: bool = False) -> Capture:
    """transforms.json, or else the transforms files of the splits (see ``read_splits``).

    splits_first: the other way round, where both are there.
    """
    path = datadir / "transforms.json"
    if path.exists() and not (splits_first and (datadir / "transforms_train.json").exists()):
        top, frames, poses = read_frames(path, 1)
        merged = [
            {**joined(top, frame), "where": f"{path}: frame {index} ({_shown(frame)})"}
            for index, frame in enumerate(frames)
        ]
        return Capture(top, merged, np.stack(poses), _listed_splits(top, frames, str(path)))
    frames, poses, splits, top = [], [], {}, {}
    for split, (content, found, found_poses) in read_splits(datadir, testskip).items():
        splits[split] = list(range(len(frames), len(frames) + len(found)))
        where = f"{datadir}/transforms_{split}.json: frame"
        lens = top if not _has_focal(content) else {}  # a test file may leave the camera out
        frames += [
            {**joined({**lens, **content}, frame), "where": f"{where} {i} ({_shown(frame)})"}
            for i, frame in enumerate(found)
        ]
        poses += found_poses
        top = top or content
    return Capture(top, frames, np.stack(poses), splits)


def _has_focal(content: dict[str, Any]) -> bool:
    return any(key in content for key in SPELLINGS[0])


def joined(top: dict[str, Any], frame: dict[str, Any]) -> dict[str, Any]:
    """A frame with the top level's keys, without spellings of what the frame itself states.

    The top level's center, in pixels, is for the top level's size: for a frame of another size it
    is scaled along, as the focal lengths are, or the middle where the proportions differ.
    "own_camera" tells whether the frame has a focal length of its own.
    """
    shared = {key: value for key, value in top.items() if key != "frames"}
    shared["own_camera"] = any(key in frame for key in SPELLINGS[0])
    for spellings in SPELLINGS:
        if any(key in frame for key in spellings):
            shared = {key: value for key, value in shared.items() if key not in spellings}
    sizes = [[source.get(key) for key in SIZE] for source in (top, {**shared, **frame})]
    if sizes[0] != sizes[1] and any(key in top for key in SIZE):
        ratio = _common_ratio(*sizes)
        pixels = (*CENTER, "fl_x", "fl_y") if ratio else CENTER
        for key in pixels:
            if ratio and isinstance(shared.get(key), int | float):
                shared[key] = shared[key] * ratio
            else:
                shared.pop(key, None)
    return {**shared, **frame}


MOST_PIXELS = 10**6  # of a picture's side


def _common_ratio(old: list[Any], new: list[Any]) -> float | None:
    """new / old where (width, height) have the same proportions; None where they do not."""
    if not all(isinstance(side, int | float) and 0 < side < MOST_PIXELS for side in (*old, *new)):
        return None
    x, y = new[0] / old[0], new[1] / old[1]
    return x if abs(x / y - 1) < 0.01 else None


def _listed_splits(top: dict[str, Any], frames: list[dict[str, Any]], where: str) -> Splits | None:
    """Splits by the lists train_filenames, val_filenames and test_filenames; None without them."""
    given = {split: top.get(f"{split}_filenames") for split in SPLITS}
    if not any(given.values()):
        return None
    for frame in frames:  # a path out of the folder is reported as such, not as missing in a list
        inside(Path(where).parent, frame["file_path"], where)
    index_of = {_normalized(frame["file_path"]): index for index, frame in enumerate(frames)}
    splits: Splits = {}
    for split, names in given.items():
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{where}: "{split}_filenames" is not a list of file paths')
        unknown = [name for name in names if _normalized(name) not in index_of]
        if unknown:
            raise ValueError(
                f'{where}: "{split}_filenames" names {unknown[0]}, which no frame has; use the '
                '"file_path" of a frame'
            )
        splits[split] = [index_of[_normalized(name)] for name in names]
    return splits


def _normalized(file_path: str) -> str:
    """A path without extension, to compare frames and lists, either of which may omit it."""
    path = pictures.composed(os.path.normpath(file_path.replace("\\", "/")))
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in IMAGE_SUFFIXES else path


# ---------------------------------------------------------------------------------- cameras


def present(datadir: Path, found: Capture, warn: Warn) -> tuple[Capture, list[Path]]:
    """The capture without the frames whose picture is missing, and the pictures of the others.

    ``warn`` names them, and keys that are not used. ValueError where too few remain, see
    ``pictures.readable``.
    """
    check_keys(found.top, found.frames, str(datadir))
    name_unused(found.top, found.frames, str(datadir), warn)
    files = find_pictures(datadir, found.frames)
    kept = pictures.readable(files, found.splits, str(datadir), warn)
    return subset(found, kept), [files[index] for index in kept]


def subset(found: Capture, kept: list[int]) -> Capture:
    """The capture with only the frames of the numbers ``kept``."""
    if len(kept) == len(found.frames):
        return found
    splits = pictures.renumbered(found.splits, kept) if found.splits is not None else None
    return Capture(found.top, [found.frames[i] for i in kept], found.poses[kept], splits)


def views_of(datadir: Path, found: Capture, files: list[Path], warn: Warn) -> capture.Views:
    """Cameras and masks of the frames with pictures ``files``. ValueError names a wrong frame."""
    names = pictures.Names()
    named = [
        find_picture(datadir, frame["mask_path"], frame["where"], names)
        if frame.get("mask_path")
        else None
        for frame in found.frames
    ]
    cameras = [camera_of(frame, file) for frame, file in zip(found.frames, files, strict=True)]
    return capture.Views(
        files=files,
        names=[os.path.splitext(os.path.relpath(file, datadir))[0] for file in files],
        c2w=found.poses.copy(),
        intrinsics=np.array([row for row, _ in cameras]),
        sizes=np.array([size for _, size in cameras]),
        masks=find_masks(datadir, files, warn, named),
    )


def expected_sizes(
    found: Capture, views: capture.Views, sizes: list[list[tuple[int, int]]]
) -> np.ndarray:
    """[V, 2] height and width that each picture should have, at any scale.

    sizes: as ``images.picture_sizes`` of each picture. A frame that states no size of its own is
    for any picture; but if few pictures have other proportions than the others, these are wrong.
    """
    expected = views.sizes.copy()
    upright = [own[-1] for own in sizes]
    common = pictures.most_common(upright)
    odd = [
        index
        for index, (frame, size) in enumerate(zip(found.frames, upright, strict=True))
        if size != common and not frame["own_camera"] and not all(key in frame for key in SIZE)
    ]
    if len(odd) <= max(1, FEW * len(upright)):
        expected[odd] = common[::-1]
    return expected


def find_pictures(datadir: Path, frames: list[dict[str, Any]]) -> list[Path]:
    """``find_picture`` for the "file_path" of each frame."""
    names = pictures.Names()
    return [find_picture(datadir, frame["file_path"], frame["where"], names) for frame in frames]


def find_picture(
    datadir: Path, file_path: object, where: str, names: pictures.Names | None = None
) -> Path:
    """The file at ``file_path``, whose extension may be missing and slashes may be backward.

    Accents may be composed in the one and decomposed in the other, letters small in the one and
    capital in the other. names: shared by the calls for many files. ValueError, beginning with
    ``where``, if it is not a path inside ``datadir``.
    """
    if not isinstance(file_path, str):
        raise ValueError(f"{where}: {file_path!r} is not a file path")
    path = inside(datadir, file_path, where)
    endings = ("", *IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES))
    places = [path.with_name(path.name + ending) for ending in endings]
    exact = next((place for place in places if place.is_file()), None)
    if exact is not None:
        return exact
    names = names or pictures.Names()
    similar = (pictures.existing(place, names) for place in places)
    return next((place for place in similar if place.is_file()), path)
