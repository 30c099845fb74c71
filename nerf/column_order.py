"""Two orders of the columns of a weight: that of its layer's inputs here, and nerf-pytorch's.

``FrequencyEncoding`` has all sines before all cosines, nerf-pytorch alternates them. The weight of
a layer on encoded inputs is kept in our order, so that training never permutes it; state dicts,
Adam's moments and averages in checkpoints are in nerf-pytorch's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class EncodedLinear(nn.Linear):
    """A linear layer whose inputs from ``start`` on are encoded, with state dicts in file order.

    columns [C]: each encoded input's index in nerf-pytorch's order. A new layer computes what
    nn.Linear computes with the same random state and inputs in nerf-pytorch's order.
    """

    def __init__(self, in_features: int, out_features: int, columns: Tensor, start: int = 0):
        super().__init__(in_features, out_features)
        order = torch.arange(in_features)
        order[start : start + len(columns)] = start + columns
        self.weight = nn.Parameter(self.weight.data[:, order])
        self.weight.file_columns = order  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        destination[name] = to_file_order(self.weight, destination[name])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        name = f"{prefix}weight"
        if isinstance(value := state_dict.get(name), Tensor):
            state_dict = {**state_dict, name: from_file_order(self.weight, value)}
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def from_file_order(parameter: Tensor, value: Tensor) -> Tensor:
    """``value``, from a file, with the columns of the parameter; unchanged in another shape."""
    return _permuted(parameter, value, lambda order: order)


def to_file_order(parameter: Tensor, value: Tensor) -> Tensor:
    """``value``, with the columns of the parameter, as it stands in a file."""
    return _permuted(parameter, value, torch.argsort)


def keep_file_order(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer's state dicts hold the moments of such weights in file order."""

    def converted(state: dict[str, Any], convert: Callable[[Tensor, Tensor], Tensor]) -> dict:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        entries = dict(state["state"])
        for number, parameter in zip(numbers, parameters, strict=False):
            entry = entries.get(number, {})  # step, exp_avg, exp_avg_sq; {} before the first update
            entries[number] = {
                name: convert(parameter, value) if isinstance(value, Tensor) else value
                for name, value in entry.items()
            }
        return {**state, "state": {number: entry for number, entry in entries.items() if entry}}

    optimizer.register_state_dict_post_hook(lambda own, state: converted(state, to_file_order))
    optimizer.register_load_state_dict_pre_hook(
        lambda own, state: converted(state, from_file_order)
    )


def _permuted(parameter: Tensor, value: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    order = getattr(parameter, "file_columns", None)
    if order is None or value.shape != parameter.shape:
        return value
    return value.index_select(1, choose(order).to(value.device))
