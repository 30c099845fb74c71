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


PLAIN_WORDS = {"right side": "side", "left side": "side"}  # what models trained on photos know


def view_texts(
    prompt: str,
    placement: str,
    *,
    known_views: list[str] | None = None,
    overrides: dict[str, str] | None = None,
) -> list[str]:
    """The text for each of VIEW_WORDS.

    placement: suffix ("a cone, front view"), prefix ("front view of a cone") or none. known_views:
    the words a model was trained on; None says "side" for both sides. overrides: whole texts, by
    view word.
    """
    texts = []
    for word in VIEW_WORDS:
        if known_views is None or word not in known_views:
            word_said = PLAIN_WORDS.get(word, word)
        else:
            word_said = word
        forms = {
            "suffix": f"{prompt}, {word_said} view",
            "prefix": f"{word_said} view of {prompt}",
            "none": prompt,
        }
        texts.append((overrides or {}).get(word) or forms[placement])
    return texts


class ViewPrompts:
    """Embedded texts, picked by where a camera stands."""

    def __init__(self, embed: Callable[[list[str]], Tensor], texts: list[str], negative: str):
        """texts: one per VIEW_WORDS. embed: N texts -> [N, L, D]."""
        self.texts = texts
        *tables, self.negative = embed([*texts, negative]).split(1)
        self.tables = tables

    def at(self, azimuth_deg: Tensor, elevation_deg: Tensor) -> tuple[Tensor, Tensor]:
        """(negative, text) for V cameras at [V]: each [V, L, D]."""
        words = [
            view_word(azimuth, elevation)
            for azimuth, elevation in zip(azimuth_deg.tolist(), elevation_deg.tolist(), strict=True)
        ]
        chosen = cat([self.tables[VIEW_WORDS.index(word)] for word in words])
        return self.negative.expand_as(chosen), chosen
