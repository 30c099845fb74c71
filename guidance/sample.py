"""Sample images from a text, to see what a model can draw before distilling from it.

python -m guidance.sample --prompt "a red cone" --out sample.png
python -m guidance.sample --prompt "a red cone" --views --sd_model /path/or/hub-id
python -m guidance.sample --prompt "a red cone" --prompt_target "a blue cone" --out edit.png
"""

import nerf.training.installed  # noqa: F401  first: says in a sentence what is missing

# isort: split
import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from guidance.model_files import find_folder
from guidance.prompt_to_prompt import PromptToPrompt
from guidance.prompts import DIRECTIONS, VIEW_WORDS
from guidance.samplers import SAMPLERS, check_steps, make_sampler, sample_with
from guidance.schedule import add_noise, to_epsilon, to_x0
from guidance.sds import Prior, guide, rescaled_x0
from guidance.stable_diffusion import DTYPES, StableDiffusion
from nerf.training import last_net
from nerf.training.arguments import ArgumentParser
from nerf.training.distributed import choose_device
from nerf.training.plain_text import one_line


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
    check_steps(prior, steps)
    total = len(prior.alphas_cumprod)
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


class Sampling(NamedTuple):
    """How images are sampled. sampler: of ``samplers.make_sampler``; None: ``ddim``."""

    scale: float = 7.5
    rescale: float = 0.0
    steps: int = 25
    sampler: Any = None


def denoise(
    prior: Prior,
    noise: Tensor,
    negative: Tensor,
    text: Tensor,
    how: Sampling,
    generators: list[Generator],
) -> Tensor:
    """Sample latents from ``noise`` [V, C, h, w]; generators: one for each of V."""
    if how.sampler is None:
        return ddim(prior, noise, negative, text, how.scale, how.steps, how.rescale)
    return sample_with(
        how.sampler, prior, noise, negative, text, how.scale, how.steps, how.rescale, generators
    )


def draw_noise(
    model: StableDiffusion, count: int, seed: int, size: int | None
) -> tuple[Tensor, list[Generator]]:
    """Noise [count, C, h, w]; number n is of seed + n, whose generator is also returned.

    size: pixels per side of the images; None: the model's own.
    """
    size = size or model.native_size
    shape = model.latent_shape(size, size)
    generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(model.device), generators


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
    sampler: Any = None,
) -> Tensor:
    """Sample an image for each of N texts: [N, 3, size, size] in [0, 1], on the CPU.

    Text n has the noise of seed + n. size: pixels per side; None: the model's own. sampler: of
    ``samplers.make_sampler``; None: ``ddim``.
    """
    noise, generators = draw_noise(prior, len(texts), seed, size)
    images, how = [], Sampling(scale, rescale, steps, sampler)
    for batch in torch.arange(len(texts)).split(8):
        numbers = batch.tolist()
        text = prior.embed([texts[n] for n in numbers])
        unconditional = prior.embed([negative]).expand_as(text)
        own = [generators[n] for n in numbers]
        latents = denoise(prior, noise[batch], unconditional, text, how, own)
        images.append(prior.decode(latents))
    return torch.cat(images).cpu()


def sample_edits(
    model: StableDiffusion,
    edit: PromptToPrompt,
    prompts: tuple[str, str],
    number: int,
    how: Sampling,
    *,
    negative: str = "",
    seed: int = 0,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Images of a prompt, and of the other prompt edited from them: [number, 3, size, size] each.

    edit: made of the same ``prompts``. Pair n starts from the noise of seed + n.
    """
    noise, generators = draw_noise(model, number, seed, size)
    firsts, seconds = [], []
    for batch in torch.arange(number).split(4):
        numbers = batch.tolist()
        own = [generators[n] for n in numbers]
        own += [generator.clone_state() for generator in own]
        text = torch.cat([model.embed([prompt] * len(numbers)) for prompt in prompts])
        pairs = noise[batch].repeat(2, 1, 1, 1)
        unconditional = model.embed([negative]).expand_as(text)
        latents = denoise(edit, pairs, unconditional, text, how, own)
        first, second = model.decode(latents).chunk(2)
        firsts.append(first)
        seconds.append(second)
    return torch.cat(firsts).cpu(), torch.cat(seconds).cpu()


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
    parser = ArgumentParser("guidance.sample", __doc__)
    parser.add_argument("--prompt", required=True, help="what the images show")
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help=".png file to write")
    parser.add_argument("--sd_model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--local_files_only", action="store_true")
    parser.add_argument("--allow_pickle", action="store_true")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=cuda, help="auto, cpu, cuda, cuda:1, ... or mps")
    parser.add_argument("--guidance_dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument(
        "--scheduler",
        help=f"diffusers' own sampler, made from the model's scheduler config: "
        f"{', '.join(SAMPLERS)}; not given: DDIM from the last timestep on",
    )
    parser.add_argument("--lora", type=Path, help="LoRA file, also VSD's lora.safetensors of a run")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="0: the model alone")
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument(
        "--guidance_rescale", type=float, default=0.0,
        help="0 to 1; with --scheduler diffusers' own, on the network's output",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=25, help="steps of the sampler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=4, help="number of images")
    parser.add_argument("--size", type=int, help="pixels per side; default: the model's")
    parser.add_argument("--views", action="store_true", help="sample one image per view word")
    parser.add_argument(
        "--prompt_target",
        help="prompt-to-prompt: also draw this prompt from the same noise, with the attention maps "
        "of --prompt, and write both side by side, and each alone as OUT_prompt.png and "
        "OUT_target.png",
    )
    parser.add_argument(
        "--cross_steps", type=float,
        help="part of the steps in which --prompt_target takes cross-attention maps, 0 to 1 (0.8)",
    )  # fmt: skip
    parser.add_argument(
        "--self_steps", type=float,
        help="part of the steps in which --prompt_target takes self-attention maps, 0 to 1 (0)",
    )  # fmt: skip
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """ValueError for flags outside their range or that contradict each other."""
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: expected a name that ends in .png")
    for name in ("steps", "number"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    for name in ("guidance_rescale", "cross_steps", "self_steps"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name} {value}: expected 0 to 1")
        if name != "guidance_rescale" and value is not None and args.prompt_target is None:
            raise ValueError(f"--{name} is for --prompt_target; add that, or leave it out")
    if args.prompt_target is not None and args.views:
        raise ValueError("--prompt_target draws pairs, --views one text; leave one out")


def main(argv: list[str] | None = None) -> None:
    """Sample the images and write them as one sheet; ValueError for a mistake in the flags."""
    args = parse(argv)
    check(args)
    path = args.sd_model or str(Path(__file__).parent / "tiny" / "model")
    model = StableDiffusion(
        path,
        choose_device(args.device),
        dtype=args.guidance_dtype,
        local_files_only=args.local_files_only,
        allow_pickle=args.allow_pickle,
        lora=(args.lora, args.lora_scale) if args.lora else None,
        warn=lambda text: print(one_line(text)),
    )
    sampler = None
    if args.scheduler is not None:
        folder = find_folder(path, args.local_files_only)
        sampler = make_sampler(folder, args.scheduler, args.steps, model)
    how = Sampling(args.guidance_scale, args.guidance_rescale, args.steps, sampler)
    if args.prompt_target is not None:
        write_edits(args, model, how)
        return
    texts = [args.prompt] * args.number
    if args.views:
        known = (model.vocabulary or {}).get("views", VIEW_WORDS)
        fine = [f"{direction} raised" for direction in DIRECTIONS]
        words = fine if set(known) >= set(fine) else VIEW_WORDS
        texts = [f"{args.prompt}, {word} view" for word in words]
    images = sample(
        model,
        texts,
        negative=args.negative_prompt,
        seed=args.seed,
        size=args.size,
        **how._asdict(),
    )
    write(args.out, sheet(images, columns=min(4, len(texts))))
    print(one_line(f"{args.out}: {', '.join(dict.fromkeys(texts))}"))


def write_edits(args: argparse.Namespace, model: StableDiffusion, how: Sampling) -> None:
    """Prompt-to-prompt: three sheets, of pairs, of the prompt's images and of the edited ones."""
    prompts = (args.prompt, args.prompt_target)
    cross = 0.8 if args.cross_steps is None else args.cross_steps
    edit = PromptToPrompt(model, *prompts, cross, args.self_steps or 0.0)
    both = sample_edits(
        model, edit, prompts, args.number, how,
        negative=args.negative_prompt, seed=args.seed, size=args.size,
    )  # fmt: skip
    alone = [args.out.with_stem(f"{args.out.stem}_{name}") for name in ("prompt", "target")]
    write(args.out, sheet(torch.stack(both, 1).flatten(0, 1), columns=2))
    for path, images in zip(alone, both, strict=True):
        write(path, sheet(images, columns=min(4, args.number)))
    own = f"; tokens with maps of their own: {' '.join(edit.new_tokens)}" if edit.new_tokens else ""
    files = ", ".join(map(str, (args.out, *alone)))
    print(one_line(f"{files}: {args.prompt} | {args.prompt_target}{own}"))


def write(path: Path, picture: np.ndarray) -> None:
    """Write an image, and make its folder."""
    import imageio.v3 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, picture)


def script(argv: list[str] | None = None) -> None:
    """Run ``main``; end the process where it failed, see ``last_net.exit_code``."""
    if code := last_net.exit_code("guidance.sample", lambda: main(argv)):
        sys.exit(code)


if __name__ == "__main__":
    script()
