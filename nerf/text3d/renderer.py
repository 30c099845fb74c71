"""Volume rendering of one object from a text: a field, lighting, a background network.

The object fills a cube around the origin, sampled in the occupied cells of an occupancy grid as in
``nerf.occupancy_renderer``. Besides colors, rays get normals and what the losses on shape need.
(Poole et al. 2022, DreamFusion, section 3.1; the density blob of Lin et al. 2022, Magic3D.)
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerf.encodings import FrequencyEncoding
from nerf.field import Field, density_packed, query_packed
from nerf.occupancy import Box, OccupancyGrid, Samples
from nerf.rays import Rays
from nerf.renderer import LoadStateDict
from nerf.text3d.shading import Lighting, shade
from nerf.volume import packed_weights_cumsum, sum_per_ray

UPDATE_EVERY = 16  # steps between updates of the occupancy grid
FAINT = 1e-3  # alpha of one sample, below which it is left out of training
# With static shapes: room for samples, as a multiple of those of the last step that was read, since
# the next cameras may be nearer; and what it is rounded up to.
SPARE_ROOM, ROOM_STEP = 1.5, 8192
# Finite differences from four densities, at a tetrahedron's corners, instead of the usual six.
TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))


class ObjectRendered(NamedTuple):
    """Rays [R] rendered; backfacing and spread are for losses."""

    rgb: Tensor  # [R, 3] in [0, 1], background included
    opacity: Tensor  # [R] in [0, 1]
    depth: Tensor  # [R] weighted mean of t, 0 where opacity is 0
    normal: Tensor  # [R, 3] weighted sum of unit normals, world axes; 0 if not computed
    backfacing: Tensor  # [R] sum of weight x max(0, n v)^2 (DreamFusion's orientation loss)
    spread: Tensor  # [R] variance of t along the ray (HiFA's z-variance)


class Background(nn.Module):
    """A background network: a color for every direction."""

    def __init__(self, multires: int = 4, width: int = 32):
        super().__init__()
        self.encoding = FrequencyEncoding(multires)
        self.layers = nn.Sequential(
            nn.Linear(self.encoding.out_dim, width), nn.ReLU(), nn.Linear(width, 3)
        )

    def forward(self, viewdirs: Tensor) -> Tensor:
        """Unit directions [R, 3] -> RGB [R, 3] in [0, 1]."""
        return torch.sigmoid(self.layers(self.encoding(viewdirs)).float())


class ObjectRenderer(nn.Module):
    """One object in a cube of half side ``bound``, with its occupancy grid.

    Density is density_scale softplus(raw + blob_scale (1 - |x| / blob_std)), per scene unit: it
    starts as a ball of that radius, or fog in front of the cameras would be the easiest answer.
    num_steps: marching steps along the cube's diagonal. normals: from the density's gradient,
    "analytic" (by autograd; the field must be twice differentiable) or "fd" (finite differences).
    early_stop: transmittance below which samples are culled (0: none). learned_background: train a
    background network. static_shapes: train with lists of samples of constant length
    (``nerf.occupancy``), chosen anew in ``end_step``.

    room_used: [2] the numbers of samples found in this step, marched and not culled; of the largest
    micro-batch.
    """

    edge: Tensor  # [3], ``bound`` along each axis

    def __init__(
        self,
        field: Field,
        grid: OccupancyGrid,
        *,
        bound: float,
        num_steps: int,
        blob_scale: float,
        blob_std: float,
        density_scale: float = 1.0,
        normals: str = "analytic",
        early_stop: float = 1e-3,
        learned_background: bool = False,
        static_shapes: bool = False,
    ):
        super().__init__()
        self.field, self.grid = field, grid
        self.background_net = Background() if learned_background else None
        edge = torch.full((3,), float(bound))
        self.register_buffer("edge", edge, persistent=False)
        self.num_steps, self.bound = num_steps, float(bound)
        self._step = Box(-edge, edge, num_steps).step
        self.blob_scale, self.blob_std = blob_scale, blob_std
        self.density_scale = density_scale
        self.normals, self.early_stop = normals, early_stop
        self.static_shapes, self.batch_samples = static_shapes, 0
        self.room_used = edge.new_zeros(2)
        # Rays of a micro-batch, and rows for its marched and its other samples; None: as many as
        # there are, which the host waits for.
        self.room: tuple[int, int, int] | None = None
        self._num_rays = 0

    @property
    def space(self) -> Box:
        """The cube, on the module's device."""
        return Box(-self.edge, self.edge, self.num_steps, self._step)

    def density(self, unit: Tensor) -> Tensor:
        """Density [N] per scene unit at unit points [N, 3]."""
        return self._activate(density_packed(self.field, unit), unit)

    def albedo(self, unit: Tensor) -> Tensor:
        """Albedo, RGB [N, 3] in [0, 1], at unit points [N, 3]."""
        ray_indices = torch.zeros(len(unit), dtype=torch.long, device=unit.device)
        viewdirs = torch.zeros_like(unit[:1])
        return torch.sigmoid(query_packed(self.field, unit, viewdirs, ray_indices)[1])

    def _activate(self, raw: Tensor, unit: Tensor) -> Tensor:
        """Density [N] from the field's output [N] and the blob at unit points [N, 3]."""
        return self.density_scale * F.softplus(raw + self.blob(unit))

    def blob(self, unit: Tensor) -> Tensor:
        """What is added to the field's raw density at unit points [N, 3]: [N], the first blob."""
        return self.blob_scale * (1.0 - unit.norm(dim=-1) * (self.bound / self.blob_std))

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Update the occupancy grid, every ``UPDATE_EVERY`` steps; equal on all ranks."""
        self.room_used = torch.zeros_like(self.edge[:2])
        if step % UPDATE_EVERY == 0:
            self.grid.update(
                self.density, step, self.space.step, generator, static=self.static_shapes
            )

    def end_step(self, room_used: Sequence[float]) -> None:
        """Make room for the samples of the next steps. room_used: as read from the device."""
        if self.static_shapes:
            rows = [int(SPARE_ROOM * count / ROOM_STEP + 1) * ROOM_STEP for count in room_used]
            self.room = self._num_rays, rows[0], rows[1]

    def _rows(self, num_rays: int) -> tuple[int | None, int | None]:
        """Rows for marched and for other samples; None: as many as there are."""
        self._num_rays = num_rays
        if self.room is None or self.room[0] != num_rays or not torch.is_grad_enabled():
            return None, None
        return self.room[1], self.room[2]

    def forward(
        self, rays: Rays, lighting: Lighting, jitter: Tensor | None = None, lit: bool | None = None
    ) -> ObjectRendered:
        """Rays [R] rendered under ``lighting`` [R].

        jitter [R, 1] in [0, 1) shifts each ray's samples; None: deterministic. lit: whether to
        compute normals; None: if any ray is lit. For a part of a batch pass what holds for the
        whole batch, else the orientation loss would depend on how the batch is split.
        """
        num_rays = len(rays.origins)
        room, room_after_culling = self._rows(num_rays)
        samples = self.grid.march(rays, self.space, jitter, room)
        marched = samples.num_found
        if self.early_stop:
            training = torch.is_grad_enabled()
            samples = self._cull_occluded(samples, num_rays, training, room_after_culling)
        self.batch_samples = len(samples.ray_indices)
        if self.static_shapes:
            used = torch.stack([marched, samples.num_found]).float()
            self.room_used = torch.maximum(self.room_used, used)
        background = lighting.background
        if self.background_net is not None:
            background = torch.lerp(
                background, self.background_net(rays.viewdirs), lighting.use_background_net
            )
        sigma, albedo, normals = self._query(samples, rays, lighting.is_lit if lit is None else lit)
        weights = packed_weights_cumsum(sigma, samples.lengths, samples.ray_indices, num_rays)
        color = albedo
        if normals is None:
            normals = torch.zeros_like(albedo)
            facing = torch.zeros_like(sigma)
        else:
            points = self.space.from_unit(samples.points)
            color = shade(albedo, normals, points, lighting.part(samples.ray_indices))
            facing = (normals * rays.viewdirs[samples.ray_indices]).sum(-1).clamp(min=0).square()
        t = samples.t
        values = torch.cat(
            [color, torch.ones_like(t)[:, None], t[:, None], t.square()[:, None], normals], dim=-1
        )
        sums = sum_per_ray(weights[:, None] * values, samples.ray_indices, num_rays)  # [R, 9]
        # Weights are detached: the loss shall turn surfaces towards the camera, not remove them.
        backfacing = sum_per_ray(weights.detach() * facing, samples.ray_indices, num_rays)
        opacity = sums[:, 3]
        hit = opacity > 1e-6  # below, the mean of t is rounding error
        mass = torch.where(hit, opacity, torch.ones_like(opacity))
        depth = torch.where(hit, sums[:, 4] / mass, 0.0)
        spread = torch.where(hit, (sums[:, 5] / mass - depth**2).clamp(min=0), 0.0)
        rgb = sums[:, :3] + background * (1.0 - opacity[:, None])
        return ObjectRendered(rgb, opacity, depth, sums[:, 6:9], backfacing, spread)

    def _query(
        self, samples: Samples, rays: Rays, lit: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Density [N], albedo [N, 3] and, if ``lit``, unit normals [N, 3] of packed samples."""
        need_normals = lit and len(samples.ray_indices) > 0
        points, graph = samples.points, torch.is_grad_enabled()
        analytic = need_normals and self.normals == "analytic"
        # The density's gradient needs float32 throughout, so an outer autocast is switched off.
        no_autocast = (
            torch.autocast(points.device.type, enabled=False) if analytic else nullcontext()
        )
        with torch.set_grad_enabled(graph or analytic), no_autocast:
            if analytic:
                points = points.detach().requires_grad_()
            raw_sigma, raw_rgb = query_packed(
                self.field, points, rays.viewdirs, samples.ray_indices
            )
            sigma = self._activate(raw_sigma, points)
            gradient = None
            if analytic:
                gradient = torch.autograd.grad(sigma.sum(), points, create_graph=graph)[0]
        if need_normals and not analytic:
            gradient = self._differences(samples.points)
        albedo = torch.sigmoid(raw_rgb)
        if not graph:
            sigma, albedo = sigma.detach(), albedo.detach()
        # normalize's epsilon of 1e-12 is far below any gradient of a visible surface.
        return sigma, albedo, None if gradient is None else -F.normalize(gradient, dim=-1)

    def _differences(self, unit: Tensor) -> Tensor:
        """A multiple of the density's gradient [N, 3], by finite differences over half a cell."""
        offset = 1.0 / self.grid.resolution
        terms = [
            self.density(unit + offset * corner)[:, None] * corner
            for corner in unit.new_tensor(TETRAHEDRON)
        ]
        return sum(terms, start=torch.zeros_like(unit))

    @torch.no_grad()
    def _cull_occluded(
        self, samples: Samples, num_rays: int, training: bool, room: int | None
    ) -> Samples:
        """``samples`` without occluded ones, those with transmittance up to ``early_stop``.

        A no-grad pass over the density alone (NerfAcc, section 3.2). training: also leave out
        samples with alpha up to FAINT. Softplus has a small slope where its value is small, so they
        hardly train, and normals make every sample several times as expensive.
        """
        sigma = self.density(samples.points)
        weights = packed_weights_cumsum(sigma, samples.lengths, samples.ray_indices, num_rays)
        alpha = -torch.expm1(-sigma * samples.lengths)
        kept = weights > self.early_stop * alpha  # weights = transmittance * alpha
        if training:
            kept &= alpha > FAINT
        return samples.select(kept, num_rays, room)

    @torch.no_grad()
    def surface_density(self, rays: Rays) -> Tensor:
        """The density [K] of the samples at which the transmittance of rays falls to a half.

        Meshes take their threshold from it: it is the density of what looks solid.
        """
        num_rays = len(rays.origins)
        samples = self.grid.march(rays, self.space, None)
        sigma = self.density(samples.points)
        weights = packed_weights_cumsum(sigma, samples.lengths, samples.ray_indices, num_rays)
        alpha = -torch.expm1(-sigma * samples.lengths)
        before = torch.where(alpha > 0, weights / alpha.clamp(min=1e-30), 0.0)  # transmittance
        return sigma[(before > 0.5) & (before * (1 - alpha) <= 0.5)]

    def checkpoint_state(self) -> dict[str, Any]:
        """The state dicts of the field, the occupancy grid and the background network."""
        background = self.background_net
        return {
            "network_fn_state_dict": self.field.state_dict(),
            "occupancy_state_dict": self.grid.state_dict(),
            "background_state_dict": {} if background is None else background.state_dict(),
        }

    def load_checkpoint_state(self, state: dict[str, Any], load: LoadStateDict, where: str) -> None:
        """Restore ``checkpoint_state``."""
        load(self.field, state["network_fn_state_dict"], f"{where}: field")
        load(self.grid, state["occupancy_state_dict"], f"{where}: occupancy grid")
        if self.background_net is not None:
            load(self.background_net, state["background_state_dict"], f"{where}: background")

    def report(self) -> dict[str, float]:
        """Samples of the latest forward pass, and the fraction of cells that are occupied."""
        return {"samples": self.batch_samples, "occupied": self.grid.fraction}


class PixelImages(nn.Module):
    """Images [V, 3, H, W] optimized pixel by pixel, instead of an object (``--space 2d``)."""

    def __init__(self, num_views: int, size: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_views, 3, size, size))
        self.batch_samples = 0
        self.first = 0  # index of the image that the first rays of ``forward`` belong to

    def pictures(self) -> Tensor:
        """All images as they are now, [V, H, W, 3] in [0, 1]."""
        return torch.sigmoid(self.logits).permute(0, 2, 3, 1)

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Do nothing: there is no occupancy grid."""

    @property
    def room_used(self) -> Tensor:
        """Zeros: there are no samples."""
        return self.logits.new_zeros(2)

    def end_step(self, room_used: Sequence[float]) -> None:
        """Do nothing: there are no samples."""

    def forward(
        self, rays: Rays, lighting: Lighting, jitter: Tensor | None = None, lit: bool | None = None
    ) -> ObjectRendered:
        """The pixels of images ``first``, ``first`` + 1, ..., as many as H * W fits into the rays.

        Rays, lighting and jitter have no effect on them.
        """
        num_views, _, height, width = self.logits.shape
        count = len(rays.origins) // (height * width)
        rows = torch.arange(self.first, self.first + count, device=self.logits.device) % num_views
        rgb = torch.sigmoid(self.logits[rows]).permute(0, 2, 3, 1).reshape(-1, 3)
        one = torch.ones_like(rgb[:, 0])
        return ObjectRendered(rgb, one, one, 0 * rgb, 0 * one, 0 * one)

    def checkpoint_state(self) -> dict[str, Any]:
        """The images."""
        return {"network_fn_state_dict": self.state_dict()}

    def load_checkpoint_state(self, state: dict[str, Any], load: LoadStateDict, where: str) -> None:
        """Restore ``checkpoint_state``."""
        load(self, state["network_fn_state_dict"], f"{where}: images")

    def report(self) -> dict[str, float]:
        """No measurements."""
        return {}
