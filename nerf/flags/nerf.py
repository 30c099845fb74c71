"""Flags of run_nerf.py: nerf-pytorch's by name, type, default and meaning, and ours beside them."""

import argparse
from pathlib import Path

import configargparse

from nerf.datasets import DATASETS
from nerf.flags import common
from nerf.flags.common import (
    add_export_flags,
    add_grid_flags,
    add_network_flags,
    add_run_flags,
    add_switch,
    add_viewer_flags,
    check_export_name,
    check_run_flags,
    new_parser,
)
from nerf.flags.types import fraction, frequencies, non_negative, non_negative_int, positive_int
from nerf.media import MESH_FORMATS
from nerf.volume import PACKED_WEIGHTS

# A checkpoint fits a run only where these agree. The rest may change on resume, and is reported.
STRUCTURAL = (
    "netdepth netwidth netdepth_fine netwidth_fine multires multires_views i_embed use_viewdirs "
    "N_importance dataset_type white_bkgd no_ndc spherify lindisp pixel_center "
    "field grid_res occ_grid occ_res contract"
).split()
# What --fast stands for: as if these stood on the command line before your own flags.
FAST = (
    "--occ_grid --field triplane --pixel_center --random_bg --hull_init auto --no-no_batching "
    "--precrop_iters 0 --raw_noise_std 0 --amp bf16 --lrate 2e-3 --lr_schedule cosine "
    "--lrate_warmup 20 --N_iters 6000"
).split()


def add_scene_flags(parser) -> None:
    """Flags of the pictures."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--datadir", default="./data/llff/fern", help="folder of the scene")
    add("--dataset_type", choices=sorted(DATASETS), default="llff", help="format; auto: look")
    add("--testskip", type=non_negative_int, default=8, help="keep 1/N of val and test views")
    add(
        "--data_store",
        choices=("memory", "mmap", "auto"),
        default="memory",
        help="in memory, in a mapped file, or there if they take over half of what is free",
    )
    add("--store_dir", help="folder of that file; default: the data folder")
    add("--shape", default="greek", help="deepvoxels: armchair, cube, greek or vase")
    add_switch(group, "white_bkgd", "white behind transparent pixels and rays that hit nothing")
    add_switch(group, "half_res", "halve the pictures of Blender and LINEMOD scenes")
    add(
        "--downscale", type=positive_int, default=1, help="reduce Blender pictures, and transforms'"
    )
    add(
        "--factor",
        type=positive_int,
        default=8,
        help="llff, colmap: pictures this many times smaller",
    )
    add_switch(group, "no_ndc", "llff: world coordinates (scenes that do not face forward)")
    add_switch(group, "lindisp", "space coarse samples evenly in 1 / depth")
    add_switch(group, "spherify", "llff: 360-degree capture around an object")
    add("--llffhold", type=non_negative_int, default=8, help="llff: every N-th view is for testing")
    add(
        "--near",
        type=non_negative,
        default=0.0,
        help="transforms, colmap: where rays begin; 0: auto",
    )
    add("--far", type=non_negative, default=0.0, help="transforms, colmap: where rays end; 0: auto")
    add_switch(group, "pixel_center", "rays through pixel centers (nerf-pytorch: corners)")


def add_field_flags(parser) -> None:
    """Flags of the networks and of sampling along rays of posed pictures."""
    add_network_flags(parser)
    group = parser.add_argument_group("view dependence and fine network")
    add = group.add_argument
    add("--netdepth_fine", type=positive_int, default=8, help="layers of the fine network")
    add("--netwidth_fine", type=positive_int, default=256, help="channels per layer, fine network")
    add_switch(group, "use_viewdirs", "color depends on the viewing direction (5D input)")
    add("--multires_views", type=frequencies, default=4, help="frequencies of the direction")
    add_grid_flags(parser)
    group = parser.add_argument_group("fast path")
    add = group.add_argument
    add_switch(group, "fast", "the recommended set of fast flags, weaker than any other you type")
    add_switch(group, "occ_grid", "one field, sampled only where an occupancy grid is not empty")
    add("--target_samples", type=positive_int, default=8192, help="samples per step; rays follow")
    add(
        "--scene_bound",
        type=non_negative,
        default=0.0,
        help="half side of the scene's cube; 0: auto",
    )
    add_switch(group, "contract", "unbounded scene: draw everything far away into a ball")
    add(
        "--cone_angle",
        type=non_negative,
        default=0.01,
        help="growth of steps with distance (contract)",
    )
    add_switch(group, "random_bg", "train over random backgrounds, where pictures have alpha")
    add(
        "--hull_init",
        choices=("off", "on", "auto"),
        default="off",
        help="start the grid as the visual hull of the alpha masks; auto: if there are any",
    )
    add("--composite", choices=sorted(PACKED_WEIGHTS), default="cumsum", help="packed blending")
    add(
        "--near_scaling",
        type=non_negative,
        default=0.0,
        help="scale gradients nearer than this by the distance squared; 0: do not",
    )
    add(
        "--resample",
        type=non_negative_int,
        default=0,
        help="samples a ray, drawn anew where a first look finds density; 0: those of that look",
    )
    add(
        "--lambda_tv",
        type=non_negative,
        default=0.0,
        help="smoothness of tri-planes, e.g. 0.03; 0: off",
    )
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--N_samples", type=positive_int, default=64, help="coarse samples per ray")
    add("--N_importance", type=non_negative_int, default=0, help="further, fine samples per ray")
    add("--perturb", type=non_negative, default=1.0, help="1: jitter training samples, 0: do not")
    add(
        "--raw_noise_std",
        type=non_negative,
        default=0.0,
        help="noise on training densities; not with occ_grid",
    )
    add("--chunk", type=positive_int, default=1024 * 32, help="most rays processed together")
    add("--netchunk", type=positive_int, default=1024 * 64, help="most points in one network call")


def add_nerf_flags(parser) -> None:
    """Flags of run_nerf.py alone."""
    group = parser.add_argument_group("ray batches")
    add = group.add_argument
    add(
        "--N_rand", type=positive_int, default=32 * 32 * 4, help="rays per step, over all processes"
    )
    add_switch(group, "no_batching", "all rays of a step from one picture")
    add(
        "--precrop_iters",
        type=non_negative_int,
        default=0,
        help="first steps use central crops only",
    )
    add("--precrop_frac", type=fraction, default=0.5, help="part of the picture taken for them")
    group = parser.add_argument_group("training posed pictures")
    add_switch(
        group, "compile", "compile the networks with torch.compile; for GPUs, slower on CPUs"
    )
    group.add_argument(
        "--dead_restarts", type=non_negative_int, default=3, help="new seeds if stuck"
    )
    group = parser.add_argument_group("rendering")
    add = group.add_argument
    add(
        "--i_testset",
        type=non_negative_int,
        default=50000,
        help="steps between test renders; 0: end",
    )
    add_switch(group, "render_only", "render from the newest checkpoint instead of training")
    add_switch(group, "render_test", "render the test views, with metrics, not the camera path")
    add("--render_factor", type=non_negative_int, default=0, help="render N times smaller, e.g. 4")
    add(
        "--metres_per_unit",
        type=non_negative,
        default=0.0,
        help="scene's scale, for depth; 0: unknown",
    )
    add_viewer_flags(parser)
    group = parser.add_argument_group("export (reads a finished run)")
    add_export_flags(group)
    add = group.add_argument
    parser.set_defaults(mesh_res=256)
    add("--export_points", help="write a point cloud with colors and normals: out.ply")
    add("--num_points", type=positive_int, default=200_000, help="of the point cloud, about")
    add(
        "--export_bound",
        type=non_negative,
        default=0.0,
        help="half side of the exported cube; 0: auto",
    )


def nerf_parser() -> configargparse.ArgumentParser:
    """The flags of run_nerf.py."""
    parser = new_parser("Train, render and measure a neural radiance field from posed pictures.")
    add_run_flags(parser)
    add_scene_flags(parser)
    add_field_flags(parser)
    add_nerf_flags(parser)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this run of run_nerf.py."""
    return common.parse(nerf_parser(), argv, run_name, FAST)


def run_name(args: argparse.Namespace) -> str:
    """The name of a run of posed pictures that was given none."""
    return Path(args.config).stem if args.config else Path(args.datadir).resolve().name


def check_nerf_flags(args: argparse.Namespace, num_ranks: int) -> None:
    """Raise ValueError on flags that contradict one another or cannot work."""
    if args.N_rand % num_ranks:
        raise ValueError(
            f"--N_rand {args.N_rand} does not divide by {num_ranks} processes; "
            f"use a multiple of {num_ranks}"
        )
    check_export_name("export", args.export, MESH_FORMATS)
    check_export_name("export_points", args.export_points, (".ply",))
    given = [n for n in ("render_only", "export", "export_points", "ft_path") if getattr(args, n)]
    if args.no_reload and given:
        other = f"--{given[0]}"
        raise ValueError(f"--no_reload and {other} contradict each other; leave one out")
    if args.half_res and args.downscale > 1:
        raise ValueError("--half_res and --downscale both reduce the pictures; leave one out")
    if args.dataset_type == "llff" and args.spherify and not args.no_ndc:
        raise ValueError("--spherify needs --no_ndc: NDC is only for cameras that face forward")
    if args.dataset_type == "llff" and args.lindisp and not args.no_ndc:
        raise ValueError("--lindisp needs --no_ndc: NDC is even in 1 / depth already")
    if args.N_importance and args.N_samples < 3:
        raise ValueError(
            f"--N_samples {args.N_samples} is too few for importance sampling; use 3 or more"
        )
    if args.field != "mlp" and not args.occ_grid:
        raise ValueError(f"--field {args.field} needs --occ_grid (or use --fast for both)")
    if args.lambda_tv and args.field != "triplane":
        raise ValueError(f"--lambda_tv is for --field triplane, not {args.field}; leave it out")
    fast_only = [f"--{n}" for n in ("contract", "random_bg", "resample") if getattr(args, n)]
    fast_only += ["--hull_init on"] * (args.hull_init == "on")
    if fast_only and not args.occ_grid:
        raise ValueError(f"{fast_only[0]} needs --occ_grid (or use --fast); or leave it out")
    if args.hull_init == "on" and args.contract:
        raise ValueError("--hull_init needs a bounded scene; leave it or --contract out")
    check_run_flags(args)
