"""Words about the viewpoint that go into a prompt (DreamFusion section 3.2).

Azimuth 0 sees the front and grows clockwise as seen from above, as ``nerf.cameras.orbit_path``
counts it: 90 sees the object's own right side (right for someone who looks out of its front), 180
its back. Elevation 0 is level with the object, 90 straight above.
"""

import math
from collections.abc import Callable

from torch import Tensor, cat

VIEW_WORDS = ("front", "right side", "back", "left side", "overhead")
FRONT_DEG = 45.0  # half the width of "front"; "back" is as wide
OVERHEAD_DEG = 60.0
DIRECTIONS = (  # of 45 degrees each, around multiples of 45
    "front", "front right", "right side", "back right",
    "back", "back left", "left side", "front left",
)  # fmt: skip
HEIGHTS = {"low": 10.0, "raised": 40.0, "high": OVERHEAD_DEG, "overhead": 90.0}  # up to, degrees
FINE_VIEW_WORDS = tuple(f"{where} {height}" for height in HEIGHTS for where in DIRECTIONS)


def view_word(azimuth_deg: float, elevation_deg: float) -> str:
    """The word of VIEW_WORDS that names this viewpoint; any turn of azimuth is the same.

    Overhead above 60 degrees of elevation (60 itself is not), front up to 45 degrees of azimuth
    and back from 135 on, both ends included; what remains are the sides.
    """
    if not (math.isfinite(azimuth_deg) and math.isfinite(elevation_deg)):
        raise ValueError(f"azimuth {azimuth_deg}, elevation {elevation_deg}: expected numbers")
    if elevation_deg > OVERHEAD_DEG:
        return "overhead"
    turned = (azimuth_deg + 180.0) % 360.0 - 180.0  # [-180, 180)
    if abs(turned) <= FRONT_DEG:
        return "front"
    if abs(turned) >= 180.0 - FRONT_DEG:
        return "back"
    return "right side" if turned > 0 else "left side"


def fine_view_word(azimuth_deg: float, elevation_deg: float) -> str:
    """The one of FINE_VIEW_WORDS that names this viewpoint, for a model that was taught them.

    A word stands for all viewpoints that share it, and score distillation averages over those: with
    a quarter of the circle to a word, the corners of a cube wash out. A height ends with the
    degrees in HEIGHTS; a direction begins 22.5 degrees before its middle.
    """
    view_word(azimuth_deg, elevation_deg)  # refuses what is no number
    direction = DIRECTIONS[math.floor(((azimuth_deg + 22.5) % 360.0) / 45.0) % 8]
    below = [height for height, end in HEIGHTS.items() if elevation_deg <= end]
    return f"{direction} {below[0] if below else 'overhead'}"


PLAIN_WORDS = {"right side": "side", "left side": "side"}  # what models trained on photos know


def view_texts(
    prompt: str,
    placement: str,
    *,
    known_views: list[str] | None = None,
    overrides: dict[str, str] | None = None,
) -> dict[str, str]:
    """The text for each view word: FINE_VIEW_WORDS if the model knows them all, else VIEW_WORDS.

    placement: suffix ("a cone, front view"), prefix ("front view of a cone") or none. known_views:
    the words a model was trained on; None says "side" for both sides. overrides: whole texts, by
    word of VIEW_WORDS; they come before the fine words, which they replace.
    """
    known, texts = set(known_views or ()), {}
    for word in FINE_VIEW_WORDS if known.issuperset(FINE_VIEW_WORDS) else VIEW_WORDS:
        word_said = word if word in known else PLAIN_WORDS.get(word, word)
        forms = {
            "suffix": f"{prompt}, {word_said} view",
            "prefix": f"{word_said} view of {prompt}",
            "none": prompt,
        }
        texts[word] = forms[placement]
    return texts | {word: text for word, text in (overrides or {}).items() if text}


class ViewPrompts:
    """Embedded texts, picked by where a camera stands."""

    def __init__(self, embed: Callable[[list[str]], Tensor], texts: dict[str, str], negative: str):
        """texts: as ``view_texts`` gives them. embed: N texts -> [N, L, D]."""
        said = list(dict.fromkeys(texts.values()))
        *tables, self.negative = embed([*said, negative]).split(1)
        self.tables = {word: tables[said.index(text)] for word, text in texts.items()}

    def at(self, azimuth_deg: Tensor, elevation_deg: Tensor) -> tuple[Tensor, Tensor]:
        """(negative, text) for V cameras at [V]: each [V, L, D]."""
        chosen = []
        for view in zip(azimuth_deg.tolist(), elevation_deg.tolist(), strict=True):
            word = view_word(*view)
            chosen.append(self.tables[word if word in self.tables else fine_view_word(*view)])
        chosen = cat(chosen)
        return self.negative.expand_as(chosen), chosen
