"""Which scene a run was trained on: a fingerprint in its checkpoints, compared when it is resumed.

It holds what the training views are, not where their files lie: poses, focal lengths relative to
the picture size, picture names and mean colors. So a moved or renamed folder, another resolution
or fewer test views are the same scene; other pictures, poses or training views are another one.
"""

import hashlib
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from nerf.datasets.scene import Scene

MAX_COLORS = 16  # training views whose mean color is compared, evenly taken
STRIP = 1 << 22  # pixels that are converted to floats together: 48 MiB
POSE_TOLERANCE = 1e-3  # of the cameras' extent; machines and versions differ by rounding
FOCAL_TOLERANCE = 5e-3  # of the focal length: pictures reduced to whole pixels differ by some
COLOR_TOLERANCE = 0.03  # in [0, 1]: another resolution changes a mean color by less


def scene_identity(scene: Scene) -> dict[str, Any]:
    """The fingerprint of a scene, for a checkpoint: poses [V, 3, 4], focal [V], colors [N, 3].

    V training views, in order. names: a hash of their names without folder and ending.
    """
    views = scene.splits["train"]
    some = views[:: max(1, -(-len(views) // MAX_COLORS))]
    names = "\n".join(PurePath(scene.names[view]).stem for view in views)
    widths = torch.tensor([scene.view_size(view)[1] for view in views], dtype=torch.float32)
    return {
        "poses": scene.c2w[views].float().cpu().clone(),
        "focal": scene.intrinsics[views, 0].float().cpu() / widths,
        "colors": torch.stack([_mean_color(scene, view) for view in some]),
        "names": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def _mean_color(scene: Scene, view: int) -> Tensor:
    """Mean color [3] of a view in [0, 1]; of a large one, by strips: as floats it may not fit."""
    height, width = scene.view_size(view)
    strip = max(1, STRIP // width)
    if height <= strip:
        return scene.picture(view).mean((0, 1))
    starts = range(0, height, strip)
    sums = [scene.picture(view, slice(y, y + strip)).sum((0, 1)).double() for y in starts]
    return (torch.stack(sums).sum(0) / (height * width)).float()


def scene_difference(saved: dict[str, Any] | None, scene: Scene) -> str:
    """What differs between ``saved``, a checkpoint's fingerprint, and ``scene``; "" for nothing.

    Names alone do not make another scene: pictures may have been converted.
    """
    if not saved:  # nerf-pytorch's checkpoints and those of our first release have none
        return ""
    own = scene_identity(scene)
    extent = float(own["poses"][:, :, 3].std(0).norm()) if len(own["poses"]) > 1 else 1.0
    same = saved["poses"].shape == own["poses"].shape
    if not (same and _agree(saved["poses"], own["poses"], extent)) and _are_among(
        saved["poses"], scene.c2w.float().cpu(), extent
    ):
        return (
            f"another split of the same views, {len(saved['poses'])} training views -> "
            f"{len(own['poses'])} (--llffhold, the files' lists of splits, or pictures left out)"
        )
    if not same:
        fewer = _are_among(own["poses"], saved["poses"], extent)
        why = " (pictures were removed, or cannot be read any more)" * fewer
        return f"{len(saved['poses'])} training views -> {len(own['poses'])}{why}"
    if _largest(saved["poses"][:, :, 3], own["poses"][:, :, 3]) > POSE_TOLERANCE * max(
        extent, 1e-6
    ):
        return "other camera positions"
    if _largest(saved["poses"][:, :, :3], own["poses"][:, :, :3]) > POSE_TOLERANCE:
        return "other camera directions"
    if _largest(saved["focal"] / own["focal"], torch.ones(len(own["focal"]))) > FOCAL_TOLERANCE:
        return "other focal lengths"
    if _largest(saved["colors"], own["colors"]) > COLOR_TOLERANCE:
        return "other pictures"
    return ""


def own_test_views(scene: Scene, flags: dict[str, Any]) -> dict[str, Any]:
    """The test views of a run's own evaluation: poses [T, 3, 4], and the flags that chose them."""
    poses = scene.c2w[scene.splits.get("test") or []].float().cpu().clone()
    return {"poses": poses, "flags": flags}


def same_test_views(saved: dict[str, Any], scene: Scene) -> bool:
    """Whether ``scene`` has the test views of ``saved``, a ``own_test_views``."""
    own = own_test_views(scene, {})["poses"]
    if saved["poses"].shape != own.shape:
        return False
    extent = float(own[:, :, 3].std(0).norm()) if len(own) > 1 else 1.0
    return not len(own) or _agree(saved["poses"], own, extent)


def _agree(first: Tensor, second: Tensor, extent: float) -> bool:
    """Whether cameras [..., 3, 4] are equal but for rounding; extent: of their positions."""
    difference = (first - second).abs()
    places = float(difference[..., 3].max()) <= POSE_TOLERANCE * max(extent, 1e-6)
    return places and float(difference[..., :3].max()) <= POSE_TOLERANCE


def _are_among(poses: Tensor, every: Tensor, extent: float) -> bool:
    """Whether each of the cameras [V, 3, 4] is one of ``every`` [N, 3, 4], but for rounding."""
    nearest = [int((every - pose).abs().amax((1, 2)).argmin()) for pose in poses]
    return _agree(poses, every[nearest], extent)


def _largest(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())
