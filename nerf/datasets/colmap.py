"""COLMAP captures: images/ and a sparse model, text or binary (``colmap_model.find_model``)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nerf import lenses
from nerf.datasets import capture
from nerf.datasets.colmap_model import Model, find_model, read_model
from nerf.datasets.images import IMAGE_SUFFIXES, inside
from nerf.datasets.scene import Scene, check_pose
from nerf.datasets.store import Store

PERCENTILES = (0.1, 99.9)  # of a view's depths, as in LLFF: single points may be wrong


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
    warn: Callable[[str], object] = print,
    store: Store | None = None,
) -> Scene:
    """The capture at ``datadir``, its pictures ``factor`` times smaller.

    ndc: use normalized device coordinates if all cameras look about the same way; otherwise the
    layout is ``capture.around``. spherical: always use ``capture.around``. near, far: in scene
    units; 0: from the depths of the points. llffhold: every n-th view by name is held out for val
    and test. background: gray level in [0, 1] behind transparent pixels. store: see
    ``images.read_images``.
    """
    folder = find_model(datadir)
    if folder is None:
        raise ValueError(
            f"{datadir}: has no COLMAP model (cameras.bin or .txt in sparse/0); create one with: "
            f"python data/from_photos.py {datadir}/images --out data/mine"
        )
    model = read_model(folder)
    views = views_of(datadir, folder, model, factor, warn)
    for name, pose in zip(views.names, views.c2w, strict=True):  # a bad one would spoil the layout
        check_pose(pose, f"{folder}: {name}")
    bounds = depth_bounds(model)
    if bounds is not None and ndc and not spherical and capture.faces_forward(views.c2w):
        layout = capture.forward_facing(views.c2w, bounds)
        warn("all cameras look the same way: using NDC (--no_ndc for world coordinates)")
    else:
        layout = capture.around(views.c2w)
    limits = capture.NEAR, capture.FAR
    if bounds is not None:
        limits = bounds[:, 0].min() * 0.9 / layout.scale, bounds[:, 1].max() / layout.scale
    limits = near or float(limits[0]), far or float(limits[1])
    splits = capture.hold_out(len(views.names), llffhold)
    # Pictures in images_N/ are N times smaller already.
    remaining = 1 if views.files[0].is_relative_to(datadir / f"images_{factor}") else factor
    return capture.scene_of(
        views, layout, splits, limits, factor=remaining, background=background, store=store
    )


def views_of(
    datadir: Path, folder: Path, model: Model, factor: int, warn: Callable[[str], object]
) -> capture.Views:
    """The registered pictures and their cameras; ``warn`` names pictures without a pose.

    folder: of the model, for messages. factor: see ``picture_folder``.
    """
    images = picture_folder(datadir, model.names, factor)
    files = [inside(images, name, f"{folder}: image name") for name in model.names]
    missing = [name for name, file in zip(model.names, files, strict=True) if not file.is_file()]
    if missing:
        raise ValueError(
            f"{images}: {len(missing)} of {len(files)} registered pictures are missing "
            f"({_some(missing)}); put them there under the names that COLMAP recorded"
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
    intrinsics: dict[int, list[float]] = {}
    for number, camera in model.cameras.items():
        if number in set(model.camera_ids):
            try:
                intrinsics[number] = lenses.from_colmap(camera.model, list(camera.params))
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
            if camera.width < 1 or camera.height < 1:
                raise ValueError(
                    f"{folder}: camera {number} is for pictures of {camera.width}x{camera.height}; "
                    "expected 1x1 or more"
                )
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
    """images_N/ with N = ``factor`` if it holds every picture, else images/."""
    reduced = datadir / f"images_{factor}"
    if factor > 1 and all(inside(reduced, name, "image name").is_file() for name in names):
        return reduced
    images = datadir / "images"
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; put the pictures given to COLMAP there")
    return images


def _some(names: list[str], count: int = 5) -> str:
    """The first names of a list, and how many more it has."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def depth_bounds(model: Model) -> np.ndarray | None:
    """Nearest and farthest depth [V, 2] of each view's points, in the model's units.

    A view with fewer than 10 points gets the bounds of all views' points. None without points.
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
        own = depth[view == number]
        rows.append(np.percentile(own if len(own) >= 10 else depth, PERCENTILES))
    return np.array(rows)
