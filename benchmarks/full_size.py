"""One guidance step with a full-size Stable Diffusion: seconds of each part, and memory.

    python benchmarks/full_size.py --device cuda --steps 20           # fp16 there, bf16 on a CPU
    python benchmarks/full_size.py --device cuda --flags channels_last vae_checkpointing

The model has Stable Diffusion 1.5's layout and sizes (860 million weights in the U-Net) with random
weights, written once to --work; the cost of a step does not depend on their values. For comparison,
the same weights run stable-dreamfusion's formula, rewritten from its guidance/sd_utils.py: half
precision throughout, the encoder in the autograd graph, the loss as a distance to a target.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from guidance import sds
from guidance.memory import Memory
from guidance.stable_diffusion import DTYPES, StableDiffusion
from guidance.tiny import build
from nerf.training.system import peak_memory_mb

ROOT = Path(__file__).resolve().parents[1]

WORDS = ["a", "dslr", "photo", "of", "hamburger", "front", "view"]


def write_model(folder: Path) -> None:
    """Write a random model of Stable Diffusion 1.5's sizes, in half precision."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = build.make_tokenizer(WORDS, folder / "words")
    tokenizer.model_max_length = 77
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768,
            num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # else the defaults
    build.write_folder(folder, tokenizer, text, vae, unet, {})
    (folder / "vocabulary.json").unlink()


class Watch:
    """Seconds spent in wrapped functions, with the device synchronized before and after."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def now(self) -> float:
        """The time in seconds, after all work on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, function):
        """``function``, adding its time to ``seconds[name]``."""

        def call(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start
            return result

        return call


def ours(prior, images, conditions, generator, encode, predict) -> None:
    """The guidance step of run_dreamfusion.py, forward and backward to the rendered images."""
    size = prior.native_size
    noise = sds.draw_noise(len(images), prior.latent_shape(size, size), generator)
    prior.encode, prior.predict = encode, predict
    shown = sds.resized(images, size)
    sds.distill(prior, shown, conditions, noise, sds.Recipe()).loss.backward()


def peer(prior, images, conditions, generator, encode, predict) -> None:
    """stable-dreamfusion's step: noise and target without a graph, then a mean squared error."""
    size, dtype = prior.native_size, prior.dtype
    shown = F.interpolate(images, (size, size), mode="bilinear", align_corners=False).to(dtype)
    posterior = encode(2 * shown - 1)
    latents = posterior.sample(generator) * prior.vae.config.scaling_factor
    with torch.no_grad():
        t = torch.randint(20, 981, (len(images),), generator=generator, device=images.device)
        noise = torch.randn(latents.shape, generator=generator, device=images.device, dtype=dtype)
        alpha_bar = prior.alphas_cumprod[t]
        noisy = sds.add_noise(latents.float(), noise.float(), alpha_bar).to(dtype)
        both = torch.cat([conditions.negative, conditions.text]).to(dtype)
        output = predict(torch.cat([noisy] * 2), torch.cat([t] * 2), both)
        unconditional, conditional = output.chunk(2)
        prediction = unconditional + 100 * (conditional - unconditional)
        gradient = torch.nan_to_num((1 - sds.per_view(alpha_bar, noise)) * (prediction - noise))
        target = (latents - gradient).detach()
    loss = 0.5 * F.mse_loss(latents.float(), target.float(), reduction="sum") / len(images)
    loss.backward()


def measure(prior, step, calls, args, device) -> dict[str, float]:
    """Median seconds over --steps of a whole step and of its parts; a first step warms up."""
    conditions = sds.Conditions(
        prior.embed([""]).expand(args.views, -1, -1),
        prior.embed(["a dslr photo of a hamburger"]).expand(args.views, -1, -1),
    )
    rows = []
    for number in range(args.steps + 1):
        generator = torch.Generator(device).manual_seed(number)
        images = torch.rand(
            args.views, 3, args.train_res, args.train_res, generator=generator, device=device
        ).requires_grad_()
        watch = Watch(device)
        start = watch.now()
        wrapped = (watch.timed(name, call) for name, call in calls.items())
        step(prior, images, conditions, generator, *wrapped)
        whole = watch.now() - start
        assert images.grad is not None
        rows.append({"step": whole, **watch.seconds, "rest": whole - sum(watch.seconds.values())})
    return {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "full_size")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--train_res", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, bf16 on a CPU")
    parser.add_argument("--flags", nargs="*", default=[], help="switches of guidance.memory.Memory")
    parser.add_argument(
        "--only", choices=("ours", "peer"), help="run one program only, to measure its peak memory"
    )
    args = parser.parse_args()
    device, sizes = args.device, args.train_res
    if not args.work.exists():
        write_model(args.work)
    dtype = args.dtype or ("fp16" if device.type == "cuda" else "bf16")
    memory = Memory(**dict.fromkeys(args.flags, True))
    prior = StableDiffusion(str(args.work), device, dtype=dtype, memory=memory)
    plain_encode, plain_predict = prior.encode, prior.predict

    def peer_unet(noisy, t, embeddings):
        return prior.unet(noisy, t, encoder_hidden_states=embeddings).sample

    programs = {
        "ours": (ours, {"encode": plain_encode, "unet": plain_predict}),
        "peer": (peer, {"encode": lambda x: prior.vae.encode(x).latent_dist, "unet": peer_unet}),
    }
    print(f"{dtype}, {args.views} view(s), {args.steps} steps, {' '.join(args.flags) or 'plain'}")
    print("| program | render | step, s | encode | U-Net | backward and rest | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for args.train_res in sizes:
        for name, (step, calls) in programs.items():
            if args.only in (None, name):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                found = measure(prior, step, calls, args, device)
                print(
                    f"| {name} | {args.train_res} | {found['step']:.3f} | {found['encode']:.3f} | "
                    f"{found['unet']:.3f} | {found['rest']:.3f} | {peak_memory_mb(device):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
