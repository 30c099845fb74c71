"""Shared by the loaders of real captures: pictures of any size and lens, and the scene's frame.

A capture's world may have any origin, rotation and scale. One of three layouts moves its cameras to
coordinates fit for training:
* ``forward_facing``: all cameras look about the same way; LLFF's layout, for NDC.
* ``around``: the origin is the point that the cameras look at, z is up, and the cameras' root mean
  square distance from the origin is 1.
* the file's own scale and shift, where it states them (``nerf.datasets.transforms``).
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nerf import lenses
from nerf.cameras import (
    average_pose,
    homogeneous,
    look_at,
    nearest_point_to_axes,
    normalize,
    recenter,
    spiral_path,
)
from nerf.datasets.arrays import must_fit
from nerf.datasets.images import read_padded, store_sized
from nerf.datasets.masks import Masks, read_masks
from nerf.datasets.scene import Scene
from nerf.datasets.store import Store, as_tensor
from nerf.datasets.stored_file import file_of

FACING_DEG = 30.0  # largest angle to the mean viewing direction in a forward-facing capture
NEAR, FAR = 0.05, 20.0  # of a capture without points, in units of the cameras' mean distance
BOUND_FACTOR = 0.75  # LLFF: the nearest depth is scaled to 1 / 0.75


class Views(NamedTuple):
    """V pictures with cameras as a file describes them, in the file's world."""

    files: list[Path]
    names: list[str]
    c2w: np.ndarray  # [V, 3, 4]
    intrinsics: np.ndarray  # [V, 4 + LENS], in pixels of pictures of ``sizes``
    sizes: np.ndarray  # [V, 2] height and width
    masks: list[Masks]  # of each view; an empty tuple: all pixels are usable

    def subset(self, kept: list[int]) -> "Views":
        """Only the views of the numbers ``kept``."""
        return Views(
            files=[self.files[i] for i in kept],
            names=[self.names[i] for i in kept],
            c2w=self.c2w[kept],
            intrinsics=self.intrinsics[kept],
            sizes=self.sizes[kept],
            masks=[self.masks[i] for i in kept],
        )


class Layout(NamedTuple):
    """Cameras in the coordinates in which the scene is trained."""

    c2w: np.ndarray  # [V, 3, 4]
    path: np.ndarray  # [P, 3, 4] camera path for previews
    to_world: np.ndarray  # [4, 4] similarity back to the file's world
    ndc: bool = False

    @property
    def scale(self) -> float:
        """How many units of the file's world one unit of the scene is."""
        return float(np.cbrt(np.linalg.det(self.to_world[:3, :3])))


# ----------------------------------------------------------------------------------- pictures


def pictures_of(views: Views, factor: int, store: Store | None = None) -> dict[str, Any]:
    """The Scene's images, stored, intrinsics, sizes and usable, ``factor`` times smaller.

    ValueError names the first picture that does not fit its camera.
    """
    for name, row in zip(views.files, views.intrinsics, strict=True):
        if not np.isfinite(row).all() or (row[:2] <= 0).any():
            raise ValueError(
                f"{name}: focal length {row[0]:g}, {row[1]:g}, principal point {row[2]:g}, "
                f"{row[3]:g}; expected finite numbers and focal lengths > 0"
            )
    images = store_sized(views.files, views.sizes, factor, store) if store is not None else None
    stored = None if images is None else file_of(images)
    if images is not None:
        sizes = np.tile(images.shape[1:3], (len(images), 1))
    else:
        with must_fit(len(views.files)):
            images, sizes = read_padded(views.files, views.sizes, factor)
    intrinsics = views.intrinsics.copy()
    ratio = sizes / views.sizes  # [V, 2]
    intrinsics[:, :4] *= ratio[:, [1, 0, 1, 0]]
    cameras = torch.tensor(intrinsics, dtype=torch.float32)
    if lenses.is_ideal(cameras):
        cameras = cameras[:, :4]
    same = bool((sizes == sizes[0]).all())
    height, width = images.shape[1:3]
    usable = None
    if stored:
        _check_all_usable(views, cameras, height, width)
    else:
        usable = _usable(views, cameras, height, width, sizes)
    return {
        "images": as_tensor(images),
        "stored": stored,
        "intrinsics": cameras,
        "sizes": None if same else torch.from_numpy(sizes),
        "usable": usable,
    }


def _check_all_usable(views: Views, cameras: torch.Tensor, height: int, width: int) -> None:
    """ValueError unless every pixel is usable: a mapped file is drawn from without exceptions."""
    domain = _lens_domains()
    invalid = cameras.shape[-1] > 4 and any(
        domain(tuple(row), height, width) is not None for row in cameras.tolist()
    )
    if invalid or any(views.masks):
        raise ValueError(
            f"{views.files[0].parent}: has masks, or corners outside its lens model's valid "
            "range; a mapped picture file cannot leave pixels out, use --data_store memory"
        )


def _usable(
    views: Views, cameras: torch.Tensor, height: int, width: int, sizes: np.ndarray
) -> torch.Tensor | None:
    """bool [V, height, width]: in the picture, not masked, valid for the lens. None: all are.

    Views without any such pixel are left out later, by ``checks``.
    """
    usable: torch.Tensor | None = None  # a byte per pixel: made when a pixel is not usable
    domain = _lens_domains()
    for view, (own_height, own_width) in enumerate(sizes.tolist()):
        masks, whole = views.masks[view], (own_height, own_width) == (height, width)
        if whole and not masks and cameras.shape[-1] == 4:
            continue
        inside = torch.ones(own_height, own_width, dtype=torch.bool)
        if masks:
            inside &= torch.from_numpy(read_masks(masks, (own_height, own_width)))
        if cameras.shape[-1] > 4:
            valid = domain(tuple(cameras[view].tolist()), own_height, own_width)
            if valid is not None:
                inside &= valid
        if whole and bool(inside.all()):
            continue
        if usable is None:
            usable = torch.ones(len(sizes), height, width, dtype=torch.bool)
        usable[view] = False
        usable[view, :own_height, :own_width] = inside
    return usable


def _lens_domains() -> Callable[[tuple[float, ...], int, int], torch.Tensor | None]:
    """``_in_lens_domain`` of a camera's numbers, which remembers the last few: many share one."""

    def domain(camera: tuple[float, ...], height: int, width: int) -> torch.Tensor | None:
        return _in_lens_domain(torch.tensor(camera), height, width)

    return lru_cache(maxsize=8)(domain)


def _in_lens_domain(camera: torch.Tensor, height: int, width: int) -> torch.Tensor | None:
    """bool [H, W]: pixels for which the lens model has a ray direction; None: all of them."""

    def valid(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        plane = (torch.stack([x, y], dim=-1) + 0.5 - camera[2:4]) / camera[:2]
        return lenses.sees(plane, camera[4:].expand(*plane.shape[:-1], -1))

    y, x = torch.arange(height).float(), torch.arange(width).float()
    # Lens models fail beyond some radius: if the whole border is valid, so is the inside.
    borders = [valid(x, torch.full_like(x, float(row))) for row in (0, height - 1)]
    borders += [valid(torch.full_like(y, float(column)), y) for column in (0, width - 1)]
    if all(bool(border.all()) for border in borders):
        return None
    y, x = torch.meshgrid(y, x, indexing="ij")
    return valid(x, y)


# ------------------------------------------------------------------------------------- layout


def faces_forward(c2w: np.ndarray) -> bool:
    """Whether all cameras [V, 3, 4] look within FACING_DEG of their mean direction."""
    away = c2w[:, :, 2] @ normalize(c2w[:, :, 2].sum(0) + 1e-12)
    return bool(away.min() > np.cos(np.radians(FACING_DEG)))


def forward_facing(c2w: np.ndarray, bounds: np.ndarray) -> Layout:
    """LLFF's layout: the average camera's frame, the nearest depth at 1 / 0.75, a spiral path.

    c2w: [V, 3, 4]. bounds: depths in the file's units.
    """
    scale = 1.0 / (bounds.min() * BOUND_FACTOR)
    scaled = np.concatenate([c2w[:, :, :3], scale * c2w[:, :, 3:]], axis=-1)
    to_world = np.diag([1 / scale] * 3 + [1.0]) @ homogeneous(average_pose(scaled))
    moved = recenter(scaled)
    path = spiral_path(moved, bounds.min() * scale, bounds.max() * scale)
    return Layout(moved, path, to_world, ndc=True)


def around(c2w: np.ndarray) -> Layout:
    """Z up, the origin at the point that the cameras [V, 3, 4] look at, an arc as camera path."""
    center, found = focus(c2w)
    up = up_direction(c2w)
    back = (c2w[:, :, 3] - center).mean(0) if found else c2w[:, :, 2].sum(0)
    back = back - (back @ up) * up
    if np.linalg.norm(back) < 1e-9:  # cameras look straight down: any horizontal axis will do
        back = np.eye(3)[np.abs(up).argmin()] - up[np.abs(up).argmin()] * up
    y = -normalize(back)  # the cameras' mean horizontal direction becomes +y
    frame = np.stack([np.cross(y, up), y, up, center], axis=1)
    radius = float(np.sqrt(((c2w[:, :, 3] - center) ** 2).sum(-1).mean()))
    if radius < 1e-6 * max(1.0, float(np.abs(c2w[:, :, 3]).max())):  # all stand at one place
        radius = 1.0
    to_world = homogeneous(frame) @ np.diag([radius] * 3 + [1.0])
    moved = to_scene(c2w, to_world)
    return Layout(moved, arc_path(moved, found), to_world)


def to_scene(c2w: np.ndarray, to_world: np.ndarray) -> np.ndarray:
    """Cameras [V, 3, 4] of the file's world in the scene's coordinates.

    to_world: [4, 4] similarity from the scene's coordinates to the file's world.
    """
    inverse = np.linalg.inv(to_world)
    rotation = inverse[:3, :3] / np.cbrt(np.linalg.det(inverse[:3, :3]))
    positions = c2w[:, :, 3] @ inverse[:3, :3].T + inverse[:3, 3]
    return np.concatenate([rotation @ c2w[:, :, :3], positions[..., None]], axis=-1)


def focus(c2w: np.ndarray) -> tuple[np.ndarray, bool]:
    """The point [3] that the cameras look at, and True; their mean position, and False if none."""
    middle = c2w[:, :, 3].mean(0)
    try:
        point = nearest_point_to_axes(c2w)
    except np.linalg.LinAlgError:  # all axes are exactly parallel
        return middle, False
    offset = point - c2w[:, :, 3]
    along = (-c2w[:, :, 2] * offset).sum(-1)
    distance = np.linalg.norm(offset, axis=-1)
    spread = np.sqrt(((c2w[:, :, 3] - middle) ** 2).sum(-1).mean())
    beside = np.sqrt(np.maximum(distance**2 - along**2, 0))
    converge = np.sqrt((distance**2).mean()) < 10 * spread and np.median(beside / distance) < 0.5
    if (along > 0).mean() > 0.8 and converge:
        return point, True
    return middle, False


def up_direction(c2w: np.ndarray) -> np.ndarray:
    """The unit vector [3] that is most nearly perpendicular to all cameras' horizontal axes.

    If the cameras' rotations are too similar to define it: the mean of their up axes.
    """
    mean = normalize(c2w[:, :, 1].sum(0) + 1e-12)
    values, vectors = np.linalg.eigh((c2w[:, :, :1] @ c2w[:, :, :1].transpose(0, 2, 1)).mean(0))
    if values[1] < max(0.05, 5 * values[0]):
        return mean
    return vectors[:, 0] * (1.0 if vectors[:, 0] @ mean >= 0 else -1.0)


def arc_path(c2w: np.ndarray, inward: bool, num_views: int = 60) -> np.ndarray:
    """A camera path [P, 3, 4] at the cameras' mean height and distance, facing the origin.

    It is a closed circle if the cameras surround the origin, else an arc over the azimuths that
    they cover, forward and back. With ``inward`` False: a small circle around the average camera.
    """
    position = c2w[:, :, 3]
    if not inward:
        average = average_pose(c2w)
        size = 0.5 * position.std(0).mean()
        turn = np.linspace(0, 2 * np.pi, num_views, endpoint=False)
        offsets = size * np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=-1)
        path = np.repeat(average[None], num_views, axis=0)
        path[:, :, 3] += offsets @ average[:, :3].T
        return path
    azimuth = np.sort(np.arctan2(position[:, 1], position[:, 0]))
    gaps = np.diff(np.append(azimuth, azimuth[0] + 2 * np.pi))
    if gaps.max() < np.radians(75):
        turns = np.linspace(0, 2 * np.pi, num_views, endpoint=False)
    else:
        start = azimuth[(gaps.argmax() + 1) % len(azimuth)]
        half = (2 * np.pi - gaps.max()) / 2
        turns = start + half * (1 - np.cos(np.linspace(0, 2 * np.pi, num_views, endpoint=False)))
    radius, height = np.linalg.norm(position[:, :2], axis=-1).mean(), position[:, 2].mean()
    return np.stack(
        [look_at([radius * np.cos(a), radius * np.sin(a), height], np.zeros(3)) for a in turns]
    )


# -------------------------------------------------------------------------------------- scene


def hold_out(num_views: int, every: int) -> dict[str, list[int]]:
    """Splits of views in order: every n-th for val and test; 0: only the middle one."""
    test = list(range(0, num_views, every)) if every else [num_views // 2]
    held = set(test)
    train = [view for view in range(num_views) if view not in held]
    return {"train": train, "val": test, "test": test}


def scene_of(
    views: Views,
    layout: Layout,
    splits: dict[str, list[int]],
    bounds: tuple[float, float],
    *,
    factor: int,
    background: float,
    box: torch.Tensor | None = None,
    store: Store | None = None,
) -> Scene:
    """The Scene of ``views`` in ``layout``, its pictures ``factor`` times smaller.

    bounds: near and far in the layout's units, unused with NDC. box: see ``Scene``.
    """
    return Scene(
        **pictures_of(views, factor, store),
        c2w=torch.tensor(layout.c2w, dtype=torch.float32),
        splits=splits,
        names=views.names,
        near=0.0 if layout.ndc else bounds[0],
        far=1.0 if layout.ndc else bounds[1],
        render_poses=torch.tensor(layout.path, dtype=torch.float32),
        background=background,
        ndc=layout.ndc,
        box=box,
        to_world=torch.tensor(layout.to_world, dtype=torch.float64),
    )
