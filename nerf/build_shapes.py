"""Checks of shapes at the main interfaces while a run goes on (``--debug_shapes``).

Fields, renderers, compositing and score distillation, by jaxtyping and beartype. The dimensions of
one call have names, and the same name must have the same length throughout. Nothing is read from a
GPU.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nerf import renderer as scene_renderer
from nerf.field import FeatureField, NeRFField
from nerf.occupancy_renderer import OccupancyRenderer
from nerf.renderer import NeRFRenderer
from nerf.text3d.renderer import ObjectRenderer

Shapes = Mapping[
    str, tuple[Any, str]
]  # name -> tensor, and its dimensions as jaxtyping writes them
# (arguments after self, result) -> what to check
Describe = Callable[..., Shapes]


def check(where: str, shapes: Shapes) -> None:
    """ValueError, which names the first tensor that is not float or not of the shape expected.

    Tensors that are None are left out.
    """
    from beartype.door import is_bearable
    from jaxtyping import Float, jaxtyped

    passed: list[str] = []
    with jaxtyped("context"):  # remembers the length of every named dimension
        for name, (value, dimensions) in shapes.items():
            if value is None:
                continue
            expected: Any = Float[Tensor, dimensions]
            if not is_bearable(value, expected):
                found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
                raise ValueError(
                    f"--debug_shapes: {where}: {name} is {found}, expected float "
                    f"[{dimensions}]{' after ' + ', '.join(passed) if passed else ''}"
                )
            passed.append(f"{name} {list(value.shape)}")


def field_shapes(
    points: Tensor, viewdirs: Tensor, ray_indices: Any = None, *, result: Any
) -> Shapes:
    """``Field.forward``: raw density and color of each point."""
    return {
        "points": (points, "*samples 3"),
        "viewdirs": (viewdirs, "rays 3"),
        "density": (result[0], "*samples"),
        "color": (result[1], "*samples 3"),
    }


def scene_shapes(rays: Any, noise: Any = None, *, result: Any) -> Shapes:
    """``Renderer.forward``: every level of a scene."""
    shapes = {
        "origins": (rays.origins, "rays 3"),
        "directions": (rays.directions, "rays 3"),
        "near": (rays.near, "rays 1"),
        "far": (rays.far, "rays 1"),
        "jitter": (getattr(noise, "jitter", None), "rays samples"),
    }
    for level, rendered in enumerate(result):
        shapes[f"rgb of level {level}"] = rendered.rgb, "rays 3"
        shapes[f"opacity of level {level}"] = rendered.opacity, "rays"
        shapes[f"depth of level {level}"] = rendered.depth, "rays"
    return shapes


def object_shapes(
    rays: Any, lighting: Any, jitter: Any = None, lit: Any = None, *, result: Any
) -> Shapes:
    """``ObjectRenderer.forward``: an object under its light."""
    return {
        "origins": (rays.origins, "rays 3"),
        "directions": (rays.directions, "rays 3"),
        "light": (lighting.light, "rays 3"),
        "background": (lighting.background, "rays 3"),
        "jitter": (jitter, "rays 1"),
        "rgb": (result.rgb, "rays 3"),
        "opacity": (result.opacity, "rays"),
        "depth": (result.depth, "rays"),
        "normal": (result.normal, "rays 3"),
    }


def composite_shapes(
    rgb: Tensor, weights: Tensor, t: Tensor, background: Any, *, result: Any
) -> Shapes:
    """``nerf.volume.composite``: samples to pixels."""
    return {
        "rgb": (rgb, "*rays samples 3"),
        "weights": (weights, "*rays samples"),
        "t": (t, "*rays samples"),
        "blended": (result[0], "*rays 3"),
        "opacity": (result[1], "*rays"),
        "depth": (result[2], "*rays"),
    }


def distill_shapes(
    prior: Any, images: Tensor, conditions: Any, noise: Any, *more: Any, result: Any
) -> Shapes:
    """``guidance.sds.distill``: pictures to the gradient of their latents."""
    return {
        "images": (images, "views 3 size size"),
        "text": (conditions.text, "views ..."),
        "negative": (conditions.negative, "views ..."),
        "u": (noise.u, "views"),
        "noise": (noise.epsilon, "views channels height width"),
        "latents": (result.latents, "views channels height width"),
        "gradient": (result.gradient, "views channels height width"),
        "loss": (result.loss, ""),
    }


METHODS: tuple[tuple[type[nn.Module], Describe], ...] = (
    (NeRFField, field_shapes),
    (FeatureField, field_shapes),
    (NeRFRenderer, scene_shapes),
    (OccupancyRenderer, scene_shapes),
    (ObjectRenderer, object_shapes),
)


def checked(where: str, function: Callable[..., Any], describe: Describe, skip: int = 0) -> Any:
    """``function``, whose arguments after the first ``skip`` and result are checked."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        check(where, describe(*given[skip:], **named, result=result))
        return result

    return call


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block the attribute ``name`` of ``owner`` is ``value``."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def debug_shapes(
    enabled: bool, log: Callable[[str], None], distillation: Any = None
) -> Iterator[None]:
    """Inside the block, if ``enabled``, every call of the main interfaces is checked.

    distillation: the module ``guidance.sds``. ValueError if a package is missing.
    """
    if not enabled:
        yield
        return
    try:
        import beartype  # noqa: F401
        import jaxtyping  # noqa: F401
    except ImportError:
        raise ValueError(
            "--debug_shapes needs two more packages: pip install jaxtyping beartype"
        ) from None
    functions: list[tuple[Any, str, Describe]] = [(scene_renderer, "composite", composite_shapes)]
    if distillation is not None:
        functions.append((distillation, "distill", distill_shapes))
    with ExitStack() as stack:
        for kind, describe in METHODS:
            call = checked(f"{kind.__name__}.forward", kind.forward, describe, skip=1)
            stack.enter_context(replaced(kind, "forward", call))
        for module, name, describe in functions:
            call = checked(name, getattr(module, name), describe)
            stack.enter_context(replaced(module, name, call))
        names = [kind.__name__ for kind, _ in METHODS] + [name for _, name, _ in functions]
        log(f"shapes are checked, which is slower: {', '.join(names)}")
        yield
