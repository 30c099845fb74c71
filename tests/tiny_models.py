"""A random, narrow model in Stable Diffusion's layout, and random tensors to give it."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

from guidance.tiny import build

WORDS = ["a", "red", "green", "cube", "sphere", "photo", "of", "front", "view"]
WIDTH, SIDE = 16, 8  # of the text encoder; of the latents


def tiny_sd_folder(
    folder: Path, prediction_type: str = "epsilon", *, linear_projection: bool = False
) -> Path:
    """A random model in Stable Diffusion's layout, narrow: four levels in U-Net and VAE.

    As SD 1.x: PNDM, vocab.json and merges.txt. ``linear_projection`` is one of 2.x' changes.
    """
    torch.manual_seed(0)
    sizes = build.Sizes((8, 8, 8, 8), (8, 8, 16), WIDTH, 8)
    tokenizer = build.make_tokenizer(WORDS, folder / "tokenizer")
    settings = {"model_max_length": build.MAX_TOKENS, "tokenizer_class": "CLIPTokenizer"}
    settings |= {"bos_token": build.START, "eos_token": build.END, "unk_token": build.END}
    text = json.dumps({**settings, "pad_token": build.END})
    (folder / "tokenizer" / "tokenizer_config.json").write_text(text)
    build.make_text_encoder(tokenizer, sizes).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.vae,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=8 * SIDE,
        scaling_factor=0.2,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=linear_projection,
    ).save_pretrained(folder / "unet")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    return folder


def draw(*shape, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int = 2, side: int = 8 * SIDE):
    return draw(count, 3, side, side).sigmoid()
