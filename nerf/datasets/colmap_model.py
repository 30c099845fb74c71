"""Read COLMAP's sparse models, text and binary: cameras, images and points3D.

The 2-D features of images are skipped, since a radiance field does not need them. Poses in the
files are world-to-camera: a unit quaternion (w x y z) and a translation, axes x right, y down,
z forward. (Formats: COLMAP's documentation, "Output Format".)
"""

import struct
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nerf.datasets.binary_values import BinaryValues
from nerf.lenses import COLMAP_MODELS

MODEL_NAMES = {number: name for name, (number, _) in COLMAP_MODELS.items()}
OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0])
MOST_PIXELS = 10**6  # of a picture's side
# A point in points3D.bin, before its track: number, place, color, error, length of the track.
POINT_HEAD = struct.Struct("<35sdQ")
POINT_ROW = np.dtype(
    [("number", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8")]
)


class Camera(NamedTuple):
    """Intrinsics of one or more images; ``params`` in COLMAP's order, in pixels."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]


class Model(NamedTuple):
    """A sparse reconstruction: V registered images, P points, T observations."""

    cameras: dict[int, Camera]
    names: list[str]  # V paths relative to the image folder
    camera_ids: list[int]  # V keys of ``cameras``
    c2w: np.ndarray  # [V, 3, 4], conventions of nerf.rays
    points: np.ndarray  # [P, 3]
    colors: np.ndarray  # [P, 3] uint8
    tracks: np.ndarray  # [T, 2] number of a point, number of an image in which it was found


class _Image(NamedTuple):
    """An entry of the images file."""

    number: int
    pose: np.ndarray  # [7] world-to-camera quaternion w x y z, translation
    camera_id: int
    name: str


class _Points(NamedTuple):
    """The points3D file."""

    xyz: np.ndarray  # [P, 3]
    rgb: np.ndarray  # [P, 3] uint8
    tracks: np.ndarray  # [T, 2] index of a point, the file's number of an image


def find_model(datadir: Path, warn: Callable[[str], object] | None = None) -> Path | None:
    """The folder of the sparse model in sparse/, colmap/sparse/ or ``datadir``; None without one.

    Of several models (0/, 1/, ...) it is the one with the most registered images; ``warn`` names
    the others.
    """
    for base in ("sparse", "colmap/sparse", "."):
        folder = datadir / base
        numbered = [path for path in folder.glob("*") if path.is_dir()] if base != "." else []
        found = [path for path in (folder, *sorted(numbered)) if _files(path, "cameras")]
        if len(found) > 1:
            counts = {path: _count_images(path) for path in found}
            best = max(found, key=lambda path: counts[path])
            others = [f"{path.name}/ ({counts[path]})" for path in found if path != best]
            if warn is not None:
                warn(
                    f"{len(found)} sparse models: {best} with {counts[best]} pictures is used, not "
                    f"{', '.join(others)}"
                )
            return best
        if found:
            return found[0]
    return None


def _count_images(folder: Path) -> int:
    """The number of registered images of a model; 0 if its file is missing or broken."""
    files = _files(folder, "images")
    try:
        if files and files[0].suffix == ".bin":
            with open(files[0], "rb") as file:
                return int(struct.unpack("<Q", file.read(8))[0])
        return (
            len(_text_images(files[0].read_text(encoding="utf-8-sig").split("\n"))) if files else 0
        )
    except (OSError, ValueError, struct.error):
        return 0


def _files(folder: Path, name: str) -> list[Path]:
    """The binary and the text file of one kind that exist, binary first."""
    paths = (folder / f"{name}.bin", folder / f"{name}.txt")
    return [path for path in paths if path.is_file()]


def read_model(folder: Path) -> Model:
    """The sparse model in ``folder``; binary files take precedence over text files.

    The points3D file may be missing. ValueError names the file and what is wrong with it.
    """
    parts: dict[str, Any] = {}
    for name in ("cameras", "images", "points3D"):
        files = _files(folder, name)
        if not files:
            if name != "points3D":
                raise ValueError(
                    f"{folder}: has no {name}.bin or {name}.txt; export the whole model again"
                )
            parts[name] = _points_of(np.zeros((0, 3)), np.zeros((0, 3), np.uint8), [], [])
            continue
        try:
            if files[0].suffix == ".bin":
                with open(files[0], "rb") as file:
                    parts[name] = READERS[name](BinaryValues(file))
            else:
                parts[name] = TEXT_READERS[name](
                    files[0].read_text(encoding="utf-8-sig").split("\n")
                )
        except (OSError, struct.error, ValueError, IndexError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"{files[0]}: is truncated or not a COLMAP file ({error}); export the model again"
            ) from None
    for number, camera in parts["cameras"].items():
        if not (0 < camera.width < MOST_PIXELS and 0 < camera.height < MOST_PIXELS):
            raise ValueError(
                f"{folder}: camera {number} has pictures of {_shown(camera.width)} x "
                f"{_shown(camera.height)} pixels; expected 1 to {MOST_PIXELS - 1}; export it again"
            )
    images = sorted(parts["images"], key=lambda image: image.name)
    return _joined(folder, parts["cameras"], images, parts["points3D"])


def _shown(number: int) -> str:
    """A number in a message: of many digits, how many."""
    return str(number) if abs(number) < 10**12 else "10^12 or more"


def _joined(
    folder: Path, cameras: dict[int, Camera], images: list[_Image], points: _Points
) -> Model:
    """The Model of the three files' contents. ValueError if they do not fit together."""
    if not images:
        raise ValueError(
            f"{folder}: no image is registered; the reconstruction failed, run it on other photos"
        )
    for image in images:
        if image.camera_id not in cameras:
            raise ValueError(
                f"{folder}: image {image.name} has camera {image.camera_id}, which the cameras "
                "file lacks; export the whole model again"
            )
    index = {image.number: view for view, image in enumerate(images)}
    numbers, place = np.unique(points.tracks[:, 1], return_inverse=True)
    views = np.array([index.get(number, -1) for number in numbers.tolist()], int)[place]
    return Model(
        cameras,
        names=[image.name for image in images],
        camera_ids=[image.camera_id for image in images],
        c2w=np.stack([_camera_to_world(i.pose, f"{folder}: {i.name}") for i in images]),
        points=points.xyz,
        colors=points.rgb,
        tracks=np.stack([points.tracks[:, 0], views], -1)[views >= 0],
    )


def _camera_to_world(pose: np.ndarray, where: str) -> np.ndarray:
    """A pose [7] (quaternion w x y z, translation) -> c2w [3, 4] in the axes of ``nerf.rays``."""
    w, x, y, z = pose[:4]
    length = np.linalg.norm(pose[:4])
    if not np.isfinite(pose).all() or length < 1e-6:
        raise ValueError(
            f"{where}: its pose is {pose.tolist()}; expected a quaternion and a translation"
        )
    w, x, y, z = (value / length for value in (w, x, y, z))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    position = -rotation.T @ np.array(pose[4:])
    return np.concatenate([rotation.T @ OPENCV_TO_OPENGL, position[:, None]], axis=1)


def _points_of(
    xyz: np.ndarray, rgb: np.ndarray, images: Sequence[int] | np.ndarray, lengths: Sequence[int]
) -> _Points:
    """The points [P, 3] with the images of all tracks, one after the other, and their lengths."""
    point = np.arange(len(xyz)).repeat(np.asarray(lengths, int))
    return _Points(xyz, rgb, np.stack([point, np.asarray(images, int)], -1))


def _check_camera_model(model: str, count: int) -> None:
    """ValueError unless COLMAP has the camera model, with ``count`` parameters."""
    if model not in COLMAP_MODELS:
        raise ValueError(f"camera model {model}; expected one of {', '.join(COLMAP_MODELS)}")
    if count != COLMAP_MODELS[model][1]:
        raise ValueError(f"{model} with {count} parameters; expected {COLMAP_MODELS[model][1]}")


# ------------------------------------------------------------------------------------- binary


def _read_cameras(data: BinaryValues) -> dict[int, Camera]:
    cameras = {}
    for _ in range(*data.take("Q")):
        number, model, width, height = data.take("iiQQ")
        if model not in MODEL_NAMES:
            raise ValueError(f"camera model number {model}; expected 0 to {max(MODEL_NAMES)}")
        name = MODEL_NAMES[model]
        cameras[number] = Camera(name, width, height, data.take(f"{COLMAP_MODELS[name][1]}d"))
    return cameras


def _read_images(data: BinaryValues) -> list[_Image]:
    images = []
    for _ in range(*data.take("Q")):
        number, *pose, camera = data.take("i7di")
        name = data.take_string()
        data.skip(24 * data.take("Q")[0])  # features: x, y, number of the point
        images.append(_Image(number, np.array(pose), camera, name))
    return images


def _read_points(data: BinaryValues) -> _Points:
    (count,) = data.take("Q")
    rows, position = memoryview(data.take_rest()), 0
    heads, tracks, lengths = [], [], array("q")
    for _ in range(count):
        (length,) = POINT_HEAD.unpack_from(rows, position)[2:]
        start, end = position + POINT_HEAD.size, position + POINT_HEAD.size + 8 * length
        if end > len(rows):
            raise struct.error(f"{end} bytes of points needed, the file has {len(rows)}")
        heads.append(rows[position:start])
        tracks.append(rows[start:end])  # pairs of an image and the number of its feature
        lengths.append(length)
        position = end
    found = np.frombuffer(b"".join(heads), POINT_ROW)
    images = np.frombuffer(b"".join(tracks), "<i4")[::2]
    return _points_of(found["xyz"].copy(), found["rgb"].copy(), images, lengths)


# --------------------------------------------------------------------------------------- text


def _without_comments(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


def _text_cameras(lines: list[str]) -> dict[int, Camera]:
    cameras = {}
    for line in _without_comments(lines):
        if line.strip():
            number, model, width, height, *params = line.split()
            _check_camera_model(model, len(params))
            values = tuple(float(word) for word in params)
            cameras[int(number)] = Camera(model, int(width), int(height), values)
    return cameras


def _text_images(lines: list[str]) -> list[_Image]:
    """The images; after each comes a line of features, which some programs leave out."""
    images = []
    features = False
    for line in _without_comments(lines):
        words = line.strip().split(maxsplit=9)
        if features and (not words or _is_number(line.split()[-1])):
            features = False
        elif words:
            number, *pose, camera, name = words
            if len(pose) != 7:
                raise ValueError(f"{line[:40]!r}; expected 10 entries: id, pose, camera, name")
            values = np.array([float(word) for word in pose])
            images.append(_Image(int(number), values, int(camera), name))
            features = True
    return images


def _is_number(word: str) -> bool:
    """Whether a line of features ends in ``word``; a line of an image ends in its name."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _text_points(lines: list[str]) -> _Points:
    xyz: list[list[float]] = []
    rgb: list[list[int]] = []
    images, lengths = array("q"), array("q")
    for line in _without_comments(lines):
        words = line.split()
        if words:
            xyz.append([float(word) for word in words[1:4]])
            rgb.append([int(word) for word in words[4:7]])
            track = [int(word) for word in words[8::2]]
            images.extend(track)
            lengths.append(len(track))
    colors = np.array(rgb, np.uint8).reshape(-1, 3)
    return _points_of(np.array(xyz, float).reshape(-1, 3), colors, images, lengths)


READERS = {"cameras": _read_cameras, "images": _read_images, "points3D": _read_points}
TEXT_READERS = {"cameras": _text_cameras, "images": _text_images, "points3D": _text_points}
