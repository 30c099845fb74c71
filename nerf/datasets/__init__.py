"""Loaders by dataset type. To add a format: write its file, add a line to DATASETS, test it.

Each entry takes DataSettings and a function that prints a warning, and returns a Scene on the CPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nerf.datasets import blender, colmap, deepvoxels, linemod, llff, transforms
from nerf.datasets.checks import check_scene
from nerf.datasets.colmap_model import find_model
from nerf.datasets.exporters import foreign_format
from nerf.datasets.frames import read
from nerf.datasets.images import IMAGE_SUFFIXES
from nerf.datasets.pictures import some
from nerf.datasets.scene import Scene
from nerf.datasets.settings import DataSettings, Warn, check_flags, name_reduction
from nerf.datasets.store import Store
from nerf.datasets.wrong_folder import (
    BLENDER_SCENES,
    about_contents,
    about_file,
    about_missing,
    from_photos,
    quoted,
)

REPOSITORY = Path(__file__).resolve().parents[2]


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
        downscale=settings.reduction("downscale"),
        near=settings.near,
        far=settings.far,
        background=settings.background,
        warn=warn,
    )


def load_demo(settings: DataSettings, warn: Warn) -> Scene:
    """The embedded scene in Blender's format, made on first use."""
    folder = settings.datadir
    if not folder.exists():
        script = REPOSITORY / "data" / "make_demo.py"
        warn(f"making the demo scene in {folder}")
        command = [sys.executable, str(script), "--out", str(folder)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
        }  # also where nothing is installed
        made = subprocess.run(command, env=environment)
        if made.returncode:
            raise ValueError(f"{folder}: the demo scene could not be made; see the line above")
    return load_blender(settings, warn)


def load_llff(settings: DataSettings, warn: Warn) -> Scene:
    """The capture in LLFF's format."""
    return llff.load(
        settings.datadir,
        store=store_of(settings, warn),
        factor=settings.reduction("factor"),
        llffhold=settings.llffhold,
        ndc=settings.ndc,
        spherical=settings.spherify,
        near=settings.near,
        far=settings.far,
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
        factor=settings.reduction("downscale"),
        near=settings.near,
        far=settings.far,
        background=settings.background,
        warn=warn,
    )


def load_linemod(settings: DataSettings, warn: Warn) -> Scene:
    """The object in LINEMOD's format."""
    return linemod.load(
        settings.datadir,
        store=store_of(settings, warn),
        testskip=settings.testskip,
        downscale=settings.reduction("downscale"),
        near=settings.near,
        far=settings.far,
        background=settings.background,
        warn=warn,
    )


def load_transforms(settings: DataSettings, warn: Warn) -> Scene:
    """The capture in instant-ngp's or nerfstudio's format."""
    return transforms.load(
        settings.datadir,
        store=store_of(settings, warn),
        factor=settings.reduction("downscale"),
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
        factor=settings.reduction("factor"),
        llffhold=settings.llffhold,
        ndc=settings.ndc,
        spherical=settings.spherify,
        near=settings.near,
        far=settings.far,
        background=settings.background,
        warn=warn,
    )


def load_auto(settings: DataSettings, warn: Warn) -> Scene:
    """The scene in the format that ``recognize`` finds."""
    return DATASETS[recognize(settings.datadir)](settings, warn)


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
PARTS = ("images", "sparse", "train", "test", "val", "masks", "0")  # folders of scenes
# Many programs, and people's own scripts, write these: the axes of their poses are often others.
BY_HAND = ("blender", "transforms", "LINEMOD")


def recognize(folder: Path) -> str:
    """The dataset type of a data folder, by the files in it.

    ValueError if it is none, with what the folder holds instead.
    """
    found = format_of(folder)
    if found is not None:
        return found
    outer = folder.resolve().parent
    if folder.name.lower() in PARTS and _recognized(outer):
        raise ValueError(
            f"{folder}: is a part of a scene; give the whole: --datadir {quoted(outer)}"
        )
    foreign = foreign_format(folder)
    folders = (folder, folder / "images")
    if any(
        path.suffix.lower() in IMAGE_SUFFIXES for parent in folders for path in parent.glob("*")
    ):
        pictures = folders[1] if folders[1].is_dir() else folder
        raise ValueError(
            f"{folder}: holds pictures but no poses that can be read; make them with: "
            + from_photos(pictures)
            + (f" (it also holds {foreign})" if foreign else "")
        )
    if foreign:
        raise ValueError(f"{folder}: holds {foreign}")
    inner = [path for path in sorted(folder.glob("*/")) if _recognized(path)]
    if inner:
        raise ValueError(
            f"{folder}: holds {some([path.name + '/' for path in inner])}, which "
            f"{'is' if len(inner) == 1 else 'are'} of a known format: give --datadir "
            f"{quoted(inner[0])}"
        )
    if found := about_contents(folder):
        raise ValueError(f"{folder}: {found}")
    raise ValueError(
        f"{folder}: no known format; expected transforms.json, transforms_train.json, "
        "sparse/0/cameras.bin, poses_bounds.npy or train/*/pose"
    )


def choose_format(settings: DataSettings, warn: Warn) -> tuple[DataSettings, str]:
    """The settings and the dataset type: the one that was asked for, or what the folder holds.

    nerf-pytorch's default is llff. It is not used where nobody asked for it and the folder is of
    another format. Two of nerf-pytorch's configs name the LLFF loader, and LLFF's folder, for
    Blender scenes; for these the Blender folder is used. ValueError if ``datadir`` does not exist,
    or is not of the format that was asked for.
    """
    folder, kind = settings.datadir, settings.dataset_type
    if kind == "llff" and not folder.exists() and folder.name in BLENDER_SCENES:
        guess = folder.parent.parent / "nerf_synthetic" / folder.name
        warn(f"{folder} is a Blender scene: dataset_type: llff -> blender, datadir: {guess}")
        settings, folder, kind = settings._replace(datadir=guess), guess, "blender"
    if kind != "demo" and folder.is_file():
        raise ValueError(f"--datadir {quoted(folder)}: {about_file(folder, _recognized)}")
    if kind != "demo" and not folder.is_dir():
        raise ValueError(
            f"{folder}: no such data folder{settings.default_datadir()}; {about_missing(folder)}"
        )
    if kind == "auto":
        kind = recognize(folder)
        if kind == "blender" and settings.spherify:  # its loader keeps the file's own layout
            kind = "transforms"
        warn(f"{folder} is in format {kind} (--dataset_type auto)")
    elif kind == "llff" and not (folder / "poses_bounds.npy").exists():
        found = _recognized(folder)
        if found and not settings.is_given("dataset_type"):
            warn(f"{folder} is in format {found}: used without --dataset_type, not llff")
            return settings, found
        if found:
            raise ValueError(
                f"{folder}: is in format {found}, not llff: it has no poses_bounds.npy; leave out "
                f"--dataset_type llff, or give --dataset_type {found}"
            )
        if not settings.is_given("dataset_type"):
            recognize(folder)  # raises ValueError that names the files of all formats
    return settings, kind


def format_of(folder: Path) -> str | None:
    """The dataset type of a data folder; None if it is none. ValueError for a broken file."""
    if (folder / "transforms.json").exists():
        return "transforms"
    if (folder / "transforms_train.json").exists():
        found = read(folder, 1)
        if "intrinsic_matrix" in found.frames[0]:
            return "LINEMOD"
        return "blender" if blender.is_plain(folder, found) else "transforms"
    # Before LLFF, whose poses_bounds.npy may lie beside the model and knows no points or lenses.
    if find_model(folder) is not None:
        return "colmap"
    if (folder / "poses_bounds.npy").exists():
        return "llff"
    return "deepvoxels" if any(folder.glob("train/*/pose")) else None


def _recognized(folder: Path) -> str | None:
    """The format of a folder; None if it is none, or a file that decides it is broken."""
    try:
        return format_of(folder)
    except ValueError:
        return None


def load_scene(settings: DataSettings, warn: Warn = print) -> Scene:
    """The scene that ``settings`` names, checked, on the CPU. ValueError if something is wrong."""
    settings, kind = choose_format(settings, warn)
    check_flags(settings, kind)
    folder = settings.datadir
    scene = DATASETS[kind](settings, warn)
    if scene.ndc and (settings.near or settings.far):
        raise ValueError(
            "--near and --far are for world coordinates, and this scene is in NDC, where rays run "
            "from the near plane to infinity; leave them out, or add --no_ndc"
        )
    size = f"{folder}: pictures of {scene.width}x{scene.height} pixels"
    if min(scene.height, scene.width) < 2:
        raise ValueError(
            f"{size}; expected 2x2 or more (--factor, --downscale, --half_res make them smaller)"
        )
    if settings.render_factor > min(scene.height, scene.width):
        raise ValueError(
            f"{size} leave nothing at --render_factor {settings.render_factor}; lower it"
        )
    name_reduction(settings, kind, scene, warn)
    scene.pixel_center |= settings.pixel_center or kind in WITH_PIXEL_CENTERS
    return check_scene(scene, warn, by_hand=kind in BY_HAND)
