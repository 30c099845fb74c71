"""COLMAP captures: images/ and a sparse model, text or binary, in sparse/0 or thereabouts."""

from pathlib import Path

import numpy as np

from nerf import lenses
from nerf.datasets import capture
from nerf.datasets.colmap_model import Model, find_model, read_model
from nerf.datasets.images import IMAGE_SUFFIXES, inside
from nerf.datasets.scene import Scene, check_pose

PERCENTILES = (0.1, 99.9)  # of a view's depths, as LLFF takes them: single points may be wrong


def load(
    datadir: Path,
    *,
    factor: int,
    llffhold: int,
    ndc: bool,
    spherical: bool,
    near: float,
    far: float,
    background: float,
    warn=print,
    store=None,
) -> Scene:
    """The capture at ``datadir``, its pictures ``factor`` times smaller.

    Cameras that all look one way are laid out for normalized device coordinates if ``ndc``, others
    around what they look at. spherical: around in any case. near, far: in scene units, 0: from the
    points. llffhold: every n-th view by name is for validation and testing.
    """
    folder = find_model(datadir)
    if folder is None:
        raise ValueError(
            f"{datadir}: has no COLMAP model (cameras.bin or .txt in sparse/0); make one from the "
            f"photos with: python data/from_photos.py {datadir}/images --out data/mine"
        )
    model = read_model(folder)
    views = views_of(datadir, folder, model, factor, warn)
    for name, pose in zip(views.names, views.c2w, strict=True):  # before one spoils the average
        check_pose(pose, f"{folder}: {name}")
    bounds = depth_bounds(model)
    facing = bounds is not None and not spherical and capture.faces_forward(views.c2w)
    if facing and ndc:
        layout = capture.forward_facing(views.c2w, bounds)
        warn("all cameras look one way: normalized device coordinates (--no_ndc for the world's)")
    else:
        layout = capture.around(views.c2w)
    limits = (capture.NEAR, capture.FAR)
    if bounds is not None:
        limits = bounds[:, 0].min() * 0.9 / layout.scale, bounds[:, 1].max() / layout.scale
    limits = near or float(limits[0]), far or float(limits[1])
    splits = capture.hold_out(len(views.names), llffhold)
    # Pictures of images_N/ are that much smaller already.
    reduced = 1 if views.files[0].is_relative_to(datadir / f"images_{factor}") else factor
    return capture.scene_of(
        views, layout, splits, limits, factor=reduced, background=background, store=store
    )


def views_of(datadir: Path, folder: Path, model: Model, factor: int, warn) -> capture.Views:
    """The registered pictures. Others beside them are named and left out."""
    images = picture_folder(datadir, model.names, factor)
    files = [inside(images, name, f"{folder}: image name") for name in model.names]
    missing = [name for name, file in zip(model.names, files, strict=True) if not file.is_file()]
    if missing:
        raise ValueError(
            f"{images}: {len(missing)} of {len(files)} registered pictures are missing "
            f"({_some(missing)}); put them there under the names that COLMAP saw"
        )
    others = {
        str(path.relative_to(images))
        for path in images.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    } - set(model.names)
    if others:
        warn(
            f"{len(others)} of {len(files) + len(others)} pictures have no pose in {folder} and "
            f"are left out: {_some(sorted(others))}"
        )
    intrinsics = {}
    for number, camera in model.cameras.items():
        if number in set(model.camera_ids):
            try:
                intrinsics[number] = lenses.from_colmap(camera.model, list(camera.params))
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
            if camera.width < 1 or camera.height < 1:
                raise ValueError(f"{folder}: camera {number} is {camera.width}x{camera.height}")
    cameras = [model.cameras[number] for number in model.camera_ids]
    return capture.Views(
        files=files,
        names=[str(Path(name).with_suffix("")) for name in model.names],
        c2w=model.c2w,
        intrinsics=np.array([intrinsics[number] for number in model.camera_ids]),
        sizes=np.array([(camera.height, camera.width) for camera in cameras]),
        masks=[None] * len(files),
    )


def picture_folder(datadir: Path, names: list[str], factor: int) -> Path:
    """images_N/ if it holds every picture ``factor`` = N times smaller, else images/."""
    reduced = datadir / f"images_{factor}"
    if factor > 1 and all(inside(reduced, name, "image name").is_file() for name in names):
        return reduced
    images = datadir / "images"
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; expected the pictures that COLMAP saw")
    return images


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def depth_bounds(model: Model) -> np.ndarray | None:
    """Nearest and farthest depth [V, 2] of the points that each view shows; None without points.

    Views that show too few points have those of all.
    """
    if not len(model.tracks):
        return None
    point, view = model.tracks.T
    poses = model.c2w[view]
    depth = -((model.points[point] - poses[:, :, 3]) * poses[:, :, 2]).sum(-1)
    good = np.isfinite(depth) & (depth > 0)
    if not good.any():
        return None
    depth, view = depth[good], view[good]
    rows = []
    for number in range(len(model.c2w)):
        mine = depth[view == number]
        rows.append(np.percentile(mine if len(mine) >= 10 else depth, PERCENTILES))
    return np.array(rows)
