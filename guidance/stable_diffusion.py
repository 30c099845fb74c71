"""A frozen text-to-image latent diffusion model (Rombach et al. 2022) in diffusers' folder layout.

A model is a folder or a hub id with the parts tokenizer, text_encoder, vae, unet and scheduler:
Stable Diffusion 1.x, 2.x, or any model in their layout, such as ``guidance/tiny/model``. Images are
[V, 3, H, W] in [0, 1]; latents [V, C, h, w] are multiplied by the VAE's ``scaling_factor``, as the
U-Net expects them. All sizes come from the parts' configs. Inputs and outputs are float32; the
networks run in ``dtype``.

Outside ``guidance/tiny``, only ``model_files`` imports diffusers and transformers, and only inside
functions, because training a NeRF needs neither.
"""

import difflib
import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guidance.attention import recorded_attention, token_maps
from guidance.lora import merge_lora
from guidance.memory import PLAIN, Memory, on_device
from guidance.model_files import (
    MODELS,
    check_folder,
    download_weights,
    find_folder,
    fingerprint,
    load_noise_schedule,
    load_part,
    load_tokenizer,
    require_libraries,
)
from guidance.model_kinds import check_kind, read_json

LONGEST_TOKEN = 64  # characters, more than any token of CLIP has
MOST_WORDS = 200  # of a prompt that are looked up in the vocabulary
FEWEST_TOKENS = 2  # start and end
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StableDiffusion:
    """A frozen text-to-image latent diffusion model in diffusers' folder layout.

    alphas_cumprod [T] float32; prediction_type: one of PREDICTIONS; native_size: pixels per side of
    its training images; vocabulary: the content of the folder's ``vocabulary.json``, or None;
    fingerprint: a hash of the files, the same wherever they are; warn: gets every warning.
    """

    # diffusers' and transformers' modules, whose attributes nn.Module's types do not know
    text_encoder: Any
    vae: Any
    unet: Any

    def __init__(
        self,
        path: str | Path,
        device: torch.device,
        *,
        dtype: str = "auto",
        local_files_only: bool = False,
        allow_pickle: bool = False,
        scheduler: str | None = None,
        memory: Memory = PLAIN,
        lora: tuple[Path, float] | None = None,
        warn: Callable[[str], None] = print,
    ):
        """Load the model at ``path``, a folder or hub id.

        dtype: auto (fp16 on CUDA, else fp32) or a key of DTYPES. scheduler: a diffusers scheduler
        whose noise schedule replaces the model's own. lora: a LoRA file that is merged into the
        U-Net, and its scale. ValueError, in one line, on any other input.
        """
        self.warn = warn
        # How ``predict`` calls the U-Net and ``encode`` the encoder; a trainer may replace them by
        # calls that record kernels.
        self.run_unet: Callable[[Callable[[Any], Tensor], Any], Tensor] = lambda call, x: call(x)
        self.run_encoder: Callable[[Callable[[Tensor], Any], Tensor], Any] = lambda call, x: call(x)
        self._warned: set[str] = set()  # what was warned of already
        self.device, self.memory = torch.device(device), memory
        self.dtype = _choose_dtype(dtype, self.device, warn)
        require_libraries()
        folder = find_folder(str(path), local_files_only)
        check_kind(folder, str(path))  # from the configs, before gigabytes are read
        download_weights(str(path), folder, local_files_only, allow_pickle)
        files = check_folder(folder, str(path), allow_pickle)
        self.alphas_cumprod, self.prediction_type = load_noise_schedule(folder, scheduler, warn)
        self.alphas_cumprod = self.alphas_cumprod.to(self.device)
        self.tokenizer = load_tokenizer(folder)
        parts = {part: load_part(folder, part, files[part], self.dtype) for part in MODELS}
        for part in (part for part, weights in files.items() if weights.variant == "non_ema"):
            warn(f"--sd_model {path}: {part} has only non_ema weights, of somewhat lower quality")
        if lora is not None:
            merge_lora(lora[0], parts["unet"], lora[1])
        home = torch.device("cpu") if memory.offload == "model" else self.device
        self.text_encoder, self.vae, self.unet = (part.to(home) for part in parts.values())
        memory.apply(self.unet, self.vae)
        self._max_tokens = _max_tokens(self.tokenizer, self.text_encoder)
        self._load_text_encoder = lambda: load_part(
            folder, "text_encoder", files["text_encoder"], self.dtype
        ).to(home)
        self._embedded: dict[str, Tensor] = {}
        self._vae_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sample_size = self.unet.config.sample_size
        size = sample_size if isinstance(sample_size, int) else max(sample_size)
        self.native_size = size * self._vae_factor
        words = folder / "vocabulary.json"
        self.vocabulary = read_json(words) if words.is_file() else None
        self.fingerprint = fingerprint(folder, files)
        if lora is not None:  # another LoRA or scale is another model
            digest = hashlib.sha256(lora[0].read_bytes()).hexdigest()[:8]
            self.fingerprint += f"+{digest}x{lora[1]:g}"

    def embed(self, texts: list[str]) -> Tensor:
        """Embed N texts for the U-Net: [N, L, D] float32. "" is the unconditional embedding.

        Warns once about words that the text encoder cuts off, or that the model never saw.
        """
        for text in texts:
            if text not in self._embedded:
                self._warn_about(text)
                self._embedded[text] = self._embed_one(text)
        return torch.cat([self._embedded[text] for text in texts])

    def _embed_one(self, text: str) -> Tensor:
        # Texts are encoded one by one, so that rounding never depends on the rest of a batch.
        if self.text_encoder is None:
            self.text_encoder = self._load_text_encoder()
        if len(text) > self._max_tokens * LONGEST_TOKEN:  # the rest is cut off in any case
            text = " ".join(text.split())[: self._max_tokens * LONGEST_TOKEN]
        tokens = self.tokenizer(
            text,
            padding="max_length",
            max_length=self._max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        config, mask = self.text_encoder.config, None
        if getattr(config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.device)
        with torch.no_grad(), self._no_autocast(), self._on_device(self.text_encoder) as encoder:
            output = encoder(tokens.input_ids.to(self.device), attention_mask=mask)
        return output[0].float()  # [1, L, D]

    def tokens(self, text: str) -> list[str]:
        """The tokens of ``text`` as strings; token n is at position n + 1 of the embedding."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        pieces = self.tokenizer.convert_ids_to_tokens(ids[: self._max_tokens - 2])
        return [piece.removesuffix("</w>") for piece in pieces]

    def free_text_encoder(self) -> None:
        """Free the text encoder's memory; embedding a new text loads it again."""
        self.text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents; ValueError if the VAE's factor does not divide the pixels."""
        factor = self._vae_factor
        if height % factor or width % factor or min(height, width) < factor:
            nearest = [_nearest_multiples(size, factor) for size in (height, width)]
            raise ValueError(
                f"images of {height} x {width} pixels (height x width): the model's VAE divides "
                f"by {factor}; use a height of {nearest[0]} and a width of {nearest[1]}"
            )
        return (self.vae.config.latent_channels, height // factor, width // factor)

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Encode images [V, 3, H, W] in [0, 1] to latents [V, C, h, w], differentiable.

        noise [V, C, h, w], standard normal, samples the encoder's posterior; None takes its mean.
        """
        self.latent_shape(*images.shape[-2:])
        with self._no_autocast():
            scaled = images.float() * 2 - 1
            if self.memory.offload == "model":
                self.vae.to(self.device)  # and stays: its backward pass comes after the U-Net
            mean, std = self.run_encoder(self._posterior, scaled)  # [V, C, h, w]
            latents = mean.float()
            if noise is not None:
                latents = latents + std.float() * noise
            latents = (latents - self._shift) * self.vae.config.scaling_factor
        if self.dtype == torch.float16 and latents.requires_grad:
            _keep_gradient_in_range(scaled, latents)
        return latents

    def _posterior(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images in [-1, 1]."""
        posterior = self.vae.encode(self._to_network(scaled)).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [V, C, h, w] to images [V, 3, H, W] in [0, 1], without a graph."""
        with torch.no_grad(), self._no_autocast(), self._on_device(self.vae) as vae:
            latents = latents.float() / vae.config.scaling_factor + self._shift
            images = vae.decode(self._to_network(latents)).sample.float()  # [V, 3, H, W]
            return (images / 2 + 0.5).clamp(0, 1)

    def predict(self, noisy: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The U-Net's raw output [B, C, h, w] (see ``prediction_type``), without a graph.

        noisy [B, C, h, w]; t [B] integer timesteps; embeddings [B, L, D] from ``embed``.
        """
        # inference_mode saves 4 to 7 % of a call of the embedded model on a CPU (batch 8, one core:
        # 62.5 ms, no_grad 65.3). channels_last, unfused attention and fused q, k, v save nothing.
        # dtype bf16 saves 27 % there, but c - u is then 5 % off at t = 100 (0.7 % at t = 800).
        output = self.run_unet(self._unet_output, (noisy, t, embeddings))
        # Autograd cannot save an inference tensor for a backward pass, but can save this copy.
        return output.to(torch.float32, copy=True)

    def _unet_output(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        noisy, t, embeddings = inputs
        with torch.inference_mode(), self._no_autocast(), self._on_device(self.unet) as unet:
            return unet(
                self._to_network(noisy), t, encoder_hidden_states=embeddings.to(self.dtype)
            ).sample

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def attention(self, noisy: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """Cross-attention maps [B, L, side, side] of one forward pass (``guidance.attention``)."""
        with recorded_attention(self.unet) as kept:
            self._unet_output((noisy, t, embeddings))
        return token_maps({name: value.clone() for name, value in kept.items()}, len(noisy))

    def _to_network(self, x: Tensor) -> Tensor:
        """Convert to the networks' dtype and memory format."""
        layout = torch.channels_last if self.memory.channels_last else torch.contiguous_format
        return x.to(self.dtype, memory_format=layout)

    def _on_device(self, part: Any) -> AbstractContextManager[Any]:
        return on_device(part, self.device, self.memory.offload)

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _warn_about(self, text: str) -> None:
        lost = self._lost_words(text)
        if lost and lost not in self._warned:
            self._warned.add(lost)
            self.warn(
                f'prompt "{_shortened(text)}": the text encoder reads {self._max_tokens} tokens; '
                f'cut off: "{_shortened(lost)}"'
            )
        unknown = _unknown_words(text, self.vocabulary)
        if self.vocabulary and unknown and not self._warned.issuperset(unknown):
            self._warned.update(unknown)
            names = ", ".join(self.vocabulary.get("objects") or self.vocabulary["words"])
            self.warn(
                f'prompt "{_shortened(text)}": the model never saw '
                f"{_shortened(', '.join(unknown))}; it knows {names}"
            )

    def _lost_words(self, text: str) -> str:
        """The words at the end of ``text`` that do not fit into the text encoder; mostly ""."""
        room = self._max_tokens - self.tokenizer.num_special_tokens_to_add()
        words = text.split()

        def fits(count: int) -> bool:
            start = " ".join(words[:count])
            if len(start) > room * LONGEST_TOKEN:
                return False
            ids = self.tokenizer(start, add_special_tokens=False, verbose=False).input_ids
            return len(ids) <= room

        # A word has at least one token, so that no more than ``room`` words fit.
        low, high = 0, min(len(words), room)
        while low < high:  # low words fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return " ".join(words[low:])


def _choose_dtype(name: str, device: torch.device, warn: Callable[[str], None]) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--guidance_dtype {name}: expected auto, {', '.join(DTYPES)}")
    if name == "fp16" and device.type == "cpu":  # the embedded U-Net takes 531 ms, fp32 22 ms
        warn("--guidance_dtype fp16 is 20 times slower on a CPU than fp32: using fp32")
        return torch.float32
    if name == "bf16" and device.type == "cpu" and not _cpu_has_bfloat16():
        warn("--guidance_dtype bf16 is ignored: this CPU has no bfloat16 arithmetic, fp32 is used")
        return torch.float32
    return DTYPES[name]


def _cpu_has_bfloat16() -> bool:
    """Whether PyTorch has bfloat16 kernels for this CPU: AVX512 on x86, BF16 on ARM."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _max_tokens(tokenizer: Any, text_encoder: Any) -> int:
    # A tokenizer has a model_max_length of 1e30 if its config has none.
    count = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    if count <= FEWEST_TOKENS:
        raise ValueError(
            f"tokenizer/tokenizer_config.json: model_max_length {tokenizer.model_max_length}; "
            f"expected more than {FEWEST_TOKENS}; download the model again"
        )
    return int(count)


def _keep_gradient_in_range(images: Tensor, latents: Tensor) -> None:
    """Scale the gradient to a maximum of 1 on its way from ``latents`` to ``images``, then undo it.

    Both are float32, but the encoder between them is float16: a small loss weight would underflow
    in it, and GradScaler's factor overflow.
    """
    factors: list[Tensor] = []

    def shrink(gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax()
        factors.append(torch.where((largest > 0) & largest.isfinite(), largest, 1.0))
        return gradient / factors[-1]

    latents.register_hook(shrink)
    images.register_hook(lambda gradient: gradient * factors.pop())


def _shortened(text: str) -> str:
    """At most 300 characters of a text, for a message."""
    return text if len(text) <= 300 else text[:300] + " ..."


def _nearest_multiples(size: int, factor: int) -> str:
    below = size // factor * factor
    above = below if below == size else below + factor
    return " or ".join(str(each) for each in sorted({below, above} - {0}))


def _unknown_words(text: str, vocabulary: dict | None) -> list[str]:
    """The quoted words of ``text`` that are not in the vocabulary, each with a near match."""
    if not vocabulary or not vocabulary.get("words"):
        return []
    words = list(dict.fromkeys(re.findall(r"[^\W_]+", text.lower())))[:MOST_WORDS]
    named = []
    for word in words:
        if word not in vocabulary["words"]:
            close = difflib.get_close_matches(word, vocabulary["words"], n=1, cutoff=0.75)
            named.append(f'"{word}"' + (f" ({close[0]}?)" if close else ""))
    return named
