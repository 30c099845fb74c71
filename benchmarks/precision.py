"""Does half precision cost quality? PSNR per step of fp32 and bf16 over several seeds.

    python benchmarks/precision.py --seeds 0 2 3 --steps 600 --lrate 1e-3

Runs configs/demo_vanilla.txt with each seed and precision and compares validation PSNR by step.
"""

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def curve(seed: int, amp: str, steps: int, every: int, extra: list[str]) -> dict[int, float]:
    """Validation PSNR in dB of one run, by step."""
    folder = tempfile.mkdtemp(prefix="precision_")
    try:
        subprocess.run(
            [
                *(sys.executable, "run_nerf.py", "--config", "configs/demo_vanilla.txt"),
                *("--basedir", folder, "--expname", "run", "--seed", str(seed), "--amp", amp),
                *("--N_iters", str(steps), "--i_img", str(every), "--i_video", "0"),
                *("--testskip", "8", "--device", "cpu", *extra),
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        with open(Path(folder) / "run" / "val.csv", encoding="utf-8") as file:
            return {int(row["step"]): float(row["val_psnr"]) for row in csv.DictReader(file)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=250, help="steps between measurements")
    args, extra = parser.parse_known_args()  # further flags go to run_nerf.py
    differences: dict[int, list[float]] = {}
    for seed in args.seeds:
        full, half = (curve(seed, amp, args.steps, args.every, extra) for amp in ("off", "bf16"))
        for step in full:
            differences.setdefault(step, []).append(half[step] - full[step])
        rows = ", ".join(f"{step}: {full[step]:.2f} / {half[step]:.2f}" for step in full)
        print(f"seed {seed}, fp32 / bf16 dB at step  {rows}", flush=True)
    for step, values in differences.items():
        spread = f"{min(values):+.2f} to {max(values):+.2f}"
        print(f"step {step}: bf16 - fp32 = {statistics.mean(values):+.2f} dB ({spread})")


if __name__ == "__main__":
    main()
