"""Train the embedded text-to-image model from scratch and write it as a diffusers folder.

    python -m guidance.tiny.train --work logs/tiny --out guidance/tiny/model
    python -m guidance.tiny.train --work logs/tiny64 --out logs/tiny64/model --size 64 --device cuda

There are four stages: images, VAE, latents, and the U-Net with the text encoder. Each keeps its
result or its progress in --work. An interrupted run is resumed by the same command and ends with
the same weights, bit for bit, as an uninterrupted one on the same machine. Raise --unet_steps to
train longer. --write_now writes the newest averaged weights without training.
"""

import nerf.training.installed  # noqa: F401  first: says in a sentence what is missing

# isort: split
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from guidance.attention import fast_attention
from guidance.tiny import build, pictures
from nerf.training import last_net
from nerf.training.arguments import ArgumentParser
from nerf.training.distributed import choose_device
from nerf.training.ema import EMA
from nerf.training.files import folders_above, replace_file, unfinished_folder
from nerf.training.rng import seed_everything, step_generator
from nerf.training.system import StopSignal, autocast

STAGES = {"pictures": 1, "vae": 2, "latents": 3, "unet": 4}  # offsets of their random seeds
FREE = (  # flags that may change when a run is resumed
    "out", "work", "device", "vae_steps", "unet_steps", "save_seconds", "stop_after", "write_now",
    "print_every",
)  # fmt: skip


def parse(argv: list[str] | None = None) -> Namespace:
    """The checked command-line flags; ValueError for a bad value."""
    parser = ArgumentParser("guidance.tiny.train", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, required=True, help="images and training state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--size", type=int, choices=sorted(build.SIZES), default=32, help="pixels")
    parser.add_argument("--pictures", type=int, default=81920, help=f"multiple of {pictures.CHUNK}")
    parser.add_argument("--held_out", type=int, default=512, help="pictures for the VAE's PSNR")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--vae_lr", type=float, default=1.5e-3)
    parser.add_argument("--unet_steps", type=int, default=9000)
    parser.add_argument("--unet_lr", type=float, default=7e-4)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--save_seconds", type=float, default=120.0)
    parser.add_argument("--print_every", type=int, default=100)
    parser.add_argument("--stop_after", type=int, help="interrupt training after this many steps")
    parser.add_argument("--write_now", action="store_true", help="write the model; no training")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: Namespace) -> None:
    """ValueError for flags outside their range."""
    if args.pictures % pictures.CHUNK or args.pictures <= args.held_out:
        raise ValueError(
            f"--pictures {args.pictures}: expected a multiple of {pictures.CHUNK} above "
            f"--held_out {args.held_out}"
        )
    for name in ("held_out", "batch", "vae_steps", "unet_steps", "print_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically: an interruption leaves the old file intact."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def same_settings(args: Namespace) -> None:
    """Save the flags that decide the result in --work; ValueError if they differ from its own."""
    args.work.mkdir(parents=True, exist_ok=True)
    now = {key: value for key, value in sorted(vars(args).items()) if key not in FREE}
    path = args.work / "settings.json"
    if not path.exists():
        replace_file(path, (json.dumps(now, indent=1) + "\n").encode("utf-8"))
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"--{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changed:
        raise ValueError(
            f"{args.work} was made with other settings ({', '.join(changed)}); use another --work"
        )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate warms up over 200 steps, then is constant, then falls to 2 % in the last 30 %.

    It falls along a cosine. It is constant for long, so that a run can be made longer before the
    decay starts.
    """
    warm = min(1.0, (step + 1) / 200)
    left = (steps - step) / (0.3 * steps)
    return peak * warm * (1.0 if left >= 1 else 0.02 + 0.98 * 0.5 * (1 - _cos(left)))


def _cos(left: float) -> float:
    return float(torch.cos(torch.tensor(torch.pi * left)))


class Fit:
    """A stage's weights, their average, optimizer and finished updates, resumed from ``path``."""

    def __init__(
        self, path: Path, module: nn.Module, peak: float, args: Namespace, device: torch.device
    ):
        self.path, self.module, self.step, self.cpu_seconds = path, module, 0, 0.0
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=peak, betas=(0.9, 0.99))
        self.ema = EMA(module, args.ema_decay)
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            for name in ("module", "optimizer", "ema"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        self._began, self.saved = time.process_time(), time.monotonic()

    def spent(self) -> float:
        """CPU seconds of training so far, with those before all interruptions."""
        return self.cpu_seconds + time.process_time() - self._began

    def save(self) -> None:
        """Write the state to ``path``."""
        parts: dict[str, Any] = {
            name: getattr(self, name).state_dict() for name in ("module", "optimizer", "ema")
        }
        save(self.path, {**parts, "step": self.step, "cpu_seconds": self.spent()})
        self.saved = time.monotonic()

    @torch.no_grad()
    def finish(self) -> None:
        """Copy the averaged weights into the module and freeze it."""
        if self.ema.enabled:
            torch._foreach_copy_(list(self.module.parameters()), self.ema.shadow)
        self.module.eval().requires_grad_(False)


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[Generator], Tensor],
    steps: int,
    peak: float,
    args: Namespace,
    device: torch.device,
) -> bool:
    """Minimize ``loss_of(generator)``; the module ends with its averaged weights, frozen.

    Resumes from <work>/<name>.pt and saves to it. peak: the highest learning rate. Returns False if
    --stop_after came before ``steps``; a signal ends the process after a save, with 128 + signal.
    """
    run = Fit(args.work / f"{name}.pt", module, peak, args, device)
    last, total = run.step, torch.zeros((), device=device)
    stop_at = steps if args.stop_after is None else min(steps, run.step + args.stop_after)
    with StopSignal() as stop:
        while run.step < stop_at and not stop.number:
            run.optimizer.param_groups[0]["lr"] = learning_rate(run.step, steps, peak)
            generator = step_generator(args.seed * 8 + STAGES[name], run.step, device)
            with autocast(device, args.amp), fast_attention(device):
                loss = loss_of(generator)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.ema.update()
            run.step += 1
            total += loss.detach()
            if run.step % args.print_every == 0 or run.step == stop_at:
                mean = total.item() / (run.step - last)
                print(
                    f"{name} {run.step}/{steps} loss {mean:.4f} grad {norm:.2f} "
                    f"cpu {run.spent():.0f} s",
                    flush=True,
                )
                last, total = run.step, torch.zeros_like(total)
            late = time.monotonic() - run.saved > args.save_seconds
            if late or run.step == stop_at or stop.number:
                run.save()
    if stop.number and run.step < steps:
        print(f"stopped by signal {stop.number}; {name} {run.step}/{steps} is saved", flush=True)
        sys.exit(128 + stop.number)
    run.finish()
    return run.step >= steps


# ------------------------------------------------------------------------------------- stages


def make_pictures(args: Namespace) -> dict[str, Tensor]:
    """All images and their facts, made in chunks; the last --held_out are not trained on."""
    path = args.work / "pictures.pt"
    if not path.exists():
        began, parts = time.process_time(), []
        for chunk in range(args.pictures // pictures.CHUNK):
            generator = step_generator(args.seed * 8 + STAGES["pictures"], chunk, "cpu")
            parts.append(pictures.draw_pictures(generator, pictures.CHUNK, args.size))
        facts = torch.stack([torch.cat([part[1][n] for part in parts]) for n in range(5)], -1)
        save(path, {"pictures": torch.cat([part[0] for part in parts]), "facts": facts})
        print(f"{args.pictures} pictures, cpu {time.process_time() - began:.0f} s", flush=True)
    return torch.load(path, weights_only=True)


def to_range(images: Tensor) -> Tensor:
    """uint8 images -> [-1, 1], as the VAE expects them."""
    return images.float() / 127.5 - 1.0


def vae_loss(vae: Any, images: Tensor, generator: Generator) -> Tensor:
    """Squared and absolute error, edges, color of 8x8 blocks, a small KL; images in [-1, 1].

    Without the block term, a short training confuses hues of the same brightness.
    """
    posterior = vae.encode(images).latent_dist
    found = vae.decode(posterior.sample(generator)).sample.float()
    error = found - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    blocks = F.avg_pool2d(error, 8)
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return (
        F.mse_loss(found, images) + 0.3 * error.abs().mean() + 0.1 * edges
        + (blocks**2).mean() + 1e-4 * kl
    )  # fmt: skip


@torch.no_grad()
def vae_psnr(vae: Any, images: Tensor, device: torch.device) -> float:
    """Mean PSNR of the reconstructions of uint8 images [N, 3, H, W] from the posterior mean."""
    values = []
    for batch in images.split(64):
        batch = to_range(batch.to(device))
        found = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((found - batch) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def train_vae(args: Namespace, images: Tensor, device: torch.device) -> Any | None:
    """The trained VAE; None if training was stopped before its end and --write_now is not set."""
    seed_everything(args.seed)
    vae = build.make_vae(build.SIZES[args.size], args.size).to(device)
    train = images[: -args.held_out].to(device)

    def loss_of(generator: Generator) -> Tensor:
        pick = torch.randint(len(train), (args.batch,), generator=generator, device=device)
        return vae_loss(vae, to_range(train[pick]), generator)

    done = fit("vae", vae, loss_of, args.vae_steps, args.vae_lr, args, device)
    psnr = vae_psnr(vae, images[-args.held_out :], device)
    print(f"vae: {build.count_weights(vae)} weights, {psnr:.2f} dB held out", flush=True)
    return vae if done or args.write_now else None


@torch.no_grad()
def make_latents(args: Namespace, vae: Any, images: Tensor, device: torch.device) -> dict[str, Any]:
    """The posterior mean and log variance of every image, unscaled, and 1 / std of all latents."""
    path = args.work / "latents.pt"
    if not path.exists():
        batches = (to_range(batch.to(device)) for batch in images[: -args.held_out].split(128))
        codes = torch.cat([vae.encode(x).latent_dist.parameters.half().cpu() for x in batches])
        mean, log_variance = codes.float().chunk(2, dim=1)
        factor = (mean.var() + log_variance.exp().mean()).rsqrt().item()
        save(path, {"codes": codes, "scaling_factor": factor})
    return torch.load(path, weights_only=True)


def train_unet(
    args: Namespace, facts: Tensor, latents: dict[str, Any], device: torch.device
) -> tuple[Any, nn.ModuleDict, bool]:
    """Train the U-Net and the text encoder together, on samples of the VAE's posterior.

    Returns the tokenizer, both networks ("text", "unet"), and whether the model can be written.
    """
    seed_everything(args.seed + 1)
    sizes = build.SIZES[args.size]
    tokenizer = build.make_tokenizer(pictures.vocabulary()["words"], args.work / "tokenizer")
    both = nn.ModuleDict(
        {
            "text": build.make_text_encoder(tokenizer, sizes),
            "unet": build.make_unet(sizes, args.size),
        }
    ).to(device)
    both.train()
    # A tokenizer keeps, and writes, the settings of its last call: also without a step to train.
    tokenizer("", padding="max_length", truncation=True)
    scheduler, codes = build.make_scheduler(), latents["codes"].to(device)

    def loss_of(generator: Generator) -> Tensor:
        options: dict[str, Any] = {"generator": generator, "device": device}
        pick = torch.randint(len(codes), (args.batch,), **options)
        mean, log_variance = codes[pick].float().chunk(2, dim=1)
        clean = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, **options)
        clean = clean * latents["scaling_factor"]
        noise = torch.randn(clean.shape, **options)
        t = torch.randint(scheduler.config.num_train_timesteps, (args.batch,), **options)
        draws = torch.rand(args.batch, 3, **options).tolist()
        rows = facts[pick.cpu()].tolist()
        texts = [pictures.caption(row, draw) for row, draw in zip(rows, draws, strict=True)]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        words = both["text"](tokens.input_ids.to(device))[0]
        found = both["unet"](scheduler.add_noise(clean, noise, t), t, words).sample
        return F.mse_loss(found.float(), scheduler.get_velocity(clean, noise, t))

    done = fit("unet", both, loss_of, args.unet_steps, args.unet_lr, args, device)
    print(f"unet and text: {build.count_weights(both)} weights", flush=True)
    return tokenizer, both, done or args.write_now


def main(argv: list[str] | None = None) -> None:
    """Run all stages that are not finished, then write the model folder."""
    args = parse(argv)
    device = choose_device(args.device)
    same_settings(args)
    if args.write_now:
        args.stop_after = 0
    data = make_pictures(args)
    vae = train_vae(args, data["pictures"], device)
    if vae is None:
        return
    latents = make_latents(args, vae, data["pictures"], device)
    vae.register_to_config(scaling_factor=latents["scaling_factor"])
    tokenizer, both, ready = train_unet(args, data["facts"], latents, device)
    if ready:
        parts = tokenizer, both["text"], vae, both["unet"], pictures.vocabulary()
        with folders_above(args.out), unfinished_folder(args.out) as temporary:
            build.write_folder(temporary / "model", *parts)
            put(temporary / "model", args.out)
        print(f"written: {args.out}", flush=True)


def put(new: Path, out: Path) -> None:
    """Move the folder ``new`` to ``out``; if that exists, file by file, so that each is whole."""
    if not out.exists():
        new.rename(out)
        return
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        target = out / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def script(argv: list[str] | None = None) -> None:
    """Run ``main``; end the process where it failed, see ``last_net.exit_code``."""
    if code := last_net.exit_code("guidance.tiny.train", lambda: main(argv)):
        sys.exit(code)


if __name__ == "__main__":
    script()
