"""What each entry of a checkpoint must be, value by value, before anything of it is used.

A file may be whole and still hold what no run writes: texts for numbers, quantized weights, Adam
moments of 1e38. Used, they would end in a traceback, or in weights that are NaN a step later.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FORMAT = 1  # version of the keys that nerf-pytorch does not have
PARTS = {  # types of a checkpoint's entries
    "network_fn_state_dict": dict,
    "network_fine_state_dict": dict,
    "optimizer_state_dict": dict,
    "scaler_state_dict": dict,
    "ema_state_dict": dict,
    "occupancy_state_dict": dict,
    "background_state_dict": dict,
    "particles": list,  # of text to 3D: the other objects, as dicts of the same entries
    "args": dict,
    "best": dict,
    "ranking": dict,  # the best checkpoints, see nerf.training.checkpoint_choice
    "told": dict,  # the prompts that a viewer set
    "model": str,  # of guidance: what identifies it
    "copy": dict,  # VSD's LoRA score network
    "scene": dict,  # which scene it was trained on, see nerf.datasets.identity
    "box": Tensor,  # corners of the box that an occupancy grid lies in
    "weights_only": bool,  # --save_weights_only: without the optimizer's state
    "attempt_seeds": str,  # how restarts make their seeds, see nerf.training.recovery
    "format": int,
}
# None stands for a part that is not used; of these there is none, or they are left out.
NEEDED = ("network_fn_state_dict", "optimizer_state_dict", "args", "told", "box", "format")
NETWORKS = ("network_fn_state_dict", "network_fine_state_dict", "background_state_dict")
COUNTS = "global_step attempt draws rays_drawn".split()
WEIGHTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS = (*WEIGHTS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST = torch.finfo(torch.float32).max
ABSURD = 1e30  # of Adam's moments, in gradients and their squares
MAX_STEPS = 1e12
DEPTH = 40  # of dicts and lists inside one another


def newer_format(state: Any) -> int | None:
    """The format of a checkpoint that only a newer version of this program reads, else None."""
    found = state.get("format", FORMAT) if isinstance(state, dict) else FORMAT
    return found if type(found) is int and found > FORMAT else None


def problem(state: Any, size: int) -> str:
    """The first thing wrong with the content of a checkpoint file of ``size`` bytes; "" if none."""
    if not isinstance(state, dict) or "network_fn_state_dict" not in state:
        return "not a NeRF checkpoint (no network_fn_state_dict inside)"
    for wrong in _entries(state):
        return f"not a NeRF checkpoint ({wrong})"
    for wrong in _numbers(state, size):
        return wrong
    for wrong in (*_networks(state), *_training(state), *_about_the_run(state)):
        return f"not a NeRF checkpoint ({wrong})"
    return ""


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether ``value`` is a number, no bool, from low to high; NaN is not."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return type(value) in (int, float) and low <= value <= high


def _is_count(value: Any, high: float = 2**53) -> bool:
    return type(value) is int and 0 <= value < high


def _entries(state: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the kinds of the entries, and with plain numbers."""
    for key, kind in PARTS.items():
        if key in state and type(state[key]) is not kind and not isinstance(state[key], kind):
            if state[key] is None and key not in NEEDED:
                continue
            yield f"{key} is not a {kind.__name__}"
    if type(state.get("format", FORMAT)) is not int or state.get("format", FORMAT) < 1:
        yield "format is not a number of a version"
    for key in COUNTS:
        if not _is_count(state.get(key, 0 if key != "global_step" else None)):
            yield f"{key} is not a count"
    if not _is_number(state.get("train_seconds", 0.0), 0, 1e300):
        yield "train_seconds is not a time"
    if "num_rays" in state and not (_is_count(state["num_rays"], 2**31) and state["num_rays"]):
        yield "num_rays is not a number of rays"
    best = state.get("best") or {"step": None, "psnr": 0.0}
    if not (best.get("step") is None or _is_count(best["step"])) or not _is_number(
        best.get("psnr")
    ):
        yield "best is not a step and a PSNR"


def _numbers(state: Mapping[str, Any], size: int) -> Iterator[str]:
    """What is wrong with the tensors, whatever they are."""
    try:
        for name, value in tensors(state, "", set()):
            if value.layout != torch.strided or value.device.type != "cpu":
                yield f"{name} is not a dense tensor on the CPU"
            elif value.dtype not in NUMBERS:  # quantized, complex, of 8 bits and less
                yield f"{name} has numbers of a kind that no run writes ({value.dtype})"
            elif value.numel() * value.element_size() > size:  # expanded with stride 0
                yield f"{name} claims more numbers than the file has"
            elif not value.isfinite().all():
                yield f"{name} holds NaN or infinity"
            elif value.dtype is torch.float64 and not value.float().isfinite().all():
                yield f"{name} holds numbers above {LARGEST:.3g}, which float32 cannot hold"
    except RecursionError:
        yield f"its entries lie inside one another, deeper than {DEPTH}"


def tensors(value: Any, name: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(path of keys, tensor) of all tensors in nested dicts and lists, skipping ids in ``seen``.

    RecursionError if they are nested deeper than ``DEPTH``.
    """
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        if depth > DEPTH:
            raise RecursionError
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(item, f"{name} {key}".strip(), seen, depth + 1)


def _networks(state: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the weights of networks, and with the averaged ones."""
    objects = [
        ("", state),
        *((f"particle {n} ", p) for n, p in enumerate(state.get("particles") or [], 1)),
    ]
    for where, part in objects:
        if not isinstance(part, dict) or not isinstance(part.get("network_fn_state_dict"), dict):
            yield f"{where}is not an object's weights"
            continue
        for key in NETWORKS:
            for name, value in (part.get(key) or {}).items():
                if not isinstance(name, str) or not _is_weight(value):
                    yield f"{where}{key} {name} is not a tensor of weights"
        for name, value in (part.get("occupancy_state_dict") or {}).items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                yield f"{where}occupancy_state_dict {name} is not a tensor"
    box = state.get("box")
    if box is not None and (box.shape != (2, 3) or not _is_weight(box) or (box[0] >= box[1]).any()):
        yield "box is not two corners of a box"
    if average := state.get("ema_state_dict"):
        if not _is_count(average.get("num_updates")):
            yield "ema_state_dict: num_updates is not a count"
        shadow = average.get("shadow")
        if not isinstance(shadow, list) or not all(map(_is_weight, shadow)):
            yield "ema_state_dict: shadow is not a list of weights"


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in WEIGHTS


def _training(state: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the state of optimizers and loss scales."""
    for where, part in (("", state), ("copy: ", state.get("copy") or {})):
        names = ("optimizer", "scaler") if where else ("optimizer_state_dict", "scaler_state_dict")
        optimizer, scaler = (part.get(name) for name in names)
        if optimizer is not None:
            for wrong in _optimizer(optimizer):
                yield f"{where}{names[0]}: {wrong}"
        if scaler and not _is_scaler(scaler):
            yield f"{where}{names[1]} is not a loss scale and how it changes"


def _optimizer(optimizer: Any) -> Iterator[str]:
    """What is wrong with Adam's moments and steps."""
    entries = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(entries, dict) or not isinstance(optimizer.get("param_groups"), list):
        yield "it is not the state of an optimizer"
        return
    for group in optimizer["param_groups"]:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            yield "its groups are not lists of parameters"
    for number, entry in entries.items():
        if not isinstance(entry, dict):
            yield f"entry {number} is not Adam's"
            continue
        if "step" in entry and not (
            _is_number(entry["step"], 0, MAX_STEPS) and float(entry["step"]).is_integer()
        ):
            yield f"step of parameter {number} is not a count of updates"
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            value = entry.get(name)
            if value is None:
                continue
            if not _is_weight(value) or (value.numel() and float(value.abs().max()) > ABSURD):
                yield f"{name} of parameter {number} has no numbers up to {ABSURD:g}"
            elif name != "exp_avg" and value.numel() and float(value.min()) < 0:
                yield f"{name} of parameter {number} is negative, and it is a mean of squares"


def _is_scaler(scaler: Any) -> bool:
    """Whether it is the state of a GradScaler."""
    return isinstance(scaler, dict) and (
        _is_number(scaler.get("scale"), 1e-30, ABSURD)
        and _is_number(scaler.get("growth_factor"), 1, 1e6)
        and _is_number(scaler.get("backoff_factor"), 1e-6, 1)
        and _is_count(scaler.get("growth_interval"))
        and _is_count(scaler.get("_growth_tracker"))
    )


def _about_the_run(state: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with what the checkpoint tells about its run."""
    flags = state.get("args", {})
    for name, value in flags.items():
        items = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(map(_is_plain, items)):
            yield f"args: {name} is not the value of a flag"
    if not _is_number(flags.get("ema_decay", 0.0), 0, 1):
        yield f"args: ema_decay is {flags['ema_decay']!r}, not a number from 0 to 1"
    for step, text in state.get("told", {}).items():
        if not isinstance(step, str | int) or not isinstance(text, str):
            yield "told is not a table of steps and prompts"
    ranking = state.get("ranking") or {"top": {}, "monitor": None, "split": None}
    top = ranking.get("top")
    if not isinstance(top, dict) or not {"monitor", "split"} <= ranking.keys():
        yield "ranking is not a table of steps and scores"
    elif not all(
        isinstance(step, str) and step.isascii() and step.isdigit() and len(step) < 16
        and _is_number(score, -1e300, 1e300) for step, score in top.items()
    ):  # fmt: skip
        yield "ranking is not a table of steps and scores"
    elif not all(isinstance(ranking[name], str | None) for name in ("monitor", "split")):
        yield "ranking: its monitor or split is not a name"
    scene = state.get("scene") or {}
    for name, dims in (("poses", 3), ("focal", 1), ("colors", 2)) if scene else ():
        if not _is_weight(scene.get(name)) or scene[name].ndim != dims:
            yield f"scene: {name} is not a table of numbers"
    test = scene.get("test") or {"poses": torch.zeros(0, 3, 4), "flags": {}}
    if not (isinstance(test, dict) and _is_weight(test.get("poses")) and test["poses"].ndim == 3):
        yield "scene: test is not a table of views"
    elif not isinstance(test.get("flags"), dict):
        yield "scene: flags of its test views are missing"


def _is_plain(value: Any) -> bool:
    """Whether a flag can have this value: a text, a number, on or off, or not set."""
    if type(value) is int:
        return abs(value) < 2**63
    return value is None or isinstance(value, str | bool | float)
