"""Write COLMAP's sparse models (``colmap_model.Model``) as text or binary files.

Formats: COLMAP's documentation, "Output Format".
"""

import struct
from pathlib import Path

import numpy as np
import torch

from nerf.datasets.colmap_model import OPENCV_TO_OPENGL, Model
from nerf.lenses import COLMAP_MODELS, from_colmap, project


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
    features: list[np.ndarray] = []  # by view [N, 3]: x, y, number of the point
    for view in range(len(poses)):
        points = model.tracks[model.tracks[:, 1] == view, 0]
        features.append(np.column_stack([_project(model, view, points), points]))
    row_of = {(int(p), v): i for v, rows in enumerate(features) for i, p in enumerate(rows[:, 2])}
    tracks: list[list[tuple[int, int]]] = [[] for _ in model.points]  # (image id, feature) pairs
    for point, view in model.tracks.tolist():
        tracks[point].append((view + 1, row_of[point, view]))
    (_write_text if text else _write_binary)(folder, model, poses, features, tracks)


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
    tracks: list[list[tuple[int, int]]],
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
            track = (value for pair in tracks[number] for value in pair)
            file.write(row(number, *xyz.tolist(), *rgb.tolist(), 0.0, *track))


def _write_binary(
    folder: Path,
    model: Model,
    poses: list[list[float]],
    features: list[np.ndarray],
    tracks: list[list[tuple[int, int]]],
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
        data += [struct.pack("<2dq", x, y, int(point)) for x, y, point in features[view].tolist()]
    (folder / "images.bin").write_bytes(b"".join(data))
    data = [struct.pack("<Q", len(model.points))]
    for number, (xyz, rgb) in enumerate(zip(model.points, model.colors, strict=True)):
        track = tracks[number]
        data.append(struct.pack("<Q3d3BdQ", number, *xyz, *rgb.tolist(), 0.0, len(track)))
        data += [struct.pack("<2i", *pair) for pair in track]
    (folder / "points3D.bin").write_bytes(b"".join(data))
