"""Loaders by ``--dataset_type``. To add a format: write its file, add a line to DATASETS, test it.

Each entry takes the parsed flags and a function that warns, and returns a Scene on the CPU.
"""

import subprocess
import sys
from pathlib import Path

from nerf.datasets import blender, colmap, deepvoxels, linemod, llff, transforms
from nerf.datasets.colmap_model import find_model
from nerf.datasets.images import IMAGE_SUFFIXES
from nerf.datasets.scene import Scene
from nerf.datasets.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")


def store_of(args, warn) -> Store | None:
    """Where pictures are kept that do not fit into memory (``--data_store``); None: in memory."""
    if args.data_store == "memory":
        return None
    return Store(Path(args.store_dir or args.datadir), args.data_store, warn)


def load_blender(args, warn) -> Scene:
    return blender.load(
        Path(args.datadir),
        store=store_of(args, warn),
        testskip=args.testskip,
        downscale=args.downscale * (2 if args.half_res else 1),
        background=float(args.white_bkgd),
    )


def load_demo(args, warn) -> Scene:
    """The embedded scene in Blender's format, made on first use."""
    folder = Path(args.datadir)
    if not folder.exists():
        script = REPOSITORY / "data" / "make_demo.py"
        warn(f"making the demo scene in {folder}")
        made = subprocess.run([sys.executable, str(script), "--out", str(folder)])
        if made.returncode:
            raise ValueError(f"{folder}: the demo scene could not be made; see the line above")
    return load_blender(args, warn)


def load_llff(args, warn) -> Scene:
    return llff.load(
        Path(args.datadir),
        store=store_of(args, warn),
        factor=args.factor,
        llffhold=args.llffhold,
        ndc=not args.no_ndc,
        spherical=args.spherify,
        background=float(args.white_bkgd),
        warn=warn,
    )


def load_deepvoxels(args, warn) -> Scene:
    return deepvoxels.load(
        Path(args.datadir),
        store=store_of(args, warn),
        shape=args.shape,
        testskip=args.testskip,
        background=float(args.white_bkgd),
    )


def load_linemod(args, warn) -> Scene:
    return linemod.load(
        Path(args.datadir),
        store=store_of(args, warn),
        testskip=args.testskip,
        downscale=args.downscale * (2 if args.half_res else 1),
        background=float(args.white_bkgd),
    )


def load_transforms(args, warn) -> Scene:
    return transforms.load(
        Path(args.datadir),
        store=store_of(args, warn),
        factor=args.downscale * (2 if args.half_res else 1),
        testskip=args.testskip,
        llffhold=args.llffhold,
        near=args.near,
        far=args.far,
        background=float(args.white_bkgd),
        warn=warn,
    )


def load_colmap(args, warn) -> Scene:
    return colmap.load(
        Path(args.datadir),
        store=store_of(args, warn),
        factor=args.factor,
        llffhold=args.llffhold,
        ndc=not args.no_ndc,
        spherical=args.spherify,
        near=args.near,
        far=args.far,
        background=float(args.white_bkgd),
        warn=warn,
    )


def load_auto(args, warn) -> Scene:
    """The scene in whatever format its folder has; says which."""
    kind = recognize(Path(args.datadir))
    warn(f"{args.datadir} is in format {kind} (--dataset_type auto)")
    return DATASETS[kind](args, warn)


DATASETS = {
    "blender": load_blender,
    "demo": load_demo,
    "llff": load_llff,
    "deepvoxels": load_deepvoxels,
    "LINEMOD": load_linemod,
    "transforms": load_transforms,
    "colmap": load_colmap,
    "auto": load_auto,
}
# What these files call a place in a picture has pixel centers at half numbers, and is exact.
WITH_PIXEL_CENTERS = ("transforms", "colmap")


def recognize(folder: Path) -> str:
    """The --dataset_type of a data folder, by the files in it. ValueError if it is none."""
    if (folder / "transforms.json").exists():
        return "transforms"
    split = folder / "transforms_train.json"
    if split.exists():
        top, frames, _ = blender.read_frames(split, 1)
        if "intrinsic_matrix" in frames[0]:
            return "LINEMOD"
        return "transforms" if any("fl_x" in part for part in (top, *frames)) else "blender"
    if find_model(folder) is not None:  # with points and lenses, so before what LLFF makes of it
        return "colmap"
    if (folder / "poses_bounds.npy").exists():
        return "llff"
    if any(folder.glob("train/*/pose")):
        return "deepvoxels"
    places = (folder, folder / "images")
    if any(path.suffix.lower() in IMAGE_SUFFIXES for place in places for path in place.glob("*")):
        pictures = places[1] if places[1].is_dir() else folder
        raise ValueError(
            f"{folder}: holds pictures but no poses; make them with: "
            f"python data/from_photos.py {pictures} --out data/mine"
        )
    raise ValueError(
        f"{folder}: no known format; expected transforms.json, transforms_train.json, "
        "sparse/0/cameras.bin, poses_bounds.npy or train/*/pose"
    )


def load_scene(args, warn=print) -> Scene:
    """The scene that ``args`` names, validated, on the CPU. ValueError says what is wrong with it.

    Two of nerf-pytorch's configs name the LLFF loader for Blender scenes; the folder decides.
    """
    folder, kind = Path(args.datadir), args.dataset_type
    if kind == "llff" and not (folder / "poses_bounds.npy").exists():
        guess = folder
        if not folder.exists() and folder.name in BLENDER_SCENES:
            guess = folder.parent.parent / "nerf_synthetic" / folder.name
        if (guess / "transforms_train.json").exists() or (guess != folder and not guess.exists()):
            warn(f"{folder} is a Blender scene: dataset_type: llff -> blender, datadir: {guess}")
            args, folder, kind = _copy(args, datadir=str(guess)), guess, "blender"
    if kind != "demo" and not folder.is_dir():
        name = folder.name or "lego"
        raise ValueError(
            f"{folder}: no such data folder; set --datadir, or fetch it with: "
            f"python data/download.py {name}"
        )
    scene = DATASETS[kind](args, warn)
    small = f"{folder}: pictures of {scene.width}x{scene.height} pixels"
    if min(scene.height, scene.width) < 2:
        raise ValueError(
            f"{small}; expected 2x2 or more (--factor, --downscale, --half_res make them smaller)"
        )
    if args.render_factor > min(scene.height, scene.width):
        raise ValueError(f"{small} leave nothing at --render_factor {args.render_factor}; lower it")
    kind = recognize(folder) if kind == "auto" else kind
    scene.pixel_center = args.pixel_center or kind in WITH_PIXEL_CENTERS
    return scene


def _copy(args, **changes):
    return type(args)(**{**vars(args), **changes})
