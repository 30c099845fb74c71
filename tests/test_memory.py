"""guidance/memory: every setting gives the plain results; contradictions are refused."""

import argparse

import pytest
import torch
from helpers import CPU
from tiny_models import SIDE, draw, pictures

from guidance.build import next_memory_saving
from guidance.memory import Memory, on_device
from guidance.stable_diffusion import StableDiffusion

CUDA = torch.device("cuda")
SAVINGS = {
    "attention_slicing auto": Memory(attention_slicing="auto"),
    "attention_slicing max": Memory(attention_slicing="max"),
    "attention_slicing 2": Memory(attention_slicing="2"),
    "vae_slicing": Memory(vae_slicing=True),
    "vae_checkpointing": Memory(vae_checkpointing=True),
    "channels_last": Memory(channels_last=True),
    "all": Memory("auto", vae_slicing=True, vae_checkpointing=True, channels_last=True),
}


def guided(model):
    """Latents, the images' gradient, the U-Net's output and the decoded latents."""
    images = pictures(3).requires_grad_()
    latents = model.encode(images, draw(3, 4, SIDE, SIDE, seed=1))
    latents.square().sum().backward()
    output = model.predict(
        latents.detach(), torch.tensor([3, 300, 900]), model.embed(["a cube"] * 3)
    )
    return latents.detach(), images.grad, output, model.decode(latents.detach())


@pytest.mark.parametrize("name", SAVINGS)
def test_a_saving_changes_rounding_only(sd_folder, name):
    plain = guided(StableDiffusion(sd_folder, CPU))
    saved = guided(StableDiffusion(sd_folder, CPU, memory=SAVINGS[name]))
    for mine, whole in zip(saved, plain, strict=True):
        torch.testing.assert_close(mine, whole, atol=1e-5, rtol=1e-4)


def test_slicing_and_checkpointing_are_on(sd_folder):
    model = StableDiffusion(sd_folder, CPU, memory=SAVINGS["all"])
    kinds = {type(p).__name__ for p in model.unet.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor"}
    assert model.vae.use_slicing and model.vae.encoder.gradient_checkpointing
    weight = model.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_checkpointing_stores_less_for_the_backward_pass(sd_folder):
    """Bytes that autograd holds on to between the encoder and its backward pass."""

    def held(memory):
        model, total = StableDiffusion(sd_folder, CPU, memory=memory), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        images = pictures(1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encode(images, None)
        return total

    assert held(Memory(vae_checkpointing=True)) < 0.5 * held(Memory())


class Traveler(torch.nn.Module):
    """A module that records the devices it is moved to."""

    def __init__(self):
        super().__init__()
        self.stops = []

    def to(self, place):
        self.stops.append(str(place))
        return self


@pytest.mark.parametrize("offload, stops", [("none", []), ("model", ["cuda", "cpu"])])
def test_offloaded_parts_move_to_the_cpu_after_the_block(offload, stops):
    part = Traveler()
    with pytest.raises(KeyError), on_device(part, CUDA, offload) as here:
        assert here is part
        raise KeyError
    assert part.stops == stops


@pytest.mark.parametrize(
    "memory, settings, complaint",
    [
        (Memory(attention_slicing="some"), {}, "--attention_slicing some: expected off, auto"),
        (Memory(attention_slicing="0"), {}, "--attention_slicing 0"),
        (Memory(attention_slicing="auto"), {"wants_maps": True}, "--i_attn draws; leave one out"),
        (Memory(offload="sequential"), {"trains_unet": True}, "use --offload model"),
        (Memory(offload="model"), {"trains_unet": True}, "--guidance vsd trains through"),
        (Memory(offload="model", compile=True), {}, "--compile compiles again"),
        (Memory(offload="model"), {"device": CPU}, "needs a GPU"),
    ],
)
def test_contradictions_are_refused_in_one_line(memory, settings, complaint):
    given = {"device": CUDA, "trains_unet": False, "wants_maps": False} | settings
    with pytest.raises(ValueError) as error:
        memory.check(given.pop("device"), **given)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_out_of_memory_names_the_next_flag_each_time():
    args = argparse.Namespace(
        guidance_dtype="fp32", vae_checkpointing=False, vae_slicing=False, attention_slicing="off",
        offload="none", guidance="sds", i_attn=0, train_res="64", batch_views=4,
    )  # fmt: skip
    named = []
    while (advice := next_memory_saving(args, CUDA)).startswith("try --"):
        flag, *value = advice.removeprefix("try --").split()
        named.append(flag)
        setattr(args, flag, value[0] if value else True)
    assert named == [
        "guidance_dtype", "vae_checkpointing", "vae_slicing", "attention_slicing", "offload"
    ]  # fmt: skip
    assert advice == "lower --batch_views 4, --train_res 64 or --guidance_res"
    args.vae_slicing = False
    assert next_memory_saving(args, CPU) == "try --vae_slicing"


@pytest.mark.slow
def test_a_compiled_unet_gives_the_same(sd_folder):
    plain = guided(StableDiffusion(sd_folder, CPU))
    compiled = guided(StableDiffusion(sd_folder, CPU, memory=Memory(compile=True)))
    for mine, whole in zip(compiled, plain, strict=True):
        torch.testing.assert_close(mine, whole, atol=1e-4, rtol=1e-3)
