"""logs/<expname>/report.html: metrics, curves and pictures of a run on one self-contained page.

    python -m nerf.report logs/demo          # write it again, also for an unfinished run

Everything is read from the files of the run folder (docs/outputs.md); missing files are left out.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nerf.outputs import html
from nerf.training import last_net, logged
from nerf.training.arguments import ArgumentParser
from nerf.training.checkpoint_choice import BEST, describe_best
from nerf.training.files import replace_file, why_not_written
from nerf.training.plain_text import one_line

MAX_VIEWS = 32  # shown, worst first
SIDE = 200  # pixels of a picture's longer side
MAX_NOTES = 60  # lines of the log that are shown
MOST = 1e15  # what no measurement is above
LOGGED = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)"  # a line of log.txt: time and message
ROUTINE = (
    r"step \d+/\d+ |step \d+: validation |best so far: |(test view|val view|frame) \d+/|"
    r"test: PSNR|report: |video: |next: |mesh: |\d+ updates will take "
)
# Folders of a test view's pictures inside render_test_STEP/, and their captions.
PICTURES = {"": "rendered", "target": "target", "error": "error x 4", "depth": "depth"}
MEASUREMENTS = {  # keys of metrics.json and their labels
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS (VGG)",
    "depth_error": "depth error, mean, units of the data's files",
    "depth_error_median": "depth error, median, units of the data's files",
    "seconds_per_view": "seconds per view",
}
# For each diagram its columns in the tables of a run, and whether its y axis is logarithmic.
DIAGRAMS = {
    "loss": (("loss",), True),
    "sds, not a measure of quality": (("sds",), True),
    "PSNR, dB": (("psnr", "val_psnr", "test_psnr"), False),
    "learning rate": (("lr", "lr_grid", "lr_lora"), True),
    "gradient norm": (("grad_norm",), True),
    "rays per second": (("rays_per_second",), False),
    "samples per ray": (("samples_per_ray",), False),
    "opacity": (("opacity",), False),
    "memory, MB": (("memory_mb",), False),
}


class Run:
    """Flags, metrics and curves, read from a run folder. ValueError if the folder holds no run."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected a run, such as logs/demo")
        self.folder, self.name = folder, folder.resolve().name
        self.args = _json(folder / "args.json")
        if not self.args:
            raise ValueError(
                f"{folder} is no run folder: it has no args.json; name one, such as logs/demo"
            )
        self.metrics, self.left_out = known_metrics(_json(folder / "metrics.json"))
        tables = ("metrics.csv", "val.csv", "test.csv")
        self.curves = {k: v for name in tables for k, v in _columns(folder / name).items()}

    @property
    def views(self) -> list[tuple[int, dict[str, Any]]]:
        """Number and measurements of the test views, worst PSNR first."""
        return sorted(self.metrics.get("views", []), key=lambda row: row[1].get("psnr") or 0.0)

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
        """Step of the newest row of any table; None if there is none."""
        return max((int(steps[-1]) for steps, _ in self.curves.values()), default=None)

    def last(self, name: str) -> float | None:
        """The last value of a curve; None if there is none."""
        return float(self.curves[name][1][-1]) if name in self.curves else None


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none. ValueError if it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content)  # recursion: what is nested too deep to be written is to be shown
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it or train again") from None
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> float | None:
    """``value`` if it is a number that can be shown and compared, else None."""
    is_number = type(value) in (int, float) and -MOST < value < MOST  # NaN is not
    return value if is_number else None


def known_metrics(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """metrics.json without entries of another kind than runs write, and the names of those.

    "views" becomes a list of (number, measurements), the same for each view.
    """
    kept: dict[str, Any] = {}
    for name in (*MEASUREMENTS, "train_seconds"):
        kept[name] = _number(content.get(name))
    for name in ("step", "num_views"):
        kept[name] = content.get(name) if type(content.get(name)) is int else None
        if kept[name] is not None and not 0 <= kept[name] < MOST:
            kept[name] = None
    for name in ("weights", "split", "prompt"):
        kept[name] = content.get(name) if isinstance(content.get(name), str) else None
    size = content.get("resolution")
    is_size = (
        isinstance(size, list) and len(size) == 2 and all(_number(n) is not None for n in size)
    )
    kept["resolution"] = size if is_size else None
    views = content.get("views")
    left_out = [f"metrics.json: {name}" for name in kept if content.get(name) is not kept[name]]
    kept["views"] = []
    for number, view in enumerate(views if isinstance(views, list) else []):
        if isinstance(view, dict):
            known = {name: _number(view.get(name)) for name in MEASUREMENTS}
            title = view.get("name")
            own = known | {"name": title if isinstance(title, str) else None}
            kept["views"].append((number, own))
            wrong = [name for name in known if view.get(name) is not known[name]]
        else:
            wrong = ["all"]
        left_out += [f"metrics.json: {name} of view {number}" for name in wrong]
    if views is not None and not isinstance(views, list):
        left_out.append("metrics.json: views")
    return {name: value for name, value in kept.items() if value is not None}, left_out


def _columns(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (steps, values) of a CSV file with a column "step"; broken rows are left out."""
    columns: dict[str, list[tuple[int, float]]] = {}
    if not path.is_file():
        return {}
    rows = path.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff").split("\n")
    header = rows[0].rstrip("\r").split(",")
    for row in rows[1:]:
        cells = row.rstrip("\r").split(",")
        if logged.header_problem(header) or logged.row_problem(row.rstrip("\r"), header):
            continue
        for name, cell in zip(header[1:], cells[1:], strict=False):
            if cell:  # "": no value
                columns.setdefault(name, []).append((int(cells[0]), float(cell)))
    arrays = {name: np.array(points, dtype=float).T for name, points in columns.items()}
    return {name: (steps, values) for name, (steps, values) in arrays.items()}


def diagrams(runs: list[Run]) -> str:
    """HTML of all diagrams for which the runs have curves."""
    parts = []
    for title, (names, log) in DIAGRAMS.items():
        lines = {}
        for run in runs:
            for name in names:
                if name in run.curves:
                    label = name if len(runs) == 1 else run.name
                    label += f" {name}" if len(runs) > 1 and len(names) > 1 else ""
                    lines[label] = run.curves[name]
        parts.append(html.curves(title, lines, log))
    return "".join(parts)


def measurements(run: Run) -> list[list[Any]]:
    """Rows of label and value: quality, number of updates, time and memory."""
    rows: list[list[Any]] = []
    if "prompt" in run.args:  # the prompt that the object shown was made for: a viewer may set it
        rows.append(["text", run.metrics.get("prompt") or run.args["prompt"]])
        rows.append(["seed", run.args.get("seed")])
    rows += [
        [label, run.metrics[key]] for key, label in MEASUREMENTS.items() if run.metrics.get(key)
    ]
    if {"num_views", "resolution", "weights", "split"} <= run.metrics.keys():
        width, height = run.metrics["resolution"]
        size = f"{run.metrics['num_views']} of {width}x{height}, {run.metrics['weights']} weights"
        rows.append([f"{run.metrics['split']} views", size])
    if best := describe_best(_json(run.folder / BEST)):
        rows.append(["best checkpoint", best])
    if run.left_out:
        rows.append(["left out, not what a run writes", ", ".join(run.left_out[:MAX_NOTES])])
    if "lpips" not in run.metrics and "psnr" in run.metrics:
        rows.append(["LPIPS", "left out: its package or weights are not installed"])
    step = run.metrics.get("step") or run.last_step
    rows.append(["updates", step])
    seconds = run.last("train_seconds") or run.metrics.get("train_seconds")
    if seconds:
        rows.append(["training", f"{seconds:.0f} s ({seconds / 60:.1f} min)"])
    rows += [
        [label, f"{value:.0f}"]
        for name, label in (
            ("rays_per_second", "rays per second"),
            ("memory_mb", "peak memory, MB"),
        )
        if (value := run.last(name)) is not None
    ]
    return rows


def notes(folder: Path) -> str:
    """HTML of what the run logged besides its progress: views left out, warnings, changed flags."""
    path = folder / "log.txt"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [match for line in lines if (match := re.match(LOGGED, line))]
    kept = {match[2]: match[1] for match in reversed(found) if not re.match(ROUTINE, match[2])}
    if not kept:
        return ""
    rows = [f"{time}: {text[:1000]}" for text, time in reversed(kept.items())]
    items = "".join(f"<li>{html.text(row)}</li>" for row in rows[-MAX_NOTES:])
    return f"<h2>Log, without progress</h2><ul>{items}</ul>"


def views(run: Run) -> list[str]:
    """HTML of the test views with target, error and depth, worst PSNR first."""
    rows = run.views
    if not rows:
        # text-to-3D runs have a prompt and no test views
        return [] if "prompt" in run.args else ["<p>No test views have been measured yet.</p>"]
    parts = [f"<h2>Test views, worst first (step {run.metrics.get('step')})</h2>"]
    unit = _json(run.test_folder / "depth" / "unit.json")
    if unit:
        note = "; ".join(str(unit.get(key)) for key in ("depth", "unit", "png"))
        parts.append(f'<p class="note">Depth: {html.text(note)}.</p>')
    for number, view in rows[:MAX_VIEWS]:
        values = [f"{key} {view[key]:.4g}" for key in MEASUREMENTS if view.get(key) is not None]
        parts.append(f"<p>{html.text(view.get('name'))}: {html.text(', '.join(values))}</p>")
        pictures = [
            html.picture(run.test_folder / part / f"{number:03d}.png", SIDE, caption)
            for part, caption in PICTURES.items()
        ]
        parts.append(f'<div class="row">{"".join(pictures)}</div>')
    if len(rows) > MAX_VIEWS:
        parts.append(f'<p class="note">{len(rows) - MAX_VIEWS} better views are not shown.</p>')
    return parts


def pictures_and_videos(run: Run) -> list[str]:
    """HTML of the newest camera path's videos, validation strip and preview."""
    parts: list[str] = []
    if run.path_folder is not None:
        found = [*run.path_folder.glob("*.mp4"), *run.path_folder.glob("*.gif")]
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
    """Write report.html of a run folder and return its path. ValueError if it holds no run."""
    run = Run(folder)
    parts = [html.table(["", ""], measurements(run)), "<h2>Curves</h2>", diagrams([run])]
    parts += [*views(run), *pictures_and_videos(run), notes(folder)]
    settings = [[name, value] for name, value in sorted(run.args.items()) if value is not None]
    parts.append("<h2>Settings</h2>")
    command = folder / "cmd.txt"
    if command.is_file():
        newest = command.read_text(encoding="utf-8", errors="replace").strip().split("\n\n# 20")[-1]
        parts.append(html.block(newest[:4000]))
    parts.append(f"<details><summary>all flags</summary>{html.table(['flag', ''], settings)}"
                 "</details>")  # fmt: skip
    return write_page(folder / "report.html", html.page(run.name, parts))


def write_page(path: Path, content: str) -> Path:
    """Write a page, replaced as a whole, and return its path. ValueError if that fails."""
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        replace_file(path, content.encode("utf-8"))
    except OSError as error:
        reason = why_not_written(error, path.parent)
        raise ValueError(f"{path} cannot be written ({reason}); choose another path") from None
    return path


def try_report(folder: Path, log: Callable[[str], None]) -> None:
    """``write_report`` after a run; an error is logged and does not fail the run.

    A folder without args.json, of a checkpoint that was trained elsewhere, gets none.
    """
    if not (folder / "args.json").exists():
        log("no report.html: a report is made of a run that was trained here, and this one was not")
        return
    try:
        log(f"report: {write_report(folder)}")
    except (ValueError, OSError, KeyError, TypeError) as error:
        log(f"report.html is not written: {error}")


def main() -> int:
    """Write the reports of the run folders on the command line; the exit code."""
    parser = ArgumentParser("nerf.report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, such as logs/demo")
    runs = parser.parse_args().runs

    def write_all() -> None:
        for folder in runs:
            print(one_line(write_report(folder)))

    return last_net.exit_code("nerf.report", write_all)


if __name__ == "__main__":
    sys.exit(main())
