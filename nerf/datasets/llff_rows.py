"""Which picture belongs to which row of an LLFF capture's poses_bounds.npy.

The rows hold no names. They are in the order of the names of the registered pictures, so as many
pictures as rows belong together in that order. With more or fewer pictures, something else must
name the rows: view_imgs.txt of imgs2poses, the sparse model that the poses are from, a complete
folder of reduced pictures, or numbers in the pictures' own names. A guess would give views the
poses of other views.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from nerf.datasets.colmap_model import find_model, read_model
from nerf.datasets.images import list_images
from nerf.datasets.pictures import composed, some

SAME = 1e-3  # of the cameras' extent: positions in the model and in the rows agree
Warn = Callable[[str], object]


def files_of_rows(datadir: Path, poses: np.ndarray, found: list[Path], warn: Warn) -> list[Path]:
    """The picture of each row, which may be missing; ``warn`` names pictures without a row.

    poses: c2w [V, 3, 4] of the rows, as in the file. found: the pictures that are there, sorted by
    name. ValueError if it is undecidable which belong together.
    """
    by_stem = {_stem(file.name): file for file in found}
    for source, names in _names_of_rows(datadir, poses, len(found)):
        stems = [_stem(name) for name in names]
        if len(set(stems)) < len(stems) or len(by_stem) < len(found):
            continue
        if not by_stem.keys() & set(stems):  # the pictures were renamed
            continue
        others = sorted(file.name for stem, file in by_stem.items() if stem not in set(stems))
        if others:
            warn(
                f"{datadir}: {len(others)} of {len(found)} pictures have no pose, by {source}, and "
                f"are left out: {some(others)}"
            )
        suffix = found[0].suffix
        folder = found[0].parent
        return [
            by_stem.get(stem, folder / (Path(name).stem + suffix))
            for stem, name in zip(stems, names, strict=True)
        ]
    if len(found) == len(poses):
        return found
    numbered = _by_number(found, len(poses))
    if numbered is None:
        raise ValueError(
            f"{datadir}: {len(found)} pictures but {len(poses)} poses in poses_bounds.npy, and "
            "nothing tells which belong together; remove the pictures that were not registered, "
            "bring back those that are missing, or estimate the poses again"
        )
    warn(
        f"{datadir}: {len(found)} pictures for {len(poses)} poses in poses_bounds.npy: matched by "
        f"the numbers in their names, {numbered[0].name} to {numbered[-1].name}"
    )
    return numbered


def _names_of_rows(
    datadir: Path, poses: np.ndarray, num_found: int
) -> Iterator[tuple[str, list[str]]]:
    """What names the rows, and the names, from the surest source on."""
    listed = datadir / "view_imgs.txt"
    if listed.is_file():
        text = listed.read_text(encoding="utf-8-sig", errors="replace")
        names = [line.strip().replace("\\", "/") for line in text.splitlines() if line.strip()]
        if len(names) == len(poses):
            yield listed.name, names
    folder = find_model(datadir)
    if folder is not None:
        registered = _names_in_model(folder, poses)
        if registered is not None:
            yield str(folder.relative_to(datadir)), registered
    if num_found == len(poses):
        return
    for reduced in sorted(datadir.glob("images_*/")):
        files = list_images(reduced)
        if len(files) == len(poses):
            yield f"{reduced.name}/", [file.name for file in files]


def _names_in_model(folder: Path, poses: np.ndarray) -> list[str] | None:
    """The sorted names of a sparse model's pictures, if its cameras are those of the rows."""
    try:
        model = read_model(folder)
    except ValueError:
        return None
    if len(model.names) != len(poses):
        return None
    place = poses[:, :, 3]
    extent = float(np.abs(place - place.mean(0)).max())
    if np.abs(model.c2w[:, :, 3] - place).max() > SAME * max(extent, 1e-9):
        return None
    return model.names


def _by_number(found: list[Path], count: int) -> list[Path] | None:
    """The pictures of consecutive numbers, ``count`` of them, with the first and last in ``found``.

    None if names are not of one form, or other numbers may have been there.
    """
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", file.stem) for file in found]
    if len(found) > count or len(found) < 2 or not all(parts):
        return None
    groups = [part.groups() for part in parts if part is not None]
    numbers = {int(digits): file for (_, digits, _), file in zip(groups, found, strict=True)}
    same = len({(before, after) for before, _, after in groups}) == 1
    padded = len({len(digits) for _, digits, _ in groups}) == 1
    low, high = min(numbers), max(numbers)
    # Without leading zeros names are sorted as text, 10 before 2, and rows with them.
    if not same or not padded or len(numbers) < len(found) or high - low + 1 != count:
        return None
    before, digits, after = groups[0]
    return [
        numbers.get(
            number,
            found[0].with_name(f"{before}{number:0{len(digits)}d}{after}{found[0].suffix}"),
        )
        for number in range(low, high + 1)
    ]


def _stem(name: str) -> str:
    """A picture's name without folder and ending, to compare names."""
    return composed(Path(name).stem)
