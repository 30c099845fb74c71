"""Flags of an object from text: its space and shape, its cameras, its light, its losses."""

import argparse
from typing import Any

from nerf.field import ACTIVATIONS
from nerf.flags.common import refuse_first
from nerf.flags.optimization import SCHEDULE
from nerf.flags.parser import Parser
from nerf.flags.types import (
    fraction,
    non_negative,
    non_negative_int,
    non_negative_schedule,
    number_schedule,
    positive_float,
    positive_int,
    unit_schedule,
)
from nerf.training.schedules import schedule, steps_of, value_at, values_of

# fmt: off


def add_object_flags(parser: Parser) -> None:
    """Flags of the object."""
    section = parser.section("object", "The object: its space, its initial shape, its surface.")
    flag, switch = section.flag, section.switch
    flag("space", ("3d", "2d"), "3d",
        "3d: optimize an object; 2d: optimize --batch_views pictures, without an object")
    flag("bound", positive_float, 1.0, "half side of the object's cube, in scene units")
    flag("activation", sorted(ACTIVATIONS), "silu", "activation function of the MLP (--field mlp)")
    flag("blob_scale", non_negative, 10.0, "raw density of the initial blob at its center")
    flag("blob_std", positive_float, 0.5, "radius of the initial blob, in scene units")
    flag("density_scale", positive_float, 1.0,
        "factor on the density; larger: harder surfaces, fewer samples behind them")
    switch("smooth_planes", "blur the tri-planes at each lookup, for smoother surfaces")
    flag("normals", ("analytic", "fd"), None,
        "normals from the gradient of the density (analytic) or from finite differences (fd); "
        "default: analytic for --field mlp, else fd")


def add_camera_flags(parser: Parser) -> None:
    """Flags of the random cameras."""
    section = parser.section("cameras", f"The random cameras of an update. {SCHEDULE}")
    flag = section.flag
    flag("batch_views", positive_int, 4, "views per update, over all processes")
    flag("views_at_once", non_negative_int, 0,
        "views that a process renders and guides together; fewer need less memory; 0: all, and "
        "fewer if the memory of a single process runs out")
    flag("train_res", schedule, "64",
        "pixels per side of training renders, 8 or more; a schedule jumps at its steps")
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")}
    flag("azimuth_range", number_schedule, [-180.0, 180.0], "azimuths in degrees", **pair)
    flag("elevation_range", number_schedule, [-10.0, 90.0],
        "elevations in degrees, -90 to 90", **pair)
    flag("radius_range", number_schedule, [1.0, 1.5],
        "distances from the origin, in scene units", **pair)
    flag("fov_range", number_schedule, [40.0, 70.0],
        "fields of view in degrees, above 0, below 180", **pair)
    flag("sphere_rate", unit_schedule, 0.5,
        "fraction of the elevations drawn uniformly by area on the sphere; the others are uniform "
        "by angle")
    flag("view_spread", fraction, 1.0,
        "fraction of each fine view's range (8 directions, 4 heights), around its middle, from "
        "which cameras are drawn; 1: the whole range")
    flag("jitter_pos", non_negative_schedule, 0.1,
        "maximum random shift of a camera along each axis, in scene units")
    flag("jitter_target", non_negative_schedule, 0.2,
        "standard deviation of the point that a camera looks at, in scene units")
    flag("jitter_up", non_negative_schedule, 0.02, "standard deviation of a camera's up direction")


def add_light_flags(parser: Parser) -> None:
    """Flags of light and background."""
    section = parser.section(
        "light", f"Light and background during training. {SCHEDULE}"
    )
    flag = section.flag
    flag("albedo_steps", non_negative_int, 1000,
        "number of updates, from the first on, that show the plain albedo, without light")
    flag("p_diffuse", unit_schedule, 0.75,
        "fraction of the views that are lit after --albedo_steps, 0 to 1")
    flag("p_textureless", unit_schedule, 0.5,
        "fraction of the lit views that show the object in white, 0 to 1")
    flag("ambient", unit_schedule, 0.1, "fraction of ambient light in lit views, 0 to 1")
    flag("background", ("random", "learned", "white", "black"), "learned",
        "background of the object in training; random: one color per view; learned: a network")
    flag("p_random_bg", unit_schedule, 0.5,
        "fraction of the views with a random background color, whatever --background is, 0 to 1")


def add_loss_flags(parser: Parser) -> None:
    """Flags of the losses on the shape."""
    section = parser.section("losses", f"Weights of the losses on the object's shape. {SCHEDULE}")
    flag = section.flag
    flag("lambda_opacity", schedule, "0", "weight of the opacity loss: favors empty space")
    flag("lambda_entropy", schedule, "0", "weight of the entropy of the opacity: less fog")
    flag("lambda_orient", schedule, "0",
        "weight of the orientation loss: visible normals should face the camera")
    flag("lambda_spread", schedule, "0",
        "weight of the variance of depth along rays: thinner surfaces")
    flag("lambda_tv", schedule, "0",
        "weight of the tri-planes' total variation: smoother features")


# fmt: on
def check_camera_flags(args: argparse.Namespace) -> None:
    """Raise ValueError on places where no camera can stand."""
    ranges = {
        name: getattr(args, f"{name}_range") for name in ("azimuth", "elevation", "radius", "fov")
    }
    texts = {
        name: " ".join(end if isinstance(end, str) else f"{end:g}" for end in ends)
        for name, ends in ranges.items()
    }
    refuse_first(
        (any(value_at(low, step) > value_at(high, step) for step in steps_of(low, high)),
         f"--{name}_range {texts[name]}; expected two numbers, smaller first")
        for name, (low, high) in ranges.items()
    )  # fmt: skip
    all_values = {name: [*values_of(low), *values_of(high)] for name, (low, high) in ranges.items()}
    elevations, radii, fovs = list(all_values.values())[1:]
    refuse_first([
        (not -90 <= min(elevations) <= max(elevations) <= 90,
         f"--elevation_range {texts['elevation']}; expected degrees from -90 to 90"),
        (not 1e-6 < min(radii) <= max(radii) < 1e6,
         f"--radius_range {texts['radius']}; expected distances above 0 (to 1e6)"),
        (not 0 < min(fovs) <= max(fovs) < 180,
         f"--fov_range {texts['fov']}; expected degrees above 0, below 180"),
        (not -90 <= args.eval_elevation <= 90,
         f"--eval_elevation {args.eval_elevation:g}; expected degrees from -90 to 90"),
    ])  # fmt: skip
