"""Several objects that are trained together, one per step (ProlificDreamer's particles)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nerf.rays import Rays
from nerf.renderer import LoadStateDict
from nerf.text3d.renderer import ObjectRendered, ObjectRenderer
from nerf.text3d.shading import Lighting
from nerf.training.rng import host_generator


class Particles(nn.Module):
    """Object renderers of equal settings; ``forward`` renders member number ``current``.

    ``begin_step`` draws ``current``.
    """

    def __init__(self, members: list[ObjectRenderer]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.current = 0

    @property
    def current_member(self) -> ObjectRenderer:
        """The renderer of this step."""
        return self._member(self.current)

    def _member(self, number: int) -> ObjectRenderer:
        member = self.members[number]
        assert isinstance(member, ObjectRenderer)
        return member

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Draw the member of this step, the same on all ranks, and begin its step."""
        self.current = int(
            torch.randint(len(self.members), (), generator=host_generator(generator))
        )
        # A member takes one of n steps on average. With step // n it updates its occupancy grid
        # about as often per step of its own as an object that is trained alone.
        self.current_member.begin_step(step // len(self.members), generator)

    def forward(
        self, rays: Rays, lighting: Lighting, jitter: Tensor | None = None, lit: bool | None = None
    ) -> ObjectRendered:
        """Rays [R] rendered from the current member, see ``ObjectRenderer.forward``."""
        return self.current_member(rays, lighting, jitter, lit)

    @property
    def batch_samples(self) -> int:
        """The current member's, see ``ObjectRenderer``."""
        return self.current_member.batch_samples

    @property
    def room_used(self) -> Tensor:
        """The current member's, see ``ObjectRenderer``."""
        return self.current_member.room_used

    def end_step(self, room_used: Sequence[float]) -> None:
        """See ``ObjectRenderer.end_step``; for the current member, and for those without room."""
        self.current_member.end_step(room_used)
        for number in range(len(self.members)):
            member = self._member(number)
            member.room = member.room or self.current_member.room

    def report(self) -> dict[str, float]:
        """The current member's number and measurements."""
        return {"particle": self.current, **self.current_member.report()}

    def checkpoint_state(self) -> dict[str, Any]:
        """The first member's state as if it were alone, and the others' in ``particles``."""
        numbers = range(len(self.members))
        first, *others = (self._member(number).checkpoint_state() for number in numbers)
        return {**first, "particles": others}

    def load_checkpoint_state(self, state: dict[str, Any], load: LoadStateDict, where: str) -> None:
        """Restore ``checkpoint_state``; ValueError if the number of members differs."""
        saved = [state, *state.get("particles", [])]
        if len(saved) != len(self.members):
            raise ValueError(
                f"{where}: this checkpoint has {len(saved)} particles, this run has "
                f"{len(self.members)}; use --n_particles {len(saved)}"
            )
        for number, member_state in enumerate(saved):
            self._member(number).load_checkpoint_state(member_state, load, where)


def members_of(renderer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The objects of a renderer, each with an ending of its file names: "", "_1", "_2", ...

    Particles have several, every other renderer is its own only one.
    """
    members = renderer.members if isinstance(renderer, Particles) else [renderer]
    return [(f"_{number}" if number else "", member) for number, member in enumerate(members)]
