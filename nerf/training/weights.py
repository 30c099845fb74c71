"""Weights without the rest of a run: written to .safetensors, and loaded into a new run.

Names are those of the renderer's state dict: ``coarse.`` and ``fine.``, or ``field.`` and ``grid.``
(the occupancy grid), ``background_net.``, ``members.N.`` of particles. Averaged weights take the
place of the trained ones where a run has them, as in its pictures.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerf import __version__
from nerf.training.checkpoint import CheckpointError, finished_updates, load_checkpoint
from nerf.training.ema import EMA
from nerf.training.files import replace_file

Log = Callable[[str], None]
# The entries of a checkpoint that hold an object, and their module in a renderer of one field.
PARTS = {
    "network_fn_state_dict": "field",
    "occupancy_state_dict": "grid",
    "background_state_dict": "background_net",
}
NAMED = 4  # names in a message


class Weights(NamedTuple):
    """The tensors of a file by their names in a renderer, and what the file says about itself."""

    tensors: dict[str, Tensor]
    note: str  # such as "step 500, ema weights"
    box: list[list[float]] | None  # corners of the box that grids lie in, of run_nerf.py


# ----------------------------------------------------------------------------------------- writing


def export_weights(
    path: Path, renderer: nn.Module, ema: EMA, step: int, flags: dict[str, Any], log: Log
) -> None:
    """Write the renderer's state dict, with the averaged weights, to a .safetensors file.

    Its metadata, all text: ``step``, ``weights`` ("ema" or "raw"), ``args`` (the run's flags, as
    JSON), ``box`` (JSON, of an occupancy grid), ``version`` of the program, and ``format`` "pt".
    """
    from safetensors.torch import save

    with ema.swap():
        state = {name: value.detach().cpu() for name, value in renderer.state_dict().items()}
        tensors = {name: value.clone().contiguous() for name, value in state.items()}
    metadata = {"format": "pt", "version": __version__, "step": str(step), "weights": ema.kind}
    metadata |= {"args": json.dumps(flags)}
    space = getattr(renderer, "space", None)
    if isinstance(getattr(space, "low", None), Tensor):
        assert space is not None
        metadata["box"] = json.dumps([space.low.tolist(), space.high.tolist()])
    replace_file(path, save(tensors, metadata=metadata))
    count = sum(value.numel() for value in tensors.values())
    log(f"weights: {path} (step {step}, {ema.kind}; {len(tensors)} tensors, {count} numbers)")


# ----------------------------------------------------------------------------------------- reading


def read_weights(path: Path) -> Weights:
    """The weights in a checkpoint, also nerf-pytorch's, or in a .safetensors file.

    CheckpointError if it is neither, damaged, or has numbers that are not finite.
    """
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    state = load_checkpoint(path)
    tensors = _named_tensors(state)
    average, kind = state.get("ema_state_dict"), "raw"
    if average:
        kind = "ema"
        # Averages are in the order of the parameters, which is that of the state dict.
        names = [name for name in tensors if ".grid." not in f".{name}"]
        shadow = average.get("shadow")
        if not isinstance(shadow, list) or len(shadow) != len(names):
            raise CheckpointError(f"{path}: its averaged weights are not those of its network")
        for name, value in zip(names, shadow, strict=True):
            if not isinstance(value, Tensor) or value.shape != tensors[name].shape:
                raise CheckpointError(f"{path}: its averaged weights are not those of its network")
            tensors[name] = value
    box = state.get("box")
    corners = box.tolist() if isinstance(box, Tensor) else None
    return Weights(tensors, f"step {finished_updates(state)}, {kind} weights", corners)


def _named_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the renderer that wrote it."""
    named = {}
    if (state.get("args") or {}).get("space") == "2d":
        named[""] = state["network_fn_state_dict"]
    elif "occupancy_state_dict" in state:
        members = [state, *(state.get("particles") or [])]
        for number, member in enumerate(members):
            place = f"members.{number}." if len(members) > 1 else ""
            named |= {f"{place}{part}.": member.get(key) for key, part in PARTS.items()}
    else:
        named["coarse."] = state["network_fn_state_dict"]
        named["fine."] = state.get("network_fine_state_dict")
    return {
        prefix + name: value
        for prefix, tensors in named.items()
        for name, value in (tensors or {}).items()
        if isinstance(value, Tensor)
    }


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        box = json.loads(metadata["box"]) if "box" in metadata else None
    except (OSError, SafetensorError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable .safetensors file ({reason})") from None
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
    return Weights(tensors, f"step {metadata.get('step')}, {metadata.get('weights')} weights", box)


# ----------------------------------------------------------------------------------------- loading


def split_module(text: str) -> tuple[Path, str]:
    """ "old.tar:field.encoding" as (old.tar, "field.encoding"); without a module (PATH, "")."""
    path, colon, module = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), ""
    return Path(path), module


def load_weights(renderer: nn.Module, given: str, ignored: Sequence[str], log: Log) -> None:
    """Copy weights into the renderer: ``--ft_weights`` ``given``, ``--ft_ignore`` ``ignored``.

    given: PATH or PATH:MODULE. Ignored names, of tensors or of modules, keep this run's own values;
    all others must be in both and have one shape. ValueError that names those that do not.
    """
    path, module = split_module(given)
    weights, own = read_weights(path), renderer.state_dict()
    wanted = {name for name in {*weights.tensors, *own} if _is_in(name, module)}
    if not any(name in own for name in wanted):
        raise ValueError(
            f"--ft_weights {given}: this run's network has no {module}; it has {_modules(own)}"
        )
    for name in ignored:
        if not any(_is_in(each, name) for each in wanted):
            raise ValueError(
                f"--ft_ignore {name}: neither {path} nor this run's network has a tensor or module "
                f"of this name; they have {_modules(wanted)}"
            )
    kept = {name for name in wanted if any(_is_in(name, each) for each in ignored)}
    problems = _problems(weights.tensors, own, sorted(wanted - kept))
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ValueError(
            f"--ft_weights {path} does not fit this network: {'; '.join(problems[:NAMED])}{more}; "
            "change the network's flags, or leave tensors out: --ft_ignore NAME ..."
        )
    taken = wanted - kept
    # By load_state_dict, for its hooks; names that are not given stay as they are.
    renderer.load_state_dict({name: weights.tensors[name] for name in taken}, strict=False)
    left = [f"{name} ({sum(_is_in(each, name) for each in kept)})" for name in ignored]
    of = f" of {module}" if module else ""
    log(
        f"--ft_weights {path} ({weights.note}): loaded {len(taken)} tensors{of}, ignored "
        f"{len(kept)}{': ' + ', '.join(left) if left else ''}; step 0, with a fresh optimizer"
    )
    _compare_box(renderer, weights, taken, log)


def _is_in(name: str, module: str) -> bool:
    """Whether a tensor is the one named ``module``, or of that module; "": all are."""
    return not module or name == module or name.startswith(module + ".")


def _modules(names: Any) -> str:
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names})[:12])


def _problems(given: dict[str, Tensor], own: dict[str, Tensor], names: list[str]) -> list[str]:
    """What is wrong with each of the tensors ``names``, if anything is."""
    found = []
    for name in names:
        if name not in given:
            found.append(f"{name} is not in the file")
        elif name not in own:
            found.append(f"{name} is in the file only")
        elif given[name].shape != own[name].shape:
            found.append(f"{name} is {list(given[name].shape)} there, {list(own[name].shape)} here")
    return found


def _compare_box(renderer: nn.Module, weights: Weights, taken: set[str], log: Log) -> None:
    """Say so if grids were loaded that lie in another box than this run's."""
    space = getattr(renderer, "space", None)
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    on_grids = any("encoding." in name or name.startswith("grid.") for name in taken)
    if weights.box is None or low is None or high is None or not on_grids:
        return
    box = torch.tensor(weights.box, device=low.device)
    own = torch.stack([low, high])
    if box.shape != own.shape or not torch.allclose(box, own, rtol=1e-3, atol=1e-3):
        log("this scene has another box than the file's: the feature grids are stretched to fit")
