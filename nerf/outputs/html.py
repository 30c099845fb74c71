"""Parts of self-contained HTML pages: layout, tables, curves as SVG, embedded pictures and videos.

A page needs no network and no script: it opens by a double click, and follows the reader's light or
dark color scheme.
"""

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nerf.training.plain_text import one_line

COLORS = ("#3b76d6", "#d9722e", "#2f9e6e", "#b24bb5", "#8a7a1f", "#c23b4a")
MAX_VIDEO_BYTES = 8 << 20  # of a larger video only the path is shown
WIDTH, HEIGHT = 460, 220  # of a diagram, in CSS pixels
MOST = 1e300  # of a curve's numbers: beyond, their difference may be infinite
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 26, 26  # margins around its curves

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
    """A whole page with ``parts``, which are HTML, below its title."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{text(title)}</h1>"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def text(value: object) -> str:
    """Any value as a line with HTML characters escaped; floats with four digits, None is empty."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    return html.escape("" if value is None else one_line(value))


def block(value: str) -> str:
    """A text of several lines as it stands."""
    return f"<pre>{''.join(text(line) + chr(10) for line in value.splitlines())}</pre>"


def table(header: list[str], rows: list[list]) -> str:
    """A table of values, escaped by ``text``; a wide table scrolls."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def picture(path: Path, side: int, caption: str = "") -> str:
    """An embedded picture file, its longer side at most ``side`` pixels; a note if there is none.

    Pictures of up to 128 pixels stay exact (PNG) and are shown enlarged, others become JPEG.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        why = "cannot be read" if path.exists() else "is missing"
        return f"<figure><figcaption>{text(path.name)} {why}</figcaption></figure>"
    image.thumbnail((side, side))
    kind = "PNG" if max(image.size) <= 128 else "JPEG"
    buffer, options = io.BytesIO(), {"quality": 85} if kind == "JPEG" else {"optimize": True}
    image.save(buffer, kind, **options)
    width = max(image.width, side * image.width // max(image.size))
    return (
        f'<figure><img alt="{text(caption or path.name)}" width="{width}" '
        f'src="{_data(f"image/{kind.lower()}", buffer.getvalue())}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def video(path: Path, caption: str) -> str:
    """An embedded video or GIF, or its path if it is too large; "" if it is missing."""
    if not path.is_file():
        return ""
    if path.stat().st_size > MAX_VIDEO_BYTES:
        return f'<p class="note">{text(caption)}: {text(path)}, too large for this page</p>'
    if path.suffix == ".gif":
        source = _data("image/gif", path.read_bytes())
        shown = f'<img width="360" src="{source}" alt="{text(caption)}">'
    else:
        source = _data("video/mp4", path.read_bytes())
        shown = f'<video controls loop muted width="360" src="{source}"></video>'
    return f"<figure>{shown}<figcaption>{text(caption)}</figcaption></figure>"


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def curves(title: str, lines: dict[str, tuple[np.ndarray, np.ndarray]], log: bool = False) -> str:
    """A diagram (SVG) with a curve of y over x for each name; non-finite points are left out.

    log: y axis is logarithmic, and values that are not positive are left out. "" if no point is
    left.
    """
    kept = {}
    for name, (x, y) in lines.items():
        good = (abs(x) < MOST) & (abs(y) < MOST) & ((y > 0) if log else True)  # NaN is neither
        if good.any():
            kept[name] = (x[good], np.log10(y[good]) if log else y[good])
    if not kept:
        return ""
    every_x = np.concatenate([x for x, _ in kept.values()])
    every_y = np.concatenate([y for _, y in kept.values()])
    (x0, x1), (y0, y1) = _range(every_x), _range(every_y)

    def position(x: Any, y: Any) -> tuple[Any, Any]:  # numbers or arrays, in CSS pixels
        right = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return right, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="15">{text(title)}</text>']
    for number in _log_ticks(y0, y1) if log else _ticks(y0, y1):
        _, down = position(x0, number)
        label = f"{10**number if log else number:.6g}"
        parts.append(f'<path d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>')
    for number in _ticks(x0, x1):
        right, _ = position(number, y0)
        parts.append(
            f'<text x="{right:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number:g}</text>'
        )
    for index, (name, (x, y)) in enumerate(kept.items()):
        color = COLORS[index % len(COLORS)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*position(x, y), strict=True))
        parts.append(
            f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{points}"/>'
        )
        if len(x) == 1:
            right, down = position(x[0], y[0])
            parts.append(f'<circle r="3" fill="{color}" cx="{right:.1f}" cy="{down:.1f}"/>')
        if len(kept) > 1 or name != title:
            parts.append(
                f'<text x="{WIDTH - RIGHT}" y="{15 + 13 * index}" text-anchor="end" '
                f'style="fill:{color}">{text(name)}</text>'
            )
    return f'<svg role="img" width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg> '


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-12 * max(abs(low), abs(high), 1e-280):  # else no axis can show it
        return low, high
    margin = max(0.5, 1e-6 * abs(low))
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between ``low`` and ``high``."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2, 5 times powers of ten, of powers of ten, or of other round numbers."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [power + math.log10(factor) for power in powers for factor in factors]
        found = [number for number in found if low <= number <= high]
        if 2 <= len(found) <= 6:
            return found
    if len(found) > 6:
        return _ticks(low, high)  # some of the powers of ten
    return [math.log10(number) for number in _ticks(10**low, 10**high) if number > 0]
