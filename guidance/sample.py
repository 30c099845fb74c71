"""Sample images from a text, to see what a model can draw before distilling from it.

python -m guidance.sample --prompt "a red cone" --out sample.png
python -m guidance.sample --prompt "a red cone" --views --sd_model /path/or/hub-id
"""

import nerf.training.installed  # noqa: F401  first: says in a sentence what is missing

# isort: split
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guidance.prompts import DIRECTIONS, VIEW_WORDS
from guidance.schedule import add_noise, to_epsilon, to_x0
from guidance.sds import Prior, guide, rescaled_x0
from guidance.stable_diffusion import DTYPES, StableDiffusion


def ddim(
    prior: Prior,
    noise: Tensor,
    negative: Tensor,
    text: Tensor,
    scale: float,
    steps: int,
    rescale: float = 0.0,
) -> Tensor:
    """Sample latents [V, C, h, w] from ``noise`` by deterministic DDIM (Song et al. 2020).

    negative, text [V, L, D]: embeddings from ``prior.embed``. scale: guidance scale. rescale: the
    fraction of ``guidance.sds.rescaled_x0``. The first timestep is T - 1, as with diffusers'
    spacing "trailing", and the last step ends at x0. ValueError if the schedule cannot be sampled.
    """
    total = len(prior.alphas_cumprod)
    if steps > total:
        raise ValueError(f"--steps {steps}: the model has {total} timesteps; use at most {total}")
    if prior.prediction_type == "epsilon" and not prior.alphas_cumprod[-1] > 0:
        raise ValueError(
            "the scheduler's config has zero terminal SNR, but a model that predicts epsilon "
            "cannot start a picture from pure noise; set prediction_type to what the model "
            "predicts (v_prediction?), or rescale_betas_zero_snr to false"
        )
    times = [round(total * left / steps) - 1 for left in range(steps, 0, -1)]  # T - 1 comes first
    latents = noise
    for now, after in zip(times, [*times[1:], None], strict=True):
        t = torch.full((len(latents),), now, device=latents.device)
        alpha_bar = prior.alphas_cumprod[t]
        output = prior.predict(latents.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([negative, text]))
        unconditional, conditional = (
            to_x0(half, latents, alpha_bar, prior.prediction_type) for half in output.chunk(2)
        )
        x0 = guide(unconditional, conditional, scale)
        if rescale:
            x0 = rescaled_x0(x0, conditional, rescale)
        if after is None:
            return x0
        epsilon = to_epsilon(x0, latents, alpha_bar, "sample")
        latents = add_noise(x0, epsilon, prior.alphas_cumprod[torch.full_like(t, after)])
    raise AssertionError("steps is at least 1")


def sample(
    prior: StableDiffusion,
    texts: list[str],
    *,
    negative: str = "",
    scale: float = 7.5,
    rescale: float = 0.0,
    steps: int = 25,
    seed: int = 0,
    size: int | None = None,
) -> Tensor:
    """Sample an image for each of N texts: [N, 3, size, size] in [0, 1], on the CPU.

    Text n has the noise of seed + n. size: pixels per side; None: the model's own.
    """
    size = size or prior.native_size
    shape = prior.latent_shape(size, size)
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + number))
            for number in range(len(texts))
        ]
    ).to(prior.device)
    images = []
    for batch in torch.arange(len(texts)).split(8):
        text = prior.embed([texts[n] for n in batch.tolist()])
        unconditional = prior.embed([negative]).expand_as(text)
        latents = ddim(prior, noise[batch], unconditional, text, scale, steps, rescale)
        images.append(prior.decode(latents))
    return torch.cat(images).cpu()


def sheet(images: Tensor, columns: int, side: int = 128) -> np.ndarray:
    """Arrange images [N, 3, H, W] in [0, 1] row by row in one uint8 [H, W, 3].

    Images smaller than ``side`` pixels are enlarged by a whole factor; empty cells are white.
    """
    factor = max(1, side // images.shape[-1])
    rows = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    missing = -len(rows) % columns
    rows = torch.cat([rows, torch.ones_like(rows[:1]).expand(missing, -1, -1, -1)])
    count, _, height, width = rows.shape
    rows = rows.view(count // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    flat = rows.reshape(count // columns * height, columns * width, 3)
    return (flat.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help=".png file to write")
    parser.add_argument("--sd_model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--local_files_only", action="store_true")
    parser.add_argument("--allow_pickle", action="store_true")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=cuda)
    parser.add_argument("--guidance_dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--scheduler", help="diffusers scheduler; default: the model's own")
    parser.add_argument("--lora", type=Path, help="LoRA file, also VSD's lora.safetensors of a run")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="0: the model alone")
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--guidance_rescale", type=float, default=0.0, help="0 to 1")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=4, help="number of images")
    parser.add_argument("--size", type=int, help="pixels per side; default: the model's")
    parser.add_argument("--views", action="store_true", help="sample one image per view word")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Sample the images and write them as one sheet; ValueError for a mistake in the flags."""
    import imageio.v3 as imageio

    args = parse(argv)
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: expected a name that ends in .png")
    for name in ("steps", "number"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    if not 0 <= args.guidance_rescale <= 1:
        raise ValueError(f"--guidance_rescale {args.guidance_rescale}: expected 0 to 1")
    model = args.sd_model or str(Path(__file__).parent / "tiny" / "model")
    prior = StableDiffusion(
        model,
        args.device,
        dtype=args.guidance_dtype,
        local_files_only=args.local_files_only,
        allow_pickle=args.allow_pickle,
        scheduler=args.scheduler,
        lora=(args.lora, args.lora_scale) if args.lora else None,
    )
    texts = [args.prompt] * args.number
    if args.views:
        known = (prior.vocabulary or {}).get("views", VIEW_WORDS)
        fine = [f"{direction} raised" for direction in DIRECTIONS]
        words = fine if set(known) >= set(fine) else VIEW_WORDS
        texts = [f"{args.prompt}, {word} view" for word in words]
    images = sample(
        prior,
        texts,
        negative=args.negative_prompt,
        scale=args.guidance_scale,
        rescale=args.guidance_rescale,
        steps=args.steps,
        seed=args.seed,
        size=args.size,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(args.out, sheet(images, columns=min(4, len(texts))))
    print(f"{args.out}: {', '.join(dict.fromkeys(texts))}")


def script(argv: list[str] | None = None) -> None:
    """Run ``main``; print a user's mistake as one line and exit with code 2."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        print(f"guidance.sample: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    script()
