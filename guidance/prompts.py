"""Words about the viewpoint that go into a prompt (DreamFusion section 3.2).

Azimuth 0 sees the front and grows clockwise as seen from above, as ``nerf.cameras.orbit_path``
counts it: 90 sees the object's own right side (right for someone who looks out of its front), 180
its back. Elevation 0 is level with the object, 90 straight above.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, cat

from guidance.sds import Conditions

VIEW_WORDS = ("front", "right side", "back", "left side", "overhead")
FRONT_DEG = 45.0  # half the width of "front"; "back" is as wide
OVERHEAD_DEG = 60.0
DIRECTIONS = (  # of 45 degrees each, around multiples of 45
    "front", "front right", "right side", "back right",
    "back", "back left", "left side", "front left",
)  # fmt: skip
HEIGHTS = {"low": 10.0, "raised": 40.0, "high": OVERHEAD_DEG, "overhead": 90.0}  # up to, degrees
LOWEST_DEG, HIGHEST_DEG = -15.0, 85.0  # of cameras around an object on the ground
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


def pull_to_view_center(azimuth_deg: Tensor, elevation_deg: Tensor, fraction: float):
    """Viewpoints [V], each pulled into the middle ``fraction`` of the fine view that it is in.

    fraction: in (0, 1]; 1 leaves them as they are. What a word stands for is an average over all
    viewpoints that share it; near the middle there is less to average, and corners stay corners.
    Heights reach from -15 to 85 degrees here, as in the pictures of the embedded model. Returns
    azimuths and elevations [V], which have the same fine view words.
    """
    middle = 45.0 * torch.floor((azimuth_deg + 22.5) / 45.0)
    azimuth = middle + fraction * (azimuth_deg - middle)
    ends = elevation_deg.new_tensor([LOWEST_DEG, *list(HEIGHTS.values())[:-1], HIGHEST_DEG])
    height = torch.bucketize(elevation_deg, ends[1:-1])
    middle = 0.5 * (ends[height] + ends[height + 1])
    return azimuth, middle + fraction * (elevation_deg - middle)


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


def perp_neg_weights(azimuth_deg: float) -> tuple[float, float]:
    """Weights, not positive, of what a view should not be: threestudio's decaying exponentials.

    On the front half of front and side, on the back half of side and front. A word weighs nearly
    nothing where it is right, and more the further the camera is from there.
    """
    around = abs((azimuth_deg + 180.0) % 360.0 - 180.0) / 90.0  # 0 front, 1 side, 2 back

    def decay(height: float, shift: float, share: float) -> float:
        return -max(0.0, height * math.exp(-0.5 * share) + shift)

    if around < 1.0:
        return decay(4.0, -2.426, 1.0 - around), decay(4.0, -2.426, around)
    return decay(1.0, -0.606, 2.0 - around), decay(1.0, 0.967, 2.0 - around)


class ViewPrompts:
    """Embedded texts, picked by where a camera stands."""

    def __init__(
        self,
        embed: Callable[[list[str]], Tensor],
        texts: dict[str, str],
        negatives: dict[str, str],
        coarse: dict[str, str] | None = None,
    ):
        """texts: as ``view_texts`` gives them. embed: N texts -> [N, L, D].

        negatives: the negative prompt for each of VIEW_WORDS. coarse: the text for each of
        VIEW_WORDS, to be kept apart by Perp-Neg; None: without it.
        """
        tables = (texts, negatives, coarse or {})
        said = list(dict.fromkeys(text for table in tables for text in table.values()))
        embedded = dict(zip(said, embed(said).split(1), strict=True))
        self.texts, self.negatives, self.coarse = (
            {word: embedded[text] for word, text in table.items()} for table in tables
        )

    def at(self, azimuth_deg: Tensor, elevation_deg: Tensor) -> Conditions:
        """What V cameras at [V] are asked for: [V, L, D] each."""
        views = list(zip(azimuth_deg.tolist(), elevation_deg.tolist(), strict=True))
        words = [view_word(*view) for view in views]
        text = cat(
            [
                self.texts[word if word in self.texts else fine_view_word(*view)]
                for word, view in zip(words, views, strict=True)
            ]
        )
        negative = cat([self.negatives[word] for word in words])
        if not self.coarse:
            return Conditions(negative, text)
        rows = [self._not_to_be(*view) for view in views]
        others = tuple(cat([row[0][n] for row in rows]) for n in range(2))
        weights = tuple(text.new_tensor([row[1][n] for row in rows]) for n in range(2))
        return Conditions(negative, text, others, weights)

    def _not_to_be(self, azimuth_deg: float, elevation_deg: float):
        """The two words that Perp-Neg pushes a view away from, and their weights, 0 overhead."""
        turned = (azimuth_deg + 180.0) % 360.0 - 180.0
        side = self.coarse["right side" if turned > 0 else "left side"]
        front = self.coarse["front"]
        words = (front, side) if abs(turned) < 90.0 else (side, front)
        overhead = view_word(azimuth_deg, elevation_deg) == "overhead"
        return words, (0.0, 0.0) if overhead else perp_neg_weights(azimuth_deg)
