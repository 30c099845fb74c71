"""Runs side by side on one self-contained page: metrics, differing flags, curves, test views.

python -m nerf.compare logs/a logs/b              # writes logs/compare.html
python -m nerf.compare logs/a logs/b --out ab.html
"""

import sys
from pathlib import Path
from typing import Any

from nerf.outputs import html
from nerf.outputs.report import MAX_VIEWS, MEASUREMENTS, SIDE, Run, diagrams, write_page
from nerf.training import last_net
from nerf.training.arguments import ArgumentParser
from nerf.training.plain_text import one_line

# Flags that differ between any two runs and explain nothing.
UNINTERESTING = {"expname", "basedir", "config", "fast"}


def measurements(runs: list[Run]) -> str:
    """HTML table of the measurements of each run, empty where a run has none."""
    rows: list[list[Any]] = []
    for key, label in MEASUREMENTS.items():
        values = [run.metrics.get(key) for run in runs]
        if any(value is not None for value in values):
            rows.append([label, *values])
    sizes = [run.metrics.get("resolution") for run in runs]
    if any(sizes):
        rows.append(
            ["picture size", *("x".join(map(str, size)) if size else None for size in sizes)]
        )
        rows.append(["test views", *(run.metrics.get("num_views") for run in runs)])
        rows.append(["data", *(run.args.get("datadir") for run in runs)])
    rows.append(["updates", *(run.metrics.get("step") or run.last_step for run in runs)])
    rows.append(["training, s", *(run.last("train_seconds") for run in runs)])
    return html.table(["", *(run.name for run in runs)], rows)


def differing_flags(runs: list[Run]) -> str:
    """HTML table of the flags that are not the same in all runs."""
    names = sorted({name for run in runs for name in run.args} - UNINTERESTING)
    missing = "(no such flag)"
    rows = []
    for name in names:
        values = [run.args.get(name, missing) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([name, *("not set" if value is None else value for value in values)])
    if not rows:
        return "<p>All flags are the same.</p>"
    return html.table(["flag", *(run.name for run in runs)], rows)


def common_views(runs: list[Run]) -> list[str]:
    """HTML of the test views that all runs have, the lowest PSNR in any run first."""
    views_by_name = [
        {view.get("name"): (number, view) for number, view in run.views} for run in runs
    ]
    names = [name for name in views_by_name[0] if all(name in views for views in views_by_name)]
    if not names:
        return ["<p>The runs have no test view in common.</p>"]
    names.sort(key=lambda name: min(views[name][1].get("psnr") or 0.0 for views in views_by_name))
    parts = ["<h2>Test views, worst first</h2>"]
    for name in names[:MAX_VIEWS]:
        number = views_by_name[0][name][0]
        pictures = [
            html.picture(runs[0].test_folder / "target" / f"{number:03d}.png", SIDE, "target")
        ]
        for run, views in zip(runs, views_by_name, strict=True):
            number, view = views[name]
            psnr = f"{run.name}: {view['psnr']:.2f} dB" if view.get("psnr") else run.name
            for part, caption in (("", psnr), ("error", f"{run.name}: error x 4")):
                path = run.test_folder / part / f"{number:03d}.png"
                pictures.append(html.picture(path, SIDE, caption))
        parts.append(f'<p>{html.text(name)}</p><div class="row">{"".join(pictures)}</div>')
    if len(names) > MAX_VIEWS:
        parts.append(f'<p class="note">{len(names) - MAX_VIEWS} better views are not shown.</p>')
    return parts


def compare(folders: list[Path], out: Path) -> Path:
    """Write the page of at least two run folders to ``out`` and return it.

    ValueError for fewer than two different folders, or for one without a run.
    """
    if len({folder.resolve() for folder in folders}) < 2:
        raise ValueError(
            f"{', '.join(map(str, folders))}: expected at least two different runs; "
            "name another run folder"
        )
    runs = [Run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # runs of the same name in two folders
        for run in runs:
            run.name = str(run.folder)
    parts = [measurements(runs)]
    data = {str(run.args.get("datadir")) for run in runs}
    if len(data) > 1:
        warning = (
            f"These runs have different data ({', '.join(sorted(data))}): "
            "their metrics cannot be compared."
        )
        parts.append(f"<p>{html.text(warning)}</p>")
    parts += ["<h2>Differing flags</h2>", differing_flags(runs), "<h2>Curves</h2>", diagrams(runs)]
    return write_page(
        out, html.page(" | ".join(run.name for run in runs), parts + common_views(runs))
    )


def main(argv: list[str] | None = None) -> int:
    """Write the comparison of the run folders on the command line; the exit code."""
    parser = ArgumentParser("nerf.compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, such as logs/a logs/b")
    parser.add_argument("--out", type=Path, help="default: compare.html beside the first run")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0].resolve().parent / "compare.html"
    return last_net.exit_code("nerf.compare", lambda: print(one_line(compare(args.runs, out))))


if __name__ == "__main__":
    sys.exit(main())
