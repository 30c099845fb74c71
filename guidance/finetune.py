"""Teach a text-to-image model one's own pictures: LoRA fine-tuning, and DreamBooth.

python -m guidance.finetune --pictures DIR --prompt "a zebra cup" --out logs/zebra.safetensors
python -m guidance.sample --prompt "a zebra cup" --lora logs/zebra.safetensors

The LoRA is for --sd_lora, ``guidance.sample --lora`` and diffusers' load_lora_weights. Beside it,
the folder OUT_run/ (logs/zebra_run/) holds the training state, sample pictures, and pictures of
the class. The same command goes on from the state, and ends with the same bits as an uninterrupted
run on the same machine.
"""

import nerf.training.installed  # noqa: F401  first: says in a sentence what is missing

# isort: split
import fcntl
import hashlib
import io
import math
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch
from torch import Tensor

from guidance.captioned import Captioned, read_captioned, read_picture
from guidance.finetune_flags import SETTINGS, parse
from guidance.lora import LoRA, attention_layers, save_lora
from guidance.lora_training import Examples, check_length, encode, training_loss
from guidance.sample import sample, sheet
from guidance.stable_diffusion import StableDiffusion
from nerf.training.distributed import choose_device
from nerf.training.entry import NOTHING_LEARNED, exit_code, exit_process
from nerf.training.files import replace_file
from nerf.training.plain_text import one_line
from nerf.training.progress import duration
from nerf.training.rng import step_generator
from nerf.training.system import (
    StopSignal,
    autocast,
    grad_scaler,
    update_if_finite,
    usable_amp,
)

TINY = Path(__file__).parent / "tiny" / "model"
SAMPLES = 4  # pictures of a sample sheet, and of a batch of class pictures


def log(text: str) -> None:
    """Print a line now."""
    print(one_line(text), flush=True)


# ------------------------------------------------------------------------------- state of training


class Run:
    """The LoRA, its optimizer and the number of finished updates, kept in ``folder``/state.pt.

    settings: what decides the result; ValueError if the saved state was made with others.
    """

    def __init__(
        self, folder: Path, model: StableDiffusion, settings: dict[str, Any], device: torch.device
    ):
        self.path, self.settings, self.step = folder / "state.pt", settings, 0
        self.saved = 0  # the step of the file
        torch.manual_seed(settings["seed"])
        self.lora = LoRA(model.unet, settings["rank"]).to(device)
        self.optimizer = torch.optim.AdamW(
            self.lora.parameters(), lr=settings["lrate"], weight_decay=0.0
        )
        self.scaler = grad_scaler(device, settings["amp"])
        if self.path.exists():
            self._restore(device)

    def _restore(self, device: torch.device) -> None:
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
            before = state["settings"]
        except Exception as error:  # a broken file can fail anywhere inside zip, pickle or torch
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{self.path}: cannot read it ({reason[0][:120]}); remove it to start again"
            ) from None
        hashed = {"pictures": "other --pictures or captions", "model": "another --sd_model"}
        changed = [
            hashed.get(name, f"{name} {before.get(name)} -> {value}")
            for name, value in self.settings.items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{self.path.parent} was made with other settings ({', '.join(changed)}); keep "
                "them to go on, or use another --out"
            )
        self.lora.load_state_dict(state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]

    def save(self, out: Path) -> None:
        """Write the LoRA to ``out``, then the state; each is replaced as a whole.

        In this order, since a start that finds the last step's state has nothing left to write.
        """
        content = io.BytesIO()
        parts = {name: getattr(self, name).state_dict() for name in ("lora", "optimizer", "scaler")}
        torch.save({**parts, "settings": self.settings, "step": self.step}, content)
        save_lora(out, self.lora)
        replace_file(self.path, content.getvalue())
        self.saved = self.step


@contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """The folder beside ``out`` for state and samples, which one process at a time holds.

    ValueError if nothing can be written. A new folder in which nothing was made is removed again.
    """
    folder = out.with_name(f"{out.stem}_run")
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error})") from None
    with lock:
        try:  # the system releases the lock when its process ends, even if that is killed
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{folder}: another process is training here; wait for it, or use another --out"
            ) from None
        try:
            yield folder
        finally:
            if created and {path.name for path in folder.iterdir()} == {".lock"}:
                shutil.rmtree(folder)


# -------------------------------------------------------------------------------------- pictures


def write_png(path: Path, picture: Any) -> None:
    """Write an image, replaced as a whole."""
    replace_file(path, iio.imwrite("<bytes>", picture, extension=".png"))


def class_pictures(args: Namespace, model: StableDiffusion, folder: Path, size: int) -> Tensor:
    """Pictures [N, 3, size, size] that the model itself draws of --class_prompt, kept in a folder.

    They are drawn in batches of fixed composition, so that it does not matter what was there.
    """
    what = (args.class_prompt, args.seed, args.guidance_scale, size, model.fingerprint)
    own = folder / f"class_{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"
    paths = [own / f"{n:04d}.png" for n in range(args.num_class_pictures)]
    for first in range(0, len(paths), SAMPLES):
        batch = paths[first : first + SAMPLES]
        if all(path.exists() for path in batch):
            continue
        log(f"drawing class pictures {first + 1} to {first + len(batch)} of {len(paths)}")
        texts = [args.class_prompt] * len(batch)
        seed = args.seed + first
        images = sample(model, texts, scale=args.guidance_scale, seed=seed, size=size)
        for path, image in zip(batch, (images * 255).round().byte(), strict=True):
            write_png(path, image.permute(1, 2, 0).numpy())
    return torch.stack([read_picture(path, size) for path in paths])


def samples_of(run: Run) -> Path:
    """The sheet of samples of this step."""
    return run.path.parent / "samples" / f"{run.step:06d}.png"


def draw_samples(args: Namespace, model: StableDiffusion, run: Run, text: str, size: int) -> None:
    """A sheet of samples with the LoRA of this step, in the folder samples/."""
    with run.lora.switched():
        images = sample(
            model, [text] * SAMPLES, negative=args.negative, scale=args.guidance_scale, size=size
        )
    path = samples_of(run)
    write_png(path, sheet(images, columns=SAMPLES))
    log(f"step {run.step}: {path}")


# -------------------------------------------------------------------------------------- training


def train(
    args: Namespace,
    model: StableDiffusion,
    run: Run,
    own: Examples,
    others: Examples | None,
    draw: Callable[[], None],
) -> int:
    """Train until --steps or a signal; the exit code. draw: writes samples of the present step."""
    device, began, first = model.device, time.monotonic(), run.step
    total, counted = torch.zeros(2, device=device), 0
    with StopSignal() as stop:
        while run.step < args.steps and not stop.number:
            # ---- one update; every random number comes from (seed, step)
            generator = step_generator(args.seed, run.step, device)
            with autocast(device, run.settings["amp"]), run.lora.switched():
                loss = training_loss(model, own, others, args.batch, args.prior_weight, generator)
            run.scaler.scale(loss).backward()
            run.scaler.unscale_(run.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(run.lora.parameters(), 1.0)
            finite = norm.isfinite()
            update_if_finite(run.optimizer, finite)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            total += torch.stack([loss.detach(), finite.float()])
            counted += 1
            # ---- between updates
            ends = run.step == args.steps or stop.number
            if run.step % args.print_every == 0 or ends:
                mean, updates = (total / counted).tolist()
                left = (time.monotonic() - began) / (run.step - first) * (args.steps - run.step)
                log(f"step {run.step}/{args.steps}  loss {mean:.4f}  {duration(left)} left")
                if not updates and not math.isfinite(mean):
                    log(f"no update was possible, the loss is {mean}; lower --lrate {args.lrate:g}")
                    return NOTHING_LEARNED
                total, counted = torch.zeros_like(total), 0
            if ends or (args.save_every and run.step % args.save_every == 0):
                run.save(args.out)
            if args.sample_every and (run.step % args.sample_every == 0) and not stop.number:
                draw()
    if run.saved != run.step or not args.out.exists():  # stopped while it drew samples
        run.save(args.out)
    if run.step < args.steps:
        log(f"stopped at step {run.step}, which is saved; the same command goes on from there")
        return 128 + stop.number
    log(f"{args.out}: LoRA of rank {args.rank}, {run.step} updates")
    return 0


def prepare(args: Namespace, model: StableDiffusion) -> tuple[Captioned, int]:
    """The pictures with checked captions, and their size."""
    size = args.size or model.native_size
    model.latent_shape(size, size)
    pictures = read_captioned(args.pictures, size, args.prompt)
    for caption, source in zip(pictures.captions, pictures.sources, strict=True):
        check_length(model, caption, source)
    for name in ("prompt", "class_prompt", "negative"):
        check_length(model, getattr(args, name) or "", f"--{name}")
    own = sum(source != "--prompt" for source in pictures.sources)
    log(f"{len(pictures.captions)} pictures, {own} of them with captions of their own")
    layers = attention_layers(model.unet).values()
    most = min(min(layer.in_features, layer.out_features) for layer in layers)
    if args.rank > most:
        raise ValueError(
            f"--rank {args.rank}: the model's narrowest attention layer has {most} channels; use "
            f"at most {most}"
        )
    return pictures, size


def fine_tune(args: Namespace, folder: Path, device: torch.device, amp: str) -> int:
    """Open the model, read the pictures, go on from a saved state, and train; the exit code."""
    model = StableDiffusion(
        args.sd_model or TINY, device, dtype="fp32", local_files_only=args.local_files_only,
        allow_pickle=args.allow_pickle, warn=log,
    )  # fmt: skip
    pictures, size = prepare(args, model)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"size": size, "amp": amp, "pictures": pictures.digest, "model": model.fingerprint}
    if args.class_prompt is None:
        settings |= {"num_class_pictures": 0, "prior_weight": 0.0}
    else:
        settings |= {"guidance_scale": args.guidance_scale}
    run = Run(folder, model, settings, device)
    if run.step:
        log(f"going on from step {run.step}")
    others = None
    if args.class_prompt is not None:
        drawn = class_pictures(args, model, folder, size)
        others = encode(model, drawn, [args.class_prompt] * len(drawn))
    own = encode(model, pictures.images, pictures.captions)
    shown = args.prompt or pictures.captions[0]
    due = args.sample_every and run.step % args.sample_every == 0
    if due and not (run.step and samples_of(run).exists()):  # also what a kill left undone
        draw_samples(args, model, run, shown, size)
    try:
        return train(
            args, model, run, own, others, lambda: draw_samples(args, model, run, shown, size)
        )
    except torch.OutOfMemoryError:
        raise ValueError(
            f"out of memory at step {run.step}; lower --batch {args.batch} or --size {size}, or "
            "set --amp bf16"
        ) from None


def body(argv: list[str] | None = None) -> int:
    """Fine-tune; the exit code. ValueError for a mistake in flags, pictures or the run's folder."""
    args = parse(argv, (__doc__ or "").splitlines()[0])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("one process fine-tunes; start guidance.finetune without torchrun")
    device = choose_device(args.device, log)
    amp = usable_amp(args.amp, device, log)
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 needs a GPU; leave it out")
    with run_folder(args.out) as folder:
        return fine_tune(args, folder, device, amp)


def main(argv: list[str] | None = None) -> int:
    """Run ``body``; a mistake is one line and the exit code 2."""
    return exit_code("guidance.finetune", lambda: body(argv))


if __name__ == "__main__":
    exit_process(main())
