"""Picture files -> uint8 arrays, one documented conversion per kind of file.

Gray becomes RGB; palette and CMYK become RGB (RGBA where transparent); gray with alpha becomes
RGBA; 16-bit gray is scaled to 8 bits, 16-bit RGB keeps its high byte. Alpha stays straight (not
premultiplied). A rotation in a photo's EXIF data is applied, unless its camera was estimated from
the picture as stored. Any other kind of file is a ValueError. Of a file of more than BIG pixels the
size is compared before it is decoded.
"""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nerf.datasets.arrays import must_fit, padded, shrink, with_alpha
from nerf.datasets.store import Store
from nerf.training.plain_text import one_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
BIG = 50_000_000  # pixels; an 8K picture has 33 million
LARGEST = 16  # times the width that a camera is for: cameras are estimated on smaller pictures
EXIF_ORIENTATION = 0x0112  # tag; values 1 to 4 keep width and height, 5 to 8 swap them
PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # names of its places in a PNG
Size = tuple[float, float]  # width, height


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of ``name``, read from a data file, which must lie inside ``folder``.

    Slashes may be backward; an absolute name must begin with the folder's. Only names are checked:
    a symbolic link inside the folder is followed, since whoever put it there may read its target.
    ValueError, beginning with ``where``, if the path leads out of the folder.
    """
    if one_line(name) != name or any(len(part.encode()) > 255 for part in re.split(r"[/\\]", name)):
        if "\0" not in name:
            raise ValueError(f"{where}: {name[:80]!r} is not a valid file name; correct it")
    root = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(root, name.replace("\\", "/")))
    if "\0" in name or re.match(r"[A-Za-z]:[/\\]", name) or not Path(path).is_relative_to(root):
        raise ValueError(
            f"{where}: {name!r} leads out of the data folder; put the pictures into {folder} and "
            "name them from there"
        )
    if path == root:
        raise ValueError(f"{where}: {name!r} is the data folder itself; expected a picture in it")
    return folder / os.path.relpath(path, root)


def list_images(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name, without hidden files."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; expected one with {'/'.join(IMAGE_SUFFIXES)} files"
        )
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.is_dir()
        and not path.name.startswith((".", "dynamic_mask_"))  # the latter: see ``masks``
    )


def open_image(path: Path) -> Image.Image:
    """``Image.open``, without Pillow's warning about large pictures: their sizes are compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def is_big(image: Image.Image) -> bool:
    """Whether an open picture has more than BIG pixels."""
    return image.width * image.height > BIG


def read_image(
    path: Path, size: Size | None = None, *, like: tuple[str, int, int] | None = None
) -> np.ndarray:
    """One picture as uint8 [H, W, 3], or [H, W, 4] if it has transparency.

    size: of the picture that its camera was estimated from. Its proportions decide whether that was
    the picture as stored or as rotated by its EXIF data; None: as rotated.
    like: name, width and height of a picture that it must be as large as, stored or rotated.
    ValueError if the file cannot be read, is too large for its camera, or its orientation stays
    ambiguous; sizes are compared before it is decoded.
    """
    try:
        with open_image(path) as opened:
            if _is_animation(opened):
                count = getattr(opened, "n_frames", "several")
                raise ValueError(f"it is an animation of {count} frames, expected one")
            if size is not None and is_big(opened) and max(opened.size) > LARGEST * max(size):
                (w, h), (width, height) = opened.size, size
                raise ValueError(f"it has {w}x{h} pixels, its camera is for {width:g}x{height:g}")
            if like is not None and sorted(opened.size) != sorted(like[1:]):
                raise _Refused(_other_size(path, opened.size, like))
            opened.load()
            image = _oriented(opened, path, size)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such picture; is the data folder complete?") from None
    except _Refused:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace it") from None
    image = eight_bit(image, path)
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return np.array(image.convert("RGBA" if transparent else "RGB"))


def why_unreadable(path: Path) -> str | None:
    """Why a file cannot be decoded as one picture; None: it can.

    A file that begins and ends as its format demands, with the checksums that it has, is not
    decoded; one that does not is, unless it is BIG, and Pillow decides.
    """
    try:
        with open_image(path) as image:
            if _is_animation(image):
                return f"an animation of {getattr(image, 'n_frames', 'several')} frames"
            if image.mode == "F":
                return "floating-point pixels"
            kind, big = image.format, is_big(image)
            if kind == "PNG" and _has_checksums(image):
                return None
        if kind in ("JPEG", "MPO") and _ends_with(path, b"\xff\xd9"):
            return None
        if big:
            return "damaged" if kind in ("PNG", "JPEG", "MPO") else f"a large {kind}"
        with open_image(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return _kind(path) if isinstance(error, UnidentifiedImageError) else str(error)
    return None


def _kind(path: Path) -> str:
    """What a file is that is no picture that Pillow knows."""
    with open(path, "rb") as file:
        start = file.read(256)
    if not start:
        return "empty"
    if start[4:8] == b"ftyp":
        return "HEIC, AVIF or a video, whatever its name: convert it to JPEG"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: git lfs pull fetches the picture"
    if start.lstrip().lower().startswith((b"<html", b"<!doctype")):
        return "a web page"
    return "not a picture"


def _has_checksums(image: Image.Image) -> bool:
    """Whether all parts of an open PNG are there and have their checksums; it is used up."""
    try:
        image.verify()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _ends_with(path: Path, mark: bytes) -> bool:
    """Whether the last bytes of a file are ``mark``, perhaps followed by zeros."""
    with open(path, "rb") as file:
        file.seek(-min(path.stat().st_size, 4096), os.SEEK_END)
        return file.read().rstrip(b"\0").endswith(mark)


def _is_animation(image: Image.Image) -> bool:
    """Whether an open picture has several frames.

    An MPO photo carries a small copy of itself as a second frame; it is no animation.
    """
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def picture_sizes(path: Path) -> list[tuple[int, int]]:
    """Width and height of a picture, as stored and as rotated by its EXIF data, not decoded."""
    try:
        with open_image(path) as image:
            # Pillow decodes a whole PNG to look for EXIF data behind its pixels.
            if image.format == "PNG" and not _names_exif(path.read_bytes()):
                return [image.size, image.size]
            if image.format == "PNG" and is_big(image) and "exif" not in image.info:
                return [image.size, image.size[::-1]]
            swapped = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return [image.size, image.size[::-1] if swapped else image.size]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace it") from None


def _names_exif(content: bytes) -> bool:
    """Whether a PNG file may hold EXIF data."""
    return any(mark in content for mark in PNG_EXIF)


def eight_bit(image: Image.Image, path: Path) -> Image.Image:
    """16-bit gray scaled to 8-bit gray (Pillow's own conversion would clip it); else unchanged."""
    if not image.mode.startswith(("I", "F")):
        return image
    wide = np.asarray(image)
    if wide.dtype == np.float32 or wide.min() < 0 or wide.max() > 65535:
        raise ValueError(f"{path}: floating-point pixels; expected 8- or 16-bit integers")
    return Image.fromarray(np.round(wide / 257.0).astype(np.uint8))


def _oriented(image: Image.Image, path: Path, size: Size | None) -> Image.Image:
    """The picture in the orientation of its camera, from EXIF data and the camera's proportions."""
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation not in range(2, 9):
        return image
    upright = ImageOps.exif_transpose(image)
    if size is None:
        return upright
    ratio, stored = size[0] / size[1], image.width / image.height
    fits_stored, fits_rotated = (abs(one / ratio - 1) < 0.02 for one in (stored, 1 / stored))
    if orientation < 5 or (fits_stored and fits_rotated):
        raise _Refused(
            f"{path}: its EXIF data asks for a rotation (orientation {orientation}), and its pose "
            "may be for the rotated or for the stored picture; save all pictures upright, without "
            "EXIF data, and estimate the poses again (data/from_photos.py does both)"
        )
    return image if fits_stored else upright


class _Refused(ValueError):
    """A picture that can be read but not used, with the whole message."""


def _other_size(path: Path, size: tuple[int, ...], like: tuple[str, int, int]) -> str:
    (w, h), (name, w0, h0) = size, like
    return (
        f"{path}: is {w}x{h} pixels but {name} is {w0}x{h0}; "
        "all pictures of a scene must have one size"
    )


def read_images(
    paths: list[Path],
    size: Size | None = None,
    *,
    factor: int = 1,
    store: Store | None = None,
) -> np.ndarray:
    """Pictures of one size as uint8 [V, H, W, C], made ``factor`` times smaller by ``shrink``.

    C is 4 if any has alpha; then pictures without alpha become opaque. size: as in ``read_image``.
    store: if it wants pictures of this total size, the result is mapped from its file.
    ValueError if sizes differ or a file cannot be read.
    """
    first = read_image(paths[0], size)
    like = (paths[0].name, first.shape[1], first.shape[0])

    def read(number: int) -> np.ndarray:
        picture = read_image(paths[number], size, like=like) if number else first
        if picture.shape[:2] != first.shape[:2]:
            raise ValueError(_other_size(paths[number], picture.shape[1::-1], like))
        return shrink(picture, factor, str(paths[number]))

    if store is not None and store.wanted(len(paths) * first.size // factor**2):
        return store.keep(paths, read, {"factor": factor, "size": size and list(map(float, size))})
    with must_fit(len(paths)):
        return _together(len(paths), read)


def _together(count: int, read: Callable[[int], np.ndarray]) -> np.ndarray:
    """The pictures ``read(0)``, ... as uint8 [V, H, W, C], never twice in memory."""
    picture = read(0)
    images = np.empty((count, *picture.shape), np.uint8)
    for number in range(count):
        picture = read(number) if number else picture
        if picture.shape[-1] > images.shape[-1]:  # the first with alpha
            wider = np.empty((*images.shape[:3], 4), np.uint8)
            wider[:number, ..., :3], wider[:number, ..., 3] = images[:number], 255
            images = wider
        images[number] = picture if images.shape[-1] == 3 else with_alpha(picture)
    return images


def read_padded(paths: list[Path], sizes: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of any sizes, ``factor`` times smaller by area averaging, and their sizes [V, 2].

    They are one array uint8 [V, H, W, C], each at its top left; C is 4 if any has alpha. Of one
    size they are never twice in memory. sizes: [V, 2] height and width that their cameras are for.
    ValueError if a picture's proportions differ from its camera's.
    """
    others: dict[int, np.ndarray] = {}  # of another size than the first

    def read(number: int) -> np.ndarray:
        picture = _sized(paths[number], sizes[number], factor) if number else first
        if picture.shape[:2] == first.shape[:2]:
            return picture
        others[number] = picture
        return np.zeros((*first.shape[:2], picture.shape[-1]), np.uint8)

    with must_fit(len(paths)):
        first = _sized(paths[0], sizes[0], factor)
        images = _together(len(paths), read)
        if not others:
            return images, np.tile(images.shape[1:3], (len(images), 1))
        rows = [others.get(number, row) for number, row in enumerate(images)]
        return padded([row if images.shape[-1] == 3 else with_alpha(row) for row in rows])


def store_sized(
    paths: list[Path], sizes: np.ndarray, factor: int, store: Store
) -> np.ndarray | None:
    """The pictures of ``read_padded`` in a mapped file, uint8 [V, H, W, C]; None if not wanted.

    ValueError if their sizes differ.
    """
    if not store.wanted(int(sizes.prod(-1).sum()) * 3 // factor**2):
        return None
    how = {"factor": factor, "sizes": np.asarray(sizes, float).tolist()}
    return store.keep(paths, lambda number: _sized(paths[number], sizes[number], factor), how)


def _sized(path: Path, size: np.ndarray, factor: int) -> np.ndarray:
    """One picture for a camera of ``size`` (height, width), ``factor`` times smaller."""
    height, width = size
    picture = read_image(path, (width, height))
    h, w = picture.shape[:2]
    # One pixel of difference may come from rounding when pictures were reduced.
    if abs(w * height / width - h) > 1 and abs(h * width / height - w) > 1:
        raise ValueError(
            f"{path}: is {w}x{h} pixels but its camera is for {width:g}x{height:g}; "
            "use the picture that the camera was estimated from, or one of the same proportions"
        )
    if factor > 1:
        target = (max(1, round(w / factor)), max(1, round(h / factor)))
        picture = np.asarray(Image.fromarray(picture).resize(target, Image.Resampling.BOX))
    return picture
