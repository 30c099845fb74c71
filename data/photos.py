"""Any photos or a video -> upright, distinct pictures for structure from motion.

They are saved as JPEG, or as PNG where parts are transparent.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from nerf.datasets.images import eight_bit, open_image, why_unreadable
from nerf.datasets.pictures import some, too_few
from nerf.datasets.wrong_folder import VIDEOS, quoted

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
HEIC = (".heic", ".heif")
MEASURED_SIDE = 640  # pixels of the longer side at which sharpness is measured
SAME = 1.5  # gray levels; thumbnails with a smaller mean difference are duplicates
BLURRED = 0.2  # fraction of the median sharpness below which a picture is blurred


class Photo(NamedTuple):
    """One kept picture; width and height are those of the saved file."""

    name: str
    width: int
    height: int
    sharpness: float
    thumbnail: np.ndarray  # [32, 32] gray levels


def sharpness(gray: np.ndarray) -> float:
    """Variance of the Laplacian of gray levels [H, W]; low for blurred or plain pictures."""
    gray = gray.astype(np.float32)
    laplacian = gray[1:-1, :-2] + gray[1:-1, 2:] + gray[:-2, 1:-1] + gray[2:, 1:-1]
    return float((laplacian - 4 * gray[1:-1, 1:-1]).var())


def measured(name: str, image: Image.Image) -> Photo:
    """The Photo of an upright picture, with sharpness and thumbnail measured."""
    gray = image.convert("L")
    small = gray.copy()
    small.thumbnail((MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.BOX)
    thumbnail = np.asarray(gray.resize((32, 32), Image.Resampling.BOX), np.float32)
    return Photo(name, image.width, image.height, sharpness(np.asarray(small)), thumbnail)


def list_photos(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder, sorted by name, and its other files.

    ValueError if it has HEIC files, or no pictures.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    heic = [path for path in files if path.suffix.lower() in HEIC]
    if heic:
        raise ValueError(
            f"{folder}: {len(heic)} HEIC photos ({heic[0].name}); convert them to JPEG first "
            "(on the phone: Settings, Camera, Formats, Most Compatible; or: magick mogrify -format "
            "jpg *.HEIC)"
        )
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    if not pictures:
        videos = [path.name for path in files if path.suffix.lower() in VIDEOS]
        hint = f"; for a video, give its path: {quoted(folder / videos[0])}" if videos else ""
        inner = [p for p in sorted(folder.glob("*/*")) if p.suffix.lower() in PICTURES + HEIC]
        if inner and not hint:
            hint = f"; photos lie in folders in it: give one, {quoted(inner[0].parent)}"
        raise ValueError(f"{folder}: holds no photo; expected {', '.join(PICTURES)}{hint}")
    return pictures, [path for path in files if path not in set(pictures)]


def take_photos(
    folder: Path, out: Path, max_side: int, log: Callable[[str], object]
) -> list[Photo]:
    """Copy the photos of ``folder`` to ``out``, upright, with sides of at most max_side pixels.

    Other files and folders, unreadable pictures and duplicates are left out, and ``log`` names
    them. ValueError where too many are unreadable, see ``pictures.too_few``.
    """
    pictures, others = list_photos(folder)
    if others:
        log(f"left out, not pictures: {some([path.name for path in others])}")
    inner = [path.name + "/" for path in sorted(folder.glob("*/")) if path.name[0] != "."]
    if inner:
        log(f"not read: folders in {folder}: {some(inner)}; only the photos beside them are used")
    photos: list[Photo] = []
    broken, repeated = [], []
    for path in pictures:
        try:
            with open_image(path) as image:
                image.load()
                upright = eight_bit(ImageOps.exif_transpose(image), path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            broken.append(f"{path.name} ({why_unreadable(path) or error})")
            continue
        suffix = ".png" if is_transparent(upright) else ".jpg"
        photo = measured(_unused(path.stem, photos) + suffix, upright)
        if any(np.abs(photo.thumbnail - other.thumbnail).mean() < SAME for other in photos):
            repeated.append(path.name)
            continue
        photos.append(_save(upright, out, photo, max_side))
    too_few(len(pictures), len(broken), f"{folder}: ", "unreadable", broken)
    transparent = sum(photo.name.endswith(".png") for photo in photos)
    if transparent:
        log(f"{transparent} photos are transparent in parts, which is kept: saved as PNG")
    if broken:
        log(f"left out, cannot be read: {some(broken)}")
    if repeated:
        log(f"left out, duplicates of another picture: {some(repeated)}")
    return photos


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    return np.asarray(image.convert("RGBA"))[..., 3].min() < 255


def _unused(stem: str, photos: list[Photo]) -> str:
    """``stem``, or with a number if another photo has it already (a.png beside a.jpg)."""
    names, number, found = {Path(photo.name).stem for photo in photos}, 2, stem
    while found in names:
        found, number = f"{stem}_{number}", number + 1
    return found


def _save(image: Image.Image, out: Path, photo: Photo, max_side: int) -> Photo:
    """Write an upright picture; its Photo with the width and height of the file."""
    exif = image.getexif()  # holds the focal length; exif_transpose removed the rotation
    image = image.convert("RGBA" if photo.name.endswith(".png") else "RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out.mkdir(parents=True, exist_ok=True)
    image.save(out / photo.name, quality=95, exif=exif)
    return photo._replace(width=image.width, height=image.height)


def take_frames(video: Path, out: Path, count: int, max_side: int) -> list[Photo]:
    """Write the sharpest frame of each of ``count`` equal parts of a video to ``out``.

    A frame that repeats the previous one (the camera stood still) is left out. ValueError if ffmpeg
    cannot read the file.
    """
    import imageio_ffmpeg

    try:
        total, _ = imageio_ffmpeg.count_frames_and_secs(str(video))
        frames = imageio_ffmpeg.read_frames(str(video))
        size = next(frames)["size"]
    except (OSError, RuntimeError, StopIteration, ValueError):
        raise ValueError(
            f"{video}: holds no video that ffmpeg can read; give an MP4 or MOV file"
        ) from None
    if total < 1:
        raise ValueError(f"{video}: holds no frames; is the recording complete?")
    photos: list[Photo] = []
    best: tuple[Photo, Image.Image] | None = None

    def keep() -> None:
        repeats = best and photos and np.abs(best[0].thumbnail - photos[-1].thumbnail).mean() < SAME
        if best and not repeats:
            photos.append(_save(best[1], out, best[0], max_side))

    part = -1
    for number, frame in enumerate(frames):
        if number * count // total != part:
            keep()
            part, best = number * count // total, None
        image = Image.frombytes("RGB", size, frame)
        photo = measured(f"frame_{number:06d}.jpg", image)
        if best is None or photo.sharpness > best[0].sharpness:
            best = photo, image
    keep()
    return photos


def blurred(photos: list[Photo]) -> list[str]:
    """Names of photos much less sharp than the median."""
    median = float(np.median([photo.sharpness for photo in photos]))
    return [photo.name for photo in photos if photo.sharpness < BLURRED * median]
