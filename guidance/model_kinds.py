"""What kind of model a folder in diffusers' layout holds, from its configs alone.

Only plain text-to-image models in the layout of Stable Diffusion 1.x and 2.x can guide: one CLIP
text encoder, a U-Net conditioned on text alone, an AutoencoderKL. Every other kind is refused here
with its own reason, before gigabytes of weights are downloaded or read.
"""

import json
from pathlib import Path
from typing import Any

from guidance.model_limits import check_limits

LAYOUT = "the folders tokenizer, text_encoder, vae, unet and scheduler, as diffusers saves them"
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "vae": "AutoencoderKL",
    "unet": "UNet2DConditionModel",
}
EXPECTED = "expected Stable Diffusion 1.x or 2.x, or a fine-tuned model of that layout"
TRANSFORMERS = {
    "FluxTransformer2DModel": "FLUX",
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "PixArtTransformer2DModel": "PixArt",
}
# The input channels of U-Nets on latents of 4 channels that take more than noisy latents
MORE_INPUTS = {
    9: "an inpainting model, which also takes a mask and the masked picture",
    8: "an editing model such as InstructPix2Pix, which also takes the picture to edit",
    7: "an upscaling model, which also takes a small picture",
    5: "a depth model, which also takes a depth map",
}
# diffusers' and transformers' values of what a config leaves out
DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "latent_channels": 4,
    "cross_attention_dim": 1280,
    "hidden_size": 512,
}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; ValueError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot read it as JSON ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}; expected a JSON object")
    return content


def one_line(error: Exception) -> str:
    """The first line of an error's message, at most 160 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:160]


def check_kind(folder: Path, path: str) -> None:
    """ValueError, with what the model is, if it cannot guide; reads configs, no weights.

    path: what the user typed, for the message. A part without a config is left to
    ``model_files.check_folder``.
    """
    if not any((folder / part).is_dir() for part in (*PARTS, "transformer", "prior")):
        raise ValueError(f"--sd_model {path}: {_without_parts(folder)}")
    configs = {
        part: read_json(folder / part / "config.json")
        for part in (*CLASSES, "transformer")
        if (folder / part / "config.json").is_file()
    }
    for part, config in configs.items():
        check_limits(config, str(folder / part / "config.json"))
    index = folder / "model_index.json"
    pipeline = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    kind = _other_family(folder, configs, pipeline)
    if kind is None and configs.keys() >= CLASSES.keys():
        kind = _other_inputs(configs)
    if kind is not None:
        raise ValueError(f"--sd_model {path}: {kind}; {EXPECTED}")
    if configs.keys() >= CLASSES.keys():
        _check_fit(path, configs)


def _without_parts(folder: Path) -> str:
    """What a folder is that has none of a model's folders."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    loose = [name for name in names if name.endswith((".safetensors", ".ckpt", ".bin", ".pt"))]
    if any("lora" in name.lower() for name in loose):
        return (
            "a LoRA, not a model; give its base model here, and the file to --lora_file with "
            "--guidance vsd"
        )
    if (folder / "config.json").is_file():
        name = read_json(folder / "config.json").get("_class_name", "part of a model")
        return f"a {name} alone, one part of a model; expected {LAYOUT}"
    if loose:
        return (
            f"not a model folder but a single-file checkpoint ({loose[0]}); convert it with "
            "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    return f"not a model folder; expected {LAYOUT}"


def _other_family(folder: Path, configs: dict[str, dict[str, Any]], pipeline: str) -> str | None:
    """The model's family, with what it has in place of our parts; None if it may be our kind."""
    if (folder / "transformer").is_dir():
        name = configs.get("transformer", {}).get("_class_name", "transformer")
        family = TRANSFORMERS.get(name, pipeline.removesuffix("Pipeline") or name)
        return f"{family}: a transformer ({name}) takes the place of the U-Net"
    unet = configs.get("unet", {})
    added, classes = unet.get("addition_embed_type"), unet.get("class_embed_type")
    if added == "text_time" or (folder / "text_encoder_2").is_dir():
        refiner = "" if (folder / "text_encoder").is_dir() else ", a refiner"
        return (
            f"Stable Diffusion XL{refiner}: its U-Net needs more than a text of one encoder (a "
            "second text encoder, and picture sizes)"
        )
    if any((folder / part).is_dir() for part in ("movq", "prior", "decoder")) or added in (
        "image",
        "text_image",
    ):
        family = pipeline.removesuffix("Pipeline") or "unCLIP"
        return (
            f"{family}: its U-Net is conditioned on the embedding of a picture, which another "
            "network makes from the text"
        )
    if (folder / "image_noising_scheduler").is_dir() or "UnCLIP" in pipeline:
        return (
            "an unCLIP model: its U-Net needs more than a text, the embedding of a picture "
            f"(class_embed_type {classes})"
        )
    if unet.get("time_cond_proj_dim") is not None:
        return (
            "a latent consistency model (LCM, time_cond_proj_dim): the guidance scale is built "
            "in, and it predicts pictures in a few steps, not the noise of a diffusion model"
        )
    if added == "text" or (unet and "text_encoder" in configs and pipeline.startswith("IF")):
        return "DeepFloyd IF: it works on pixels, without a VAE"
    return None


def _other_inputs(configs: dict[str, dict[str, Any]]) -> str | None:
    """What a complete set of configs needs beyond a text and noisy latents; None if nothing."""
    for part, expected in CLASSES.items():
        config = configs[part]
        name = config.get("_class_name") or (config.get("architectures") or [expected])[0]
        if name != expected:
            return f"its {part} is a {name}; expected {expected}"
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "quantized")
            return f"its {part} is quantized ({method}), and gradients need whole weights"
    unet = configs["unet"]
    channels = _setting(configs["vae"], "latent_channels")
    inputs, outputs = _setting(unet, "in_channels"), _setting(unet, "out_channels")
    if (inputs, outputs) != (channels, channels):
        kind = MORE_INPUTS.get(inputs) if channels == 4 else None
        return (
            f"the U-Net has {inputs} input and {outputs} output channels, the VAE has {channels}: "
            f"{kind or 'not a plain text-to-image model'}"
        )
    for name in ("addition_embed_type", "class_embed_type", "num_class_embeds"):
        if unet.get(name) is not None:
            return f"the U-Net needs more than a text ({name} {unet[name]})"
    return None


def _check_fit(path: str, configs: dict[str, dict[str, Any]]) -> None:
    """ValueError unless the parts fit together."""
    text, unet = configs["text_encoder"], configs["unet"]
    width = _setting(text.get("text_config") or text, "hidden_size")
    expected = _setting(unet, "cross_attention_dim")
    if width != expected and unet.get("encoder_hid_dim") != width:
        raise ValueError(
            f"--sd_model {path}: the text encoder's embeddings have {width} channels, the U-Net "
            f"expects {expected}; use text_encoder and unet of one model"
        )
    if not unet.get("sample_size"):
        raise ValueError(f"--sd_model {path}: unet/config.json lacks sample_size; add it")


def _setting(config: dict[str, Any], name: str) -> Any:
    return config.get(name, DEFAULTS[name])
