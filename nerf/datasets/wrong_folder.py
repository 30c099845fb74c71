"""What to do about a --datadir that is no scene: a file, or a folder that does not exist."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from nerf.datasets.images import IMAGE_SUFFIXES
from nerf.training.plain_text import shell_command

DATA = Path(__file__).resolve().parents[2] / "data"
BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
LLFF_SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
# What data/download.py fetches, or says where to get: scene -> its folder in data/.
DOWNLOADS = {name: f"nerf_synthetic/{name}" for name in BLENDER_SCENES}
DOWNLOADS |= {name: f"nerf_llff_data/{name}" for name in LLFF_SCENES}

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp")
PHOTOS = (*IMAGE_SUFFIXES, ".heic", ".heif", ".webp", ".tif", ".tiff", ".bmp")
MODELS = (
    ".blend", ".obj", ".ply", ".glb", ".gltf", ".fbx", ".stl", ".usd", ".usdz", ".dae", ".3ds",
    ".max", ".ma", ".mb", ".c4d",
)  # fmt: skip
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
EXPORT = "export pictures and camera poses from it first (transforms_train.json beside train/)"


def quoted(path: Path) -> str:
    """A path as a word of a shell command; one below the working folder as seen from there."""
    here = Path.cwd()
    return shell_command([str(path.relative_to(here) if path.is_relative_to(here) else path)])


def from_photos(source: Path, name: str = "mine") -> str:
    """The command that makes a scene of a folder of photos or of a video."""
    return f"python {quoted(DATA / 'from_photos.py')} {quoted(source)} --out data/{name}"


def about_file(path: Path, recognized: Callable[[Path], str | None]) -> str:
    """What to do about a file that was given for a scene's folder.

    recognized: the format of a folder, None if it is no scene.
    """
    kind, folder = path.suffix.lower(), path.parent
    if kind in VIDEOS:
        return f"it is a video; make a scene of it with: {from_photos(path)}"
    if kind in MODELS and kind != ".ply":  # scenes hold points as .ply
        return f"it is a 3D model, not pictures; {EXPORT}"
    if kind in ARCHIVES:
        return "it is an archive; unpack it, and give the folder of the scene"
    if kind == ".tar":
        return "it is a file; a checkpoint is for --ft_path, and an archive has to be unpacked"
    for outer in (folder, folder.parent):
        if recognized(outer):
            return f"it is a file; give the folder that it is in: --datadir {quoted(outer)}"
    if kind in PHOTOS:
        return f"it is one photo; make a scene of its folder with: {from_photos(folder)}"
    if kind == ".ply":
        return f"it is a 3D model or points, not pictures; {EXPORT}"
    return "it is a file; expected the folder of a scene (a config file is for --config)"


def about_contents(folder: Path) -> str:
    """What to do about a folder of videos or 3D models, in which no scene was found; or ""."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    for path in files:
        if path.suffix.lower() in VIDEOS:
            return f"holds a video, {path.name}; make a scene of it with: {from_photos(path)}"
    for path in files:
        if path.suffix.lower() in PHOTOS:
            return f"holds photos without poses; make them with: {from_photos(folder)}"
    for path in files:
        if path.suffix.lower() in MODELS:
            return f"holds a 3D model, {path.name}, and no pictures; {EXPORT}"
    return ""


def about_missing(folder: Path) -> str:
    """What to do about a folder that does not exist: how to fetch it, or names like it."""
    if folder.name in DOWNLOADS:
        target = DATA / DOWNLOADS[folder.name]
        then = f"give --datadir {quoted(target)}"
        if target.is_dir():
            return then
        fetch = f"fetch it with: python {quoted(DATA / 'download.py')} {folder.name}"
        same = os.path.realpath(folder) == os.path.realpath(target)
        return fetch if same else f"{fetch}, then {then}"
    parent = folder.parent
    there = sorted(path.name for path in parent.glob("*/")) if parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, there, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(quoted(parent / name) for name in close)}? (--datadir)"
    return "set --datadir to the folder of the scene"
