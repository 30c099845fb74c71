"""Watching a young run: the dead start that NeRF's ReLU density is known for."""

import torch

from nerf.renderer import Rendered

FLAT = 1e-3  # deviation of the colours in a batch, below which they are one colour
PATIENCE = 200  # flat steps in a row that mean death: living runs leave this state in about 50
WATCHED_STEPS = 2000  # a run that is alive by then does not die this way


class DeadStart:
    """Notices a level that renders one single colour for ``PATIENCE`` steps in a row.

    It happens when every density is negative at the start (all background), or one wall fills the
    view: ReLU then passes no gradient and nothing ever changes.
    """

    def __init__(self) -> None:
        self.flat_steps = 0

    def looks_dead(self, levels: tuple[Rendered, ...], target: torch.Tensor, step: int) -> bool:
        """Whether this rank's batch (colours of ``levels``, ``target`` [B, 3]) looks dead."""
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
        color = "all background" if level.opacity.mean() < 0.5 else "one solid colour"
        where = "" if all(flat) else f" of the {('coarse', 'fine')[flat.index(True)]} level"
        return f"every ray{where} is {color}"


class Collapse:
    """Notices an object that has gone: every view empty, or every view full, ``PATIENCE`` steps.

    Text to 3D fails this way when a loss on shape outweighs the guidance, or fog fills the box.
    """

    EMPTY, FULL = 0.01, 0.99  # mean opacity of a step's views

    def __init__(self) -> None:
        self.steps, self._said = 0, None

    def watch(self, opacity: float, step: int, say) -> None:
        """``say`` the diagnosis, when there is a new one."""
        complaint = self.diagnosis(opacity)
        if complaint and complaint != self._said:
            say(f"step {step}: {complaint}")
            self._said = complaint

    def diagnosis(self, opacity: float) -> str | None:
        """What to say after a step whose views have mean ``opacity``; None while all is well."""
        empty, full = opacity < self.EMPTY, opacity > self.FULL
        self.steps = self.steps + 1 if empty or full else 0
        if self.steps < PATIENCE:
            return None
        if empty:
            return (
                "the object has vanished; lower --lambda_opacity, raise --blob_scale, or lower "
                "--lrate"
            )
        return (
            "the object fills every view; raise --lambda_opacity, lower --blob_std, or move the "
            "cameras away (--radius_range)"
        )
