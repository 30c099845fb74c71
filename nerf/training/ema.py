"""Exponential moving average of weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nerf.column_order import from_file_order, to_file_order


class EMA:
    """shadow <- d shadow + (1 - d) weights after every update, d = min(decay, (1 + n) / (10 + n)).

    With the ramp in the number of updates n, the initial, random weights soon lose their influence.
    decay 0 switches the average off: then every method does nothing.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.enabled = decay > 0
        self.parameters: list[nn.Parameter] = list(module.parameters()) if self.enabled else []
        self.reset()

    @torch.no_grad()
    def replace(
        self,
        new: Mapping[nn.Parameter, nn.Parameter],
        resized: Callable[[Tensor, Any], Tensor],
    ) -> None:
        """Average the parameters ``new`` instead of the old ones, its keys.

        resized(average, shape): an old average in the shape of the new parameter.
        """
        for number, parameter in enumerate(self.parameters):
            if parameter in new:
                self.parameters[number] = new[parameter]
                self.shadow[number] = resized(self.shadow[number], new[parameter].shape)

    @property
    def kind(self) -> str:
        """The weights inside ``swap``, for file names and JSON: "ema" or "raw"."""
        return "ema" if self.enabled else "raw"

    def reset(self) -> None:
        """Start averaging again from the module's present weights."""
        self.shadow = [parameter.detach().clone().float() for parameter in self.parameters]
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Average the present weights in; call once after every optimizer step."""
        if not self.enabled:
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Inside the block, the module holds the averaged weights; after it, its own again."""
        if not self.enabled:
            yield
            return
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._copy_in(self.shadow)
        try:
            yield
        finally:
            self._copy_in(own)

    def keep(self) -> None:
        """Copy the averaged weights into the module for good."""
        if self.enabled:
            self._copy_in(self.shadow)

    @torch.no_grad()
    def _copy_in(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights on the CPU, and the number of updates."""
        pairs = zip(self.parameters, self.shadow, strict=True)
        shadow = [to_file_order(parameter, value).cpu() for parameter, value in pairs]
        return {"num_updates": self.num_updates, "shadow": shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``. ValueError if the number of weights differs."""
        if len(state["shadow"]) != len(self.shadow):
            raise ValueError(
                f"the checkpoint has {len(state['shadow'])} averaged weights, this run has "
                f"{len(self.shadow)}; use the --ema_decay with which it was trained"
            )
        self.num_updates = state["num_updates"]
        for parameter, own, saved in zip(
            self.parameters, self.shadow, state["shadow"], strict=True
        ):
            own.copy_(from_file_order(parameter, saved))
