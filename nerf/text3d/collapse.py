"""Detects that text to 3D has collapsed: the object has vanished, or fills every view."""

from collections.abc import Callable

PATIENCE = 200  # such steps in a row count as collapse; runs that recover do so within about 50


class Collapse:
    """Detects that all views have been empty, or all full, for ``PATIENCE`` steps in a row.

    Text to 3D fails this way when a loss on shape outweighs the guidance, or when fog fills the
    cube.
    """

    EMPTY, FULL = 0.01, 0.99  # mean opacity of a step's views

    def __init__(self) -> None:
        self.steps = 0  # in a row
        self._last_step: int | None = None
        self._logged: str | None = None

    def watch(self, opacity: float, step: int, log: Callable[[str], None]) -> None:
        """Log the diagnosis of ``step``, unless the latest one that was logged is the same.

        Steps since the last call count as this one.
        """
        passed = 1 if self._last_step is None else step - self._last_step
        self._last_step = step
        message = self.diagnosis(opacity, passed)
        if message and message != self._logged:
            log(f"step {step}: {message}")
            self._logged = message

    def diagnosis(self, opacity: float, passed: int = 1) -> str | None:
        """A message if it has collapsed, else None. opacity: mean over the views of a step.

        passed: how many steps it stands for.
        """
        empty, full = opacity < self.EMPTY, opacity > self.FULL
        self.steps = self.steps + passed if empty or full else 0
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
