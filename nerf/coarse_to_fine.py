"""Tri-planes that start coarse and become finer during training.

(Chen et al. 2022, TensoRF, section 4.4.)
"""

from typing import NamedTuple

from torch import nn

from nerf.encodings import TriPlane


class GridSchedule(NamedTuple):
    """Entries per side of the finest planes: a geometric sequence from ``start`` to ``finest``.

    steps: the updates at which they become finer, rising; none: ``finest`` from the start.
    """

    steps: tuple[int, ...]
    start: int
    finest: int

    def size(self, step: int) -> int:
        """Entries per side at update ``step``."""
        passed = sum(refined <= step for refined in self.steps)
        if passed == len(self.steps):
            return self.finest
        return round(self.start * (self.finest / self.start) ** (passed / len(self.steps)))

    def latest(self, step: int) -> int:
        """The last update up to ``step`` at which planes became finer; 0: none did."""
        return max((refined for refined in self.steps if refined <= step), default=0)


def refine(renderer: nn.Module, finest: int) -> dict[nn.Parameter, nn.Parameter]:
    """Make the planes of the renderer's field finer, if they are coarser than ``finest`` per side.

    Returns the new parameter of each old one; nothing if there are no planes or nothing changes.
    """
    encoding = getattr(getattr(renderer, "field", None), "encoding", None)
    if not isinstance(encoding, TriPlane) or finest <= encoding.finest:
        return {}
    return encoding.resize(finest)
