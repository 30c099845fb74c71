"""COLMAP captures: images/ and a sparse model, text or binary (``colmap_model.find_model``)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nerf import lenses
from nerf.datasets import capture, pictures
from nerf.datasets.caches import other_factors, why_stale
from nerf.datasets.colmap_model import Model, find_model, read_model
from nerf.datasets.images import inside, list_images, picture_sizes, why_unreadable
from nerf.datasets.masks import find_masks
from nerf.datasets.scene import Scene, check_pose
from nerf.datasets.store import Store
from nerf.datasets.wrong_folder import from_photos

CHUNK = 1 << 16  # observations whose depths are computed together
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
    folder = find_model(datadir, warn)
    if folder is None:
        raise ValueError(
            f"{datadir}: has no COLMAP model (cameras.bin or .txt in sparse/0); create one with: "
            f"{from_photos(datadir / 'images')}"
        )
    model = read_model(folder)
    views, kept = registered(datadir, folder, model, factor, warn)
    model = _subset(model, kept)
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
    """The registered pictures with their cameras; the arguments are those of ``registered``."""
    return registered(datadir, folder, model, factor, warn)[0]


def registered(
    datadir: Path, folder: Path, model: Model, factor: int, warn: Callable[[str], object]
) -> tuple[capture.Views, list[int]]:
    """The registered pictures with their cameras, and their numbers in the model.

    ``warn`` names pictures without a pose, and those that are missing or do not fit their cameras.
    folder: of the model, for messages. factor: see ``picture_folder``.
    """
    images = picture_folder(datadir, model.names, factor, warn)
    names = pictures.Names()
    files = [
        pictures.existing(inside(images, name, f"{folder}: image name"), names)
        for name in model.names
    ]
    if not any(file.is_file() for file in files):  # names may begin with the folder's own
        whole = [inside(datadir, name, f"{folder}: image name") for name in model.names]
        files = whole if any(file.is_file() for file in whole) else files
    others = _unregistered(images, files)
    if others:
        warn(
            f"{len(others)} of {len(files) + len(others)} pictures have no pose in {folder} and "
            f"are left out: {pictures.some(others)}"
        )
    kept = pictures.readable(files, None, str(images), warn, "registered pictures")
    model, files = _subset(model, kept), [files[view] for view in kept]
    intrinsics: dict[int, list[float]] = {}
    used = set(model.camera_ids)
    for number, camera in model.cameras.items():
        if number in used:
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
    views = capture.Views(
        files=files,
        names=[str(Path(name).with_suffix("")) for name in model.names],
        c2w=model.c2w,
        intrinsics=np.array([intrinsics[number] for number in model.camera_ids]),
        sizes=np.array([(camera.height, camera.width) for camera in cameras]),
        masks=find_masks(datadir, files, warn),
    )
    found = [picture_sizes(file) for file in files]
    fitting = pictures.of_their_cameras(files, views.sizes, found, warn)
    return views.subset(fitting), [kept[view] for view in fitting]


def _unregistered(images: Path, files: list[Path]) -> list[str]:
    """The pictures below ``images`` that are not among ``files``, by name."""
    folders = [images, *(path for path in images.rglob("*") if path.is_dir())]
    found = {path for folder in folders for path in list_images(folder)}
    return sorted(str(path.relative_to(images)) for path in found - set(files))


def _subset(model: Model, kept: list[int]) -> Model:
    """The model with only the images of the numbers ``kept``; the points stay."""
    if len(kept) == len(model.names):
        return model
    place = np.full(len(model.names), -1)
    place[kept] = np.arange(len(kept))
    point, view = model.tracks.T
    tracks = np.stack([point, place[view]], -1)[place[view] >= 0]
    return model._replace(
        names=[model.names[view] for view in kept],
        camera_ids=[model.camera_ids[view] for view in kept],
        c2w=model.c2w[kept],
        tracks=tracks,
    )


def picture_folder(
    datadir: Path, names: list[str], factor: int, warn: Callable[[str], object]
) -> Path:
    """images_N/ with N = ``factor`` if it holds every registered picture, else images/.

    Without images/, an incomplete images_N/ will do.
    """
    images, reduced = pictures.existing(datadir / "images"), datadir / f"images_{factor}"
    if factor > 1:
        there = pictures.Names()
        small = [pictures.existing(inside(reduced, name, "image name"), there) for name in names]
        if all(path.is_file() for path in small):
            large = [pictures.existing(inside(images, name, "image name"), there) for name in names]
            stale = why_stale(small, large)
            broken = [path.name for path in small if why_unreadable(path)]
            if broken and images.is_dir():
                stale = f"its {broken[0]} cannot be read"
            if not stale:
                return reduced
            warn(f"{reduced} is ignored: {stale}; delete the folder")
        elif not images.is_dir() and any(path.is_file() for path in small):
            return reduced
    if not images.is_dir():
        raise ValueError(
            f"{images}: no such folder; put the pictures given to COLMAP there"
            f"{other_factors(datadir)}"
        )
    return images


def _depths(model: Model, part: slice) -> np.ndarray:
    """Depths [N] along the cameras' axes of a part of the observations."""
    point, view = model.tracks[part].T
    poses = model.c2w[view]
    return -((model.points[point] - poses[:, :, 3]) * poses[:, :, 2]).sum(-1)


def depth_bounds(model: Model) -> np.ndarray | None:
    """Nearest and farthest depth [V, 2] of each view's points, in the model's units.

    A view with fewer than 10 points gets the bounds of all views' points. None without points.
    """
    if not len(model.tracks):
        return None
    view = model.tracks[:, 1]
    starts = range(0, len(view), CHUNK)
    depth = np.concatenate([_depths(model, slice(start, start + CHUNK)) for start in starts])
    good = np.isfinite(depth) & (depth > 0)
    if not good.any():
        return None
    depth, view = depth[good], view[good]
    together = np.percentile(depth, PERCENTILES)
    of_view = depth[np.argsort(view, kind="stable")]
    ends = np.bincount(view, minlength=len(model.c2w)).cumsum()
    rows = [
        np.percentile(own, PERCENTILES) if len(own) >= 10 else together
        for own in np.split(of_view, ends[:-1])
    ]
    return np.array(rows)
