"""logs/<expname>/report.html: what a run gave, on one self-contained page.

    python -m nerf.report logs/demo          # make it again, also of an unfinished run

Everything comes from the files of the run folder (README); what is not there is left out.
"""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np

from nerf.outputs import html

MOST_VIEWS = 32  # shown, worst first
SIDE = 200  # pixels of a picture's longer side
PARTS = {"": "rendered", "target": "target", "error": "error x 4", "depth": "depth"}
FIGURES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS (VGG)",
    "depth_error": "depth error, mean, scene units",
    "depth_error_median": "depth error, median, scene units",
    "seconds_per_view": "seconds per view",
}
# Columns of metrics.csv in one diagram, and whether its axis is logarithmic.
DIAGRAMS = {
    "loss": (("loss",), True),
    "sds, not a measure of quality": (("sds",), True),
    "PSNR, dB": (("psnr", "val_psnr"), False),
    "learning rate": (("lr",), True),
    "gradient norm": (("grad_norm",), True),
    "rays per second": (("rays_per_second",), False),
    "samples per ray": (("samples_per_ray",), False),
    "opacity": (("opacity",), False),
    "memory, MB": (("memory_mb",), False),
}


class Run:
    """What the files of a run folder say. ValueError if it is none."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected a run, such as logs/demo")
        self.folder, self.name = folder, folder.resolve().name
        self.args = _json(folder / "args.json")
        if not self.args:
            raise ValueError(f"{folder}: is no run folder, it has no args.json; train there first")
        self.metrics = _json(folder / "metrics.json")
        # Flags that a measured run was rendered with may be others than those it was trained with.
        self.curves = _columns(folder / "metrics.csv") | _columns(folder / "val.csv")

    @property
    def views(self) -> list[tuple[int, dict]]:
        """Number and figures of the test views, worst PSNR first."""
        rows = enumerate(self.metrics.get("views", []))
        return sorted(rows, key=lambda row: row[1].get("psnr") or 0.0)

    @property
    def test_folder(self) -> Path:
        return self.folder / f"render_test_{self.metrics.get('step', 0):06d}"

    @property
    def path_folder(self) -> Path | None:
        """The newest rendered camera path."""
        found = [path for path in self.folder.glob("render_path_*") if path.is_dir()]
        numbered = [path for path in found if re.fullmatch(r"render_path_\d+", path.name)]
        return max(numbered, key=lambda path: int(path.name[12:]), default=None)

    @property
    def last_step(self) -> int | None:
        """Of the newest row of metrics."""
        return max((int(steps[-1]) for steps, _ in self.curves.values()), default=None)

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        return float(self.curves[name][1][-1]) if name in self.curves else None


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it or train again") from None
    return content if isinstance(content, dict) else {}


def _columns(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (steps, values) of a table with a column "step"; broken rows are left out."""
    columns: dict[str, list] = {}
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                numbers = {name: float(value) for name, value in row.items()}
                step = numbers.pop("step")
            except (KeyError, TypeError, ValueError):
                continue
            for name, value in numbers.items():
                columns.setdefault(name, []).append((step, value))
    return {name: tuple(np.array(rows).T) for name, rows in columns.items()}


def diagrams(runs: list[Run]) -> str:
    """Every diagram that the runs have curves for."""
    parts = []
    for title, (names, log) in DIAGRAMS.items():
        lines = {}
        for run in runs:
            for name in names:
                if name in run.curves:
                    said = name if len(runs) == 1 else run.name
                    said += f" {name}" if len(runs) > 1 and len(names) > 1 else ""
                    lines[said] = run.curves[name]
        parts.append(html.curves(title, lines, log))
    return "".join(parts)


def figures(run: Run) -> list[list]:
    """Name and value of what was measured and how long it took."""
    rows = [["text", run.args["prompt"]]] if "prompt" in run.args else []
    rows += [[said, run.metrics[key]] for key, said in FIGURES.items() if run.metrics.get(key)]
    if run.metrics.get("num_views"):
        width, height = run.metrics["resolution"]
        size = f"{run.metrics['num_views']} of {width}x{height}, {run.metrics['weights']} weights"
        rows.append([f"{run.metrics['split']} views", size])
    if "lpips" not in run.metrics and "psnr" in run.metrics:
        rows.append(["LPIPS", "left out: its package or weights are not installed"])
    step = run.metrics.get("step") or run.last_step
    rows.append(["updates", step])
    seconds = run.last("train_seconds") or run.metrics.get("train_seconds")
    if seconds:
        rows.append(["training", f"{seconds:.0f} s ({seconds / 60:.1f} min)"])
    rows += [
        [said, f"{run.last(name):.0f}"]
        for name, said in (("rays_per_second", "rays per second"), ("memory_mb", "peak memory, MB"))
        if run.last(name) is not None
    ]
    return rows


def views(run: Run) -> list[str]:
    """The test views beside target, error and depth, worst first."""
    rows = run.views
    if not rows:
        # text to 3D has none
        return [] if "prompt" in run.args else ["<p>No test views have been measured yet.</p>"]
    parts = [f"<h2>Test views, worst first (step {run.metrics.get('step')})</h2>"]
    unit = _json(run.test_folder / "depth" / "unit.json")
    if unit:
        said = "; ".join(str(unit.get(key)) for key in ("depth", "unit", "png"))
        parts.append(f'<p class="note">Depth: {html.text(said)}.</p>')
    for number, view in rows[:MOST_VIEWS]:
        said = [f"{key} {view[key]:.4g}" for key in FIGURES if view.get(key) is not None]
        parts.append(f"<p>{html.text(view.get('name'))}: {html.text(', '.join(said))}</p>")
        shown = [
            html.picture(run.test_folder / part / f"{number:03d}.png", SIDE, caption)
            for part, caption in PARTS.items()
        ]
        parts.append(f'<div class="row">{"".join(shown)}</div>')
    if len(rows) > MOST_VIEWS:
        parts.append(f'<p class="note">{len(rows) - MOST_VIEWS} better views are not shown.</p>')
    return parts


def pictures_and_videos(run: Run) -> list[str]:
    """The newest camera path's videos, the newest preview and validation strip."""
    parts = []
    if run.path_folder is not None:
        found = run.path_folder.glob("*.mp4")
        for path in sorted(found, key=lambda path: (path.stem != "rgb", path.name)):
            parts.append(html.video(path, f"{run.path_folder.name}/{path.name}"))
    if parts:
        parts.insert(0, "<h2>Camera path</h2>")
    strip = run.folder / "val_strip.png"
    if strip.is_file():
        parts.append("<h2>Newest validation</h2>")
        parts.append(html.picture(strip, 1100, "rendered, target, error x 4, depth, opacity"))
    previews = sorted((run.folder / "previews").glob("*.png"))
    if previews:
        parts.append("<h2>Newest preview</h2>")
        parts.append(html.picture(previews[-1], 1100, previews[-1].name))
    return parts


def write_report(folder: Path) -> Path:
    """Make report.html of a run folder, replaced as a whole; its path. ValueError: no run there."""
    run = Run(folder)
    parts = [html.table(["", ""], figures(run)), "<h2>Curves</h2>", diagrams([run])]
    parts += views(run) + pictures_and_videos(run)
    settings = [[name, value] for name, value in sorted(run.args.items()) if value is not None]
    parts.append("<h2>Settings</h2>")
    command = folder / "cmd.txt"
    if command.is_file():
        newest = command.read_text(encoding="utf-8", errors="replace").strip().split("\n\n# 20")[-1]
        parts.append(f"<pre>{html.text(newest[:4000])}</pre>")
    parts.append(f"<details><summary>all flags</summary>{html.table(['flag', ''], settings)}"
                 "</details>")  # fmt: skip
    return write_page(folder / "report.html", html.page(run.name, parts))


def write_page(path: Path, content: str) -> Path:
    """A page to a file, replaced as a whole. ValueError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}); name another place") from None
    return path


def try_report(folder: Path, log) -> None:
    """``write_report`` after a run: what goes wrong is said and costs nothing else."""
    try:
        log(f"report: {write_report(folder)}")
    except (ValueError, OSError, KeyError, TypeError) as error:
        log(f"there is no report.html: {error}")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    try:
        for folder in sys.argv[1:]:
            print(write_report(Path(folder)))
    except ValueError as error:
        print(f"nerf.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
