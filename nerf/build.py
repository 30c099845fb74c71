"""Modules from flags, which know nothing of these."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nerf import datasets
from nerf.coarse_to_fine import GridSchedule
from nerf.datasets import DataSettings
from nerf.datasets.scene import Scene
from nerf.encodings import ENCODINGS, HashGrid, TriPlane
from nerf.field import FeatureField, Field, NeRFField
from nerf.flags import nerf as nerf_flags
from nerf.flags.dreamfusion import STRUCTURAL
from nerf.occupancy import Box, OccupancyGrid
from nerf.occupancy_renderer import OccupancyRenderer
from nerf.rays import Rays
from nerf.renderer import NeRFRenderer
from nerf.scene_bounds import carve, hull_scene, scene_space
from nerf.text3d.particles import Particles
from nerf.text3d.renderer import ObjectRenderer, PixelImages
from nerf.training.dead_start import start_as_fog
from nerf.training.monitor import READ_EVERY
from nerf.training.schedules import highest, stepped, value_at

Log = Callable[[str], None]
SceneRenderer = NeRFRenderer | OccupancyRenderer


def data_settings(args: argparse.Namespace) -> DataSettings:
    """The settings of data loading. --half_res is --downscale 2."""
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
        given=nerf_flags.given_flags(args),
    )


def load_scene(args: argparse.Namespace, log: Log = print) -> Scene:
    """Load the scene of ``args``, on the CPU. ValueError if its files are missing or wrong."""
    return datasets.load_scene(data_settings(args), log)


def build_renderer(
    args: argparse.Namespace,
    scene: Scene | None = None,
    log: Log = print,
    saved: Mapping[str, Any] | None = None,
) -> SceneRenderer:
    """The renderer of ``args``, with weights drawn from torch's global generator, on the CPU.

    scene: only needed for ``--occ_grid``, which takes its bounds from the scene's cameras. saved:
    the checkpoint that will be loaded, whose planes may still be coarse (``--grid_steps``).
    """

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
        assert scene is not None, "an occupancy grid needs the scene's bounds"
        return _occupancy_renderer(args, scene, field, log, saved)
    device = scene.c2w.device if scene is not None else torch.device("cpu")
    renderer = NeRFRenderer(
        field(args.netdepth, args.netwidth),
        field(args.netdepth_fine, args.netwidth_fine) if args.N_importance > 0 else None,
        num_samples=args.N_samples,
        num_importance=args.N_importance,
        background=float(args.white_bkgd),
        perturb=args.perturb > 0,
        raw_noise_std=value_at(args.raw_noise_std, 0),
        lindisp=args.lindisp,
        static_shapes=has_static_shapes(args, device),
    )
    if args.fog_start:
        start_as_fog(renderer)
    return renderer


def _occupancy_renderer(
    args: argparse.Namespace,
    scene: Scene,
    mlp: Callable[[int, int], NeRFField],
    log: Log,
    saved: Mapping[str, Any] | None,
) -> OccupancyRenderer:
    """One field, and an occupancy grid of the space that the scene's cameras see.

    mlp: makes the field of ``--field mlp`` from its depth and width. saved: see ``build_renderer``.
    """
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
        assert isinstance(space, Box), "a visual hull needs a bounded scene"
        space, warning = carve(scene, grid, space)
        if warning:
            log(warning)
    log(f"scene space: {space}; {grid.fraction:.1%} of the occupancy grid can be occupied")
    field: Field
    if args.field == "mlp":
        field = mlp(args.netdepth, args.netwidth)
    else:
        field = FeatureField(
            _encoding(args, saved),
            multires_views=args.multires_views,
            use_viewdirs=args.use_viewdirs,
        )
    return OccupancyRenderer(
        field,
        grid,
        space,
        background=float(args.white_bkgd),
        random_background=args.random_bg and has_alpha,
        target_samples=stepped(args.target_samples, 0),
        composite=args.composite,
        early_stop=args.early_stop,
        near_scaling=args.near_scaling,
        lambda_tv=value_at(args.lambda_tv, 0),
        lambda_l1=value_at(args.lambda_l1, 0),
        resample=args.resample,
        static_shapes=has_static_shapes(args, scene.c2w.device),
    )


def ray_pool(args: argparse.Namespace, scene: Scene, renderer: Any, log: Log = print) -> Scene:
    """The scene to draw training rays from: with --hull_rays only those that may meet the hull."""
    return hull_scene(scene, renderer.grid, renderer.space, log) if args.hull_rays else scene


def _encoding(args: argparse.Namespace, saved: Mapping[str, Any] | None) -> TriPlane | HashGrid:
    """The features of a scene; tri-planes as fine as in the checkpoint ``saved``."""
    if args.field == "hashgrid":
        return HashGrid(args.grid_res, log2_size=args.log2_hashmap_size)
    weights = (saved or {}).get("network_fn_state_dict", {})
    planes = [value for name, value in weights.items() if name.startswith("encoding.planes.")]
    finest = max((value.shape[-1] for value in planes if value.dim() == 4), default=0)
    return TriPlane(finest or grid_schedule(args).size(0), lookup=args.plane_lookup)


def grid_schedule(args: argparse.Namespace) -> GridSchedule:
    """How tri-planes become finer (``--grid_steps``); run_dreamfusion.py has no such flag."""
    steps = [int(part) for part in getattr(args, "grid_steps", "0").split(",")]
    start = getattr(args, "grid_start", args.grid_res)
    return GridSchedule(tuple(step for step in steps if step), start, args.grid_res)


def has_static_shapes(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether training uses constant shapes, so that a GPU is never waited for."""
    return args.static_shapes == "on" or (args.static_shapes == "auto" and device.type == "cuda")


def read_every(args: argparse.Namespace, device: torch.device) -> int:
    """Steps between two reads of the numbers of a step (``monitor.Monitor``)."""
    return READ_EVERY if has_static_shapes(args, device) else 1


def compile_renderer(renderer: SceneRenderer, rays: Rays, log: Log = print) -> bool:
    """Compile what training and rendering call; whether that works and gives the same colors.

    rays [B]: a few on which to try it. If it fails, ``log`` gets a warning and everything stays as
    it was. With static shapes each shape is compiled by itself, which is faster.
    """
    parts = renderer.compiled_parts()
    dynamic = None if renderer.static_shapes else True  # packed queries come in many sizes
    with torch.no_grad():
        expected = torch.stack([renderer(rays)[-1].rgb, renderer.render(rays).rgb])
    try:
        for owner, name in parts:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=dynamic))
        trained = renderer(rays)[-1].rgb
        trained.sum().backward()
        found = torch.stack([trained.detach(), renderer.render(rays).rgb])
        difference = (found - expected).abs().max().item()
        problem = f"colors differ by {difference:.2g}" if not difference <= 1e-3 else None
    except Exception as error:  # a compiler can fail in any way; training must not
        problem = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    renderer.zero_grad(set_to_none=True)
    if problem:
        for owner, name in parts:
            vars(owner).pop(name, None)
        log(f"--compile is ignored: {problem}")
    return problem is None


def object_renderer(
    args: argparse.Namespace, device: torch.device | None = None
) -> ObjectRenderer | Particles | PixelImages:
    """The module to optimize, with weights drawn from torch's global generator, on the CPU.

    device: on which it will be trained; None: the CPU.
    """
    if args.space == "2d":
        return PixelImages(args.batch_views, int(highest(args.train_res)))
    static = has_static_shapes(args, device or torch.device("cpu"))
    members = [_one_object(args, static) for _ in range(args.n_particles)]
    return members[0] if args.n_particles == 1 else Particles(members)


def _one_object(args: argparse.Namespace, static_shapes: bool) -> ObjectRenderer:
    field: Field
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
        OccupancyGrid(args.occ_res, decay=0.5),  # the initial fog leaves it within a few updates
        bound=args.bound,
        num_steps=args.march_steps,
        blob_scale=args.blob_scale,
        blob_std=args.blob_std,
        density_scale=args.density_scale,
        normals=args.normals or ("analytic" if args.field == "mlp" else "fd"),
        early_stop=args.early_stop,
        learned_background=args.background == "learned",
        static_shapes=static_shapes,
    )


def adopt_saved_flags(args: argparse.Namespace, saved: dict[str, Any], log: Log) -> None:
    """Set the flags of the network and the object to those of a checkpoint; log the changes.

    saved: the checkpoint's flags.
    """
    for name in (*STRUCTURAL, "bound", "march_steps", "normals"):
        if name in saved and saved[name] != getattr(args, name):
            if not name.startswith(("prompt", "negative_")):
                log(f"--{name} {getattr(args, name)} -> {saved[name]} (as the run was trained)")
            setattr(args, name, saved[name])
