"""Which of the pictures that a data folder names are there and fit: the others are left out.

A capture with a few missing pictures is still a good capture. What is left out is named, and
refused only where too little remains.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nerf.datasets.images import LARGEST, why_unreadable

FEWEST = 3  # training pictures that must remain
LEAST_PART = 1 / 3  # of the training pictures that must remain
Splits = dict[str, list[int]]
Warn = Callable[[str], object]


def some(names: list[str], count: int = 5) -> str:
    """The first names of a list, and how many more it has."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def composed(name: str) -> str:
    """A name with its accents composed (NFC): macOS writes them decomposed (NFD) to disk."""
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    """A name with its accents composed and in small letters."""
    return composed(name).casefold()


class Names:
    """The names in folders, each folder listed once: for looking up many files of a capture.

    It does not see what changes afterwards, so it is made anew for every use.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, list[dict[str, list[str]]]] = {}

    def similar(self, folder: Path, name: str) -> str:
        """The only name in ``folder`` that is ``name`` but for accents, then for case.

        ``name`` itself where there is none, or more than one.
        """
        if folder not in self._folders:
            forms: list[dict[str, list[str]]] = [{}, {}]
            for other in os.listdir(folder):
                for form, convert in zip(forms, (composed, _folded), strict=True):
                    form.setdefault(convert(other), []).append(other)
            self._folders[folder] = forms
        for form, convert in zip(self._folders[folder], (composed, _folded), strict=True):
            same = form.get(convert(name))
            if same:
                return same[0] if len(same) == 1 else name
        return name


def existing(path: Path, names: Names | None = None) -> Path:
    """``path``, or the one file whose name differs only in capital letters or composed accents.

    names: shared by the calls for many files.
    """
    if path.exists():
        return path
    names, found = names or Names(), Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not (found / part).exists() and found.is_dir():
            part = names.similar(found, part)
        found = found / part
    return found


def renumbered(splits: Splits, kept: list[int]) -> Splits:
    """Splits of the views ``kept``, by their new numbers; a split without views is left out."""
    place = {view: index for index, view in enumerate(kept)}
    moved = {
        name: [place[view] for view in views if view in place] for name, views in splits.items()
    }
    return {name: views for name, views in moved.items() if views or name == "train"}


def readable(
    files: list[Path], splits: Splits | None, where: str, warn: Warn, kind: str = "pictures"
) -> list[int]:
    """The numbers of the files that exist and are whole pictures; ``warn`` names the others.

    splits: split name -> numbers, or None. ValueError, beginning with ``where``, if fewer than
    FEWEST or LEAST_PART of the training pictures remain.
    """
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    lost = set(missing)
    broken = {
        index: why
        for index, file in enumerate(files)
        if index not in lost and (why := why_unreadable(file))
    }
    lost |= set(broken)
    if not lost:
        return list(range(len(files)))
    for name, views in (splits or {}).items():
        if name != "train" and views and lost.issuperset(views):
            why = "exists" if set(missing).issuperset(views) else "can be read"
            warn(f"{where}: none of the {len(views)} {name} pictures {why}; that split is empty")
            own = set(views)
            missing = [index for index in missing if index not in own]
    train = splits["train"] if splits and splits.get("train") else range(len(files))
    shown = {i: files[i].name + (f" ({broken[i]})" if i in broken else "") for i in lost}
    names = [shown[index] for index in train if index in lost]
    reason = " and ".join(["missing"] * bool(missing) + ["unreadable"] * bool(broken))
    hint = _other_ending([files[index] for index in missing])
    too_few(len(train), sum(index in lost for index in train), f"{where}: ", reason, names, hint)
    for group, what in ((missing, "missing"), (list(broken), "unreadable")):
        if group:
            are = "is" if len(group) == 1 else "are"
            warn(
                f"{where}: {len(group)} of {len(files)} {kind} {are} {what} and left out: "
                f"{some([shown[index] for index in group])}{hint if group is missing else ''}"
            )
    return [index for index in range(len(files)) if index not in lost]


def _other_ending(missing: list[Path]) -> str:
    """For a message: a file that has the name of a missing one, but another ending; else ""."""
    for file in missing[:3]:
        if file.parent.is_dir():
            for name in sorted(os.listdir(file.parent)):
                if Path(name).stem == file.stem and (file.parent / name).is_file():
                    return f"; {name} is there, which has another ending"
    return ""


def too_few(count: int, lost: int, where: str, why: str, names: list[str], hint: str = "") -> None:
    """ValueError if fewer than FEWEST, or LEAST_PART, of ``count`` pictures are not ``lost``.

    why: what is wrong with those that are lost, for the message; names: theirs.
    """
    if lost and (count - lost < FEWEST or count - lost < LEAST_PART * count):
        raise ValueError(
            f"{where}{lost} of {count} pictures are {why} ({some(names)}), which leaves too few; "
            f"is the data folder complete?{hint}"
        )


def most_common(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The most frequent size; of several the smallest."""
    counts = Counter(sizes)
    return max(sorted(counts), key=lambda size: counts[size])


def _others(count: int, wrong: list[int]) -> list[int]:
    """The numbers below ``count`` that are not ``wrong``."""
    lost = set(wrong)
    return [index for index in range(count) if index not in lost]


def of_one_size(files: list[Path], found: list[list[tuple[int, int]]], warn: Warn) -> list[int]:
    """The numbers of the files that have the most common size; ``warn`` names the others.

    found: as in ``of_their_cameras``. ValueError if too many differ.
    """
    upright = [own[-1] for own in found]
    common = most_common(upright)
    wrong = [index for index, own in enumerate(found) if common not in own]
    if wrong:
        leave_out(files, wrong, warn, f"not {common[0]}x{common[1]} pixels as the others")
    return _others(len(files), wrong)


def of_their_cameras(
    files: list[Path], sizes: np.ndarray, found: list[list[tuple[int, int]]], warn: Warn
) -> list[int]:
    """The numbers of the files that have the proportions of their cameras; ``warn`` names others.

    sizes: [V, 2] height and width that the cameras are for. found: width and height of each file,
    as stored and as rotated by its EXIF data; either may fit, up to LARGEST times the size.
    ValueError if too many differ.
    """

    def fits(size: np.ndarray, w: int, h: int) -> bool:
        height, width = size
        # One pixel of difference may come from rounding when pictures were reduced.
        same = abs(w * height / width - h) <= 1 or abs(h * width / height - w) <= 1
        return same and max(w, h) <= LARGEST * max(width, height)

    wrong = [
        index
        for index, (size, own) in enumerate(zip(sizes, found, strict=True))
        if not any(fits(size, w, h) for w, h in own)
    ]
    if wrong:
        (w, h), (height, width) = found[wrong[0]][-1], sizes[wrong[0]]
        reason = f"{w}x{h} pixels where its camera is for {width:g}x{height:g}"
        leave_out(files, wrong, warn, f"of another shape or size than their cameras ({reason})")
    return _others(len(files), wrong)


def leave_out(files: list[Path], wrong: list[int], warn: Warn, why: str) -> None:
    """Warn that the files of numbers ``wrong`` are left out; ValueError if too few remain."""
    names = [str(files[index]) for index in wrong[:1]] + [files[i].name for i in wrong[1:]]
    too_few(len(files), len(wrong), "", why, names)
    warn(f"{len(wrong)} of {len(files)} pictures are {why}, and left out: {some(names)}")
