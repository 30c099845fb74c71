"""Pictures from a text, to see what a model folder is good for before distilling from it.

python -m guidance.sample --prompt "a red cone" --out sample.png
python -m guidance.sample --prompt "a red cone" --views --sd_model /path/or/hub-id
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from guidance.prompts import DIRECTIONS, VIEW_WORDS
from guidance.sds import add_noise, guide, predict_x0, rescaled, to_epsilon
from guidance.stable_diffusion import DTYPES, StableDiffusion


def ddim(
    prior, noise: Tensor, negative: Tensor, text: Tensor, scale: float, steps: int, rescale=0.0
) -> Tensor:
    """Latents [V, C, h, w] from ``noise`` by DDIM without noise of its own (Song et al. 2020).

    negative, text: [V, L, D] as ``prior.embed`` gives them. rescale: see ``guidance.sds.rescaled``.
    """
    total = len(prior.alphas_cumprod)
    times = [round(total * left / steps) - 1 for left in range(steps, 0, -1)]  # T - 1 comes first
    latents = noise
    for now, after in zip(times, [*times[1:], None], strict=True):
        t = torch.full((len(latents),), now, device=latents.device)
        alpha_bar = prior.alphas_cumprod[t]
        output = prior.predict(latents.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([negative, text]))
        without, told = (
            to_epsilon(half, latents, alpha_bar, prior.prediction_type) for half in output.chunk(2)
        )
        epsilon = guide(without, told, scale)
        if rescale:
            epsilon = rescaled(epsilon, told, latents, alpha_bar, rescale)
        latents = predict_x0(epsilon, latents, alpha_bar)
        if after is not None:
            latents = add_noise(latents, epsilon, prior.alphas_cumprod[torch.full_like(t, after)])
    return latents


def sample(
    prior, texts: list[str], *, negative="", scale=7.5, rescale=0.0, steps=25, seed=0, size=None
) -> Tensor:
    """Pictures [N, 3, size, size] in [0, 1]; each text has its own noise, from ``seed`` on."""
    size = size or prior.native_size
    shape = prior.latent_shape(size, size)
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + number))
            for number in range(len(texts))
        ]
    ).to(prior.device)
    pictures = []
    for part in torch.arange(len(texts)).split(8):
        told = prior.embed([texts[n] for n in part.tolist()])
        untold = prior.embed([negative]).expand_as(told)
        pictures.append(prior.decode(ddim(prior, noise[part], untold, told, scale, steps, rescale)))
    return torch.cat(pictures).cpu()


def sheet(pictures: Tensor, columns: int, side: int = 128):
    """uint8 [H, W, 3]: pictures [N, 3, H, W] row by row, small ones enlarged."""
    larger = max(1, side // pictures.shape[-1])
    rows = pictures.repeat_interleave(larger, -1).repeat_interleave(larger, -2)
    missing = -len(rows) % columns
    rows = torch.cat([rows, torch.ones_like(rows[:1]).expand(missing, -1, -1, -1)])
    count, _, height, width = rows.shape
    rows = rows.view(count // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    flat = rows.reshape(count // columns * height, columns * width, 3)
    return (flat.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="a .png")
    parser.add_argument("--sd_model", default=None, help="folder or hub id; default: embedded")
    parser.add_argument("--local_files_only", action="store_true")
    parser.add_argument("--allow_pickle", action="store_true")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=cuda)
    parser.add_argument("--guidance_dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--scheduler", help="noise schedule instead of the model's own")
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--guidance_rescale", type=float, default=0.0, help="0 to 1")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=4, help="pictures")
    parser.add_argument("--size", type=int, help="pixels per side; default: the model's")
    parser.add_argument("--views", action="store_true", help="one picture per view word instead")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    import imageio.v3 as imageio

    args = parse(argv)
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: expected a name that ends in .png")
    if min(args.steps, args.number) < 1:
        raise ValueError("--steps and --number: expected 1 or more")
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
    )
    texts = [args.prompt] * args.number
    if args.views:
        known = (prior.vocabulary or {}).get("views", VIEW_WORDS)
        fine = [f"{where} raised" for where in DIRECTIONS]
        words = fine if set(known) >= set(fine) else VIEW_WORDS
        texts = [f"{args.prompt}, {word} view" for word in words]
    pictures = sample(
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
    imageio.imwrite(args.out, sheet(pictures, columns=min(4, len(texts))))
    print(f"{args.out}: {', '.join(dict.fromkeys(texts))}")


def script(argv=None) -> None:
    """``main``, with the user's mistakes as one line and exit code 2."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        print(f"guidance.sample: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    script()
