"""Exponential moving average of weights."""

from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """shadow <- d shadow + (1 - d) weights after every update, d = min(decay, (1 + n) / (10 + n)).

    The ramp in the number of updates n keeps the first, random weights from lingering. decay 0
    switches it off; every call is a no-op then.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.enabled = decay > 0
        self.parameters = list(module.parameters()) if self.enabled else []
        self.reset()

    @property
    def kind(self) -> str:
        """What a picture made inside ``swap`` was made with: "ema" or "raw"."""
        return "ema" if self.enabled else "raw"

    def reset(self) -> None:
        """Start averaging from the module's present weights."""
        self.shadow = [parameter.detach().clone().float() for parameter in self.parameters]
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Call once after every optimizer step."""
        if not self.enabled:
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    def swap(self):
        """Inside the block the module holds the averaged weights; afterwards its own again."""
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
        """Leave the averaged weights in the module for good."""
        if self.enabled:
            self._copy_in(self.shadow)

    @torch.no_grad()
    def _copy_in(self, values) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates, "shadow": [value.cpu() for value in self.shadow]}

    def load_state_dict(self, state: dict) -> None:
        if len(state["shadow"]) != len(self.shadow):
            raise ValueError(
                f"the checkpoint averages {len(state['shadow'])} weights, this run "
                f"{len(self.shadow)}; keep --ema_decay as it was (0 or not)"
            )
        self.num_updates = state["num_updates"]
        for own, saved in zip(self.shadow, state["shadow"], strict=True):
            own.copy_(saved)
