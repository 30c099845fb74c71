"""Point clouds: normals and outliers by the nearest neighbors, and a .ply file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nerf.outputs.mesh import write_export

NEIGHBORS = 16  # of a point, for its normal and for outlier removal
OUTLIER_DEVIATIONS = 2.0  # standard deviations above the mean distance to neighbors
CHUNK = 1 << 14  # points whose normals are computed together


class PointCloud(NamedTuple):
    """Points of a surface with normals and colors."""

    points: np.ndarray  # [N, 3]
    normals: np.ndarray  # [N, 3] unit, towards the camera of each point's pixel
    rgb: np.ndarray  # [N, 3] uint8, sRGB


def estimate_normals(points: np.ndarray, cameras: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [N, 3] towards ``cameras`` [N, 3], and which points are no outliers, bool [N].

    A normal is that of the plane through a point's nearest neighbors, by principal components. An
    outlier is OUTLIER_DEVIATIONS farther from its neighbors than the mean point (Rusu et al. 2008).
    ValueError if scipy is not installed.
    """
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise ValueError(
            f"a point cloud needs another package ({error}): pip install scipy"
        ) from error
    distance, near = cKDTree(points).query(points, NEIGHBORS)
    mean = distance[:, 1:].mean(1)
    kept = mean <= mean.mean() + OUTLIER_DEVIATIONS * mean.std()
    normals = np.empty_like(points)
    for start in range(0, len(points), CHUNK):
        part = slice(start, start + CHUNK)
        around = points[near[part]]
        around = around - around.mean(1, keepdims=True)
        _, axes = np.linalg.eigh(around.transpose(0, 2, 1) @ around)
        normals[part] = axes[:, :, 0]  # the direction of least spread
    facing = (normals * (cameras - points)).sum(1)
    return normals * np.where(facing < 0, -1.0, 1.0)[:, None], kept


def write_points(path: Path, cloud: PointCloud) -> None:
    """Write a binary .ply file: x y z, nx ny nz as float32, red green blue as uint8."""
    names = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    names += [(name, "u1") for name in ("red", "green", "blue")]
    rows = np.empty(len(cloud.points), dtype=names)
    columns = np.concatenate([cloud.points, cloud.normals, cloud.rgb], axis=1).T
    for (name, _), column in zip(names, columns, strict=True):
        rows[name] = column
    kinds = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property {kinds[kind]} {name}" for name, kind in names] + ["end_header", ""]
    write_export(path, "\n".join(header).encode() + rows.tobytes())
