"""An object in a field of another kind or size: tri-planes resampled, anything else by a short fit.

The fit asks for the old object's density and albedo at random points of its cube; no picture is
rendered.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerf.encodings import TriPlane, resized_planes
from nerf.field import Field, query_packed
from nerf.text3d.renderer import ObjectRenderer

STEPS, POINTS = 600, 4096  # of a fit; points per step
LR_GRID, LR_NETWORK = 2e-2, 3e-3  # learning rates at the start; they fall to 0
EMPTY = -8.0  # softplus makes a density of 3e-4 of it
OPAQUE = 7.0  # optical depth of a step with alpha 0.999
COLOR = 10.0  # weight of albedo beside density


class FitError(NamedTuple):
    """Mean absolute differences at new points where the old object is: alpha of a step, albedo."""

    alpha: float
    albedo: float


def resample(new: Field, old: Field) -> bool:
    """Give ``new`` the weights of ``old``, its tri-planes interpolated to the size of the new ones.

    Returns False, with nothing changed, if the fields differ in more than the size of tri-planes.
    """
    weights, own = old.state_dict(), new.state_dict()
    if _kind(new) != _kind(old):
        return False
    if weights.keys() != own.keys():
        return False
    for name, value in weights.items():
        if isinstance(new.encoding, TriPlane) and name.startswith("encoding.planes."):
            weights[name] = resized_planes(value, tuple(own[name].shape))
    if any(weights[name].shape != value.shape for name, value in own.items()):
        return False
    new.load_state_dict(weights)
    return True


def _kind(field: Field) -> tuple:
    """What fields must have in common besides the shapes of their weights."""
    activation, sizes = getattr(field, "activation", None), getattr(field.encoding, "sizes", None)
    return type(field), type(field.encoding), activation, sizes


def fit(new: ObjectRenderer, old: ObjectRenderer, seed: int) -> FitError:
    """Train the field of ``new`` to the density and albedo of ``old``; what is left in the end.

    Unit coordinates of both are the same points; a density is matched as it is per scene unit, so
    ``new`` may have another blob or density scale. On the device of ``new``, to which ``old`` is
    expected to be moved.
    """
    device = next(new.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.Adam(_groups(new.field), betas=(0.9, 0.99), eps=1e-15)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sample = _sampler(old, generator)
    for _ in range(STEPS):
        points = sample()
        optimizer.zero_grad(set_to_none=True)
        _loss(new, old, points).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        points = torch.cat([sample() for _ in range(4)])
        (found, albedo), (argument, color) = (_query(each, points) for each in (new, old))
        alpha, target = _alpha(new, found), _alpha(old, argument)
        there = target > 0.1
        if not there.any():
            return FitError(float((alpha - target).abs().mean()), 0.0)
        difference = (alpha - target).abs()[there].mean()
        return FitError(float(difference), float((albedo - color).abs()[there].mean()))


def _groups(field: Field) -> list[dict]:
    """Adam's parameter groups: features on grids learn faster."""
    trained = [p for p in field.parameters() if p.requires_grad]
    grids = set(field.encoding.parameters())
    networks: list[nn.Parameter] = [p for p in trained if p not in grids]
    return [
        {"params": networks, "lr": LR_NETWORK},
        *([{"params": [p for p in trained if p in grids], "lr": LR_GRID}] if grids else []),
    ]


def _sampler(old: ObjectRenderer, generator: torch.Generator) -> Callable[[], Tensor]:
    """A function that draws unit points [POINTS, 3]: half in occupied cells, half anywhere."""
    grid, device = old.grid, generator.device
    occupied = grid.occupied.nonzero()[:, 0]

    def uniform(count: int) -> Tensor:
        return torch.rand(count, 3, generator=generator, device=device)

    def draw() -> Tensor:
        if not len(occupied):
            return uniform(POINTS) * 2 - 1
        count = POINTS // 2
        picked = torch.randint(len(occupied), (count,), generator=generator, device=device)
        inside = grid.cell_points(occupied[picked], uniform(count))
        return torch.cat([inside, uniform(POINTS - count) * 2 - 1])

    return draw


def _query(renderer: ObjectRenderer, points: Tensor) -> tuple[Tensor, Tensor]:
    """Softplus' argument [N] and albedo [N, 3] at unit points [N, 3]."""
    rows = torch.zeros(len(points), dtype=torch.long, device=points.device)
    raw, rgb = query_packed(renderer.field, points, torch.zeros_like(points[:1]), rows)
    return raw + renderer.blob(points), torch.sigmoid(rgb)


def _alpha(renderer: ObjectRenderer, argument: Tensor) -> Tensor:
    """Alpha [N] of a marching step from softplus' argument [N]."""
    density = renderer.density_scale * F.softplus(argument)
    return -torch.expm1(-density * renderer.space.step)


def _loss(new: ObjectRenderer, old: ObjectRenderer, points: Tensor) -> Tensor:
    """Differences of density, as softplus' argument, and of albedo where the old object is.

    Empty is empty and opaque is opaque: beyond EMPTY and OPAQUE nothing more is asked for.
    """
    with torch.no_grad():
        argument, color = _query(old, points)
        weight = _alpha(old, argument) + 1e-2
        density = (old.density_scale / new.density_scale) * F.softplus(argument)
        target = _before_softplus(density).clamp(min=EMPTY)
    found, albedo = _query(new, points)
    opaque = OPAQUE / (new.density_scale * new.space.step)
    found = torch.where(target <= EMPTY, found.clamp(min=EMPTY), found)
    found = torch.where(target >= opaque, found.clamp(max=opaque), found)
    shape = F.smooth_l1_loss(found, target.clamp(max=opaque))
    return shape + COLOR * (weight[:, None] * (albedo - color).square()).mean()


def _before_softplus(density: Tensor) -> Tensor:
    """The argument at which softplus is ``density`` [N]; of next to nothing, that of 1e-6."""
    safe = density.clamp(min=1e-6)
    return safe + torch.log(-torch.expm1(-safe))
