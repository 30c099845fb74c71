"""Ways to make a diffusion model take less memory, or less time, with the same results.

Each is checked against the plain model by the tests: slicing, checkpointing and channels_last
change only rounding, offloading nothing.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

SLICES = ("off", "auto", "max")


class Memory(NamedTuple):
    """Which of them to use."""

    attention_slicing: str = "off"  # of SLICES, or heads at a time
    vae_slicing: bool = False  # one picture at a time through the VAE
    vae_checkpointing: bool = False  # compute the VAE's inside again on the way back
    channels_last: bool = False
    offload: str = "none"  # model: each part is on the device only while it works
    compile: bool = False  # the U-Net, by torch.compile

    def check(self, device: torch.device, *, trains_unet: bool, wants_maps: bool) -> None:
        """ValueError on what undoes one another, or cannot work here."""
        slicing = self.attention_slicing
        if slicing not in SLICES and not (slicing.isdigit() and int(slicing) > 0):
            raise ValueError(f"--attention_slicing {slicing}: expected off, auto, max or a number")
        if slicing != "off" and wants_maps:
            raise ValueError(
                "--attention_slicing never holds a whole attention map, which --i_attn draws; "
                "leave one out"
            )
        if self.offload == "sequential":
            raise ValueError(
                "--offload sequential moves the U-Net layer by layer, many times slower, and "
                "cannot train a LoRA; use --offload model"
            )
        if self.offload == "model" and trains_unet:
            raise ValueError(
                "--guidance vsd trains through the U-Net, which --offload model takes away; leave "
                "one out (--vae_checkpointing and --attention_slicing auto save memory too)"
            )
        if self.offload == "model" and self.compile:
            raise ValueError("--compile begins anew whenever --offload moves the U-Net; leave one")
        if self.offload == "model" and device.type == "cpu":
            raise ValueError("--offload model: there is no GPU to take anything off; leave it out")

    def apply(self, unet: nn.Module, vae: nn.Module) -> None:
        """Set up both parts; offloading is ``on_device``'s matter."""
        if self.attention_slicing != "off":
            slices = self.attention_slicing
            unet.set_attention_slice(int(slices) if slices.isdigit() else slices)
        if self.vae_slicing:
            vae.enable_slicing()
        if self.vae_checkpointing:
            vae.enable_gradient_checkpointing()
        if self.channels_last:
            unet.to(memory_format=torch.channels_last)
            vae.to(memory_format=torch.channels_last)
        if self.compile:
            unet.compile()


PLAIN = Memory()


@contextmanager
def on_device(part: nn.Module, device: torch.device, offload: str):
    """Inside the block ``part`` is on ``device``; with offload "model" it leaves afterwards."""
    part.to(device)
    try:
        yield part
    finally:
        if offload == "model":
            part.to("cpu")
