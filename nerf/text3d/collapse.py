"""Notices an object that has vanished or that fills every view."""

PATIENCE = 200  # flat steps in a row that mean death: living runs leave this state in about 50


class Collapse:
    """Notices an object that has gone: every view empty, or every view full, ``PATIENCE`` steps.

    Text to 3D fails this way when a loss on shape outweighs the guidance, or fog fills the box.
    """

    EMPTY, FULL = 0.01, 0.99  # mean opacity of a step's views

    def __init__(self) -> None:
        self.steps, self._said = 0, None

    def watch(self, opacity: float, step: int, log) -> None:
        """``say`` the diagnosis, when there is a new one."""
        complaint = self.diagnosis(opacity)
        if complaint and complaint != self._said:
            log(f"step {step}: {complaint}")
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
