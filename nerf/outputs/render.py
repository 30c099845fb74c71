"""Whole pictures in flat memory: blocks of rays through a renderer."""

from collections.abc import Callable

import torch
from torch import Tensor

from nerf.rays import Rays
from nerf.renderer import Rendered
from nerf.training.system import map_on_threads


def block_size(samples_per_ray: int, width: int, chunk: int, netchunk: int, device) -> int:
    """Rays that go through the network together.

    ``chunk`` (rays) and ``netchunk`` (points) are the user's upper bounds. On a CPU the block is
    kept small enough that one layer's activations stay in the second-level cache; that alone made
    training 1.5x faster than one large batch.
    """
    limit = min(chunk, netchunk // samples_per_ray)
    if torch.device(device).type == "cpu":
        limit = min(limit, (1 << 21) // (width * samples_per_ray))
    return max(1, limit)


def render_view(
    render: Callable[[Rays], Rendered],
    rays_of: Callable[[Tensor], Rays],
    size: tuple[int, int],
    block: int,
    device,
) -> Rendered:
    """A whole picture of (height, width), ``block`` rays at a time, on the CPU.

    render: rays [B] -> Rendered. rays_of: flat pixel numbers [B] (row by row) -> Rays. Rays are
    made block by block too, so working memory does not grow with the picture.
    """
    height, width = size
    picture = Rendered(
        torch.empty(height * width, 3), torch.empty(height * width), torch.empty(height * width)
    )

    def render_block(start: int) -> None:
        stop = min(start + block, height * width)
        rendered = render(rays_of(torch.arange(start, stop, device=device)))
        for whole, part in zip(picture, rendered, strict=True):
            whole[start:stop] = part

    map_on_threads(render_block, range(0, height * width, block), torch.device(device))
    return Rendered(*(member.view(height, width, *member.shape[1:]) for member in picture))
