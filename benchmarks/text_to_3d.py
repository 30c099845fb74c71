"""Does text to 3D make the object of the prompt? Runs, scored from views not used in training.

    python benchmarks/text_to_3d.py                       # 6 simple solids in 3 colors each
    python benchmarks/text_to_3d.py --set all --jobs 2    # 16 objects in 4 colors each
    python benchmarks/text_to_3d.py --prompts "a red cone" "a blue mug" --controls 0

Each prompt is one run of run_dreamfusion.py with the embedded model and seed 0. The object is then
rendered from 8 azimuths at elevations 20 and 60. It passes if
  (a) the color nearest to its mean color is the prompt's in 7 of 8 views, at both elevations;
  (b) its silhouettes overlap more with the exact object of the prompt than with any other (best of
      5 scales and 24 yaws) at both elevations, with an IoU of at least 0.80;
  (c) the judge (benchmarks/judge.py) ranks the prompt first of all 160.
Negative controls: runs with an untrained U-Net, and every object scored as every other prompt.
Runs that --out already holds are only scored again.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import clip as clip_score
from benchmarks import judge as judging
from guidance.tiny.pictures import COLOR_NAMES, COLORS, NAMES, article
from nerf import build
from nerf.flags import dreamfusion as dream_flags
from nerf.media import write_png
from nerf.outputs.object import render_cameras
from nerf.text3d.orbit import orbit_cameras
from nerf.training import checkpoint, checkpoint_choice
from nerf.training.ema import EMA

ROOT = Path(__file__).resolve().parents[1]

SIMPLE = ("sphere", "cube", "cylinder", "cone", "pyramid", "capsule")
ELEVATIONS = (20.0, 60.0)
AZIMUTHS = torch.arange(8) * 45.0 + 22.5  # between the azimuths of previews
SIZE, RADIUS, FOV = 64, 2.75, 41.0
IOU, VIEWS = 0.80, 7
GRAY = 0.45  # background of the judge's pictures: no prompt's color


class Score(NamedTuple):
    """Scores of one object for one prompt."""

    colored: list[int]  # views with the right color, per elevation
    iou: list[float]  # with its own object, per elevation
    best: list[str]  # the object of the largest overlap, per elevation
    rank: int  # of the prompt, 1 is first

    def passes(self, name: str) -> tuple[bool, bool, bool]:
        """Whether criteria (a), (b) and (c) of the module's docstring hold."""
        return (
            min(self.colored) >= VIEWS,
            min(self.iou) >= IOU and self.best == [name] * len(ELEVATIONS),
            self.rank == 1,
        )


class ObjectViews(NamedTuple):
    """Renders of one object: 8 views at each of E elevations."""

    albedo: torch.Tensor  # [E, 8, H, W, 3] over black
    opacity: torch.Tensor  # [E, 8, H, W]
    lit: torch.Tensor  # [E, 8, 3, H, W] over gray
    bare: torch.Tensor  # [E, 8, 3, H, W] textureless: white, lit from the camera, over gray


def prompt_sets() -> dict[str, list[tuple[str, str]]]:
    """(object, color) of every prompt of each set; the colors rotate, so that all are used."""
    simple = [
        (name, COLOR_NAMES[(3 * n + 4 * k) % 10]) for n, name in enumerate(SIMPLE) for k in range(3)
    ]
    every = [
        (name, COLOR_NAMES[(n + 3 * k) % 10]) for k in range(4) for n, name in enumerate(NAMES)
    ]
    return {"simple": simple, "all": every}


def parse_prompt(text: str) -> tuple[str, str]:
    """(object, color) named in a prompt; exits if either is missing."""
    words = text.split()
    name = next((word for word in words if word in NAMES), None)
    color = next((word for word in words if word in COLOR_NAMES), None)
    if name is None or color is None:
        raise SystemExit(f"{text!r}: expected one of {', '.join(NAMES)} in one of the known colors")
    return name, color


def make(args, name: str, color: str, model: str, folder: Path) -> Path:
    """Run run_dreamfusion.py for one prompt unless its results exist; its run folder."""
    prompt = article(f"{color} {name}")
    run = folder / dream_flags.slug(prompt)
    if (run / "metrics.json").exists():
        return run
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    command = [sys.executable, "run_dreamfusion.py", "--config", args.config, "--prompt", prompt]
    command += ["--basedir", str(folder), "--sd_model", model, "--no-mesh", "--video_frames", "4"]
    command += ["--device", args.device, *args.flags]
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return run


@torch.no_grad()
def render_views(run: Path) -> ObjectViews:
    """Render a finished run's object with averaged weights from the views that are scored."""
    path, state = checkpoint_choice.newest_checkpoint(run, print)
    args = dream_flags.parse(["--basedir", str(run.parent), "--expname", run.name])
    vars(args).update(state["args"])
    renderer = build.object_renderer(args)
    ema = EMA(renderer, args.ema_decay)
    checkpoint.restore(path, state, print, renderer, ema=ema)
    ema.keep()
    albedo, opacity, lit, bare = [], [], [], []
    for elevation in ELEVATIONS:
        one = torch.ones(len(AZIMUTHS))
        cameras = orbit_cameras(AZIMUTHS, elevation * one, RADIUS * one, FOV * one)
        plain = render_cameras(renderer, cameras, SIZE, "black")
        shaded = render_cameras(renderer, cameras, SIZE, "black", lit=True)
        albedo.append(torch.stack([picture.rgb for picture in plain]))
        opacity.append(torch.stack([picture.opacity for picture in plain]))
        behind = GRAY * (1 - opacity[-1][..., None])
        lit.append((torch.stack([p.rgb for p in shaded]) + behind).permute(0, 3, 1, 2))
        normal = torch.stack([p.normal for p in shaded])  # times opacity
        facing = torch.einsum("vhwc,vc->vhw", normal, cameras.c2w[:, :, 2]).clamp(min=0)
        white = (0.3 * opacity[-1] + 0.7 * facing)[..., None] + behind
        bare.append(white.expand(-1, -1, -1, 3).permute(0, 3, 1, 2))
    return ObjectViews(*map(torch.stack, (albedo, opacity, lit, bare)))


def colored_views(views: ObjectViews, color: str) -> list[int]:
    """Per elevation, the number of views whose mean albedo is nearest to ``color``."""
    mask, colored = views.opacity > 0.5, []
    named = torch.tensor(list(COLORS.values()))
    for albedo, opacity, solid in zip(views.albedo, views.opacity, mask, strict=True):
        count = solid.sum((1, 2)).clamp(min=1)[:, None]
        own = albedo / opacity.clamp(min=1e-3)[..., None]
        mean = (own * solid[..., None]).sum((1, 2)) / count
        nearest = torch.cdist(mean, named).argmin(-1)
        right = (nearest == COLOR_NAMES.index(color)) & solid.any(2).any(1)
        colored.append(int(right.sum()))
    return colored


@torch.no_grad()
def score(views: ObjectViews, name: str, color: str, judge, exact) -> Score:
    """Score the views as those of a ``color`` ``name``."""
    mask, colored = views.opacity > 0.5, colored_views(views, color)
    overlaps = [judging.overlap(one, outlines) for one, outlines in zip(mask, exact, strict=True)]
    verdict = judge(views.lit.flatten(0, 1).clamp(0, 1))
    # Rank among all objects in all colors; a probability of "none" above 0.5 costs one rank.
    chance = (verdict.objects[:, :-1, None] * verdict.colors[:, None]).mean(0)  # [objects, colors]
    own = chance[NAMES.index(name), COLOR_NAMES.index(color)]
    none = verdict.objects[:, -1].mean()
    rank = 1 + int((chance > own).sum()) + int(none > 0.5)
    return Score(colored, [o[name] for o in overlaps], [max(o, key=o.get) for o in overlaps], rank)


@torch.no_grad()
def r_precision(views: ObjectViews, name: str, color: str, judge) -> tuple[float, float]:
    """Shares of the views that the judge classifies as the prompt: colored, and textureless.

    Colored views must match in object and color, textureless ones in object; class "none" is left
    out (DreamFusion's R-precision, section 4, and its "Geo").
    """
    lit, bare = (judge(each.flatten(0, 1).clamp(0, 1)) for each in (views.lit, views.bare))
    colored = lit.objects[:, :-1].argmax(-1) == NAMES.index(name)
    colored &= lit.colors.argmax(-1) == COLOR_NAMES.index(color)
    shaped = bare.objects[:, :-1].argmax(-1) == NAMES.index(name)
    return colored.float().mean().item(), shaped.float().mean().item()


def contact_sheet(rows: list[tuple[str, ObjectViews, bool]], path: Path) -> None:
    """Write a sheet with four level views and two from above per prompt; failures are red."""
    from PIL import Image, ImageDraw

    strips = []
    for text, views, passed in rows:
        shown = [*views.lit[0, ::2], *views.lit[1, ::4]]
        picture = torch.cat([view.permute(1, 2, 0) for view in shown], 1).clamp(0, 1).numpy()
        label = Image.new("RGB", (150, SIZE), (255, 255, 255) if passed else (255, 200, 200))
        ImageDraw.Draw(label).text((4, SIZE // 2 - 6), text, fill=(0, 0, 0))
        strips.append(np.concatenate([np.asarray(label) / 255.0, picture], axis=1))
    half = -(-len(strips) // 2)
    blank = np.ones_like(strips[0])
    pairs = [
        np.concatenate([left, strips[half + n] if half + n < len(strips) else blank], axis=1)
        for n, left in enumerate(strips[:half])
    ]
    write_png(path, np.concatenate(pairs, axis=0))


def costs(run: Path) -> tuple[float, float]:
    """Training seconds and peak memory in MB."""
    with open(run / "metrics.csv", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["train_seconds"]), float(last["memory_mb"])


def untrained_model(model: Path, out: Path) -> str:
    """Write a copy of the embedded model with an untrained U-Net; its folder."""
    import shutil

    from diffusers import UNet2DConditionModel

    if not out.exists():
        shutil.copytree(model, out)
        torch.manual_seed(0)
        config = UNet2DConditionModel.load_config(model, subfolder="unet")
        UNet2DConditionModel.from_config(config).save_pretrained(out / "unet")
    return str(out)


def report(prompts, runs: list[Path], judge, exact, sheet: Path, clip=None) -> None:
    """Score every run; print the table and the totals, and write the contact sheet."""
    passed, crosses, rows, precise = [], [], [], []
    print("| prompt | color 20 / 60 | IoU 20 / 60 | best overlap | rank | a b c | s | MB |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, color), run in zip(prompts, runs, strict=True):
        views = render_views(run)
        own = score(views, name, color, judge, exact)
        marks = own.passes(name)
        passed.append(all(marks))
        for other, other_color in dict.fromkeys(prompts):
            if other != name:
                crosses.append(all(score_as(views, own, other, other_color, judge, exact)))
        rows.append((article(f"{color} {name}"), views, all(marks)))
        precise.append(r_precision(views, name, color, judge))
        seconds, memory = costs(run)
        print(
            f"| {rows[-1][0]} | {own.colored[0]} / {own.colored[1]} | {own.iou[0]:.2f} / "
            f"{own.iou[1]:.2f} | {', '.join(dict.fromkeys(own.best))} | {own.rank} | "
            f"{' '.join('x' if mark else '-' for mark in marks)} | {seconds:.0f} | {memory:.0f} |",
            flush=True,
        )
    contact_sheet(rows, sheet)
    print(f"\npassed: {sum(passed)} of {len(passed)} ({sum(passed) / len(passed):.0%})")
    if crosses:
        print(f"control: scored as another prompt, {sum(crosses)} of {len(crosses)} pass")
    colored, shaped = torch.tensor(precise).mean(0).tolist()
    print(f"the judge's R-precision over all views: color {colored:.1%}, textureless {shaped:.1%}")
    if clip is not None:
        texts = [text for text, *_ in rows]
        for kind in ("lit", "bare"):
            pictures = [getattr(views, kind).flatten(0, 1).clamp(0, 1) for _, views, _ in rows]
            share = clip_score.r_precision(clip, pictures, texts)
            print(f"CLIP R-precision, {'color' if kind == 'lit' else 'textureless'}: {share:.1%}")
    print(f"contact sheet: {sheet}")


def score_as(
    views: ObjectViews, own: Score, name: str, color: str, judge, exact
) -> tuple[bool, ...]:
    """(a), (b), (c) for another prompt; only (False,) if (b) fails by the known overlaps."""
    if own.best != [name] * len(ELEVATIONS):
        return (False,)
    return score(views, name, color, judge, exact).passes(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("simple", "all"), default="simple")
    parser.add_argument("--prompts", nargs="+", help="prompts to run instead of a set")
    parser.add_argument("--config", default="configs/dream_tiny.txt")
    parser.add_argument("--model", type=Path, default=ROOT / "guidance" / "tiny" / "model")
    parser.add_argument("--judge", type=Path, default=ROOT / "logs" / "judge.pt")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "text_to_3d")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs; they share the cores")
    parser.add_argument("--controls", type=int, default=2, help="runs with an untrained U-Net")
    parser.add_argument(
        "--clip", type=Path, help="folder of a CLIP model, to measure its R-precision"
    )
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="flags for run_dreamfusion.py"
    )
    args = parser.parse_args()
    prompts = prompt_sets()[args.set]
    if args.prompts:
        prompts = [parse_prompt(text) for text in args.prompts]
    args.out.mkdir(parents=True, exist_ok=True)
    clip = clip_score.Clip(args.clip) if args.clip else None
    judge = judging.load(args.judge)
    exact = [judging.outlines(AZIMUTHS, e, RADIUS, FOV, SIZE) for e in ELEVATIONS]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda p: make(args, *p, str(args.model), args.out), prompts))
    report(prompts, runs, judge, exact, args.out / "sheet.png", clip)
    if args.controls:
        with tempfile.TemporaryDirectory() as folder:
            model = untrained_model(args.model, Path(folder) / "untrained")
            some = prompts[: args.controls]
            controls = args.out / "untrained"
            runs = [make(args, *p, model, controls) for p in some]
        print("\nwith an untrained U-Net:")
        report(some, runs, judge, exact, controls / "sheet.png")


if __name__ == "__main__":
    main()
