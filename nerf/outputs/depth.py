"""Depth files of rendered views: their error against exact depth, and unit.json beside them."""

import json
from pathlib import Path

import numpy as np

from nerf.datasets.scene import Scene
from nerf.metrics import depth_error


def depth_errors(depth: np.ndarray, folder: Path | None, name: str) -> dict[str, float]:
    """``metrics.depth_error`` of a view's depth [H, W] against folder/NAME.npy, in its unit.

    Empty where that file is missing or of another size. ValueError where it cannot be read.
    """
    path = folder / f"{name}.npy" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        truth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: expected exact depth, a numpy array [H, W] ({error}); remove the file"
        ) from None
    return depth_error(depth, truth) if truth.shape == depth.shape else {}


def write_depth_unit(folder: Path, scene: Scene, metres_per_unit: float, *, values: bool) -> None:
    """Write unit.json beside depth files: the unit of their values and the range of their colors.

    metres_per_unit: length of a unit of the data's files; 0: not known, depth is in those units.
    values: whether there are .npy files beside the pictures.
    """
    scale = scene.file_units * (metres_per_unit or 1.0)
    content = {
        "depth": "z: along the camera's axis, not the distance to the camera",
        "unit": "meters"
        if metres_per_unit
        else "units of the data's files; their length in meters is not known",
        "metres_per_scene_unit": scale if metres_per_unit else None,
        "file_units_per_scene_unit": scene.file_units,
        "png": "color: bright is near, black is empty; linear in "
        + ("NDC depth" if scene.ndc else "1 / z" if scene.near > 0 else "z")
        + f" from {scene.near * (1 if scene.ndc else scale):g}"
        + f" to {scene.far * (1 if scene.ndc else scale):g}",
    }
    if values:
        content["npy"] = "float32 [height, width] in that unit, mean along the ray; 0: empty"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unit.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
