"""A scene: validated pictures with their cameras, from which training rays are drawn.

Pictures stay uint8, on the training device or in a mapped file; a ray is computed only when it is
drawn. Conventions of axes, pixels and distance are those of ``nerf.rays``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nerf.datasets.store import BlockOrder
from nerf.datasets.stored_file import StoredFile
from nerf.lenses import LENS
from nerf.rays import Rays, pixels_to_rays, rays_to_ndc

SPLITS = ("train", "val", "test")
FARTHEST = 1e8  # scene units; maps in meters reach 1e7


@dataclass
class Scene:
    """Pictures of one scene with their cameras. ValueError if the data is not usable.

    images: uint8 [V, H, W, 3|4], straight alpha. c2w: [V, 3, 4]. intrinsics: [V, 4] fx fy cx cy in
    pixels, or [V, 4 + LENS] with a lens per view (``nerf.lenses``).
    splits: split name -> view numbers. names: one per view.
    near, far: in units of t. render_poses: [P, 3, 4] camera path for previews.
    background: gray level in [0, 1] behind transparent pixels.
    ndc: rays are in normalized device coordinates.
    pixel_center: rays pass through pixel centers; False: through pixel corners, as in nerf-pytorch.
    sizes: [V, 2] height and width of each picture, which lies at the top left of its ``images``
    row; None: all have the size of ``images``.
    usable: bool [V, H, W], the pixels used for training and metrics; None: all.
    box: [2, 3] low and high corner of the scene as its files state it; None: not stated.
    to_world: float64 [4, 4] similarity from the scene's world coordinates (not NDC) to those of
    its files; None: they are the same.
    stored: the file that ``images`` is mapped from (``nerf.datasets.store``); it stays on the CPU.
    """

    images: Tensor
    c2w: Tensor
    intrinsics: Tensor
    splits: dict[str, list[int]]
    names: list[str]
    near: float
    far: float
    render_poses: Tensor
    background: float = 0.0
    ndc: bool = False
    pixel_center: bool = False
    sizes: Tensor | None = None
    usable: Tensor | None = None
    box: Tensor | None = None
    to_world: Tensor | None = None
    stored: StoredFile | None = None
    _train: Tensor = field(init=False, repr=False)
    _pools: dict[tuple[str, float], tuple[Tensor, list[int]]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self._validate()
        self._train = torch.tensor(self.splits["train"], device=self.c2w.device)

    def _validate(self) -> None:
        num_views = len(self.images)
        assert self.images.dtype == torch.uint8 and self.images.dim() == 4
        assert self.images.shape[-1] in (3, 4)
        if len(self.c2w) != num_views:
            raise ValueError(
                f"{num_views} pictures but {len(self.c2w)} poses; expected one pose per picture"
            )
        assert len(self.names) == num_views
        assert self.intrinsics.shape in ((num_views, 4), (num_views, 4 + LENS))
        # With padding (sizes), ``usable`` must exclude it from training.
        assert self.sizes is None or self.usable is not None
        for number, (name, pose) in enumerate(zip(self.names, self.c2w, strict=True)):
            check_pose(pose.cpu().numpy(), f"view {number} ({name})")
        train = self.c2w[self.splits.get("train") or []]
        if len(train) > 1 and bool((train == train[0]).all()):
            raise ValueError(
                f"all {len(train)} training cameras have the same pose; expected views from "
                "several places"
            )
        focal = self.intrinsics[:, :2]
        fine = (focal > 1e-3 * self.width) & (focal < 1e4 * self.width)
        if not bool(fine.all() and self.intrinsics.isfinite().all()):
            raise ValueError(
                f"focal lengths of {focal.min():g} to {focal.max():g} pixels for pictures "
                f"{self.width} wide; expected 0.001 to 10000 times the width"
            )
        if not 0 <= self.near < self.far < FARTHEST:
            raise ValueError(
                f"bounds near = {self.near:g}, far = {self.far:g}; expected 0 <= near < far < 1e8"
            )
        if not self.splits.get("train"):
            raise ValueError(
                f"no training view is left of {num_views} pictures; "
                "hold out fewer (larger --llffhold, or 0 for one test view)"
            )

    @property
    def height(self) -> int:
        """Pixels; of the tallest picture if sizes differ."""
        return self.images.shape[1]

    @property
    def width(self) -> int:
        """Pixels; of the widest picture if sizes differ."""
        return self.images.shape[2]

    def to(self, device: torch.device | str) -> "Scene":
        """The same scene with its tensors on ``device``; a mapped file stays a mapped file."""
        names = ["c2w", "intrinsics", "render_poses", "sizes", "usable", "box"]
        names += [] if self.stored else ["images"]
        moved: dict[str, Any] = {}
        for name in names:
            tensor = getattr(self, name)
            moved[name] = tensor if tensor is None else tensor.to(device)
        return replace(self, **moved)

    def view_size(self, view: int) -> tuple[int, int]:
        """Height and width of one picture, in pixels."""
        if self.sizes is None:
            return self.height, self.width
        height, width = self.sizes[view].tolist()
        return height, width

    def resized(self, factor: int) -> "Scene":
        """The scene with cameras for pictures ``factor`` times smaller, for rendering only.

        ``images`` becomes black and must not be used. A small pixel covers a block of ``factor`` x
        ``factor`` pixels, and its ray passes through the middle of theirs; incomplete blocks at the
        right and bottom are dropped. (nerf-pytorch scales the focal length but renders with the old
        matrix.)
        """
        if factor <= 1:
            return self
        height, width = max(1, self.height // factor), max(1, self.width // factor)
        intrinsics = self.intrinsics.clone()
        intrinsics[:, :4] /= factor
        if not self.pixel_center:
            intrinsics[:, 2:4] += 0.5 / factor - 0.5
        images = self.images.new_zeros(1, 1, 1, 3).expand(len(self.images), height, width, 3)
        small: dict[str, Any] = {"images": images, "intrinsics": intrinsics}
        if self.usable is not None:
            small["usable"] = self.usable[:, :1, :1].expand(len(images), height, width)
        if self.sizes is not None:
            small["sizes"] = (self.sizes // factor).clamp(min=1)
        return replace(self, **small)

    def rays(self, x: Tensor, y: Tensor, c2w: Tensor, intrinsics: Tensor) -> Rays:
        """Rays through pixels x, y [B] of cameras c2w [B, 3, 4] or [3, 4].

        intrinsics: [..., 4] for pinhole cameras, [..., 4 + LENS] with lenses.
        """
        rays = pixels_to_rays(
            x, y, intrinsics, c2w, (self.near, self.far), pixel_center=self.pixel_center
        )
        if self.ndc:
            # One camera's intrinsics for all rays: NDC must be the same space for every view.
            rays = rays_to_ndc(rays, self.height, self.width, self.intrinsics[0])
        return rays

    def view_rays(
        self, c2w: Tensor, intrinsics: Tensor, width: int | None = None
    ) -> Callable[[Tensor], Rays]:
        """A function from flat pixel numbers [B] to rays of one camera, ``width`` pixels wide."""
        width = width or self.width

        def rays_of(pixels: Tensor) -> Rays:
            x, y = pixels % width, pixels // width
            return self.rays(x.float(), y.float(), c2w, intrinsics)

        return rays_of

    def over_background(self, pixels: Tensor, background: Tensor | None = None) -> Tensor:
        """uint8 pixels [..., 3|4] -> float32 [..., 3] in [0, 1], blended over the background."""
        behind = self.background if background is None else background
        pixels = pixels.float() / 255.0
        if pixels.shape[-1] == 3:
            return pixels
        rgb, alpha = pixels[..., :3], pixels[..., 3:]
        return rgb * alpha + behind * (1.0 - alpha)

    def picture(self, view: int, rows: slice = slice(None), step: int = 1) -> Tensor:
        """View ``view`` as float32 [H, W, 3], at its own size, over the background, on the CPU.

        rows: those of the picture to return. step: only every step-th pixel of a row and column.
        """
        height, width = self.view_size(view)
        if self.stored is not None:
            self.stored.check()
        picture = self.images[view, :height, :width][rows]
        return self.over_background(picture[::step, ::step].cpu())

    def mask(self, view: int) -> Tensor | None:
        """The usable pixels of ``view``, bool [H, W] at its own size, on the CPU; None: all."""
        if self.usable is None:
            return None
        height, width = self.view_size(view)
        inside = self.usable[view, :height, :width].cpu()
        return None if bool(inside.all()) else inside

    def pick(
        self, views: Tensor, x: Tensor, y: Tensor, background: Tensor | None = None
    ) -> tuple[Rays, Tensor]:
        """Rays and colors [B, 3] in [0, 1] of pixels x, y [B] (integers) in views [B]."""
        return self._rays_of(views, x, y), self.over_background(
            self.pixels(views, x, y), background
        )

    def pixels(self, views: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """uint8 [B, C] of pixels x, y [B] in views [B], on the scene's device."""
        if self.stored is not None:
            self.stored.check()
            views, x, y = views.cpu(), x.cpu(), y.cpu()
        return self.images[views, y, x].to(self.c2w.device)

    def _rays_of(self, views: Tensor, x: Tensor, y: Tensor) -> Rays:
        return self.rays(x.float(), y.float(), self.c2w[views], self.intrinsics[views])

    def block_order(self, seed: int) -> BlockOrder | None:
        """The order for ``sample_rays`` from a mapped file; None if pictures are in memory."""
        if self.stored is None:
            return None
        train, device = self.splits["train"], self.c2w.device
        return BlockOrder(self.images, train, seed, device, self.stored)

    def sample_rays(
        self,
        num_rays: int,
        generator: torch.Generator,
        *,
        one_image: bool = False,
        crop: float = 1.0,
        background: Tensor | None = None,
        shard: slice | None = None,
        order: BlockOrder | None = None,
        position: int = 0,
    ) -> tuple[Rays, Tensor]:
        """Random training rays [B] and their colors [B, 3] in [0, 1].

        one_image: all rays from one random picture (``--no_batching``).
        crop: fraction of the height and width around the center to draw from (``--precrop_frac``).
        background: [B, 3] behind transparent pixels; None: the scene's.
        shard: the slice of the ``num_rays`` rays to return, this process' part; None: all.
        order, position: with a ``block_order``, the next rays of that order after ``position`` rays
        of the run, instead of random ones (not with one_image or crop).
        """
        device, shard = self.c2w.device, shard or slice(0, num_rays)
        if order is not None and not one_image and crop == 1.0:
            numbers, colors = order.draw(position, num_rays, shard)
            return self._rays_of(*self.place(numbers)), self.over_background(colors, background)

        def draw(low: int, high: int, count: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=generator, device=device)

        if self.usable is not None:
            pool, starts = self.usable_pixels("train", crop)
            low, high = 0, len(pool)
            if one_image:
                number = int(draw(0, len(starts) - 1, 1))
                low, high = starts[number], starts[number + 1]
            return self.pick(*self.place(pool[draw(low, high, num_rays)[shard]]), background)
        views = self._train[draw(0, len(self._train), 1 if one_image else num_rays)]
        views = views.expand(num_rays)
        half_w, half_h = self.width / 2 * crop, self.height / 2 * crop
        x0, x1 = int(self.width / 2 - half_w), max(1, int(self.width / 2 + half_w))
        y0, y1 = int(self.height / 2 - half_h), max(1, int(self.height / 2 + half_h))
        x, y = draw(x0, x1, num_rays), draw(y0, y1, num_rays)
        return self.pick(views[shard], x[shard], y[shard], background)

    def usable_pixels(self, split: str, crop: float = 1.0) -> tuple[Tensor, list[int]]:
        """Flat numbers [N] of a split's usable pixels, and where each of its views begins in them.

        crop: as in ``sample_rays``. The result is cached: 4 bytes per pixel.
        """
        assert self.usable is not None
        if (split, crop) not in self._pools:
            parts, starts = [], [0]
            small = self.usable.numel() < 2**31
            for view in self.splits[split]:
                height, width = self.view_size(view)
                (y0, y1), (x0, x1) = (
                    (int(side / 2 - side / 2 * crop), max(1, int(side / 2 + side / 2 * crop)))
                    for side in (height, width)
                )
                y, x = self.usable[view, y0:y1, x0:x1].nonzero().unbind(-1)
                part = (view * self.height + y + y0) * self.width + x + x0
                parts.append(part.to(torch.int32) if small else part)
                starts.append(starts[-1] + len(y))
                if not len(y):
                    raise ValueError(
                        f"view {view} ({self.names[view]}): its mask leaves no usable pixel"
                        + (f" in the middle (--precrop_frac {crop:g})" if crop < 1 else "")
                        + "; remove the picture, or change the mask"
                    )
            self._pools[split, crop] = torch.cat(parts), starts
        return self._pools[split, crop]

    def place(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flat pixel numbers [B] -> view, x and y [B]."""
        pixels = pixels.long()
        per_view = self.height * self.width
        return pixels // per_view, pixels % self.width, pixels // self.width % self.height

    def file_world(self, points: np.ndarray) -> np.ndarray:
        """World points [..., 3] of the scene in the coordinates of its files, float64.

        With NDC, points must have been converted to world coordinates.
        """
        matrix = self.file_matrix
        return np.asarray(points, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]

    @property
    def file_matrix(self) -> np.ndarray:
        """``to_world`` as float64 [4, 4]; the identity where the scene's world is the files'."""
        return np.eye(4) if self.to_world is None else self.to_world.double().cpu().numpy()

    @property
    def file_units(self) -> float:
        """How many units of the files' world one unit of the scene is."""
        return float(np.cbrt(abs(np.linalg.det(self.file_matrix[:3, :3]))))

    @property
    def has_own_world(self) -> bool:
        """Whether the scene's world is another than that of its files."""
        return not np.allclose(self.file_matrix, np.eye(4), rtol=0, atol=1e-6)

    def world_record(self) -> dict[str, Any]:
        """``to_world`` and its scale, for the run folder's world.json."""
        return {
            "to_file_world": self.file_matrix.tolist(),
            "file_units_per_scene_unit": self.file_units,
            "ndc": self.ndc,
        }

    def describe(self) -> str:
        """One line for the log: views per split, picture size, focal length and ray bounds."""
        counts = ", ".join(f"{len(self.splits.get(name, []))} {name}" for name in SPLITS)
        kind = "RGBA" if self.images.shape[-1] == 4 else "RGB"
        space = "NDC" if self.ndc else "world"
        height, width = self.view_size(0)
        size = f"{width}x{height}" if self.sizes is None else f"{width}x{height} and other sizes,"
        if self.intrinsics.shape[-1] > 4:
            kind += ", lens distortion"
        unit = (
            f"; 1 scene unit is {self.file_units:.4g} of the files'" if self.has_own_world else ""
        )
        return (
            f"{counts} views, {size} {kind}, focal {self.intrinsics[0, 0].item():.2f}, "
            f"{space} rays from {self.near:g} to {self.far:g}{unit}"
        )


def check_pose(c2w: np.ndarray, name: str) -> None:
    """Raise ValueError unless c2w [3, 4] is finite and its first three columns are a rotation."""
    if c2w.shape != (3, 4) or not np.isfinite(c2w).all():
        raise ValueError(
            f"{name}: its pose is not 3x4 finite numbers (shape {c2w.shape}); re-export it"
        )
    if np.abs(c2w[:, 3]).max() > FARTHEST:
        raise ValueError(
            f"{name}: its camera stands {np.abs(c2w[:, 3]).max():.3g} units from the origin; "
            f"expected less than {FARTHEST:.0e}, beyond which float32 is too coarse"
        )
    rotation = c2w[:, :3].astype(np.float64)
    error = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > 1e-2 or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"{name}: its pose is not a rotation (|R^T R - 1| = {error:.2g}, "
            f"det = {np.linalg.det(rotation):.2g}); expected a right-handed camera-to-world matrix"
        )
