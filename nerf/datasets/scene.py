"""A scene: posed pictures that validate themselves and give out rays.

Pictures stay uint8 on the training device; a ray is made when it is drawn. Conventions of axes,
pixels and distance are those of ``nerf.rays``.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nerf.rays import Rays, pixels_to_rays, rays_to_ndc

SPLITS = ("train", "val", "test")


@dataclass
class Scene:
    """Posed pictures of one scene.

    images: uint8 [V, H, W, 3|4], straight alpha. c2w: [V, 3, 4]. intrinsics: [V, 4] fx fy cx cy in
    pixels. splits: split name -> view numbers. names: one per view. near, far: in units of t.
    render_poses: [P, 3, 4] camera path for previews. background: grey level shown behind
    transparent pixels. ndc: rays are handed out in normalised device coordinates.
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
    _train: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        self._validate()
        self._train = torch.tensor(self.splits["train"], device=self.images.device)

    def _validate(self) -> None:
        num_views = len(self.images)
        assert self.images.dtype == torch.uint8 and self.images.dim() == 4
        assert self.images.shape[-1] in (3, 4)
        if len(self.c2w) != num_views:
            raise ValueError(f"{num_views} pictures but {len(self.c2w)} poses; one pose a picture")
        assert len(self.names) == num_views and self.intrinsics.shape == (num_views, 4)
        for number, (name, pose) in enumerate(zip(self.names, self.c2w, strict=True)):
            check_pose(pose.cpu().numpy(), f"view {number} ({name})")
        if not bool((self.intrinsics[:, :2] > 0).all() and self.intrinsics.isfinite().all()):
            raise ValueError(f"focal lengths must be positive, got {self.intrinsics[:, :2].min()}")
        if not 0 <= self.near < self.far < float("inf"):
            raise ValueError(
                f"bounds near = {self.near:g}, far = {self.far:g}; expected 0 <= near < far"
            )
        if not self.splits.get("train"):
            raise ValueError(
                f"no training view is left of {num_views} pictures; "
                "hold out fewer (larger --llffhold, or 0 for one test view)"
            )

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    def to(self, device) -> "Scene":
        """The same scene with its tensors on ``device``."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("images", "c2w", "intrinsics", "render_poses")
        }
        return replace(self, **moved)

    def resized(self, factor: int) -> "Scene":
        """Cameras for pictures ``factor`` times smaller; only for rendering, pictures are dropped.

        A small pixel stands for a block of ``factor`` x ``factor``, and its ray passes through the
        middle of what those pixels' rays pass through; incomplete blocks at the right and bottom
        are left out. (nerf-pytorch scales the focal length but renders with the old matrix.)
        """
        if factor <= 1:
            return self
        height, width = max(1, self.height // factor), max(1, self.width // factor)
        intrinsics = self.intrinsics / factor
        if not self.pixel_center:
            intrinsics[:, 2:] += 0.5 / factor - 0.5
        images = self.images.new_zeros(1, 1, 1, 3).expand(len(self.images), height, width, 3)
        return replace(self, images=images, intrinsics=intrinsics)

    def rays(self, x: Tensor, y: Tensor, c2w: Tensor, intrinsics: Tensor) -> Rays:
        """Rays through pixels x, y [B] of cameras c2w [B, 3, 4] or [3, 4]."""
        rays = pixels_to_rays(
            x, y, intrinsics, c2w, (self.near, self.far), pixel_center=self.pixel_center
        )
        if self.ndc:
            rays = rays_to_ndc(rays, self.height, self.width, intrinsics)
        return rays

    def view_rays(self, c2w: Tensor, intrinsics: Tensor):
        """A function from flat pixel numbers [B] to the rays of one camera."""

        def rays_of(pixels: Tensor) -> Rays:
            x, y = pixels % self.width, pixels // self.width
            return self.rays(x.float(), y.float(), c2w, intrinsics)

        return rays_of

    def over_background(self, pixels: Tensor, background: Tensor | None = None) -> Tensor:
        """uint8 pixels [..., 3|4] -> float32 [..., 3] in [0, 1], blended over the background."""
        background = self.background if background is None else background
        pixels = pixels.float() / 255.0
        if pixels.shape[-1] == 3:
            return pixels
        rgb, alpha = pixels[..., :3], pixels[..., 3:]
        return rgb * alpha + background * (1.0 - alpha)

    def picture(self, view: int) -> Tensor:
        """View ``view`` as float32 [H, W, 3] over the background, on the CPU."""
        return self.over_background(self.images[view].cpu())

    def pick(
        self, views: Tensor, x: Tensor, y: Tensor, background: Tensor | None = None
    ) -> tuple[Rays, Tensor]:
        """Rays and colours [B, 3] of pixels x, y [B] (integers) in views [B]."""
        target = self.over_background(self.images[views, y, x], background)
        rays = self.rays(x.float(), y.float(), self.c2w[views], self.intrinsics[views])
        return rays, target

    def sample_rays(
        self,
        num_rays: int,
        generator: torch.Generator,
        *,
        one_image: bool = False,
        crop: float = 1.0,
        background: Tensor | None = None,
    ) -> tuple[Rays, Tensor]:
        """Random training rays [B] and their colours [B, 3] in [0, 1].

        one_image: all from one random picture (``--no_batching``). crop: fraction of the height
        and width around the centre to draw from (``--precrop_frac``). background [B, 3]: behind
        transparent pixels, instead of the scene's.
        """
        device = self.images.device

        def draw(low: int, high: int, count: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=generator, device=device)

        views = self._train[draw(0, len(self._train), 1 if one_image else num_rays)]
        views = views.expand(num_rays)
        half_w, half_h = self.width / 2 * crop, self.height / 2 * crop
        x0, x1 = int(self.width / 2 - half_w), max(1, int(self.width / 2 + half_w))
        y0, y1 = int(self.height / 2 - half_h), max(1, int(self.height / 2 + half_h))
        return self.pick(views, draw(x0, x1, num_rays), draw(y0, y1, num_rays), background)

    def describe(self) -> str:
        """One line for the log."""
        counts = ", ".join(f"{len(self.splits.get(name, []))} {name}" for name in SPLITS)
        kind = "RGBA" if self.images.shape[-1] == 4 else "RGB"
        space = "NDC" if self.ndc else "world"
        return (
            f"{counts} views, {self.width}x{self.height} {kind}, focal "
            f"{self.intrinsics[0, 0].item():.2f}, {space} rays from {self.near:g} to {self.far:g}"
        )


def check_pose(c2w: np.ndarray, name: str) -> None:
    """Raise ValueError unless c2w [3, 4] is finite and its first three columns are a rotation."""
    if c2w.shape != (3, 4) or not np.isfinite(c2w).all():
        raise ValueError(f"{name}: its pose holds NaN, infinity or not 3x4 numbers; re-export it")
    rotation = c2w[:, :3].astype(np.float64)
    error = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > 1e-2 or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"{name}: its pose is not a rotation (|R^T R - 1| = {error:.2g}, "
            f"det = {np.linalg.det(rotation):.2g}); expected a right-handed camera-to-world matrix"
        )
