"""Build the parts of the embedded model in Stable Diffusion's layout, and write its folder.

The VAE takes images [N, 3, size, size] in [-1, 1]. Latents have 4 channels at size / f with
f = 2 ** (number of VAE levels - 1), and are multiplied by the VAE's ``scaling_factor``. In this
folder only this file and ``train.py`` import diffusers and transformers.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 24  # the longest caption has 19
START, END = "<|startoftext|>", "<|endoftext|>"


class Sizes(NamedTuple):
    """The widths of the networks."""

    vae: tuple[int, ...]  # channels of each level
    unet: tuple[int, int, int]  # channels of each level
    text: int  # of the text encoder
    groups: int  # of the group normalizations


SIZES = {
    32: Sizes((32, 64), (64, 96, 128), 96, 16),
    64: Sizes((32, 64, 64), (64, 96, 128), 96, 16),
    16: Sizes((8, 8), (8, 16, 16), 16, 4),  # for tests
}


def make_tokenizer(words: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer with one token for each of ``words``; it spells all other words in bytes.

    Writes ``folder`` in CLIP's layout, vocab.json and merges.txt, and reads the tokenizer from it.
    """
    letters = list(_bytes_as_letters().values())
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        for piece in re.findall(r"[a-z]+", word):
            symbols = _merge([*piece[:-1], piece[-1] + "</w>"], merges)
            while len(symbols) > 1:  # merge from the left what earlier words' merges leave apart
                merges[symbols[0], symbols[1]] = len(merges)
                symbols = _merge(symbols, merges)
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["".join(merge) for merge in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
        pad_token=END,
    )


def _bytes_as_letters() -> dict[int, str]:
    """GPT-2's printable character for every byte: its own, or one from code point 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


def _merge(symbols: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: apply the earliest merge to ``symbols`` until none applies."""
    while True:
        known = [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in merges]
        if not known:
            return symbols
        first = min(known, key=lambda pair: merges[pair])
        place = next(n for n, p in enumerate(zip(symbols, symbols[1:], strict=False)) if p == first)
        symbols = [*symbols[:place], "".join(first), *symbols[place + 2 :]]


def make_text_encoder(tokenizer: CLIPTokenizer, sizes: Sizes) -> CLIPTextModel:
    """An untrained CLIP text encoder with two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text,
            intermediate_size=4 * sizes.text,
            projection_dim=sizes.text,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae(sizes: Sizes, size: int) -> Any:
    """An untrained AutoencoderKL for size x size images."""
    levels = len(sizes.vae)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=min(8, sizes.groups),
        sample_size=size,
        mid_block_add_attention=False,  # slow on a CPU; one object needs no long-range attention
    )


def make_unet(sizes: Sizes, size: int) -> Any:
    """An untrained UNet2DConditionModel for the latents of size x size images.

    It has attention at the two coarse levels only: at the finest, attention would cost as much as
    all the rest.
    """
    return UNet2DConditionModel(
        sample_size=size // 2 ** (len(sizes.vae) - 1),
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.unet,
        layers_per_block=1,
        cross_attention_dim=sizes.text,
        attention_head_dim=4,  # a misnomer in diffusers: this is the number of heads
        norm_num_groups=sizes.groups,
    )


def make_scheduler() -> Any:
    """A DDIMScheduler with Stable Diffusion's noise schedule and v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def count_weights(*modules: nn.Module) -> int:
    """The number of parameters of all modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def write_folder(
    out: Path,
    tokenizer: CLIPTokenizer,
    text_encoder: nn.Module,
    vae: nn.Module,
    unet: nn.Module,
    vocabulary: dict[str, Any],
) -> None:
    """Write the model as a StableDiffusionPipeline folder in float16, and vocabulary.json.

    Converts the modules to float16 in place.
    """
    pipeline: Any = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    # If no dtype is given, diffusers loads these files as float32, but transformers uses the dtype
    # in the config. The parts of one pipeline must agree.
    path = out / "text_encoder" / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = json.dumps(vocabulary, indent=1) + "\n"
    (out / "vocabulary.json").write_text(text, encoding="utf-8")
