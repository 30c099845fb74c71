"""A frozen text-to-image latent diffusion model (Rombach et al. 2022) in diffusers' folder layout.

A model is a folder, or a hub id, with the parts tokenizer, text_encoder, vae, unet and scheduler:
Stable Diffusion 1.x, 2.x, or anything of their layout such as ``guidance/tiny/model``. Pictures are
[V, 3, H, W] in [0, 1]; latents [V, C, h, w] are multiplied by the VAE's ``scaling_factor``, as the
U-Net takes them. Every size comes from the parts' configs. Outside is float32, inside ``dtype``.

Outside ``guidance/tiny``, only ``model_files`` imports diffusers and transformers, in functions: a
NeRF needs neither.
"""

import difflib
import re
from collections.abc import Callable

import torch
from torch import Tensor

from guidance.attention import recorded_attention, token_maps
from guidance.memory import PLAIN, Memory, on_device
from guidance.model_files import (
    MODELS,
    check_fit,
    check_folder,
    find_folder,
    fingerprint,
    load_noise_schedule,
    load_part,
    load_tokenizer,
    read_json,
    require_libraries,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StableDiffusion:
    """A frozen text-to-image latent diffusion model in diffusers' folder layout.

    alphas_cumprod [T] float32; prediction_type one of PREDICTIONS; native_size: pixels per side of
    the pictures it learned from; vocabulary: what ``vocabulary.json`` beside it says, or None;
    fingerprint: the same text for the same files, wherever they lie.
    """

    def __init__(
        self,
        path: str,
        device: torch.device,
        *,
        dtype: str = "auto",
        local_files_only: bool = False,
        allow_pickle: bool = False,
        scheduler: str | None = None,
        memory: Memory = PLAIN,
        warn: Callable[[str], None] = print,
    ):
        """Open ``path``, a folder or hub id. dtype: auto (fp16 on cuda, else fp32) or of DTYPES."""
        self.warn, self._warned = warn, set()
        self.device, self.memory = torch.device(device), memory
        self.dtype = _choose_dtype(dtype, self.device, warn)
        require_libraries()
        folder = find_folder(str(path), local_files_only, allow_pickle)
        files = check_folder(folder, str(path), allow_pickle)
        self.alphas_cumprod, self.prediction_type = load_noise_schedule(folder, scheduler)
        self.alphas_cumprod = self.alphas_cumprod.to(self.device)
        self.tokenizer = load_tokenizer(folder)
        parts = {part: load_part(folder, part, files[part], self.dtype) for part in MODELS}
        check_fit(str(path), **parts)
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

    def embed(self, texts: list[str]) -> Tensor:
        """What the U-Net takes of each text: [N, L, D] float32. "" is the unconditional one.

        Warns, once for each, of words that the text encoder cuts off or never saw.
        """
        for text in texts:
            if text not in self._embedded:
                self._warn_about(text)
                self._embedded[text] = self._embed_one(text)
        return torch.cat([self._embedded[text] for text in texts])

    def _embed_one(self, text: str) -> Tensor:
        # Texts go through one by one, so that a text's numbers never hang on its neighbors.
        if self.text_encoder is None:
            self.text_encoder = self._load_text_encoder()
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
        with torch.no_grad(), self._no_autocast(), self._here(self.text_encoder) as encoder:
            output = encoder(tokens.input_ids.to(self.device), attention_mask=mask)
        return output[0].float()  # [1, L, D]

    def tokens(self, text: str) -> list[str]:
        """The pieces that the text encoder reads, words mostly, from its second place on."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        pieces = self.tokenizer.convert_ids_to_tokens(ids[: self._max_tokens - 2])
        return [piece.removesuffix("</w>") for piece in pieces]

    def free_text_encoder(self) -> None:
        """Give its memory back; a text that was not embedded yet loads it again."""
        self.text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of pictures of this many pixels."""
        factor = self._vae_factor
        if height % factor or width % factor or min(height, width) < factor:
            nearest = [_nearest_multiples(size, factor) for size in (height, width)]
            raise ValueError(
                f"pictures of {height} x {width} pixels (height x width): the model's VAE divides "
                f"by {factor}; use a height of {nearest[0]} and a width of {nearest[1]}"
            )
        return (self.vae.config.latent_channels, height // factor, width // factor)

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Pictures [V, 3, H, W] in [0, 1] -> latents [V, C, h, w], with the graph to the pictures.

        noise [V, C, h, w] standard normal draws from the encoder's posterior; None takes its mean.
        """
        self.latent_shape(*images.shape[-2:])
        with self._no_autocast():
            pictures = images.float() * 2 - 1
            # With --offload too it stays: the way back comes after the U-Net's turn.
            posterior = self.vae.to(self.device).encode(self._form(pictures)).latent_dist
            latents = posterior.mean.float()  # [V, C, h, w]
            if noise is not None:
                latents = latents + posterior.std.float() * noise
            latents = (latents - self._shift) * self.vae.config.scaling_factor
        if self.dtype == torch.float16 and latents.requires_grad:
            _keep_gradient_in_range(pictures, latents)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [V, C, h, w] -> pictures [V, 3, H, W] in [0, 1], without a graph."""
        with torch.no_grad(), self._no_autocast(), self._here(self.vae) as vae:
            latents = latents.float() / vae.config.scaling_factor + self._shift
            images = vae.decode(self._form(latents)).sample.float()  # [V, 3, H, W]
            return (images / 2 + 0.5).clamp(0, 1)

    def predict(self, noisy: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The U-Net's output [B, C, h, w] as it is (see ``prediction_type``), without a graph.

        noisy [B, C, h, w]; t [B] whole timesteps; embeddings [B, L, D] of ``embed``.
        """
        # inference_mode saves 4 to 7 % of a call of the embedded model on a CPU (batch 8, one core:
        # 62.5 ms, no_grad 65.3). channels_last, unfused attention and fused q, k, v save nothing.
        # dtype bf16 saves 27 % there, but c - u is then 5 % off at t = 100 (0.7 % at t = 800).
        with torch.inference_mode(), self._no_autocast(), self._here(self.unet) as unet:
            output = unet(
                self._form(noisy), t, encoder_hidden_states=embeddings.to(self.dtype)
            ).sample
        # A copy made out here may be saved for a backward pass, an inference tensor may not.
        return output.to(torch.float32, copy=True)

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def attention(self, noisy: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """Cross-attention maps [B, L, side, side] of one pass, see ``guidance.attention``."""
        with recorded_attention(self.unet) as kept:
            self.predict(noisy, t, embeddings)
        return token_maps({name: value.clone() for name, value in kept.items()}, len(noisy))

    def _form(self, x: Tensor) -> Tensor:
        """As the networks take it: their precision and their order in memory."""
        layout = torch.channels_last if self.memory.channels_last else torch.contiguous_format
        return x.to(self.dtype, memory_format=layout)

    def _here(self, part):
        return on_device(part, self.device, self.memory.offload)

    def _no_autocast(self):
        return torch.autocast(self.device.type, enabled=False)

    def _warn_about(self, text: str) -> None:
        lost = self._lost_words(text)
        if lost and lost not in self._warned:
            self._warned.add(lost)
            self.warn(
                f'prompt "{text}": the text encoder reads {self._max_tokens} tokens; '
                f'cut off: "{lost}"'
            )
        unknown = _unknown_words(text, self.vocabulary)
        if unknown and not self._warned.issuperset(unknown):
            self._warned.update(unknown)
            names = ", ".join(self.vocabulary.get("objects") or self.vocabulary["words"])
            self.warn(
                f'prompt "{text}": the model never saw {", ".join(unknown)}; it knows {names}'
            )

    def _lost_words(self, text: str) -> str:
        """The end of ``text``, in whole words, that does not fit the text encoder; often ""."""
        room = self._max_tokens - self.tokenizer.num_special_tokens_to_add()
        words = text.split()

        def fits(count: int) -> bool:
            start = " ".join(words[:count])
            ids = self.tokenizer(start, add_special_tokens=False, verbose=False).input_ids
            return len(ids) <= room

        count = len(words)
        while not fits(count):
            count -= 1
        return " ".join(words[count:])


def _choose_dtype(name: str, device: torch.device, warn) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--guidance_dtype {name}: expected auto, {', '.join(DTYPES)}")
    if name == "fp16" and device.type == "cpu":  # 531 ms a call of the embedded model, fp32 22
        warn("--guidance_dtype fp16 is 20 times slower on a CPU: using fp32 there")
        return torch.float32
    return DTYPES[name]


def _max_tokens(tokenizer, text_encoder) -> int:
    # A tokenizer whose config gives no length says 1e30.
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def _keep_gradient_in_range(pictures: Tensor, latents: Tensor) -> None:
    """Let gradients pass from ``latents`` to ``pictures`` at most 1 in size, and undo it there.

    Both are float32 with a float16 encoder between them, where a small loss weight would vanish
    and GradScaler's factor overflow.
    """
    factors = []

    def shrink(gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax()
        factors.append(torch.where((largest > 0) & largest.isfinite(), largest, 1.0))
        return gradient / factors[-1]

    latents.register_hook(shrink)
    pictures.register_hook(lambda gradient: gradient * factors.pop())


def _nearest_multiples(size: int, factor: int) -> str:
    below = size // factor * factor
    above = below if below == size else below + factor
    return " or ".join(str(each) for each in sorted({below, above} - {0}))


def _unknown_words(text: str, vocabulary: dict | None) -> list[str]:
    """Words of ``text`` that are not in the vocabulary, quoted, with what may have been meant."""
    if not vocabulary or not vocabulary.get("words"):
        return []
    words = dict.fromkeys(re.findall(r"[^\W_]+", text.lower()))
    named = []
    for word in words:
        if word not in vocabulary["words"]:
            close = difflib.get_close_matches(word, vocabulary["words"], n=1, cutoff=0.75)
            named.append(f'"{word}"' + (f" ({close[0]}?)" if close else ""))
    return named
