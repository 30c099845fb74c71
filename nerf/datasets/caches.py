"""Whether reduced pictures (images_N/) were made from the pictures that are there now.

Beside a folder that this program made lies a file with two fingerprints, of the originals and of
what was made of them: names, sizes and times. While the second holds, the first decides. Of other
folders, pictures are compared: all whose original changed after them, and a few others.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nerf.datasets.images import LARGEST, eight_bit, is_big, open_image, read_image, why_unreadable
from nerf.training.files import replace_file

SPOT_CHECKS = 4  # pictures compared although their times arouse no suspicion
SIDE = 8  # pixels of the thumbnails that are compared
DIFFERENT = 12.0  # gray levels; a larger mean difference of thumbnails is another picture


def fingerprint(files: Sequence[Path]) -> str:
    """A digest of the files' names, sizes and times of change."""
    rows = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def _note(folder: Path) -> Path:
    """The file with the fingerprints of a folder of reduced pictures."""
    return folder.with_name(f".{folder.name}.made_from")


def write_fingerprints(folder: Path, reduced: Sequence[Path], originals: Sequence[Path]) -> None:
    """Note, beside ``folder``, which will hold ``reduced``, which pictures they were made from."""
    text = f"{fingerprint(originals)} {fingerprint(reduced)}\n"
    replace_file(_note(folder), text.encode("utf-8"))


def source_of(reduced: Sequence[Path]) -> str | None:
    """The fingerprint of the pictures that this program made ``reduced`` from; None: unknown."""
    note = _note(reduced[0].parent) if reduced else None
    if note is None or not note.is_file():
        return None
    source, _, made = note.read_text(errors="replace").strip().partition(" ")
    return source if made == fingerprint(reduced) else None


def why_stale(reduced: Sequence[Path], originals: Sequence[Path]) -> str | None:
    """Why the reduced pictures are not those of ``originals``, in the same order; None: they are.

    Without originals, or with another number of them, there is nothing to compare: None.
    """
    if len(reduced) != len(originals) or not all(file.is_file() for file in originals):
        return None
    source = source_of(reduced)
    if source is not None:
        same = source == fingerprint(originals)
        return None if same else "the pictures in images/ have changed since it was made"
    few = set(np.linspace(0, len(reduced) - 1, SPOT_CHECKS).astype(int).tolist())
    for index, (small, large) in enumerate(zip(reduced, originals, strict=True)):
        if index in few or _changed(large) > _changed(small):
            if not why_unreadable(large) and _differ(small, large):
                return f"its {small.name} is another picture than {large.name} in images/"
    return None


def other_factors(datadir: Path) -> str:
    """For a message: the factors for which ``datadir`` has reduced pictures; "" for none."""
    found = [path.name.removeprefix("images_") for path in datadir.glob("images_*/")]
    factors = sorted((name for name in found if name.isdigit()), key=int)
    return f", or give --factor {' or '.join(factors)}, for which there are some" * bool(factors)


def _changed(file: Path) -> float:
    """When the file was last written, replaced or moved."""
    stat = file.stat()
    return max(stat.st_mtime, stat.st_ctime)


def _differ(small: Path, large: Path) -> bool:
    """Whether two files show different pictures, at any size up to LARGEST times the other."""
    with open_image(small) as own, open_image(large) as other:
        if is_big(other) and max(other.size) > LARGEST * max(own.size):
            return True
    if _transparent(small) != _transparent(large):
        return True
    stored, upright = _thumbnails(large)  # the small one may be either
    small_stored = _thumbnails(small)[0]
    return all(np.abs(small_stored - other).mean() > DIFFERENT for other in (stored, upright))


def _thumbnails(file: Path) -> list[np.ndarray]:
    """Gray levels [SIDE, SIDE] of a picture, as stored and as rotated by its EXIF data.

    A large JPEG is not decoded at full size.
    """
    try:
        with open_image(file) as image:
            image.draft("L", (8 * SIDE, 8 * SIDE))
            gray = eight_bit(image, file).convert("L")
            return [
                np.asarray(one.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
                for one in (gray, ImageOps.exif_transpose(gray))
            ]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: cannot be read as an image ({error}); replace it") from None


def _transparent(file: Path) -> bool:
    """Whether a picture has pixels that are not opaque."""
    with open_image(file) as image:
        if image.mode in ("RGB", "L", "CMYK", "YCbCr") and "transparency" not in image.info:
            return False
    picture = read_image(file)
    return picture.shape[-1] == 4 and int(picture[..., 3].min()) < 255
