"""Several objects that learn together, one per step (ProlificDreamer's particles)."""

import torch
from torch import nn


class Particles(nn.Module):
    """``members``: object renderers alike. ``current`` is the one that all calls go to."""

    def __init__(self, members: list[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.current = 0

    @property
    def current_member(self) -> nn.Module:
        return self.members[self.current]

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Draw the one that this step is for; the same on every rank."""
        draw = torch.randint(len(self.members), (), generator=generator, device=generator.device)
        self.current = int(draw)
        # Each keeps its own count, so that its occupancy grid is looked at as often as if alone.
        self.current_member.begin_step(step // len(self.members), generator)

    def forward(self, rays, lighting, jitter=None, lit=None):
        return self.current_member(rays, lighting, jitter, lit)

    def report(self) -> dict[str, float]:
        return {"particle": self.current, **self.current_member.report()}

    def checkpoint_state(self) -> dict:
        first, *others = (member.checkpoint_state() for member in self.members)
        return {**first, "particles": others}

    def load_checkpoint_state(self, state: dict, load, where: str) -> None:
        saved = [state, *state.get("particles", [])]
        if len(saved) != len(self.members):
            raise ValueError(
                f"{where}: holds {len(saved)} particles, this run {len(self.members)}; "
                "keep --n_particles as it was"
            )
        for member, part in zip(self.members, saved, strict=True):
            member.load_checkpoint_state(part, load, where)


def members_of(renderer: nn.Module) -> list[tuple[str, nn.Module]]:
    """What there is to look at, each with an ending for file names: "" for the first."""
    members = getattr(renderer, "members", [renderer])
    return [(f"_{number}" if number else "", member) for number, member in enumerate(members)]
