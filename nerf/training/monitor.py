"""Watching a young run: the dead start that NeRF's ReLU density is known for."""

import torch

from nerf.renderer import Rendered

FLAT = 1e-3  # deviation of the colors in a batch, below which they are one color
PATIENCE = 200  # flat steps in a row that mean death: living runs leave this state in about 50
WATCHED_STEPS = 2000  # a run that is alive by then does not die this way


class DeadStart:
    """Notices a level that renders one single color for ``PATIENCE`` steps in a row.

    It happens when every density is negative at the start (all background), or one wall fills the
    view: ReLU then passes no gradient and nothing ever changes.
    """

    def __init__(self) -> None:
        self.flat_steps = 0

    def looks_dead(self, levels: tuple[Rendered, ...], target: torch.Tensor, step: int) -> bool:
        """Whether this rank's batch (colors of ``levels``, ``target`` [B, 3]) looks dead."""
        if step >= WATCHED_STEPS:
            return False
        varied = target.std(0).max() > 10 * FLAT  # a blank batch says nothing
        flat = torch.stack([level.rgb.detach().std(0).max() < FLAT for level in levels]).any()
        self.flat_steps = self.flat_steps + 1 if bool(flat & varied) else 0
        return self.flat_steps >= PATIENCE

    @staticmethod
    def diagnosis(levels: tuple[Rendered, ...]) -> str:
        """Which level renders what."""
        flat = [level.rgb.detach().std(0).max() < FLAT for level in levels]
        level = levels[flat.index(True)]
        color = "all background" if level.opacity.mean() < 0.5 else "one solid color"
        where = "" if all(flat) else f" of the {('coarse', 'fine')[flat.index(True)]} level"
        return f"every ray{where} is {color}"
