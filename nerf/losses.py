"""Losses on the colors of rendered pixels, by name."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nerf.renderer import squared_error


def _mse(rgb: Tensor, target: Tensor, delta: float) -> Tensor:
    return squared_error(rgb, target)


def _huber(rgb: Tensor, target: Tensor, delta: float) -> Tensor:
    return F.huber_loss(rgb, target, delta=delta)


def _smooth_l1(rgb: Tensor, target: Tensor, delta: float) -> Tensor:
    return F.smooth_l1_loss(rgb, target, beta=delta)


# loss(rgb, target, delta) -> [], the mean over colors rgb and target [..., 3] of a function of the
# difference x. mse: x^2. huber: x^2 / 2 for |x| < delta, else delta (|x| - delta / 2). smooth_l1:
# huber / delta, so that its slope is 1 for large differences, whatever delta is. With delta 1 both
# are half of mse, since no two colors differ by more (NerfAcc's smooth L1); Instant-NGP has 0.1.
PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "huber": _huber,
    "mse": _mse,
    "smooth_l1": _smooth_l1,
}
