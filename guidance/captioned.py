"""A folder of one's own pictures, and the caption of each, as diffusers and kohya lay it out.

The caption of NAME.png is its "text" in metadata.jsonl, else the content of NAME.txt, else the
prompt. Pictures are cropped to a centered square and resized.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guidance.model_kinds import one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")  # of a line of METADATA: the first that it has


class Captioned(NamedTuple):
    """Pictures and captions, in the order of the file names."""

    images: Tensor  # [N, 3, size, size] in [0, 1]
    captions: list[str]
    sources: list[str]  # where each caption comes from, for messages
    digest: str  # of the files' bytes and the captions


def read_captioned(folder: Path, size: int, prompt: str | None) -> Captioned:
    """All pictures of ``folder``; prompt: the caption of those that have none of their own.

    ValueError, in one line, if there is no picture, one cannot be read, or one has no caption.
    """
    if not folder.is_dir():
        raise ValueError(f"--pictures {folder}: no such folder; expected one with pictures in it")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"--pictures {folder}: no pictures in it; expected files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    listed = _metadata(folder, {path.name for path in files})
    images, captions, sources, digest = [], [], [], hashlib.sha256()
    for path in files:
        caption, source = _caption(path, listed, prompt)
        images.append(read_picture(path, size))
        captions.append(caption)
        sources.append(source)
        digest.update(path.read_bytes())
        digest.update(f"\n{caption}\n".encode())
    return Captioned(torch.stack(images), captions, sources, digest.hexdigest()[:16])


def read_picture(path: Path, size: int) -> Tensor:
    """A picture's centered square, resized: [3, size, size] in [0, 1].

    Transparent pixels are white; a photo's orientation is respected. ValueError if it cannot be
    read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot read it as a picture ({one_line(error)}); repair or remove it"
        ) from None
    white = Image.new("RGBA", picture.size, "white")
    square = ImageOps.fit(
        Image.alpha_composite(white, picture).convert("RGB"), (size, size), Image.Resampling.LANCZOS
    )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def _metadata(folder: Path, names: set[str]) -> dict[str, str]:
    """Captions by file name in the folder's metadata.jsonl, {} without one."""
    path, captions = folder / METADATA, {}
    if not path.is_file():
        return {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = entry["file_name"]
            captions[name] = next(str(entry[key]) for key in CAPTION_KEYS if key in entry)
        except (ValueError, TypeError, KeyError, StopIteration, RecursionError):
            raise ValueError(
                f'{path}: line {number}: expected {{"file_name": "1.png", "text": "a caption"}}'
            ) from None
        if name not in names:
            raise ValueError(f"{path}: line {number}: no picture {name!r} in the folder")
    return captions


def _caption(path: Path, listed: dict[str, str], prompt: str | None) -> tuple[str, str]:
    """The caption of a picture, and where it comes from."""
    beside = path.with_suffix(".txt")
    if listed.get(path.name, "").strip():
        return listed[path.name].strip(), str(path.with_name(METADATA))
    if beside.is_file() and (text := _text(beside).strip()):
        return " ".join(text.split()), str(beside)
    if prompt is None:
        raise ValueError(
            f"{path}: has no caption; give all pictures one with --prompt, or write it into "
            f"{beside.name} or {METADATA}"
        )
    return prompt, "--prompt"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read it as text ({one_line(error)})") from None
