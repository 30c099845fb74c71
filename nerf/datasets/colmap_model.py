"""COLMAP's sparse models, text and binary: cameras, images and points3D, read and written.

Only what a radiance field needs is kept: the 2-D features of images are skipped. Poses in the files
are world-to-camera, a unit quaternion (w x y z) and a translation, axes x right, y down, z forward.
(Formats: COLMAP's documentation, "Output Format".)
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nerf.lenses import COLMAP_MODELS, from_colmap, project

MODEL_NAMES = {number: name for name, (number, _) in COLMAP_MODELS.items()}
OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0])


class Camera(NamedTuple):
    """A lens on a sensor; params as COLMAP orders them, in pixels."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]


class Model(NamedTuple):
    """What COLMAP reconstructed. V registered images, P points, T observations."""

    cameras: dict[int, Camera]
    names: list[str]  # V, as COLMAP has them: paths below the image folder
    camera_ids: list[int]  # V
    c2w: np.ndarray  # [V, 3, 4], conventions of nerf.rays
    points: np.ndarray  # [P, 3]
    colors: np.ndarray  # [P, 3] uint8
    tracks: np.ndarray  # [T, 2] number of the point, number of the image that shows it


def find_model(datadir: Path) -> Path | None:
    """The folder of the sparse model that belongs to a data folder; None if there is none.

    Where COLMAP left several, the one with the largest file of images.
    """
    for base in ("sparse", "colmap/sparse", "."):
        folder = datadir / base
        numbered = [path for path in folder.glob("*") if path.is_dir()] if base != "." else []
        found = [path for path in (folder, *sorted(numbered)) if _files(path, "cameras")]
        if found:
            return max(
                found, key=lambda path: sum(f.stat().st_size for f in _files(path, "images"))
            )
    return None


def _files(folder: Path, name: str) -> list[Path]:
    paths = (folder / f"{name}.bin", folder / f"{name}.txt")
    return [path for path in paths if path.is_file()]


def read_model(folder: Path) -> Model:
    """The sparse model in ``folder``; of both kinds of files the binary ones count.

    Points may be missing. ValueError names the file and what is wrong with it.
    """
    parts = {}
    for name in ("cameras", "images", "points3D"):
        files = _files(folder, name)
        if not files:
            if name != "points3D":
                raise ValueError(
                    f"{folder}: has no {name}.bin or {name}.txt; is the model complete?"
                )
            parts[name] = _no_points()
            continue
        try:
            if files[0].suffix == ".bin":
                parts[name] = READERS[name](_Bytes(files[0].read_bytes()))
            else:
                parts[name] = TEXT_READERS[name](files[0].read_text(encoding="utf-8").split("\n"))
        except (OSError, UnicodeDecodeError, struct.error, ValueError, IndexError) as error:
            raise ValueError(
                f"{files[0]}: is truncated or no COLMAP file ({error}); export the model again"
            ) from None
    cameras, images, points = parts["cameras"], parts["images"], parts["points3D"]
    return _joined(folder, cameras, sorted(images, key=lambda image: image[3]), points)


def _joined(folder: Path, cameras, images, points) -> Model:
    if not images:
        raise ValueError(f"{folder}: no image is registered; the reconstruction failed")
    names = [image[3] for image in images]
    for _, _, camera, name in images:
        if camera not in cameras:
            raise ValueError(f"{folder}: image {name} has camera {camera}, which is not there")
    place = {image[0]: number for number, image in enumerate(images)}
    xyz, rgb, tracks = points
    kept = np.array([(point, place[image]) for point, image in tracks if image in place], int)
    poses = np.stack([_camera_to_world(pose, f"{folder}: {name}") for _, pose, _, name in images])
    return Model(
        cameras, names, [image[2] for image in images], poses, xyz, rgb, kept.reshape(-1, 2)
    )


def _camera_to_world(pose, where: str) -> np.ndarray:
    """w x y z, translation -> c2w [3, 4] in our axes."""
    w, x, y, z = pose[:4]
    length = np.linalg.norm(pose[:4])
    if not np.isfinite(pose).all() or length < 1e-6:
        raise ValueError(f"{where}: its pose is {list(pose)}; expected a quaternion and a place")
    w, x, y, z = (value / length for value in (w, x, y, z))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    place = -rotation.T @ np.array(pose[4:])
    return np.concatenate([rotation.T @ OPENCV_TO_OPENGL, place[:, None]], axis=1)


def _no_points():
    return np.zeros((0, 3)), np.zeros((0, 3), np.uint8), []


def _known(model: str, count: int) -> None:
    if model not in COLMAP_MODELS:
        raise ValueError(f"camera model {model}; known are {', '.join(COLMAP_MODELS)}")
    if count != COLMAP_MODELS[model][1]:
        raise ValueError(f"{model} with {count} parameters; it has {COLMAP_MODELS[model][1]}")


# ------------------------------------------------------------------------------------- binary


class _Bytes:
    """Little-endian values, read one after the other; struct.error at the end of the file."""

    def __init__(self, content: bytes):
        self.content, self.position = content, 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.content, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def skip(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.content):
            raise struct.error(f"{self.position} bytes wanted, it has {len(self.content)}")
        return self.content[start : self.position]

    def word(self) -> str:
        end = self.content.index(b"\0", self.position)
        return self.skip(end - self.position + 1)[:-1].decode("utf-8")


def _read_cameras(data: _Bytes) -> dict[int, Camera]:
    cameras = {}
    for _ in range(*data.take("Q")):
        number, model, width, height = data.take("iiQQ")
        if model not in MODEL_NAMES:
            raise ValueError(f"camera model number {model}; known are 0 to {max(MODEL_NAMES)}")
        name = MODEL_NAMES[model]
        cameras[number] = Camera(name, width, height, data.take(f"{COLMAP_MODELS[name][1]}d"))
    return cameras


def _read_images(data: _Bytes) -> list[tuple]:
    images = []
    for _ in range(*data.take("Q")):
        number, *pose, camera = data.take("i7di")
        name = data.word()
        data.skip(24 * data.take("Q")[0])  # x, y, number of the point
        images.append((number, np.array(pose), camera, name))
    return images


def _read_points(data: _Bytes):
    xyz, rgb, tracks = [], [], []
    for number in range(*data.take("Q")):
        values = data.take("Q3d3BdQ")
        xyz.append(values[1:4])
        rgb.append(values[4:7])
        track = np.frombuffer(data.skip(8 * values[8]), "<i4")[::2]
        tracks += [(number, image) for image in track.tolist()]
    if not xyz:
        return _no_points()
    return np.array(xyz), np.array(rgb, np.uint8), tracks


# --------------------------------------------------------------------------------------- text


def _content(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


def _text_cameras(lines: list[str]) -> dict[int, Camera]:
    cameras = {}
    for line in _content(lines):
        if line.strip():
            number, model, width, height, *params = line.split()
            _known(model, len(params))
            values = tuple(float(word) for word in params)
            cameras[int(number)] = Camera(model, int(width), int(height), values)
    return cameras


def _text_images(lines: list[str]) -> list[tuple]:
    lines = _content(lines)
    while lines and not lines[0].strip():
        lines.pop(0)
    images = []
    for line in lines[::2]:  # every second line lists features, and may be empty
        if line.strip():
            number, *pose, camera, name = line.strip().split(maxsplit=9)
            if len(pose) != 7:
                raise ValueError(f"{line[:40]!r}; expected 10 entries: id, pose, camera, name")
            values = np.array([float(word) for word in pose])
            images.append((int(number), values, int(camera), name))
    return images


def _text_points(lines: list[str]):
    xyz, rgb, tracks = [], [], []
    for line in _content(lines):
        words = line.split()
        if words:
            tracks += [(len(xyz), int(word)) for word in words[8::2]]
            xyz.append([float(word) for word in words[1:4]])
            rgb.append([int(word) for word in words[4:7]])
    if not xyz:
        return _no_points()
    return np.array(xyz), np.array(rgb, np.uint8), tracks


READERS = {"cameras": _read_cameras, "images": _read_images, "points3D": _read_points}
TEXT_READERS = {"cameras": _text_cameras, "images": _text_images, "points3D": _text_points}


# -------------------------------------------------------------------------------------- write


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """w x y z [4] of a rotation [3, 3], w >= 0: the eigenvector that Bar-Itzhack (2000) names."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    table = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, yy - xx - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, zz - xx - yy],
        ]
    )
    found = np.linalg.eigh(table)[1][:, -1]
    return found if found[0] >= 0 else -found


def write_model(folder: Path, model: Model, text: bool = False) -> None:
    """Write cameras, images and points3D; images have an exact feature for each point they show."""
    folder.mkdir(parents=True, exist_ok=True)
    poses = []
    for c2w in model.c2w:
        rotation = (c2w[:, :3] @ OPENCV_TO_OPENGL).T
        poses.append([*quaternion(rotation).tolist(), *(-rotation @ c2w[:, 3]).tolist()])
    seen = []  # [N, 3] by view: x, y, number of the point
    for view in range(len(poses)):
        points = model.tracks[model.tracks[:, 1] == view, 0]
        seen.append(np.column_stack([_features(model, view, points), points]))
    place = {(int(p), v): i for v, rows in enumerate(seen) for i, p in enumerate(rows[:, 2])}
    tracks: list[list[tuple[int, int]]] = [[] for _ in model.points]
    for point, view in model.tracks.tolist():
        tracks[point].append((view + 1, place[point, view]))
    (_write_text if text else _write_binary)(folder, model, poses, seen, tracks)


def _features(model: Model, view: int, points: np.ndarray) -> np.ndarray:
    """Where points (numbers [N]) appear in a picture: [N, 2] pixels."""
    camera, c2w = model.cameras[model.camera_ids[view]], model.c2w[view]
    row = torch.tensor(from_colmap(camera.model, list(camera.params)), dtype=torch.float64)
    local = (model.points[points] - c2w[:, 3]) @ c2w[:, :3] @ OPENCV_TO_OPENGL
    return (project(torch.from_numpy(local), row[4:]) * row[:2] + row[2:4]).numpy()


def _write_text(folder: Path, model: Model, poses, seen, tracks) -> None:
    def row(*values) -> str:
        return " ".join(str(value) for value in values) + "\n"

    with open(folder / "cameras.txt", "w") as file:
        file.write("# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n")
        for number, camera in model.cameras.items():
            file.write(row(number, *camera[:3], *camera.params))
    with open(folder / "images.txt", "w") as file:
        file.write("# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n# POINTS2D[]\n")
        for view, pose in enumerate(poses):
            file.write(row(view + 1, *pose, model.camera_ids[view], model.names[view]))
            file.write(row(*(f"{x} {y} {point:.0f}" for x, y, point in seen[view].tolist())))
    with open(folder / "points3D.txt", "w") as file:
        file.write("# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]\n")
        for number, (xyz, rgb) in enumerate(zip(model.points, model.colors, strict=True)):
            track = (value for pair in tracks[number] for value in pair)
            file.write(row(number, *xyz.tolist(), *rgb.tolist(), 0.0, *track))


def _write_binary(folder: Path, model: Model, poses, seen, tracks) -> None:
    data = [struct.pack("<Q", len(model.cameras))]
    for number, (name, width, height, params) in model.cameras.items():
        data.append(struct.pack("<iiQQ", number, COLMAP_MODELS[name][0], width, height))
        data.append(struct.pack(f"<{len(params)}d", *params))
    (folder / "cameras.bin").write_bytes(b"".join(data))
    data = [struct.pack("<Q", len(poses))]
    for view, pose in enumerate(poses):
        data.append(struct.pack("<i7di", view + 1, *pose, model.camera_ids[view]))
        data.append(model.names[view].encode() + b"\0" + struct.pack("<Q", len(seen[view])))
        data += [struct.pack("<2dq", x, y, int(point)) for x, y, point in seen[view].tolist()]
    (folder / "images.bin").write_bytes(b"".join(data))
    data = [struct.pack("<Q", len(model.points))]
    for number, (xyz, rgb) in enumerate(zip(model.points, model.colors, strict=True)):
        track = tracks[number]
        data.append(struct.pack("<Q3d3BdQ", number, *xyz, *rgb.tolist(), 0.0, len(track)))
        data += [struct.pack("<2i", *pair) for pair in track]
    (folder / "points3D.bin").write_bytes(b"".join(data))
