"""What loaders of real captures share: pictures of any sizes and lenses, and where the scene is.

A capture's world has any place, turn and scale. Three layouts make it fit for training:
facing (``forward_facing``): all cameras look the same way; LLFF's, for NDC.
around (``around``): the origin is what the cameras look at, z is up, the cameras' root mean square
distance is 1. as given: only a scale and a shift, where the file states them.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

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
from nerf.datasets.images import padded, read_image, read_sized, store_sized
from nerf.datasets.scene import Scene
from nerf.datasets.store import as_tensor

FACING_DEG = 30.0  # no camera of a forward-facing capture looks farther from the mean direction
NEAR, FAR = 0.05, 20.0  # of a capture around something without points, in its camera distances
BOUND_FACTOR = 0.75  # LLFF: the nearest depth is scaled to 1 / 0.75


class Views(NamedTuple):
    """V posed pictures as a file describes them, in the file's world."""

    files: list[Path]
    names: list[str]
    c2w: np.ndarray  # [V, 3, 4]
    intrinsics: np.ndarray  # [V, 4 + LENS], for pictures of ``sizes``
    sizes: np.ndarray  # [V, 2] height and width
    masks: list[Path | None]  # white where a picture counts; None: everywhere


class Layout(NamedTuple):
    """Cameras moved to where the scene is trained."""

    c2w: np.ndarray  # [V, 3, 4]
    path: np.ndarray  # [P, 3, 4] preview
    to_world: np.ndarray  # [4, 4] similarity back to the file's world
    ndc: bool = False

    @property
    def scale(self) -> float:
        """Units of the file's world in one of the scene."""
        return float(np.cbrt(np.linalg.det(self.to_world[:3, :3])))


# ----------------------------------------------------------------------------------- pictures


def pictures_of(views: Views, factor: int, store=None) -> dict:
    """Members of a Scene: images, intrinsics, sizes, usable, all ``factor`` times smaller.

    ValueError names the first picture that does not fit its camera.
    """
    for name, row in zip(views.files, views.intrinsics, strict=True):
        if not np.isfinite(row).all() or (row[:2] <= 0).any():
            raise ValueError(
                f"{name}: focal length {row[0]:g}, {row[1]:g}, principal point {row[2]:g}, "
                f"{row[3]:g}; expected finite numbers and focal lengths > 0"
            )
    images = store and store_sized(views.files, views.sizes, factor, store)
    stored = images is not None
    if stored:
        sizes = np.tile(images.shape[1:3], (len(images), 1))
    else:
        images, sizes = padded(read_sized(views.files, views.sizes, factor))
    intrinsics = views.intrinsics.copy()
    ratio = sizes / views.sizes  # [V, 2]
    intrinsics[:, :4] *= ratio[:, [1, 0, 1, 0]]
    cameras = torch.tensor(intrinsics, dtype=torch.float32)
    if lenses.is_ideal(cameras):
        cameras = cameras[:, :4]
    same = bool((sizes == sizes[0]).all())
    if stored:
        usable = _all_usable(views, cameras, images.shape[1:3])
    else:
        usable = _usable(views, cameras, images.shape[1:3], sizes)
    return {
        "images": as_tensor(images),
        "stored": stored,
        "intrinsics": cameras,
        "sizes": None if same else torch.from_numpy(sizes),
        "usable": usable,
    }


def _all_usable(views: Views, cameras: torch.Tensor, shape) -> None:
    """ValueError unless every pixel may be trained on, which is all that a store can draw."""
    blind = cameras.shape[-1] > 4 and not all(bool(_seen(row, *shape).all()) for row in cameras)
    if blind or any(mask is not None for mask in views.masks):
        raise ValueError(
            f"{views.files[0].parent}: has masks, or corners that its lens does not see; "
            "a store of pictures cannot leave pixels out, use --data_store memory"
        )


def _usable(views: Views, cameras: torch.Tensor, shape, sizes: np.ndarray) -> torch.Tensor | None:
    """bool [V, H, W]: inside the picture, not masked, seen through the lens. None: all are."""
    usable = torch.zeros(len(sizes), *shape, dtype=torch.bool)
    for view, (height, width) in enumerate(sizes.tolist()):
        inside = usable[view, :height, :width]
        inside.fill_(True)
        if views.masks[view] is not None:
            inside &= torch.from_numpy(_read_mask(views.masks[view], (height, width)))
        if cameras.shape[-1] > 4:
            inside &= _seen(cameras[view], height, width)
        if not inside.any():
            raise ValueError(
                f"{views.masks[view] or views.files[view]}: leaves no pixel of its picture; change "
                "the mask (or lens), or leave the picture out"
            )
    return None if bool(usable.all()) else usable


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: where the mask is white, also after it was reduced to ``size``."""
    gray = Image.fromarray(read_image(path, size[::-1])[..., 0])
    if abs(gray.width * size[0] / size[1] - gray.height) > 1 + 0.02 * gray.height:
        raise ValueError(
            f"{path}: is {gray.width}x{gray.height}; expected the proportions of its picture, "
            f"{size[1]}x{size[0]}"
        )
    if gray.size != size[::-1]:
        gray = gray.resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(gray) > 127


def _seen(camera: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """bool [H, W]: pixels that the lens' model gives a direction."""

    def seen(x, y):
        plane = (torch.stack([x, y], dim=-1) + 0.5 - camera[2:4]) / camera[:2]
        return lenses.sees(plane, camera[4:].expand(*plane.shape[:-1], -1))

    y, x = torch.arange(height).float(), torch.arange(width).float()
    # Models fail outwards of some radius: a border without a gap needs no closer look.
    ends = [seen(x, torch.full_like(x, float(row))) for row in (0, height - 1)]
    ends += [seen(torch.full_like(y, float(column)), y) for column in (0, width - 1)]
    if all(bool(end.all()) for end in ends):
        return torch.ones(height, width, dtype=torch.bool)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return seen(x, y)


# ------------------------------------------------------------------------------------- layout


def faces_forward(c2w: np.ndarray) -> bool:
    """Whether cameras [V, 3, 4] look about the same way."""
    away = c2w[:, :, 2] @ normalize(c2w[:, :, 2].sum(0) + 1e-12)
    return bool(away.min() > np.cos(np.radians(FACING_DEG)))


def forward_facing(c2w: np.ndarray, bounds: np.ndarray) -> Layout:
    """The frame of the average camera, nearest depth at 1 / 0.75; a spiral as preview (LLFF).

    bounds: depths in the file's units.
    """
    scale = 1.0 / (bounds.min() * BOUND_FACTOR)
    scaled = np.concatenate([c2w[:, :, :3], scale * c2w[:, :, 3:]], axis=-1)
    to_world = np.diag([1 / scale] * 3 + [1.0]) @ homogeneous(average_pose(scaled))
    moved = recenter(scaled)
    path = spiral_path(moved, bounds.min() * scale, bounds.max() * scale)
    return Layout(moved, path, to_world, ndc=True)


def around(c2w: np.ndarray) -> Layout:
    """Upright, and centered on what the cameras look at; an arc through them as preview."""
    center, found = _focus(c2w)
    up = up_direction(c2w)
    back = (c2w[:, :, 3] - center).mean(0) if found else c2w[:, :, 2].sum(0)
    back = back - (back @ up) * up
    if np.linalg.norm(back) < 1e-9:  # straight from above: any side will do
        back = np.eye(3)[np.abs(up).argmin()] - up[np.abs(up).argmin()] * up
    y = -normalize(back)  # the capture's middle looks along +y
    frame = np.stack([np.cross(y, up), y, up, center], axis=1)
    radius = float(np.sqrt(((c2w[:, :, 3] - center) ** 2).sum(-1).mean())) or 1.0
    to_world = homogeneous(frame) @ np.diag([radius] * 3 + [1.0])
    moved = to_scene(c2w, to_world)
    return Layout(moved, arc_path(moved, found), to_world)


def to_scene(c2w: np.ndarray, to_world: np.ndarray) -> np.ndarray:
    """Cameras [V, 3, 4] of the file's world in the scene's coordinates."""
    inverse = np.linalg.inv(to_world)
    turn = inverse[:3, :3] / np.cbrt(np.linalg.det(inverse[:3, :3]))
    places = c2w[:, :, 3] @ inverse[:3, :3].T + inverse[:3, 3]
    return np.concatenate([turn @ c2w[:, :, :3], places[..., None]], axis=-1)


def _focus(c2w: np.ndarray) -> tuple[np.ndarray, bool]:
    """What the cameras look at [3], and whether there is such a point (else their middle)."""
    middle = c2w[:, :, 3].mean(0)
    try:
        point = nearest_point_to_axes(c2w)
    except np.linalg.LinAlgError:  # all look exactly the same way
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
    """The vertical [3]: what the cameras' horizontal axes are all at right angles to.

    Their mean upwards axis instead where they do not turn enough to tell.
    """
    mean = normalize(c2w[:, :, 1].sum(0) + 1e-12)
    values, vectors = np.linalg.eigh((c2w[:, :, :1] @ c2w[:, :, :1].transpose(0, 2, 1)).mean(0))
    if values[1] < max(0.05, 5 * values[0]):
        return mean
    return vectors[:, 0] * (1.0 if vectors[:, 0] @ mean >= 0 else -1.0)


def arc_path(c2w: np.ndarray, inward: bool, num_views: int = 60) -> np.ndarray:
    """Preview [P, 3, 4] at the cameras' mean height and distance, over the azimuths they cover.

    A closed circle where they go around, else there and back. Not inward: a small circle about the
    middle camera.
    """
    place = c2w[:, :, 3]
    if not inward:
        average = average_pose(c2w)
        size = 0.5 * place.std(0).mean()
        turn = np.linspace(0, 2 * np.pi, num_views, endpoint=False)
        offsets = size * np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=-1)
        path = np.repeat(average[None], num_views, axis=0)
        path[:, :, 3] += offsets @ average[:, :3].T
        return path
    azimuth = np.sort(np.arctan2(place[:, 1], place[:, 0]))
    gaps = np.diff(np.append(azimuth, azimuth[0] + 2 * np.pi))
    if gaps.max() < np.radians(75):
        turns = np.linspace(0, 2 * np.pi, num_views, endpoint=False)
    else:
        start = azimuth[(gaps.argmax() + 1) % len(azimuth)]
        half = (2 * np.pi - gaps.max()) / 2
        turns = start + half * (1 - np.cos(np.linspace(0, 2 * np.pi, num_views, endpoint=False)))
    flat, height = np.linalg.norm(place[:, :2], axis=-1).mean(), place[:, 2].mean()
    return np.stack(
        [look_at([flat * np.cos(a), flat * np.sin(a), height], np.zeros(3)) for a in turns]
    )


# -------------------------------------------------------------------------------------- scene


def hold_out(num_views: int, every: int) -> dict[str, list[int]]:
    """Splits of views in order: every n-th for validation and testing; 0: the middle one only."""
    test = list(range(0, num_views, every)) if every else [num_views // 2]
    train = [view for view in range(num_views) if view not in set(test)]
    return {"train": train, "val": test, "test": test}


def scene_of(
    views: Views,
    layout: Layout,
    splits: dict[str, list[int]],
    bounds: tuple[float, float],
    *,
    factor: int,
    background: float,
    store=None,
    **members,
) -> Scene:
    """The Scene of ``views`` in ``layout``; bounds: near and far in its units."""
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
        to_world=torch.tensor(layout.to_world, dtype=torch.float64),
        **members,
    )
