"""Train the embedded text-to-image model from nothing, and write it as a diffusers folder.

    python guidance/tiny/train.py --work logs/tiny --out guidance/tiny/model
    python guidance/tiny/train.py --work logs/tiny64 --out logs/tiny64/model --size 64 --device cuda

Four stages, each left out when its file in --work is already there: pictures, VAE, latents, U-Net
with text encoder. Stop it whenever you like: the same command goes on where it was, and ends with
the same weights as if it had never stopped (on one machine). Raise --unet_steps to train longer.
With --write_now the newest averaged weights are written without any training.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guidance.attention import fast_attention
from guidance.tiny import build, pictures
from nerf.training.distributed import choose_device
from nerf.training.ema import EMA
from nerf.training.rng import seed_everything, step_generator
from nerf.training.system import StopSignal, autocast

STAGES = {"pictures": 1, "vae": 2, "latents": 3, "unet": 4}  # their random numbers differ
FREE = ("out", "work", "device", "vae_steps", "unet_steps", "save_seconds", "stop_after")
FREE += ("write_now", "print_every")  # may change between one start and the next


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, required=True, help="pictures and training state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--size", type=int, choices=sorted(build.SIZES), default=32, help="pixels")
    parser.add_argument("--pictures", type=int, default=81920, help=f"multiple of {pictures.CHUNK}")
    parser.add_argument("--held_out", type=int, default=512, help="of them, for the VAE's PSNR")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--vae_lr", type=float, default=1.5e-3)
    parser.add_argument("--unet_steps", type=int, default=9000)
    parser.add_argument("--unet_lr", type=float, default=7e-4)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--save_seconds", type=float, default=120.0)
    parser.add_argument("--print_every", type=int, default=100)
    parser.add_argument(
        "--stop_after", type=int, help="stop as if interrupted, after so many steps"
    )
    parser.add_argument("--write_now", action="store_true", help="write what there is; no training")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args) -> None:
    if args.pictures % pictures.CHUNK or args.pictures <= args.held_out:
        raise ValueError(
            f"--pictures {args.pictures}: expected a multiple of {pictures.CHUNK} above "
            f"--held_out {args.held_out}"
        )
    for name in ("held_out", "batch", "vae_steps", "unet_steps", "print_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")


def save(path: Path, state: dict) -> None:
    """Either the old file or the new one is whole at any moment."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def same_settings(args) -> None:
    """Note what decides the result in --work; refuse to go on there with anything else."""
    args.work.mkdir(parents=True, exist_ok=True)
    now = {key: value for key, value in sorted(vars(args).items()) if key not in FREE}
    path = args.work / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"--{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changed:
        raise ValueError(
            f"{args.work} was made with other settings ({', '.join(changed)}); use another --work"
        )


# ------------------------------------------------------------------------------------ the loop


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up over 200 steps, flat, and down to 2 % along a cosine in the last 30 %.

    Flat until late, so that a run can be made longer without having decayed for nothing.
    """
    warm = min(1.0, (step + 1) / 200)
    left = (steps - step) / (0.3 * steps)
    return peak * warm * (1.0 if left >= 1 else 0.02 + 0.98 * 0.5 * (1 - _cos(left)))


def _cos(left: float) -> float:
    return float(torch.cos(torch.tensor(torch.pi * left)))


class Fit:
    """What one stage resumes from: weights, their average, the optimizer, updates finished."""

    def __init__(self, path: Path, module: nn.Module, peak: float, args, device):
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
        """CPU seconds of this and all earlier starts; an interrupted machine does not count."""
        return self.cpu_seconds + time.process_time() - self._began

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("module", "optimizer", "ema")}
        save(self.path, {**parts, "step": self.step, "cpu_seconds": self.spent()})
        self.saved = time.monotonic()

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the averaged weights in the module, for use."""
        if self.ema.enabled:
            torch._foreach_copy_(list(self.module.parameters()), self.ema.shadow)
        self.module.eval().requires_grad_(False)


def fit(name: str, module: nn.Module, loss_of, steps: int, peak: float, args, device) -> bool:
    """Minimize ``loss_of(generator)`` over the module's weights, averaged weights at the end.

    Resumes from <work>/<name>.pt and keeps it up to date. False if it was stopped before ``steps``.
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
    run.finish()
    return run.step >= steps


# ------------------------------------------------------------------------------------- stages


def make_pictures(args) -> dict:
    """Every picture and its facts, drawn in chunks; the last --held_out are never trained on."""
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
    """uint8 -> [-1, 1], as the VAE takes them."""
    return images.float() / 127.5 - 1.0


def vae_loss(vae, images: Tensor, generator) -> Tensor:
    """Squared and absolute error, edges, color of 8x8 blocks, and a little KL.

    Without the block term a short training mixes up hues that share a brightness.
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
def vae_psnr(vae, images: Tensor, device) -> float:
    """Mean over uint8 images [N, ...] of the PSNR of what the decoder makes of the mean code."""
    values = []
    for part in images.split(64):
        part = to_range(part.to(device))
        found = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((found - part) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def train_vae(args, images: Tensor, device) -> nn.Module | None:
    seed_everything(args.seed)
    vae = build.make_vae(build.SIZES[args.size], args.size).to(device)
    train = images[: -args.held_out].to(device)

    def loss_of(generator):
        pick = torch.randint(len(train), (args.batch,), generator=generator, device=device)
        return vae_loss(vae, to_range(train[pick]), generator)

    done = fit("vae", vae, loss_of, args.vae_steps, args.vae_lr, args, device)
    psnr = vae_psnr(vae, images[-args.held_out :], device)
    print(f"vae: {build.count_weights(vae)} weights, {psnr:.2f} dB held out", flush=True)
    return vae if done or args.write_now else None


@torch.no_grad()
def make_latents(args, vae, images: Tensor, device) -> dict:
    """Mean and spread of every picture's code, unscaled, and 1 / std of all codes."""
    path = args.work / "latents.pt"
    if not path.exists():
        codes = []
        for part in images[: -args.held_out].split(128):
            codes.append(vae.encode(to_range(part.to(device))).latent_dist.parameters.half().cpu())
        codes = torch.cat(codes)
        mean, log_variance = codes.float().chunk(2, dim=1)
        factor = (mean.var() + log_variance.exp().mean()).rsqrt().item()
        save(path, {"codes": codes, "scaling_factor": factor})
    return torch.load(path, weights_only=True)


def train_unet(args, facts: Tensor, latents: dict, device):
    """The U-Net and the text encoder together, on codes drawn from the VAE's posterior."""
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
    scheduler, codes = build.make_scheduler(), latents["codes"].to(device)

    def loss_of(generator):
        options = {"generator": generator, "device": device}
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


def main(argv=None) -> None:
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
        build.write_folder(
            args.out, tokenizer, both["text"], vae, both["unet"], pictures.vocabulary()
        )
        print(f"written: {args.out}", flush=True)


def script(argv=None) -> None:
    """``main``, with the user's mistakes as one line and exit code 1."""
    try:
        main(argv)
    except ValueError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    script()
