"""Loaders by dataset type. To add a format: write its file, add a line to DATASETS, test it.

Each entry takes DataSettings and a function that prints a warning, and returns a Scene on the CPU.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nerf.datasets import blender, colmap, deepvoxels, linemod, llff, transforms
from nerf.datasets.colmap_model import find_model
from nerf.datasets.images import IMAGE_SUFFIXES
from nerf.datasets.scene import Scene
from nerf.datasets.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
Warn = Callable[[str], object]


class DataSettings(NamedTuple):
    """Which scene to load and how. Each loader uses the fields that its format has a use for.

    datadir: the scene's folder. dataset_type: a key of DATASETS; "auto" goes by the files in it.
    testskip: keep every n-th validation and test view (0 or 1: all).
    downscale: Blender, LINEMOD and transforms pictures become this many times smaller.
    factor: LLFF and COLMAP pictures become this many times smaller.
    llffhold: every n-th view is held out, where the files name no splits.
    ndc: normalized device coordinates, for forward-facing LLFF and COLMAP captures.
    spherify: LLFF and COLMAP: the capture goes around an object.
    near, far: transforms and COLMAP: where rays begin and end, in scene units; 0: automatic.
    background: gray value in [0, 1] behind transparent pixels.
    shape: the object's name in DeepVoxels' folder names.
    data_store: "memory", "mmap" (pictures in a mapped file) or "auto" (mapped if they are large).
    store_dir: folder of the mapped file; None: ``datadir``.
    pixel_center: rays pass through pixel centers, not corners, in every format.
    render_factor: renders will be this many times smaller; checked against the pictures' size.
    """

    datadir: Path
    dataset_type: str
    testskip: int = 8
    downscale: int = 1
    factor: int = 8
    llffhold: int = 8
    ndc: bool = True
    spherify: bool = False
    near: float = 0.0
    far: float = 0.0
    background: float = 0.0
    shape: str = "greek"
    data_store: str = "memory"
    store_dir: Path | None = None
    pixel_center: bool = False
    render_factor: int = 0


def store_of(settings: DataSettings, warn: Warn) -> Store | None:
    """The mapped file for pictures that do not fit into memory; None: keep them in memory."""
    if settings.data_store == "memory":
        return None
    return Store(settings.store_dir or settings.datadir, settings.data_store, warn)


def load_blender(settings: DataSettings, warn: Warn) -> Scene:
    """The scene in Blender's format (NeRF synthetic)."""
    return blender.load(
        settings.datadir,
        store=store_of(settings, warn),
        testskip=settings.testskip,
        downscale=settings.downscale,
        background=settings.background,
    )


def load_demo(settings: DataSettings, warn: Warn) -> Scene:
    """The embedded scene in Blender's format, made on first use."""
    folder = settings.datadir
    if not folder.exists():
        script = REPOSITORY / "data" / "make_demo.py"
        warn(f"making the demo scene in {folder}")
        made = subprocess.run([sys.executable, str(script), "--out", str(folder)])
        if made.returncode:
            raise ValueError(f"{folder}: the demo scene could not be made; see the line above")
    return load_blender(settings, warn)


def load_llff(settings: DataSettings, warn: Warn) -> Scene:
    """The capture in LLFF's format."""
    return llff.load(
        settings.datadir,
        store=store_of(settings, warn),
        factor=settings.factor,
        llffhold=settings.llffhold,
        ndc=settings.ndc,
        spherical=settings.spherify,
        background=settings.background,
        warn=warn,
    )


def load_deepvoxels(settings: DataSettings, warn: Warn) -> Scene:
    """The object in DeepVoxels' format."""
    return deepvoxels.load(
        settings.datadir,
        store=store_of(settings, warn),
        shape=settings.shape,
        testskip=settings.testskip,
        background=settings.background,
    )


def load_linemod(settings: DataSettings, warn: Warn) -> Scene:
    """The object in LINEMOD's format."""
    return linemod.load(
        settings.datadir,
        store=store_of(settings, warn),
        testskip=settings.testskip,
        downscale=settings.downscale,
        background=settings.background,
    )


def load_transforms(settings: DataSettings, warn: Warn) -> Scene:
    """The capture in instant-ngp's or nerfstudio's format."""
    return transforms.load(
        settings.datadir,
        store=store_of(settings, warn),
        factor=settings.downscale,
        testskip=settings.testskip,
        llffhold=settings.llffhold,
        near=settings.near,
        far=settings.far,
        background=settings.background,
        warn=warn,
    )


def load_colmap(settings: DataSettings, warn: Warn) -> Scene:
    """The capture in COLMAP's format."""
    return colmap.load(
        settings.datadir,
        store=store_of(settings, warn),
        factor=settings.factor,
        llffhold=settings.llffhold,
        ndc=settings.ndc,
        spherical=settings.spherify,
        near=settings.near,
        far=settings.far,
        background=settings.background,
        warn=warn,
    )


def load_auto(settings: DataSettings, warn: Warn) -> Scene:
    """The scene in the format that ``recognize`` finds; ``warn`` reports which."""
    kind = recognize(settings.datadir)
    warn(f"{settings.datadir} is in format {kind} (--dataset_type auto)")
    return DATASETS[kind](settings, warn)


DATASETS: dict[str, Callable[[DataSettings, Warn], Scene]] = {
    "blender": load_blender,
    "demo": load_demo,
    "llff": load_llff,
    "deepvoxels": load_deepvoxels,
    "LINEMOD": load_linemod,
    "transforms": load_transforms,
    "colmap": load_colmap,
    "auto": load_auto,
}
# In these formats pixel centers lie at half numbers, so their rays always pass through centers.
WITH_PIXEL_CENTERS = ("transforms", "colmap")


def recognize(folder: Path) -> str:
    """The dataset type of a data folder, by the files in it. ValueError if it is none."""
    if (folder / "transforms.json").exists():
        return "transforms"
    split = folder / "transforms_train.json"
    if split.exists():
        top, frames, _ = blender.read_frames(split, 1)
        if "intrinsic_matrix" in frames[0]:
            return "LINEMOD"
        return "transforms" if any("fl_x" in part for part in (top, *frames)) else "blender"
    # Before LLFF, whose poses_bounds.npy may lie beside the model and knows no points or lenses.
    if find_model(folder) is not None:
        return "colmap"
    if (folder / "poses_bounds.npy").exists():
        return "llff"
    if any(folder.glob("train/*/pose")):
        return "deepvoxels"
    folders = (folder, folder / "images")
    if any(
        path.suffix.lower() in IMAGE_SUFFIXES for parent in folders for path in parent.glob("*")
    ):
        pictures = folders[1] if folders[1].is_dir() else folder
        raise ValueError(
            f"{folder}: holds pictures but no poses; make them with: "
            f"python data/from_photos.py {pictures} --out data/mine"
        )
    raise ValueError(
        f"{folder}: no known format; expected transforms.json, transforms_train.json, "
        "sparse/0/cameras.bin, poses_bounds.npy or train/*/pose"
    )


def load_scene(settings: DataSettings, warn: Warn = print) -> Scene:
    """The scene that ``settings`` names, checked, on the CPU. ValueError if something is wrong.

    Two of nerf-pytorch's configs name the LLFF loader for Blender scenes; the folder decides.
    """
    folder, kind = settings.datadir, settings.dataset_type
    if kind == "llff" and not (folder / "poses_bounds.npy").exists():
        guess = folder
        if not folder.exists() and folder.name in BLENDER_SCENES:
            guess = folder.parent.parent / "nerf_synthetic" / folder.name
        if (guess / "transforms_train.json").exists() or (guess != folder and not guess.exists()):
            warn(f"{folder} is a Blender scene: dataset_type: llff -> blender, datadir: {guess}")
            settings, folder, kind = settings._replace(datadir=guess), guess, "blender"
    if kind != "demo" and not folder.is_dir():
        name = folder.name or "lego"
        raise ValueError(
            f"{folder}: no such data folder; set --datadir, or fetch it with: "
            f"python data/download.py {name}"
        )
    scene = DATASETS[kind](settings, warn)
    size = f"{folder}: pictures of {scene.width}x{scene.height} pixels"
    if min(scene.height, scene.width) < 2:
        raise ValueError(
            f"{size}; expected 2x2 or more (--factor, --downscale, --half_res make them smaller)"
        )
    if settings.render_factor > min(scene.height, scene.width):
        raise ValueError(
            f"{size} leave nothing at --render_factor {settings.render_factor}; lower it"
        )
    kind = recognize(folder) if kind == "auto" else kind
    scene.pixel_center = settings.pixel_center or kind in WITH_PIXEL_CENTERS
    return scene
