"""Read the LoRA files of other programs: which layer, A, B and scale, whatever the spelling.

The spellings that are read, for a layer such as ``down_blocks.0.attentions.0...attn1.to_q``:

    peft, diffusers     [unet.]LAYER.lora_A.weight, .lora_B.weight
    diffusers           [unet.]LAYER.lora.down.weight, .lora.up.weight
    diffusers (2023)    [unet.]...attn1.processor.to_q_lora.down.weight, .up.weight
    kohya's sd-scripts  lora_unet_LAYER_BY_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha

The layer's output gets alpha / rank B A x; a file without alpha has alpha = rank. Everything else
is refused for what it is: LoRAs of other models, other kinds of adapters, whole models.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from guidance.model_kinds import one_line


class Pair(NamedTuple):
    """The two matrices of one layer: its output gets scale * B A x."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float


ROLES = (  # pattern after the layer's name, in each spelling; what the tensor is
    (r"\.lora_A(\.default)?\.weight", "a"),
    (r"\.lora_B(\.default)?\.weight", "b"),
    (r"(\.lora|\.lora_linear_layer|_lora)\.down\.weight|\.lora_down\.weight", "a"),
    (r"(\.lora|\.lora_linear_layer|_lora)\.up\.weight|\.lora_up\.weight", "b"),
    (r"(\.lora)?\.alpha", "alpha"),
)
TEXT_ENCODERS = ("text_encoder", "lora_te")
# part of a tensor's name -> what the file is, in the order in which they are tried
OTHERS = (
    (r"hada_w|\.lokr_w|\.oft_|\.on_input|\.glora", "a LyCORIS file, not a LoRA: expected A and B"),
    (r"dora_scale|magnitude_vector", "a DoRA, which also scales every weight; expected a LoRA"),
    (r"lora_mid", "a LoCon of convolutions (lora_mid); expected a LoRA of attention layers"),
    (r"^lora_te2_|^text_encoder_2\.", "a LoRA of Stable Diffusion XL, which has two text encoders"),
    (
        r"lora_unet_(input|output|middle)_block",
        "a LoRA of Stable Diffusion XL (kohya's layer names)",
    ),
    (
        r"transformer_blocks?_\d+_attn\.|^transformer\.|double_blocks|joint_blocks",
        "a LoRA of a transformer model such as FLUX or Stable Diffusion 3",
    ),
    (r"emb_params|string_to_param|^clip_[lg]$", "a textual inversion, a word and not a LoRA"),
    (r"^model\.diffusion_model\.|^conv_in\.weight$|^unet\.conv_in", "a whole model, not a LoRA"),
    (r"^text_model\.|^encoder\.|^decoder\.", "part of a whole model, not a LoRA"),
)


def read_lora(path: Path, layers: Iterable[str]) -> dict[str, Pair]:
    """The pairs in the file by layer; ValueError, with what the file is, unless all are read.

    layers: the names of the U-Net's layers that have adapters. The file may have fewer.
    """
    tensors, metadata = _read(path)
    by_file_name = _file_names(layers)
    found: dict[str, dict[str, Tensor]] = {}
    unknown: dict[str, list[str]] = {}  # layer in the file -> its tensors
    for name, tensor in tensors.items():
        place, role = _split(name)
        layer = by_file_name.get(place)
        if layer is None or role is None:
            unknown.setdefault(place, []).append(name)
        else:
            found.setdefault(layer, {})[role] = tensor
    if unknown or not found:
        raise ValueError(f"{path}: {_what(path, list(tensors), list(unknown), bool(found))}")
    half = [layer for layer, roles in found.items() if not {"a", "b"} <= roles.keys()]
    if half:
        raise ValueError(
            f"{path}: not complete, {half[0]} has only {', '.join(found[half[0]])} of a and b; "
            "download it again"
        )
    return {
        layer: Pair(roles["a"], roles["b"], _scale(layer, roles, metadata))
        for layer, roles in found.items()
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        kind = ""
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            kind = f", and a {path.suffix} is a pickle, which can run code"
        raise ValueError(
            f"{path}: cannot read it as safetensors ({one_line(error)}){kind}; expected a "
            "lora.safetensors"
        ) from None


def _file_names(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling of a layer's name in a file, without the tensor's role -> the layer."""
    names = {}
    for layer in layers:
        names[layer] = names[f"unet.{layer}"] = layer
        names["lora_unet_" + layer.replace(".", "_")] = layer
        block, _, projection = layer.removesuffix(".0").rpartition(".")
        names[f"{block}.processor.{projection}"] = layer
        names[f"unet.{block}.processor.{projection}"] = layer
    return names


def _split(name: str) -> tuple[str, str | None]:
    """The layer as the file spells it, and the tensor's role: a, b, alpha, None if unknown."""
    name = name.removeprefix("base_model.model.")
    for pattern, role in ROLES:
        if match := re.search(f"(?:{pattern})$", name):
            return name[: match.start()], role
    return name, None


def _scale(layer: str, roles: dict[str, Tensor], metadata: dict[str, str]) -> float:
    """alpha / rank: of the layer's own alpha, or of the settings that peft writes beside it."""
    rank = roles["a"].shape[0]
    if "alpha" in roles:
        return roles["alpha"].item() / rank
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings = {name.removeprefix("unet."): value for name, value in settings.items()}
        own = {
            layer_alpha
            for pattern, layer_alpha in (settings.get("alpha_pattern") or {}).items()
            # peft's patterns are regular expressions; one of a stranger's could take for ever
            if re.fullmatch(r"[\w.]+", pattern) and f".{layer}".endswith(f".{pattern}")
        }
        alpha = float(own.pop() if own else settings.get("lora_alpha") or rank)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return 1.0
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _what(path: Path, names: list[str], unknown: list[str], some_fit: bool) -> str:
    """Why a file with these tensors cannot be used; unknown: layers that are not adapted here."""
    for pattern, reason in OTHERS:
        if any(re.search(pattern, name) for name in names):
            return reason
    text = [name for name in unknown if name.startswith(TEXT_ENCODERS)]
    rest = [name for name in unknown if not name.startswith(TEXT_ENCODERS)]
    if text and not rest:
        also = "also changes" if some_fit else "changes only"
        return (
            f"a LoRA that {also} the text encoder ({len(text)} layers, such as {text[0]}), where "
            "this one has no adapters; use one that was trained on the U-Net alone"
        )
    inner = r"(ff[._]net|proj_in|proj_out|conv|time_emb|add_k|add_q|add_v|resnets)"
    if some_fit and all(re.search(inner, name) for name in rest):
        return (
            f"a LoRA that also changes layers outside attention ({len(rest)}, such as {rest[0]}); "
            "only to_q, to_k, to_v and to_out have adapters here; use one trained on those alone"
        )
    pickles = "" if any("lora" in name for name in names) else ", or no LoRA at all"
    return (
        f"a LoRA of another model{pickles} ({len(unknown)} of its layers, such as "
        f"{(unknown or ['none'])[0]}, are not in the model); use the --sd_model that it was "
        "trained with"
    )
