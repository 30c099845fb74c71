"""Checkpoints that survive a crash. Their keys are nerf-pytorch's, so either program opens both.

A file is written beside its final name, flushed to disk, read back, and only then renamed. Loading
runs no code (``weights_only=True``), checks every byte (zip CRC) and reserves no more memory than
the file has bytes. ``global_step`` counts finished updates.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nerf import __version__
from nerf.training import checkpoint_content
from nerf.training.checkpoint_content import FORMAT
from nerf.training.ema import EMA

NAME = re.compile(r"^(\d{6,})\.tar$")
Log = Callable[[str], None]
LoadStateDict = Callable[[nn.Module, dict[str, Any], str], None]
SavedState = tuple[Path, dict[str, Any]]  # a checkpoint's file and its content


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class NewerFormatError(CheckpointError):
    """A checkpoint is of a newer version: not damaged, so nothing may take its place."""


class Restorable(Protocol):
    """A module that is saved in entries of its own; a renderer."""

    def checkpoint_state(self) -> dict[str, Any]:
        """The entries of a checkpoint that hold this module."""

    def load_checkpoint_state(self, state: dict[str, Any], load: LoadStateDict, where: str) -> None:
        """Restore what ``checkpoint_state`` returned, with ``load_strictly``."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after ``step`` updates."""
    return folder / f"{step:06d}.tar"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first: files named by at least six digits, .tar."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``, which at any moment is either the old file or the new, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
    temporary.unlink(missing_ok=True)  # what a kill left, or a link
    try:
        with open(temporary, "xb") as file:
            torch.save({**state, "format": FORMAT, "version": __version__}, file)
            file.flush()
            os.fsync(file.fileno())
        load_checkpoint(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of ``path``, on the CPU. CheckpointError if it is damaged or no checkpoint."""
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a broken file can fail anywhere inside zip, pickle or torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported global" in str(error):
            reason = "it holds more than tensors and plain values, so loading it could run code"
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from None
    _check_state(path, state)
    return state


def _check_archive(path: Path, *, checksums: bool = True) -> None:
    """CheckpointError unless all checksums match and no entry claims more bytes than the file."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; expected a .tar file that a run wrote")
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise CheckpointError(f"{path} is not a file; expected a .tar file that a run wrote")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"PK\3\4":
            raise CheckpointError(f"{path}: truncated, the end of the file is missing")
        if not start.startswith(b"\x80"):  # the first byte of files from torch before 1.6
            kind = "not a checkpoint, it is neither zip nor pickle" if start else "empty (0 bytes)"
            raise CheckpointError(f"{path}: {kind}; expected a .tar file that a run wrote")
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise CheckpointError(f"{path}: its entries claim more bytes than the file has")
        damaged = archive.testzip() if checksums else None
    if damaged:
        raise CheckpointError(f"{path}: damaged ({damaged} fails its checksum)")


def _check_state(path: Path, state: Any) -> None:
    """CheckpointError unless ``state`` has a checkpoint's entries, with values that a run writes.

    NewerFormatError if a newer version has written it.
    """
    if newer := checkpoint_content.newer_format(state):
        raise NewerFormatError(
            f"{path}: written by a newer version (format {newer}; this one reads formats up to "
            f"{FORMAT}); update the program, or use another --expname"
        )
    if wrong := checkpoint_content.problem(state, path.stat().st_size):
        raise CheckpointError(f"{path}: {wrong}")


def refuse_newer(paths: Iterable[Path]) -> None:
    """NewerFormatError if one of the files was written by a newer version; reads no weights.

    A run that trains beside it would one day remove it as old, or write over it.
    """
    for path in paths:
        try:
            _check_archive(path, checksums=False)
            state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except Exception:  # damaged, or of torch before 1.6: a newer version writes no such files
            continue
        if checkpoint_content.newer_format(state):
            _check_state(path, state)


def finished_updates(state: dict[str, Any]) -> int:
    """The updates that ``state`` has had: nerf-pytorch's global_step is one less than Adam's."""
    step = int(state["global_step"])
    if "format" in state:
        return step
    adam = state.get("optimizer_state_dict", {}).get("state", {})
    return max([step] + [int(entry["step"]) for entry in adam.values() if "step" in entry])


def load_strictly(module: nn.Module, state: dict[str, Any], where: str) -> None:
    """Load a state dict; CheckpointError if weights are missing, extra or of another shape."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise CheckpointError(
            f"{where} does not fit this network: {lines[0]} "
            "(check netdepth, netwidth, multires, use_viewdirs, N_importance)"
        ) from None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], where: str) -> None:
    """Load Adam's moments; options such as ``fused`` stay those of this run."""
    options = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(state)
        for parameter, entry in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if entry[name].shape != parameter.shape:
                    raise ValueError(f"{name} {list(entry[name].shape)}: {list(parameter.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: its optimizer state does not fit ({error})") from None
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def restore(
    path: Path,
    state: dict[str, Any],
    log: Log,
    renderer: Restorable,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    ema: EMA | None = None,
) -> None:
    """Load ``state`` into the parts given; CheckpointError if one is missing or does not fit."""
    try:
        renderer.load_checkpoint_state(state, load_strictly, str(path))
        if optimizer is not None and state.get("weights_only"):
            log(
                f"{path} holds weights only (--save_weights_only): Adam starts fresh, so the loss "
                "may rise at first"
            )
        elif optimizer is not None:
            load_optimizer(optimizer, state["optimizer_state_dict"], str(path))
        if scaler is not None and scaler.is_enabled() and state.get("scaler_state_dict"):
            scaler.load_state_dict(state["scaler_state_dict"])
        if ema is not None and ema.enabled:
            if "ema_state_dict" in state:
                ema.load_state_dict(state["ema_state_dict"])
            else:
                log(f"{path} has no averaged weights; the average starts from its plain weights")
                ema.reset()
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: a part of the checkpoint is missing or has another shape ({what})"
        ) from None
