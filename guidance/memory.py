"""Settings that make a diffusion model use less memory, or less time, with the same results.

The tests compare each with the plain model: slicing, checkpointing and channels_last change only
rounding, offloading changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

SLICES = ("off", "auto", "max")


class Memory(NamedTuple):
    """The settings to use; the defaults are the plain model."""

    attention_slicing: str = "off"  # one of SLICES, or the number of heads at a time
    vae_slicing: bool = False  # the VAE takes one image at a time
    vae_checkpointing: bool = False  # recompute the VAE's activations in the backward pass
    channels_last: bool = False  # memory format of the U-Net and the VAE
    offload: str = "none"  # model: each part is on the device only while it runs
    compile: bool = False  # torch.compile the U-Net

    def check(self, device: torch.device, *, trains_unet: bool, wants_maps: bool) -> None:
        """ValueError if settings contradict each other or cannot work on ``device``.

        trains_unet: gradients go through the U-Net (VSD). wants_maps: attention maps are drawn.
        """
        slicing = self.attention_slicing
        if slicing not in SLICES and not (slicing.isdigit() and int(slicing) > 0):
            raise ValueError(f"--attention_slicing {slicing}: expected off, auto, max or a number")
        if slicing != "off" and wants_maps:
            raise ValueError(
                f"--attention_slicing {slicing} never holds a whole attention map, which --i_attn "
                "draws; leave one out"
            )
        if self.offload == "sequential":
            raise ValueError(
                "--offload sequential moves the U-Net layer by layer, many times slower, and "
                "cannot train a LoRA; use --offload model"
            )
        if self.offload == "model" and trains_unet:
            raise ValueError(
                "--guidance vsd trains through the U-Net, which --offload model moves to the CPU; "
                "leave one out (--vae_checkpointing and --attention_slicing auto also save "
                "memory)"
            )
        if self.offload == "model" and self.compile:
            raise ValueError(
                "--compile compiles again whenever --offload model moves the U-Net; leave one out"
            )
        if self.offload == "model" and device.type == "cpu":
            raise ValueError("--offload model needs a GPU, but the device is the CPU; leave it out")

    def apply(self, unet: Any, vae: Any) -> None:
        """Apply all settings to diffusers' U-Net and VAE, except offloading (``on_device``)."""
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
def on_device(part: nn.Module, device: torch.device, offload: str) -> Iterator[Any]:
    """``part`` on ``device``; with offload "model" it is there in the block only."""
    if offload != "model":  # it lies there: moving a U-Net that need not move takes milliseconds
        yield part
        return
    part.to(device)
    try:
        yield part
    finally:
        part.to("cpu")
