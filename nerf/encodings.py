"""Feature encodings of positions and directions. An encoding owns its output width."""

import torch
from torch import Tensor, nn


class FrequencyEncoding(nn.Module):
    """x, then sin and cos of 2^0 x ... 2^(L-1) x (NeRF eq. 4; like its code, without the pi).

    [..., 3] -> [..., 3 + 6 L], always in float32: at 2^9 x bfloat16 has no fraction bits left.
    The order (x, sin 2^0, cos 2^0, sin 2^1, ...) is nerf-pytorch's, so its weights fit.
    """

    def __init__(self, num_frequencies: int, num_dims: int = 3):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.out_dim = num_dims * (1 + 2 * num_frequencies)
        frequencies = 2.0 ** torch.arange(num_frequencies, dtype=torch.float32)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = x[..., None, :] * self.frequencies[:, None]  # [..., L, 3]
        waves = torch.stack([angles.sin(), angles.cos()], dim=-2)  # [..., L, 2, 3]
        return torch.cat([x, waves.flatten(-3)], dim=-1)


class IdentityEncoding(nn.Module):
    """No encoding (``--i_embed -1``)."""

    def __init__(self, num_dims: int = 3):
        super().__init__()
        self.out_dim = num_dims

    def forward(self, x: Tensor) -> Tensor:
        return x
