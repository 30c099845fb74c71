"""A dead start, when all rays show one color and nothing more can be learned: alarm and remedy.

NeRF's density is ReLU(raw). Where raw is negative everywhere, all rays show the background and no
gradient flows. If an opaque surface fills the view, the first sample of every ray takes all the
weight, and no gradient reaches the others. A random network is born so quite often: at the start
its raw density has one sign nearly everywhere, that of the last layer's bias.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from nerf.rays import Rays
from nerf.renderer import NeRFRenderer, RayNoise, Rendered, Renderer
from nerf.training import rng

FLAT_STD = 1e-3  # standard deviation of colors, below which they count as one color
PROBE_EVERY = 20  # steps from one rendering of the probe to the next
PROBE_RAYS = 512
CANDIDATES = 16  # rays that are drawn for each one of the probe
PROBE_STEP = 2**40  # the step whose generator draws the probe; training never reaches it
BIRTH_STEP = 2**41  # and the first of those that seed weights which are drawn again
# A network is born alive if every level gives this share of the probe's rays more than this
# opacity: those that a few rays alone keep alive may die in the first steps (docs/details.md).
ALIVE_SHARE, ALIVE_OPACITY = 0.5, 0.01
MOST_DRAWS = 100  # of new weights
# Raw density and color, up to sign, that a start as fog adds: sigmoid(3) is 0.95. A network's own
# are within 0.1 of 0 (density) and 0.4 (color) at the start. docs/details.md has other values.
FOG_DENSITY, FOG_COLOR = 0.5, 3.0

Context = Callable[[], AbstractContextManager[Any]]
DrawRays = Callable[[int, torch.Generator], tuple[Rays, Tensor]]  # and their colors [B, 3]


class Probe:
    """A fixed sample of training rays, rendered now and then to notice a dead start.

    A batch would not do: it may be a single ray, or rays that all miss the object. rays [B], target
    [B, 3] their colors in [0, 1], noise that of densities in training. context: in which they are
    rendered, such as autocast; without gradients unless it enables them. ``levels``: as they were
    rendered last.
    """

    def __init__(
        self,
        renderer: Renderer,
        rays: Rays,
        target: Tensor,
        noise: RayNoise,
        context: Context = nullcontext,
    ) -> None:
        self.renderer, self.rays, self.target = renderer, rays, target
        self.noise, self.context = noise, context
        self.levels: tuple[Rendered, ...] = ()
        self._flat: Tensor | None = None

    @classmethod
    def draw(
        cls,
        sample_rays: DrawRays,
        renderer: Renderer,
        seed: int,
        device: torch.device,
        context: Context = nullcontext,
    ) -> Self:
        """The probe of a run with ``seed``, on ``device``, from what ``sample_rays`` draws there.

        Half of its rays are drawn at random. The others are those of many candidates whose colors
        are the farthest from the mean: they see the object however small it is.
        """
        generator = rng.step_generator(seed, PROBE_STEP, device)
        rays, target = sample_rays(CANDIDATES * PROBE_RAYS, generator)
        half = PROBE_RAYS // 2
        distance = (target - target.mean(0)).square().sum(-1)
        distance[:half] = -1.0  # those drawn at random
        far, near = distance.topk(PROBE_RAYS - half), distance.topk(half, largest=False)
        order = torch.cat([far.indices, near.indices])
        drawn = renderer.draw_noise(PROBE_RAYS, generator)
        # Without density noise a network may look dead which the noise keeps alive.
        noise = RayNoise(None, None, drawn.density_coarse, drawn.density_fine)
        return cls(renderer, rays.part(order), target[order], noise, context)

    @torch.no_grad()
    def render(self, most: int) -> tuple[Rendered, ...]:
        """All levels of the probe, ``most`` rays at a time; training notices nothing of it."""
        batch_samples, parts = self.renderer.batch_samples, []
        with self.context():
            for start in range(0, len(self.target), most):
                piece = slice(start, start + most)
                levels = self.renderer.forward(self.rays.part(piece), self.noise.part(piece))
                parts.append([[tensor.detach() for tensor in level] for level in levels])
            self.renderer.penalties()  # forgets what a forward keeps for them, with its graph
        self.renderer.batch_samples = batch_samples
        whole = (map(torch.cat, zip(*level, strict=True)) for level in zip(*parts, strict=True))
        self.levels = tuple(Rendered(*level) for level in whole)
        return self.levels

    def is_flat(self, most: int) -> Tensor:
        """Whether a level is dead now -> bool [] on the device; ``most`` rays at a time."""
        return flat_levels(self.render(most), self.target).any()

    def is_alive(self, most: int) -> bool:
        """Whether half of the rays meet density on every level, and not all show one color."""
        shares = [(level.opacity > ALIVE_OPACITY).float().mean() for level in self.render(most)]
        dead = flat_levels(self.levels, self.target).any()
        return bool((torch.stack(shares).min() > ALIVE_SHARE) & ~dead)

    def watch(self, step: int, most: int) -> Tensor:
        """``is_flat`` as of the latest ``PROBE_EVERY``-th step; the host waits for nothing."""
        if self._flat is None or step % PROBE_EVERY == 0:
            self._flat = self.is_flat(most)
        return self._flat

    def diagnosis(self) -> str:
        """A message that names the level and the color; at least one level must be flat."""
        flat = flat_levels(self.levels, self.target).tolist()
        number = flat.index(True)
        opacity = self.levels[number].opacity
        hit = opacity > 0
        if opacity.sum() < 0.5 * hit.sum() or not hit.any():
            color = "all background"
        else:
            color = "one solid color" if hit.all() else "one solid color or background"
        where = "" if all(flat) else f" of the {('coarse', 'fine')[number]} level"
        return f"every ray{where} is {color}"


def redraw_until_alive(renderer: NeRFRenderer, probe: Probe, most: int, seed: int) -> int:
    """Draw a new renderer's weights again until ``probe`` sees it alive; how often they were drawn.

    About half of all networks are born without any density. Nothing else changes: the first draw
    stays where it is alive, and the others are functions of ``seed``. most: rays rendered together.
    """
    for draws in range(MOST_DRAWS):
        if probe.is_alive(most):
            return draws
        generator = rng.step_generator(seed, BIRTH_STEP + draws, "cpu")
        rng.seed_everything(generator.initial_seed())
        for module in renderer.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return MOST_DRAWS


def start_as_fog(renderer: NeRFRenderer) -> None:
    """Let new fields begin with thin fog everywhere, in nearly the color of the background.

    Rays that miss the object then have hardly any error, so they do not drive the density below 0
    before the object has shown where it is needed.
    """
    color = FOG_COLOR * (2 * renderer.background - 1)
    for field in filter(None, (renderer.coarse, renderer.fine)):
        field.start_as_fog(FOG_DENSITY, color)


def flat_levels(levels: tuple[Rendered, ...], target: Tensor) -> Tensor:
    """Which levels show a single color although ``target`` [B, 3] varies -> [L] bool.

    Rays without any density, such as those that miss the scene's space, are judged apart: they show
    the background, which may be another color.
    """
    flat = []
    for level in levels:
        groups = [level.opacity > 0, level.opacity <= 0]
        rgb, wanted = (
            torch.stack([_spread(colors, group) for group in groups]).max()
            for colors in (level.rgb, target)
        )
        flat.append((rgb < FLAT_STD) & (wanted > 10 * FLAT_STD))
    return torch.stack(flat)


def _spread(colors: Tensor, group: Tensor) -> Tensor:
    """The largest standard deviation [] of a channel of colors [B, 3] in ``group`` [B] bool.

    0 for groups of one or none.
    """
    share = group / group.sum().clamp(min=1)
    mean = (colors * share[:, None]).sum(0)
    return ((colors - mean).square() * share[:, None]).sum(0).sqrt().max()
