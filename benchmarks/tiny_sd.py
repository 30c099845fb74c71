"""Does the embedded model draw what the prompt names? Samples, scored by a separate judge.

    python benchmarks/tiny_sd.py                                  # the committed model
    python benchmarks/tiny_sd.py --model logs/tiny/model --guidance_scale 4

Every object in every color, then with two colors, from the four level views; prompts without a
view word and from overhead are scored separately. Prints a table by kind of prompt and the wrong
samples, and writes a picture of the first 256.
"""

import argparse
import collections
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import judge as judging
from guidance.prompts import VIEW_WORDS
from guidance.sample import sheet
from guidance.tiny.pictures import COLOR_NAMES, NAMES, article, describe
from guidance.tiny.shapes import SHAPES
from nerf.media import write_png

ROOT = Path(__file__).resolve().parents[1]

MODEL = ROOT / "guidance" / "tiny" / "model"


def prompts() -> list[tuple[str, str, str, str]]:
    """(prompt, object, color, kind). The first 256 name one of the four level views.

    Then 64 each without a view word and from overhead, where some solids look alike: from above a
    mushroom or a cone is a disc. These are reported separately.
    """

    def entry(number: int, view: str | None, kind: str):
        name = NAMES[number % len(NAMES)]
        # Each pass over the objects starts at another color; 10 passes make all combinations.
        color = COLOR_NAMES[(number // len(NAMES) + 3 * number) % len(COLOR_NAMES)]
        other = COLOR_NAMES[(COLOR_NAMES.index(color) + 1 + number % 7) % len(COLOR_NAMES)]
        two = kind == "two colors" and SHAPES[name].second is not None
        text = article(describe(name, color, other if two else None))
        return (text if view is None else f"{text}, {view} view", name, color, kind)

    level = [word for word in VIEW_WORDS if word != "overhead"]
    kinds = ["one color"] * 160 + ["two colors"] * 96
    entries = [entry(n, level[(n + n // 16) % 4], kind) for n, kind in enumerate(kinds)]
    entries += [entry(n, None, "no view word") for n in range(64)]
    return entries + [entry(n, "overhead", "overhead") for n in range(64)]


def load(folder: Path):
    """The diffusers pipeline in ``folder``, in float32, without a progress bar."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline, texts: list[str], scale: float, steps: int, seed: int, rescale: float = 0.0
) -> Tensor:
    """Samples [N, 3, H, W] in [0, 1]; each has its own seed, independent of the batch."""
    images = []
    for first in range(0, len(texts), 32):
        part = texts[first : first + 32]
        generators = [torch.Generator().manual_seed(seed + first + n) for n in range(len(part))]
        output = pipeline(
            part,
            guidance_scale=scale,
            guidance_rescale=rescale,
            num_inference_steps=steps,
            generator=generators,
            output_type="pt",
        )
        images.append(output.images)
    return torch.cat(images)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--judge", type=Path, default=ROOT / "logs" / "judge.pt")
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--guidance_rescale", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=25, help="steps of DDIM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, default=ROOT / "logs" / "tiny_sd.png")
    args = parser.parse_args()
    judge, entries = judging.load(args.judge), prompts()
    print("accuracy of the judge on new renders:", judging.accuracy(judge))
    texts = [text for text, *_ in entries]
    how = args.guidance_scale, args.steps, args.seed, args.guidance_rescale
    images = sample(load(args.model), texts, *how)
    write_png(args.grid, sheet(images[:256], columns=len(NAMES), side=64))
    report(judge(images), entries)


def report(verdict: judging.Verdict, entries) -> None:
    """Print the accuracy by kind of prompt, then the prompts whose sample was wrong."""
    objects, colors = verdict.objects.argmax(-1).tolist(), verdict.colors.argmax(-1).tolist()
    rows, wrong = collections.defaultdict(list), []
    for (text, name, color, kind), found_object, found_color in zip(
        entries, objects, colors, strict=True
    ):
        predicted = judging.OBJECTS[found_object], judging.COLORS[found_color]
        right = (predicted[0] == name, predicted[1] == color)
        for row in (*(("256 level views",) if "color" in kind else ()), kind):
            rows[row].append(right)
        if not all(right):
            wrong.append(f"{text}: {predicted[1]} {predicted[0]}")
    print("| prompts | number | object | color | both |\n|---|---|---|---|---|")
    for row, rights in rows.items():
        shares = torch.tensor(rights).float()
        cells = (*shares.mean(0).tolist(), shares.prod(1).mean().item())
        print(f"| {row} | {len(rights)} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |")
    print(*wrong, sep="\n")


if __name__ == "__main__":
    main()
