"""Write COLMAP's sparse models (``colmap_model.Model``) as text or binary files.

Formats: COLMAP's documentation, "Output Format".
"""

import struct
from pathlib import Path

import numpy as np
import torch

from nerf.datasets.colmap_model import OPENCV_TO_OPENGL, Model
from nerf.lenses import COLMAP_MODELS, from_colmap, project

FEATURE = np.dtype([("place", "<f8", 2), ("point", "<i8")])  # of an image, in images.bin


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """The unit quaternion w x y z [4], w >= 0, of a rotation [3, 3].

    It is the eigenvector of the largest eigenvalue of Bar-Itzhack's (2000) matrix.
    """
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
    """Write cameras, images and points3D into ``folder``, as text or binary files.

    For each observation in ``model.tracks`` the image gets a feature at the point's projection.
    """
    folder.mkdir(parents=True, exist_ok=True)
    poses: list[list[float]] = []
    for c2w in model.c2w:
        rotation = (c2w[:, :3] @ OPENCV_TO_OPENGL).T
        poses.append([*quaternion(rotation).tolist(), *(-rotation @ c2w[:, 3]).tolist()])
    point, view = model.tracks.T
    features = [  # by view [N, 3]: x, y, number of the point
        np.column_stack([_project(model, number, point[own]), point[own]])
        for number, own in enumerate(_by_group(view, len(poses)))
    ]
    pairs = np.stack([view + 1, _feature_numbers(model.tracks, len(poses))], -1)
    tracks = [pairs[own] for own in _by_group(point, len(model.points))]  # image id, feature
    (_write_text if text else _write_binary)(folder, model, poses, features, tracks)


def _by_group(groups: np.ndarray, count: int) -> list[np.ndarray]:
    """For each of ``count`` groups the indices of its rows in order; groups [N]: of each row."""
    ends = np.bincount(groups, minlength=count).cumsum()
    return np.split(np.argsort(groups, kind="stable"), ends[:-1])


def _feature_numbers(tracks: np.ndarray, count: int) -> np.ndarray:
    """The number [T] of each observation's feature in its image; of repeated ones the last."""
    numbers = np.empty(len(tracks), int)
    for own in _by_group(tracks[:, 1], count):
        last = dict(zip(tracks[own, 0].tolist(), range(len(own)), strict=True))
        numbers[own] = [last[point] for point in tracks[own, 0].tolist()]
    return numbers


def _project(model: Model, view: int, points: np.ndarray) -> np.ndarray:
    """Pixels [N, 2] at which points (numbers [N]) appear in a view."""
    camera, c2w = model.cameras[model.camera_ids[view]], model.c2w[view]
    row = torch.tensor(from_colmap(camera.model, list(camera.params)), dtype=torch.float64)
    local = (model.points[points] - c2w[:, 3]) @ c2w[:, :3] @ OPENCV_TO_OPENGL
    return (project(torch.from_numpy(local), row[4:]) * row[:2] + row[2:4]).numpy()


def _write_text(
    folder: Path,
    model: Model,
    poses: list[list[float]],
    features: list[np.ndarray],
    tracks: list[np.ndarray],
) -> None:
    def row(*values: object) -> str:
        return " ".join(str(value) for value in values) + "\n"

    with open(folder / "cameras.txt", "w") as file:
        file.write("# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n")
        for number, camera in model.cameras.items():
            file.write(row(number, *camera[:3], *camera.params))
    with open(folder / "images.txt", "w") as file:
        file.write("# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n# POINTS2D[]\n")
        for view, pose in enumerate(poses):
            file.write(row(view + 1, *pose, model.camera_ids[view], model.names[view]))
            file.write(row(*(f"{x} {y} {point:.0f}" for x, y, point in features[view].tolist())))
    with open(folder / "points3D.txt", "w") as file:
        file.write("# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]\n")
        for number, (xyz, rgb) in enumerate(zip(model.points, model.colors, strict=True)):
            track = tracks[number].ravel().tolist()
            file.write(row(number, *xyz.tolist(), *rgb.tolist(), 0.0, *track))


def _write_binary(
    folder: Path,
    model: Model,
    poses: list[list[float]],
    features: list[np.ndarray],
    tracks: list[np.ndarray],
) -> None:
    data = [struct.pack("<Q", len(model.cameras))]
    for number, (name, width, height, params) in model.cameras.items():
        data.append(struct.pack("<iiQQ", number, COLMAP_MODELS[name][0], width, height))
        data.append(struct.pack(f"<{len(params)}d", *params))
    (folder / "cameras.bin").write_bytes(b"".join(data))
    data = [struct.pack("<Q", len(poses))]
    for view, pose in enumerate(poses):
        data.append(struct.pack("<i7di", view + 1, *pose, model.camera_ids[view]))
        data.append(model.names[view].encode() + b"\0" + struct.pack("<Q", len(features[view])))
        own = np.empty(len(features[view]), FEATURE)
        own["place"], own["point"] = features[view][:, :2], features[view][:, 2]
        data.append(own.tobytes())
    (folder / "images.bin").write_bytes(b"".join(data))
    data = [struct.pack("<Q", len(model.points))]
    for number, (xyz, rgb) in enumerate(zip(model.points, model.colors, strict=True)):
        track = tracks[number]
        data.append(struct.pack("<Q3d3BdQ", number, *xyz, *rgb.tolist(), 0.0, len(track)))
        data.append(track.astype("<i4").tobytes())
    (folder / "points3D.bin").write_bytes(b"".join(data))
