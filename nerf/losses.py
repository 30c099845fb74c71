"""Training terms. All take float32 and return a scalar."""

from torch import Tensor


def squared_error(rgb: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over rays and channels: rgb, target [..., 3] -> [] (NeRF eq. 6)."""
    return ((rgb - target) ** 2).mean()
