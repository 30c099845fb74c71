"""From flags to modules: renderers, optimizer groups, schedules. The one file that sees both."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nerf import datasets
from nerf.datasets import DataSettings
from nerf.datasets.scene import Scene
from nerf.encodings import ENCODINGS
from nerf.field import FeatureField, NeRFField
from nerf.flags.dreamfusion import SCHEDULES, STRUCTURAL
from nerf.occupancy import OccupancyGrid
from nerf.occupancy_renderer import OccupancyRenderer
from nerf.rays import Rays
from nerf.renderer import NeRFRenderer
from nerf.scene_bounds import carve, scene_space
from nerf.text3d.orbit import OrbitRanges
from nerf.text3d.particles import Particles
from nerf.text3d.renderer import ObjectRenderer, PixelImages
from nerf.text3d.shading import LightingSettings
from nerf.training.schedules import highest, scheduled, stepped


def data_settings(args: argparse.Namespace) -> DataSettings:
    """Which scene to load and how. --half_res is --downscale 2."""
    return DataSettings(
        datadir=Path(args.datadir),
        dataset_type=args.dataset_type,
        testskip=args.testskip,
        downscale=args.downscale * (2 if args.half_res else 1),
        factor=args.factor,
        llffhold=args.llffhold,
        ndc=not args.no_ndc,
        spherify=args.spherify,
        near=args.near,
        far=args.far,
        background=float(args.white_bkgd),
        shape=args.shape,
        data_store=args.data_store,
        store_dir=Path(args.store_dir) if args.store_dir else None,
        pixel_center=args.pixel_center,
        render_factor=args.render_factor,
    )


def load_scene(args: argparse.Namespace, warn=print) -> Scene:
    """The scene that ``args`` names, on the CPU. ValueError if its files are missing or wrong."""
    return datasets.load_scene(data_settings(args), warn)


def build_renderer(args: argparse.Namespace, scene: Scene | None = None, warn=print):
    """The networks and sampling that ``args`` asks for, with weights from torch's global seed.

    scene: what an occupancy grid must cover; not needed without ``--occ_grid``.
    """
    background = float(args.white_bkgd)

    def field(depth: int, width: int) -> NeRFField:
        return NeRFField(
            depth,
            width,
            multires=args.multires,
            multires_views=args.multires_views,
            use_viewdirs=args.use_viewdirs,
            encode=args.i_embed == 0,
            out_channels=5 if args.N_importance > 0 else 4,  # the fifth is nerf-pytorch's, unused
        )

    if args.occ_grid:
        return _occupancy_renderer(args, scene, field, warn)
    return NeRFRenderer(
        field(args.netdepth, args.netwidth),
        field(args.netdepth_fine, args.netwidth_fine) if args.N_importance > 0 else None,
        num_samples=args.N_samples,
        num_importance=args.N_importance,
        background=background,
        perturb=args.perturb > 0,
        raw_noise_std=args.raw_noise_std,
        lindisp=args.lindisp,
    )


def _occupancy_renderer(args: argparse.Namespace, scene: Scene, mlp, warn) -> OccupancyRenderer:
    """One field with an occupancy grid in the space that the scene's cameras look into."""
    space = scene_space(
        scene,
        args.march_steps,
        bound=args.scene_bound,
        contract=args.contract,
        cone_angle=args.cone_angle,
    )
    grid = OccupancyGrid(args.occ_res).to(scene.c2w.device)
    has_alpha = scene.images.shape[-1] == 4
    if args.hull_init == "on" or (args.hull_init == "auto" and has_alpha and not args.contract):
        space, warning = carve(scene, grid, space)
        if warning:
            warn(warning)
    warn(f"scene space: {space}; {grid.fraction:.1%} of the grid to look at")
    if args.field == "mlp":
        field = mlp(args.netdepth, args.netwidth)
    else:
        field = FeatureField(
            ENCODINGS[args.field](args.grid_res),
            multires_views=args.multires_views,
            use_viewdirs=args.use_viewdirs,
        )
    return OccupancyRenderer(
        field,
        grid,
        space,
        background=float(args.white_bkgd),
        random_background=args.random_bg and has_alpha,
        target_samples=args.target_samples,
        composite=args.composite,
        early_stop=args.early_stop,
        near_scaling=args.near_scaling,
        lambda_tv=args.lambda_tv,
        resample=args.resample,
    )


def parameter_groups(renderer, args: argparse.Namespace) -> list[dict]:
    """Adam's groups: features on grids learn at their own rate ("scale" times the others')."""
    tables = []
    for member in getattr(renderer, "members", [renderer]):
        field = getattr(member, "field", None)
        if field is not None and args.field != "mlp":
            tables += field.encoding.parameters()
    others = set(renderer.parameters()) - set(tables)
    groups = [{"params": [p for p in renderer.parameters() if p in others], "scale": 1.0}]
    if tables:
        groups.append({"params": tables, "scale": args.lrate_grid / args.lrate})
    return groups


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate of update ``step`` (0 is the first), after a linear warm-up."""
    warmup = min(1.0, (step + 1) / args.lrate_warmup) if args.lrate_warmup else 1.0
    if args.lr_schedule == "cosine":
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.N_iters)))
    else:
        decay = 0.1 ** (step / (args.lrate_decay * 1000))
    return args.lrate * warmup * decay


def compile_fields(renderer: nn.Module, rays: Rays, warn=print) -> bool:
    """Compile the renderer's ``fields`` in place, if that works here and gives the same numbers.

    rays [B]: a few to try it on. Otherwise one warning, the networks stay as they were, and False.
    """
    fields = renderer.fields
    with torch.no_grad():
        expected = renderer(rays)[-1].rgb
    try:
        for field in fields:
            field.compile(dynamic=True)  # packed queries come in many sizes
        compiled = renderer(rays)[-1].rgb
        compiled.sum().backward()
        difference = (compiled - expected).abs().max().item()
        problem = f"colors differ by {difference:.2g}" if not difference <= 1e-3 else None
    except Exception as error:  # a compiler can fail in any way; training must not
        problem = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    renderer.zero_grad(set_to_none=True)
    if problem:
        for field in fields:
            field._compiled_call_impl = None
        warn(f"--compile: not used, {problem}")
    return problem is None


def object_renderer(args: argparse.Namespace):
    """The module that ``args`` asks for, with weights from torch's global seed."""
    if args.space == "2d":
        return PixelImages(args.batch_views, int(highest(args.train_res)))
    members = [_one_object(args) for _ in range(args.n_particles)]
    return members[0] if args.n_particles == 1 else Particles(members)


def _one_object(args: argparse.Namespace) -> ObjectRenderer:
    if args.field == "mlp":
        field = NeRFField(
            args.netdepth,
            args.netwidth,
            multires=args.multires,
            use_viewdirs=False,
            encode=args.i_embed == 0,
            activation=args.activation,
        )
    else:
        smooth = {"smooth": True} if args.smooth_planes else {}
        field = FeatureField(ENCODINGS[args.field](args.grid_res, **smooth), use_viewdirs=False)
    return ObjectRenderer(
        field,
        OccupancyGrid(args.occ_res, decay=0.5),  # the fog it starts with goes in a few looks
        bound=args.bound,
        num_steps=args.march_steps,
        blob_scale=args.blob_scale,
        blob_std=args.blob_std,
        density_scale=args.density_scale,
        normals=args.normals or ("analytic" if args.field == "mlp" else "fd"),
        early_stop=args.early_stop,
        learned_background=args.background == "learned",
    )


def orbit_ranges(args: argparse.Namespace) -> OrbitRanges:
    """Where random cameras stand."""
    return OrbitRanges(
        azimuth_deg=tuple(args.azimuth_range),
        elevation_deg=tuple(args.elevation_range),
        radius=tuple(args.radius_range),
        fov_deg=tuple(args.fov_range),
        sphere_rate=args.sphere_rate,
        jitter_position=args.jitter_pos,
        jitter_target=args.jitter_target,
        jitter_up=args.jitter_up,
    )


def lighting_settings(args: argparse.Namespace) -> LightingSettings:
    """By which laws views are lit."""
    return LightingSettings(
        ambient=args.ambient,
        p_diffuse=args.p_diffuse,
        p_textureless=args.p_textureless,
        background=args.background,
        p_random=args.p_random_bg,
    )


def scheduled_flags(args: argparse.Namespace, step: int) -> dict[str, Any]:
    """The flags that are schedules, as numbers at ``step``; train_res is a whole number."""
    now: dict[str, Any] = {name: scheduled(getattr(args, name), step) for name in SCHEDULES}
    return now | {"train_res": stepped(args.train_res, step)}


def adopt_saved_flags(args: argparse.Namespace, saved: dict, log) -> None:
    """Set the flags that decide which weights fit to those of a checkpoint, and log the changes."""
    for name in (*STRUCTURAL, "bound", "march_steps", "normals"):
        if name in saved and saved[name] != getattr(args, name):
            if not name.startswith(("prompt", "negative_")):
                log(f"--{name} {getattr(args, name)} -> {saved[name]} (as it was trained)")
            setattr(args, name, saved[name])
