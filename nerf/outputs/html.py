"""Parts of self-contained pages: layout, tables, curves as SVG, pictures and videos inside.

A page needs no network and no script: it opens by a double click, light or dark as the reader's
system is.
"""

import base64
import html
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = ("#3b76d6", "#d9722e", "#2f9e6e", "#b24bb5", "#8a7a1f", "#c23b4a")
LARGEST_VIDEO = 8 << 20  # bytes; a larger one is named instead
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 460, 220, 56, 20, 26  # of a curve, in CSS pixels

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left;
  vertical-align: top; }
figure { display: inline-block; margin: 0 .8rem .8rem 0; }
figcaption, .note { font-size: .85rem; opacity: .75; }
img { image-rendering: auto; background: var(--soft); max-width: 100%; }
video { max-width: 100%; } pre { background: var(--soft); overflow-x: auto; padding: .6rem; }
svg { background: var(--soft); } svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
.row { display: flex; flex-wrap: wrap; }
.scroll { overflow-x: auto; }
"""


def page(title: str, parts: list[str]) -> str:
    """A whole page; ``parts`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{text(title)}</h1>"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def text(value) -> str:
    """Any value as text that cannot be mistaken for HTML; numbers to four digits."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    return html.escape("" if value is None else str(value))


def table(header: list[str], rows: list[list]) -> str:
    """Rows of values, a wide one scrolls."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def picture(path: Path, side: int, caption: str = "") -> str:
    """A picture file inside the page, its longer side at most ``side``; a note where it is missing.

    Small ones stay exact (PNG) and are shown larger, others become JPEG.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError:
        return f"<figure><figcaption>{text(path.name)} is missing</figcaption></figure>"
    image.thumbnail((side, side))
    kind = "PNG" if max(image.size) <= 128 else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    width = max(image.width, side * image.width // max(image.size))
    return (
        f'<figure><img alt="{text(caption or path.name)}" width="{width}" '
        f'src="{_data(f"image/{kind.lower()}", buffer.getvalue())}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def video(path: Path, caption: str) -> str:
    """A video inside the page, or its place where it is large; nothing where it is missing."""
    if not path.is_file():
        return ""
    if path.stat().st_size > LARGEST_VIDEO:
        return f'<p class="note">{text(caption)}: {text(path)}, too large for this page</p>'
    source = _data("video/mp4", path.read_bytes())
    return (
        f'<figure><video controls loop muted width="360" src="{source}"></video>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def curves(title: str, lines: dict[str, tuple[np.ndarray, np.ndarray]], log: bool = False) -> str:
    """An SVG of y over x for each name; points that are not finite are left out.

    log: y on a logarithmic axis, without what is not positive. "" where nothing is left.
    """
    kept = {}
    for name, (x, y) in lines.items():
        good = np.isfinite(x) & np.isfinite(y) & ((y > 0) if log else True)
        if good.any():
            kept[name] = (x[good], np.log10(y[good]) if log else y[good])
    if not kept:
        return ""
    every_x = np.concatenate([x for x, _ in kept.values()])
    every_y = np.concatenate([y for _, y in kept.values()])
    (x0, x1), (y0, y1) = _range(every_x), _range(every_y)

    def place(x, y) -> tuple:
        right = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return right, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - 26)

    parts = [f'<text x="{LEFT}" y="15">{text(title)}</text>']
    for number in _log_ticks(y0, y1) if log else _ticks(y0, y1):
        _, down = place(x0, number)
        said = f"{10**number if log else number:.6g}"
        parts.append(f'<path d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{said}</text>')
    for number in _ticks(x0, x1):
        right, _ = place(number, y0)
        parts.append(
            f'<text x="{right:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number:g}</text>'
        )
    for index, (name, (x, y)) in enumerate(kept.items()):
        color = COLORS[index % len(COLORS)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*place(x, y), strict=True))
        parts.append(
            f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{points}"/>'
        )
        if len(x) == 1:
            right, down = place(x[0], y[0])
            parts.append(f'<circle r="3" fill="{color}" cx="{right:.1f}" cy="{down:.1f}"/>')
        if len(kept) > 1 or name != title:
            parts.append(
                f'<text x="{WIDTH - RIGHT}" y="{15 + 13 * index}" text-anchor="end" '
                f'style="fill:{color}">{text(name)}</text>'
            )
    return f'<svg role="img" width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg> '


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between ``low`` and ``high``."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2, 5 times powers of ten, or of these alone, or of other round numbers."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [power + math.log10(factor) for power in powers for factor in factors]
        found = [number for number in found if low <= number <= high]
        if 2 <= len(found) <= 6:
            return found
    if len(found) > 6:
        return _ticks(low, high)  # whole powers, some of them
    return [math.log10(number) for number in _ticks(10**low, 10**high) if number > 0]
