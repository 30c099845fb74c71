"""Losses on the shape of an object (text to 3D). All take float32 rays [R] and return a scalar [].

They are means over rays, so their weights do not depend on resolution or batch size.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from nerf.encodings import TriPlane
from nerf.text3d.particles import Particles
from nerf.text3d.renderer import ObjectRendered, ObjectRenderer


def opacity_loss(opacity: Tensor) -> Tensor:
    """Mean of sqrt(o^2 + 0.01) of opacity [R]: favors empty space (DreamFusion, appendix A.2)."""
    return (opacity.square() + 0.01).sqrt().mean()


def entropy_loss(opacity: Tensor) -> Tensor:
    """Mean binary entropy in nats of opacity [R]: favors opaque and empty rays over fog."""
    # The slope is infinite at 0 and 1; 1e-3 keeps it below 7.
    o = opacity.clamp(1e-3, 1 - 1e-3)
    return -(o * o.log() + (1 - o) * (1 - o).log()).mean()


def orientation_loss(backfacing: Tensor) -> Tensor:
    """Mean of ``ObjectRendered.backfacing`` [R]: favors visible normals that face the camera.

    (Ref-NeRF, eq. 11; DreamFusion, appendix A.2.)
    """
    return backfacing.mean()


def spread_loss(spread: Tensor, opacity: Tensor) -> Tensor:
    """Mean variance of t along rays, weighted by opacity; both [R] (HiFA's z-variance)."""
    return (spread * opacity.detach()).mean()


def total_variation(renderer: nn.Module) -> Tensor:
    """Total variation [] of the tri-planes of the object; of Particles, of the current member."""
    member = renderer.current_member if isinstance(renderer, Particles) else renderer
    assert isinstance(member, ObjectRenderer) and isinstance(member.field.encoding, TriPlane)
    return member.field.encoding.variation()


# The losses on shape; --lambda_NAME is the weight of each.
SHAPE_LOSSES = ("opacity", "entropy", "orient", "spread", "tv")


def shape_losses(
    rendered: ObjectRendered, renderer: nn.Module, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """The losses [] on the object's shape, times their weights, by name; those with weight 0 not.

    weights: lambda_opacity, lambda_entropy, lambda_orient, lambda_spread and lambda_tv (total
    variation of the tri-planes). The names are without "lambda_".
    """
    terms: dict[str, Callable[[], Tensor]] = {
        "lambda_opacity": lambda: opacity_loss(rendered.opacity),
        "lambda_entropy": lambda: entropy_loss(rendered.opacity),
        "lambda_orient": lambda: orientation_loss(rendered.backfacing),
        "lambda_spread": lambda: spread_loss(rendered.spread, rendered.opacity),
        "lambda_tv": lambda: total_variation(renderer),
    }
    return {
        name.removeprefix("lambda_"): weights[name] * term()
        for name, term in terms.items()
        if weights[name]
    }
