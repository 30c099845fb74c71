"""What each implementation detail is worth: one flag changed at a time, all else equal.

    python benchmarks/ablations.py                          # every table, three seeds of each base
    python benchmarks/ablations.py --tables fast --seeds 0 1 2 --rows "no hull"
    python benchmarks/ablations.py --tables vanilla --scene lego --data path/to/lego

Tables: ``vanilla`` and ``fast`` train run_nerf.py for a short time on the demo scene (or the real
Lego at 100x100) and measure the PSNR of test views; ``dream`` trains run_dreamfusion.py on one
prompt and measures the overlap (IoU) with the exact object from held-out views, at elevations 20
and 60. Every row runs with each of --seeds. The base always runs with seeds 0, 1 and 2: a
difference within their spread means nothing. Results that --out already holds are read, not
measured again, so the script can be stopped at any time. ``--write docs/details.md`` writes the
results in --out into that page.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BASE_SEEDS = (0, 1, 2)
QUIET = "--i_img 0 --i_video 0 --ckpt_secs 0 --i_weights 0 --no_reload --device cpu"
NERF = {
    # Without density noise seeds 1 to 5 started dead (600 steps at 4e-3).
    "vanilla": "--config configs/demo_vanilla.txt --N_iters 400 --lrate 2e-3 --raw_noise_std 1 "
    "--testskip 5 --i_testset 0",
    "fast": "--config configs/demo.txt --N_iters 400 --testskip 5 --i_testset 0",
}
LEGO = "--dataset_type blender --no-half_res --downscale 8"
DREAM = "--config configs/dream_tiny.txt --no-mesh --video_frames 1"
# name of a row: the flags that it adds to the base
ROWS = {
    "vanilla": {
        "rays through pixel corners": "--no-pixel_center",
        "no view directions": "--no-use_viewdirs",
        "no density noise": "--raw_noise_std 0",
        "no jitter of samples": "--perturb 0",
        "no fine samples, 48 coarse": "--N_samples 48 --N_importance 0",
        "8 + 40 samples": "--N_samples 8 --N_importance 40",
        "even in 1 / depth": "--lindisp",
        "one picture a step": "--no_batching",
        "one picture, central crop for 100 steps": "--no_batching --precrop_iters 100",
        "no encoding of positions": "--i_embed -1",
        "10 frequencies": "--multires 10",
        "4 frequencies": "--multires 4",
        "black background kept as it is": "--no-white_bkgd",
        "no averaged weights": "--ema_decay 0",
        "no warm-up": "--lrate_warmup 0",
        "learning rate 5e-4, nerf-pytorch's": "--lrate 5e-4 --lrate_decay 250",
        "float32": "--amp off",
    },
    "fast": {
        "rays through pixel corners": "--no-pixel_center",
        "no view directions": "--no-use_viewdirs",
        "positional-encoding MLP": "--field mlp --lrate 8e-3",
        "no hull": "--hull_init off",
        "white background only": "--no-random_bg",
        "smooth planes (0.03)": "--lambda_tv 0.03",
        "exponential decay (2)": "--lr_schedule exp --lrate_decay 2",
        "no warm-up": "--lrate_warmup 0",
        "half the steps along a ray": "--march_steps 64",
        "rays never end early": "--early_stop 0",
        "32 samples a ray, importance resampled": "--resample 32",
        "float32": "--amp off",
    },
    "dream": {
        "coarse view words": "",  # filled in by dream_flags
        "no view words": "--view_text none",
        "colors grow with the scale": "--guidance_rescale 0",
        "guidance scale 1": "--guidance_scale 1",
        "guidance scale 30": "--guidance_scale 30",
        "guidance scale 100": "--guidance_scale 100",
        "t up to 0.98 throughout": "--t_max 0.98",
        "uniform weighting": "--weighting uniform",
        "white background only": "--background white",
        "never shaded": "--albedo_steps 600",
        "shaded from the start": "--albedo_steps 0",
        "no density blob": "--blob_scale 0",
        "no entropy loss": "--lambda_entropy 0",
        "no orientation loss": "--lambda_orient 0",
        "no opacity loss": "--lambda_opacity 0",
        "no smooth planes": "--lambda_tv 0",
        "positional-encoding MLP": "--field mlp",
    },
}


def run(script: str, flags: list[str], threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def scene_flags(args) -> list[str]:
    if args.scene == "demo":
        return []
    return [*LEGO.split(), "--datadir", str(args.data.resolve())]


def nerf_row(args, table: str, flags: str, seed: int, folder: Path) -> dict:
    """Train once; mean PSNR and SSIM over the test views."""
    common = [*NERF[table].split(), *QUIET.split(), *scene_flags(args), *flags.split()]
    place = ["--basedir", str(folder.parent), "--expname", folder.name, "--seed", str(seed)]
    run("run_nerf.py", [*common, *place], args.threads)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {"psnr": metrics["psnr"], "ssim": metrics["ssim"]}


def dream_flags(row: str, prompt: str) -> list[str]:
    """The flags of one row; "coarse view words" sets the prompts of the five views in full."""
    if row != "coarse view words":
        return ROWS["dream"].get(row, "").split()
    words = {"front": "front", "left": "left side", "right": "right side", "back": "back"}
    words["overhead"] = "overhead"
    pairs = [(f"--prompt_{view}", f"{prompt}, {word} view") for view, word in words.items()]
    return [part for pair in pairs for part in pair]


def dream_row(args, row: str, seed: int, folder: Path, exact) -> dict:
    """Train once on --prompt; IoU with its exact object at elevations 20 and 60, fog, color."""
    import torch

    from benchmarks import judge, text_to_3d

    place = ["--basedir", str(folder.parent), "--expname", folder.name, "--seed", str(seed)]
    flags = [*DREAM.split(), "--prompt", args.prompt, *dream_flags(row, args.prompt), *place]
    run("run_dreamfusion.py", flags, args.threads)
    views, (name, color) = text_to_3d.render_views(folder), text_to_3d.parse_prompt(args.prompt)
    masks = views.opacity > 0.5
    overlaps = [judge.overlap(mask, each) for mask, each in zip(masks, exact, strict=True)]
    foggy = (views.opacity > 0.1) & (views.opacity < 0.9)
    share = foggy.sum() / (views.opacity > 0.1).sum().clamp(min=1)
    best = [max(overlap, key=overlap.get) for overlap in overlaps]
    colored = text_to_3d.colored_views(views, color)
    torch.set_num_threads(args.threads)
    return {
        "iou20": overlaps[0][name], "iou60": overlaps[1][name], "best": best,
        "fog": share.item(), "colored": colored,
    }  # fmt: skip


def run_folder(args, table: str, row: str, seed: int) -> Path:
    """Folder of one run; its results are in a .json file of the same name beside it."""
    name = f"{table}_{args.scene if table != 'dream' else args.prompt}_{row or 'base'}_{seed}"
    return args.out / "".join(letter if letter.isalnum() else "_" for letter in name)


def measure(args, table: str, row: str, seed: int, exact) -> dict:
    """The results of one run, read from --out where they exist."""
    folder = run_folder(args, table, row, seed)
    result_file = folder.with_suffix(".json")
    if not result_file.exists():
        if table == "dream":
            results = dream_row(args, row, seed, folder, exact)
        else:
            results = nerf_row(args, table, ROWS[table].get(row, ""), seed, folder)
        result_file.write_text(json.dumps(results) + "\n", encoding="utf-8")
    return json.loads(result_file.read_text(encoding="utf-8"))


def mean_and_range(values: list[float], digits: int) -> str:
    """Mean, followed by the range if there is more than one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_table(args, table: str, exact) -> None:
    """Print one line per row: its results and the difference from the base with the same seeds."""
    rows = {"": BASE_SEEDS} | {row: args.seeds for row in ROWS[table]}
    keys, digits = (("iou20", "iou60", "fog"), 3) if table == "dream" else (("psnr", "ssim"), 2)
    print(f"\n| {table} | seeds | {' | '.join(keys)} | difference |", flush=True)
    print("|---|" + "---|" * (len(keys) + 2))
    base: dict[int, dict] = {}
    for row, seeds in rows.items():
        if row and args.rows and row not in args.rows:
            continue
        found = {seed: measure(args, table, row, seed, exact) for seed in seeds}
        base = base or found
        differences = [found[s][keys[0]] - base[s][keys[0]] for s in seeds if s in base]
        difference = f"{statistics.fmean(differences):+.{digits}f}" if row and differences else ""
        cells = [mean_and_range([f[key] for f in found.values()], digits) for key in keys]
        note = f" best: {', '.join(found[seeds[0]]['best'])}" if table == "dream" else ""
        print(
            f"| {row or 'base'} | {len(seeds)} | {' | '.join(cells)} | {difference}{note} |",
            flush=True,
        )


def saved_results(args, table: str, row: str, seeds) -> list[dict]:
    """The results in --out for these seeds; nothing is run."""
    files = (run_folder(args, table, row, seed).with_suffix(".json") for seed in seeds)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def fill(text: str, args) -> str:
    """Markdown with each "[table: row: ...]" filled from --out; without results it is unchanged.

    "[table, Lego: row: ...]" stands for the runs on the real Lego.
    """
    scenes = {"": "demo", ", Lego": "lego"}

    def value(match: re.Match) -> str:
        table, where, row, _ = match.groups()
        own = argparse.Namespace(**(vars(args) | {"scene": scenes[where]}))
        if row != "base" and row not in ROWS[table]:
            raise SystemExit(f"[{table}: {row}]: no such row; expected some of {list(ROWS[table])}")
        keys, digits = (("iou20", "iou60"), 2) if table == "dream" else (("psnr",), 2)
        if row == "base":
            runs = saved_results(own, table, "", BASE_SEEDS)
            cells = (
                [mean_and_range([run[key] for run in runs], digits) for key in keys] if runs else []
            )
        else:
            base, runs = (saved_results(own, table, r, args.seeds) for r in ("", row))
            both = list(zip(runs, base, strict=True)) if len(runs) == len(base) else []
            cells = [
                f"{statistics.fmean(run[key] - start[key] for run, start in both):+.{digits}f}"
                for key in keys
                if both
            ]
        return f"[{table}{where}: {row}: {' / '.join(cells) or match[4]}]"

    return re.sub(r"\[(vanilla|fast|dream)(|, Lego): ([^\]:]+): ([^\]]*)\]", value, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--rows", nargs="+", help="names of rows to run beside the base; default: all"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of every row but the base"
    )
    parser.add_argument("--scene", choices=("demo", "lego"), default="demo")
    parser.add_argument("--data", type=Path, help="folder of the Lego scene")
    parser.add_argument("--prompt", default="a yellow pyramid")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "ablations")
    parser.add_argument("--write", type=Path, help="fill this file from --out without running")
    args = parser.parse_args()
    if args.write:
        text = fill(args.write.read_text(encoding="utf-8"), args)
        args.write.write_text(text, encoding="utf-8")
        return
    if args.scene == "lego" and not args.data:
        parser.error("--scene lego: expected --data, the folder of the Lego scene")
    known = {row for table in args.tables for row in ROWS[table]}
    if unknown := set(args.rows or ()) - known:
        parser.error(f"--rows {', '.join(sorted(unknown))}: expected some of {sorted(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    exact = None
    if "dream" in args.tables:
        from benchmarks import judge
        from benchmarks import text_to_3d as scoring

        views = (scoring.RADIUS, scoring.FOV, scoring.SIZE)
        exact = [judge.outlines(scoring.AZIMUTHS, e, *views) for e in scoring.ELEVATIONS]
    for table in args.tables:
        print_table(args, table, exact)


if __name__ == "__main__":
    main()
