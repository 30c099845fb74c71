"""Flags of run_nerf.py: nerf-pytorch's by name, type, default and meaning, and ours beside them."""

import argparse
from pathlib import Path

from nerf.datasets import DATASETS
from nerf.encodings import PLANE_LOOKUPS
from nerf.flags import by_device, common
from nerf.flags.checkpoints import reading_flags
from nerf.flags.common import (
    add_export_flags,
    add_grid_flags,
    add_network_flags,
    add_run_flags,
    add_viewer_flags,
    check_export_name,
    check_run_flags,
    refuse_first,
)
from nerf.flags.optimization import SCHEDULE
from nerf.flags.parser import Parser, Section
from nerf.flags.types import (
    fraction,
    frequencies,
    grid_resolution,
    hashmap_size,
    non_negative,
    non_negative_int,
    non_negative_schedule,
    parts,
    positive_float,
    positive_int,
    reduction,
    render_reduction,
    rising_steps,
    whole_schedule,
)
from nerf.losses import PIXEL_LOSSES
from nerf.media import MESH_FORMATS
from nerf.training.schedules import highest
from nerf.volume import PACKED_WEIGHTS

# A checkpoint fits a run only where these agree. The rest may change on resume, and is reported.
STRUCTURAL = (
    "netdepth netwidth netdepth_fine netwidth_fine multires multires_views i_embed use_viewdirs "
    "N_importance dataset_type white_bkgd no_ndc spherify lindisp pixel_center "
    "field grid_res log2_hashmap_size occ_grid occ_res contract"
).split()
# What --fast stands for: as if these stood on the command line before your own flags.
FAST = (
    "--occ_grid --field triplane --pixel_center --random_bg --hull_init auto --batching "
    "--precrop_iters 0 --raw_noise_std 0 --amp bf16 --lrate 2e-3 --lr_schedule cosine "
    "--lrate_warmup 20 --N_iters 6000 --by_device fast"
).split()
# The short help page: the flags that one needs, and two commands that work in a fresh clone.
MAIN_FLAGS = (
    "config", "datadir", "dataset_type", "expname", "basedir", "device", "N_iters", "no_reload",
    "factor", "white_bkgd", "fast", "viewer", "render_only", "render_test", "export",
)  # fmt: skip
EXAMPLES = (
    "python run_nerf.py --config configs/demo.txt                     # train and measure",
    "python run_nerf.py --config configs/demo.txt --export demo.glb   # then: its mesh",
)

# fmt: off


def add_data_flags(parser: Parser) -> None:
    """Flags of the pictures."""
    section = parser.section(
        "data", "The pictures: where they are, in which format, which of them, and how large."
    )
    flag, switch = section.flag, section.switch
    flag("datadir", "FOLDER", "./data/llff/fern", "folder of the scene")
    flag("dataset_type", sorted(DATASETS), "llff",
        f"format of the scene: {', '.join(sorted(DATASETS))}; auto: recognized by the files in "
        "--datadir; also used when the flag is absent and the folder is not LLFF",
        metavar="TYPE")
    flag("testskip", non_negative_int, 8,
        "keep every N-th validation and test view of formats with splits; 0 or 1: all")
    flag("llffhold", non_negative_int, 8,
        "llff, colmap, single transforms.json: every N-th view is for validation and testing; "
        "0: one view")
    flag("shape", "NAME", "greek", "deepvoxels: the object, armchair, cube, greek or vase")
    flag("data_store", ("memory", "mmap", "auto"), "memory",
        "where the pictures are kept: in memory, or in a memory-mapped file (mmap); auto: mmap "
        "if they would take more than half of the free memory")
    flag("store_dir", "FOLDER", None,
        "folder of the memory-mapped file (--data_store mmap); default: --datadir")
    switch("half_res", "half the width and height")
    flag("downscale", reduction, 1, "make pictures N times smaller")
    flag("factor", reduction, 8,
        "make pictures N times smaller; the default, 8, is for llff and colmap only")


def add_space_flags(parser: Parser) -> None:
    """Flags of the scene's space and of what is behind it."""
    section = parser.section(
        "scene", "The scene's coordinates, where its rays run, and what is behind it."
    )
    flag, switch = section.flag, section.switch
    switch("white_bkgd",
        "white background behind transparent pixels and rays that hit nothing; off: black")
    switch("no_ndc",
        "--ndc: normalized device coordinates for forward-facing llff and colmap captures "
        "(default); --no-ndc or --no_ndc: world coordinates", positive="ndc")
    switch("spherify", "llff, colmap: 360-degree capture around an object")
    switch("pixel_center",
        "cast rays through pixel centers; off: through corners, as in nerf-pytorch")
    flag("near", non_negative, 0.0,
        "distance at which rays begin, in scene units (not for NDC scenes); 0: automatic")
    flag("far", non_negative, 0.0,
        "distance at which rays end, in scene units (not for NDC scenes); 0: automatic")


def add_field_flags(parser: Parser) -> None:
    """Flags of the coarse and the fine network."""
    section = add_network_flags(parser)
    flag, switch = section.flag, section.switch
    flag("netdepth_fine", parts, 8, "layers of the fine network (--N_importance above 0)")
    flag("netwidth_fine", positive_int, 256,
        "channels per layer of the fine network (--N_importance above 0)")
    switch("use_viewdirs", "color depends on the viewing direction")
    flag("multires_views", frequencies, 4,
        "frequencies in the positional encoding of viewing directions, 1 to 32")


def add_sampling_flags(parser: Parser) -> None:
    """Flags of sampling along rays without an occupancy grid, and of memory."""
    section = parser.section(
        "sampling",
        f"Samples along rays without --occ_grid, and the size of the blocks. {SCHEDULE}"
    )
    flag, switch = section.flag, section.switch
    flag("N_samples", positive_int, 64, "coarse samples per ray")
    flag("N_importance", non_negative_int, 0,
        "fine samples per ray, added to the coarse ones; 0: no fine network")
    flag("perturb", non_negative, 1.0,
        "above 0: training samples at random positions in their intervals; 0: fixed positions")
    switch("lindisp", "space coarse samples evenly in 1 / depth; off: in depth")
    flag("raw_noise_std", non_negative_schedule, 0.0,
        "standard deviation of the noise added to raw densities in training; no effect with "
        "--occ_grid")
    flag("chunk", positive_int, 1024 * 32,
        "maximum number of rays rendered together; fewer need less memory")
    flag("netchunk", positive_int, 1024 * 64,
        "maximum number of points in one network call; fewer need less memory")


def add_fast_flags(parser: Parser) -> None:
    """Flags of the fast path: one field with an occupancy grid."""
    section = parser.section(
        "fast",
        f"The fast path: one field, sampled through the grid of section occupancy. {SCHEDULE}"
    )
    flag, switch = section.flag, section.switch
    switch("fast",
        "the fast path with recommended flags; flags you type override them; on the command line "
        "only")
    switch("occ_grid", "one field, sampled only in occupied cells of a grid")
    flag("target_samples", whole_schedule, 8192,
        "samples per update with --occ_grid; it sets the number of rays, and --N_rand has no "
        "effect; a schedule jumps at its steps")
    flag("scene_bound", non_negative, 0.0,
        "half side of the scene's cube, in scene units; 0: from the cameras")
    switch("contract",
        "unbounded scene: map everything beyond radius 1 into the shell between radius 1 and 2")
    flag("cone_angle", non_negative, 0.01, "with --contract: step length per unit of distance")
    switch("random_bg", "train over random background colors if the pictures have alpha")
    flag("hull_init", ("off", "on", "auto"), "off",
        "initialize the occupancy grid with the visual hull of the alpha masks; auto: if the "
        "pictures have alpha masks")
    switch("hull_rays", "train only on pixels that may see the visual hull of --hull_init")
    add_feature_flags(section)
    add_loss_flags(section)


def add_feature_flags(section: Section) -> None:
    """Flags of the features on grids."""
    flag = section.flag
    flag("grid_steps", rising_steps, "0",
        "coarse to fine: updates at which tri-planes become finer, from --grid_start to "
        "--grid_res, and the learning rate schedule restarts, e.g. 500,1000,2000; 0: --grid_res "
        "from the first update on",
        metavar="STEPS")
    flag("grid_start", grid_resolution, 64,
        "with --grid_steps: cells per side of the finest tri-planes at the first update, 16 or "
        "more")
    flag("plane_lookup", ("auto", *sorted(PLANE_LOOKUPS)), "auto",
        "how tri-planes are interpolated: rows of a table (rows) or PyTorch's grid_sample, with "
        "the same result; auto: rows on a GPU, grid_sample on a CPU")
    flag("log2_hashmap_size", hashmap_size, 17,
        "hash grids: base-2 logarithm of the largest number of entries per level; Instant-NGP: 19")


def add_loss_flags(section: Section) -> None:
    """Flags of the fast path's compositing and regularization."""
    flag = section.flag
    flag("composite", sorted(PACKED_WEIGHTS), "cumsum",
        "how transmittance is computed: one running sum over all rays (cumsum), or a table padded "
        "to the longest ray (padded), with the same result")
    flag("near_scaling", non_negative, 0.0,
        "scale gradients of samples nearer to the camera than X by (distance / X) squared; 0: no "
        "scaling")
    flag("resample", non_negative_int, 0,
        "importance resampling: N samples per ray from the weights of a first no-grad pass; "
        "0: off")
    flag("lambda_tv", non_negative_schedule, 0.0,
        "weight of the tri-planes' total variation (smoother features), e.g. 0.03; 0: off")
    flag("lambda_l1", non_negative_schedule, 0.0,
        "weight of the sum of sample opacities along a ray (less fog, thinner surfaces), e.g. "
        "1e-4; 0: off")


def add_training_flags(parser: Parser) -> None:
    """Flags of the batches of rays."""
    section = parser.section("training", "The loss, batches of rays, compilation and restarts.")
    flag, switch = section.flag, section.switch
    flag("loss", sorted(PIXEL_LOSSES), "mse",
        "loss on colors: mse, squared differences; huber, smooth_l1: linear beyond --loss_delta, "
        "which makes outliers count less; PSNR is always computed from squared differences")
    flag("loss_delta", positive_float, 0.1,
        "color difference (colors range from 0 to 1) beyond which huber and smooth_l1 are linear")
    flag("N_rand", positive_int, 32 * 32 * 4, "rays per update, over all processes")
    switch("no_batching",
        "--batching: each update takes rays from all pictures (default); --no-batching or "
        "--no_batching: from one picture", positive="batching")
    flag("precrop_iters", non_negative_int, 0,
        "number of updates, from the first on, that take rays only from the middle of the "
        "pictures")
    flag("precrop_frac", fraction, 0.5,
        "fraction of the height and width that --precrop_iters uses, above 0, up to 1")
    switch("compile", "compile the networks (torch.compile): for GPUs, slower on CPUs")
    switch("alive_start",
        "draw the initial weights again until half of the rays meet density; about half of all "
        "random initializations have zero density everywhere (docs/details.md); off: as in "
        "nerf-pytorch; no effect with --occ_grid")
    switch("fog_start",
        "start from thin fog of the background's color, which never gets stuck but converges more "
        "slowly (docs/details.md); no effect with --occ_grid")
    flag("dead_restarts", non_negative_int, 3,
        "maximum number of restarts with another seed if a network is stuck from the start; 0: "
        "train on without a restart")


def add_output_flags(parser: Parser) -> None:
    """Flags of what is rendered, measured and exported."""
    section = parser.section(
        "rendering", "Test views and the camera path, during training or afterwards."
    )
    flag, switch = section.flag, section.switch
    switch("render_only", "render the camera path of a trained run, without training")
    switch("render_test", "with --render_only: render and measure the test views")
    switch("validate",
        "measure the validation views of a trained run, without training; the results are in "
        "render_val_STEP/")
    flag("render_factor", render_reduction, 0,
        "render pictures N times smaller, e.g. 4; 0 or 1: full size")
    flag("i_testset", non_negative_int, 50000,
        "interval, in updates, at which the test views are measured; 0: only at the end")
    flag("metres_per_unit", non_negative, 0.0,
        "length in meters of one unit of the data's files (1 for a metric capture); depth files "
        "are in meters; 0: depth in units of the data's files")
    add_viewer_flags(parser)
    section = add_export_flags(parser, mesh_res=256)
    flag = section.flag
    flag("export_points", "FILE", None,
        "write a point cloud with colors and normals; FILE ends in .ply")
    flag("num_points", positive_int, 200_000, "approximate number of points of --export_points")
    flag("export_bound", non_negative, 0.0,
        "half side of the exported cube around the origin, in scene units; 0: automatic")
    flag("export_world", ("files", "scene"), "files",
        "coordinates of exported meshes and points: files, those of the data's files (a COLMAP "
        "model, transforms.json); scene, those of training, in which captures are upright and of "
        "size 1")


# fmt: on
def nerf_parser() -> Parser:
    """The flags of run_nerf.py."""
    parser = Parser(
        "run_nerf.py",
        "Train, render and measure a neural radiance field from posed pictures.",
        EXAMPLES,
        MAIN_FLAGS,
    )
    add_run_flags(
        parser,
        unnamed="the name of the config, or of the data folder",
        images="interval, in updates, between validations; 0: never",
        videos="interval, in updates, between videos of the camera path (one more at the end); "
        "0: never",
        measures=True,
    )
    add_data_flags(parser)
    add_space_flags(parser)
    add_field_flags(parser)
    add_sampling_flags(parser)
    add_fast_flags(parser)
    add_grid_flags(parser)
    add_training_flags(parser)
    add_output_flags(parser)
    return parser


class Flags(argparse.Namespace):
    """Parsed flags.

    given: those that were set, not by default. notes: lines for the log. sources: the file or the
    variable of those that were set, but not typed.
    """

    __slots__ = ("given", "notes", "sources")  # not in vars(), which goes into checkpoints

    def __init__(
        self,
        values: dict[str, object],
        given: frozenset[str],
        notes: list[str],
        sources: dict[str, str],
    ) -> None:
        super().__init__(**values)
        self.given, self.notes, self.sources = given, notes, sources


def parse(argv: list[str] | None = None) -> Flags:
    """The flags of this run of run_nerf.py."""
    parser = nerf_parser()
    args = common.parse(parser, argv, run_name, tuple(FAST))
    given = by_device.given_flags(parser, args)
    notes = parser.site_notes() + parser.checked(by_device.choose_by_device, args, given)
    if args.config and Path(args.config).name == "args.txt":  # a run's record lists every flag
        changed = {name for name in given if getattr(args, name) != parser.get_default(name)}
        given = frozenset(changed | {"dataset_type"})
    if "half_res" in given and args.half_res:
        given |= {"downscale"}
    return Flags(vars(args), given, notes, parser.sources())


def given_flags(args: argparse.Namespace) -> frozenset[str] | None:
    """The names of the flags that were set on the command line or in a file; None: unknown."""
    return getattr(args, "given", None)


def _without(args: argparse.Namespace, *flags: str) -> str:
    """How to do without one of some flags, each with its value that is off, such as "contract 0".

    One that was typed is left out; one from a config has to be overridden by its value.
    """
    ways = []
    for flag in flags:
        name = flag.split()[0].removeprefix("no-")
        place = getattr(args, "sources", {}).get(name)
        ways.append(f"add --{flag} ({place} sets {name})" if place else f"leave out --{name}")
    return ", or ".join(ways)


def run_name(args: argparse.Namespace) -> str:
    """The name of a run of posed pictures that was given none."""
    return Path(args.config).stem if args.config else Path(args.datadir).resolve().name


def check_nerf_flags(args: argparse.Namespace, num_ranks: int) -> None:
    """Raise ValueError on flags that contradict one another or cannot work."""
    check_export_name("export", args.export, MESH_FORMATS)
    check_export_name("export_points", args.export_points, (".ply",))
    loads = [*reading_flags(args), *(["--ft_path"] * bool(args.ft_path))]
    of_grid = ("contract", "random_bg", "resample", "lambda_l1", "hull_rays")
    needs_grid = [f"--{name}" for name in of_grid if getattr(args, name)]
    needs_grid += ["--hull_init on"] * (args.hull_init == "on")
    given = given_flags(args)
    in_ndc = args.dataset_type == "llff" and not args.no_ndc
    if given is not None and "dataset_type" not in given:  # the folder decides, see nerf.datasets
        folder = Path(args.datadir)
        in_ndc &= not folder.is_dir() or (folder / "poses_bounds.npy").exists()
    refuse_first([
        (args.N_rand % num_ranks,
         f"--N_rand {args.N_rand} does not divide by {num_ranks} processes; "
         f"use a multiple of {num_ranks}"),
        (args.no_reload and loads,
         f"--no_reload and {''.join(loads[:1])} contradict each other; leave one out"),
        (args.validate and args.render_factor > 1,
         "--validate measures pictures of full size; leave out --render_factor"),
        (args.half_res and args.downscale > 1,
         f"--half_res and --downscale {args.downscale} both reduce the pictures; "
         f"{_without(args, 'no-half_res', 'downscale 1')}"),
        (args.spherify and in_ndc,
         "--spherify needs --no_ndc: NDC is only for cameras that face forward"),
        (args.lindisp and in_ndc,
         "--lindisp needs --no_ndc: samples in NDC are already even in 1 / depth"),
        (args.N_importance and args.N_samples < 3,
         f"--N_samples {args.N_samples}: importance sampling (--N_importance) needs 3 or more"),
        (args.field != "mlp" and not args.occ_grid,
         f"--field {args.field} needs --occ_grid (or use --fast for both)"),
        (highest(args.lambda_tv) and args.field != "triplane",
         f"--lambda_tv is for --field triplane, not {args.field}; "
         f"{_without(args, 'lambda_tv 0')}"),
        (args.grid_steps != "0" and args.field != "triplane",
         f"--grid_steps is for --field triplane, not {args.field}; "
         f"{_without(args, 'grid_steps 0')}"),
        (args.grid_steps != "0" and args.grid_start > args.grid_res,
         f"--grid_start {args.grid_start} exceeds --grid_res {args.grid_res}; make it smaller"),
        (needs_grid and not args.occ_grid,
         f"{''.join(needs_grid[:1])} needs --occ_grid (or use --fast); or leave it out"),
        (args.hull_rays and args.precrop_iters,
         "--hull_rays and --precrop_iters both choose pixels; "
         f"{_without(args, 'no-hull_rays', 'precrop_iters 0')}"),
        (args.hull_init == "on" and args.contract,
         "--hull_init on needs a bounded scene; "
         f"{_without(args, 'hull_init off', 'no-contract')}"),
    ])  # fmt: skip
    check_run_flags(args)
