"""SDS, CSD, VSD and Perp-Neg compared: the same prompts, scored as in ``text_to_3d.py``.

    python benchmarks/compare_guidance.py --prompts "a red cone" "a blue mug" --judge logs/judge.pt

Runs go one after the other, so that their times are comparable. An object counts as having two
fronts (the Janus problem) if its silhouettes overlap more with the union of the object and itself
turned by 180 degrees than with the object.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks import judge as judging
from benchmarks import text_to_3d as scoring
from guidance.tiny.shapes import SHAPES

KINDS = {
    "sds": [],
    "csd": ["--guidance", "csd"],
    "vsd": ["--guidance", "vsd", "--lrate_lora", "1e-3", "--lora_views", "2"],
    "perp-neg": ["--perp_neg"],
}
ASYMMETRIC = ("house", "chair", "mug")


def doubled(exact: list[judging.Outlines]) -> list[judging.Outlines]:
    """Per elevation, masks of the union of every object and itself turned by 180 degrees."""
    half = exact[0].masks.shape[2] // 2  # [objects, scales, yaws, V, H, W]
    return [
        judging.Outlines(each.names, each.masks | each.masks.roll(half, dims=2)) for each in exact
    ]


def has_doubled_front(views, name: str, exact, twice) -> bool:
    """Whether the object has two fronts, judged at elevation 20, where fronts are visible."""
    mask = views.opacity[0] > 0.5
    return judging.overlap(mask, twice[0])[name] > judging.overlap(mask, exact[0])[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=["a red cone", "a yellow cylinder"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--config", default="configs/dream_tiny.txt")
    parser.add_argument("--model", type=Path, default=scoring.ROOT / "guidance/tiny/model")
    parser.add_argument("--judge", type=Path, default=scoring.ROOT / "logs" / "judge.pt")
    parser.add_argument("--out", type=Path, default=scoring.ROOT / "logs" / "guidance")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="flags for run_dreamfusion.py"
    )
    args = parser.parse_args()
    args.jobs, extra = 1, args.flags
    prompts = [scoring.parse_prompt(text) for text in args.prompts]
    judge = judging.load(args.judge)
    cameras = (scoring.AZIMUTHS, scoring.RADIUS, scoring.FOV, scoring.SIZE)
    exact = [judging.outlines(cameras[0], e, *cameras[1:]) for e in scoring.ELEVATIONS]
    twice, rows, seconds = doubled(exact), [], {kind: [] for kind in args.kinds}
    print("| guidance | prompt | IoU 20 / 60 | rank | a b c | R lit / bare | doubled | s | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, color in prompts:
        for kind in args.kinds:
            args.flags = [*KINDS[kind], *extra]
            run = scoring.make(args, name, color, str(args.model), args.out / kind)
            views = scoring.render_views(run)
            own = scoring.score(views, name, color, judge, exact)
            marks, (spent, memory) = own.passes(name), scoring.costs(run)
            seconds[kind].append(spent)
            lit, bare = scoring.r_precision(views, name, color, judge)
            front = "-"
            if SHAPES[name].second is not None and name in ASYMMETRIC:
                front = "yes" if has_doubled_front(views, name, exact, twice) else "no"
            rows.append((f"{kind}: {color} {name}", views, all(marks)))
            print(
                f"| {kind} | {color} {name} | {own.iou[0]:.2f} / {own.iou[1]:.2f} | {own.rank} | "
                f"{' '.join('x' if mark else '-' for mark in marks)} | {lit:.2f} / {bare:.2f} | "
                f"{front} | {spent:.0f} | {memory:.0f} |",
                flush=True,
            )
    scoring.contact_sheet(rows, args.out / "sheet.png")
    base = statistics.median(seconds[args.kinds[0]])
    for kind, spent in seconds.items():
        print(
            f"{kind}: {statistics.median(spent) / base:.2f} times {args.kinds[0]}'s training time"
        )
    print(f"contact sheet: {args.out / 'sheet.png'}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
