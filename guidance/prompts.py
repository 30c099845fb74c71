"""View-dependent prompts: words for the viewpoint in the text (DreamFusion section 3.2).

A camera at azimuth 0 sees the front; azimuth grows clockwise seen from above, as in
``nerf.cameras.orbit_path``: at 90 the camera sees the object's own right side, at 180 its back.
Elevation 0 is level with the object, 90 straight above it. Angles are in degrees.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, cat

from guidance.sds import Conditions

VIEW_WORDS = ("front", "right side", "back", "left side", "overhead")
FRONT_DEG = 45.0  # half the width of "front", and of "back"
OVERHEAD_DEG = 60.0
DIRECTIONS = (  # sectors of 45 degrees, centered at multiples of 45
    "front", "front right", "right side", "back right",
    "back", "back left", "left side", "front left",
)  # fmt: skip
# The largest elevation of each height
HEIGHTS = {"low": 10.0, "raised": 40.0, "high": OVERHEAD_DEG, "overhead": 90.0}
LOWEST_DEG, HIGHEST_DEG = -15.0, 85.0  # elevations of the embedded model's training images
FINE_VIEW_WORDS = tuple(f"{direction} {height}" for height in HEIGHTS for direction in DIRECTIONS)


def view_word(azimuth_deg: float, elevation_deg: float) -> str:
    """The word of VIEW_WORDS for this viewpoint; azimuth is taken modulo 360.

    Overhead for elevations above 60; else front for |azimuth| <= 45, back for |azimuth| >= 135, and
    a side between them. ValueError unless both angles are finite.
    """
    if not (math.isfinite(azimuth_deg) and math.isfinite(elevation_deg)):
        raise ValueError(
            f"azimuth {azimuth_deg}, elevation {elevation_deg}: expected finite numbers"
        )
    if elevation_deg > OVERHEAD_DEG:
        return "overhead"
    wrapped = (azimuth_deg + 180.0) % 360.0 - 180.0  # [-180, 180)
    if abs(wrapped) <= FRONT_DEG:
        return "front"
    if abs(wrapped) >= 180.0 - FRONT_DEG:
        return "back"
    return "right side" if wrapped > 0 else "left side"


def fine_view_word(azimuth_deg: float, elevation_deg: float) -> str:
    """The one of FINE_VIEW_WORDS for this viewpoint, for a model that was trained with them.

    Score distillation averages over all viewpoints that share a word: with a quarter of the circle
    per word, the corners of a cube wash out. A height includes its value in HEIGHTS; a direction
    starts 22.5 degrees before its center. ValueError unless both angles are finite.
    """
    view_word(azimuth_deg, elevation_deg)  # raises for angles that are not finite
    direction = DIRECTIONS[math.floor(((azimuth_deg + 22.5) % 360.0) / 45.0) % 8]
    below = [height for height, end in HEIGHTS.items() if elevation_deg <= end]
    return f"{direction} {below[0] if below else 'overhead'}"


def pull_to_view_center(
    azimuth_deg: Tensor, elevation_deg: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    """Scale each viewpoint's offset from the center of its fine view by ``fraction``, in (0, 1].

    azimuth_deg and elevation_deg [V]; returns both [V], with the same fine view words. Score
    distillation averages over all viewpoints that share a word: near the center of a view there is
    less to average, and corners stay sharp. Heights are taken to reach from -15 to 85 degrees.
    """
    center = 45.0 * torch.floor((azimuth_deg + 22.5) / 45.0)
    azimuth = center + fraction * (azimuth_deg - center)
    edges = elevation_deg.new_tensor([LOWEST_DEG, *list(HEIGHTS.values())[:-1], HIGHEST_DEG])
    height = torch.bucketize(elevation_deg, edges[1:-1])
    center = 0.5 * (edges[height] + edges[height + 1])
    return azimuth, center + fraction * (elevation_deg - center)


PLAIN_WORDS = {"right side": "side", "left side": "side"}  # for models trained on photographs


def view_texts(
    prompt: str,
    placement: str,
    *,
    known_views: list[str] | None = None,
    overrides: dict[str, str] | None = None,
) -> dict[str, str]:
    """The prompt for each of FINE_VIEW_WORDS if the model knows them all, else of VIEW_WORDS.

    placement: suffix ("a cone, front view"), prefix ("front view of a cone") or none. known_views:
    the words that the model was trained with; other models get "side" for both sides. overrides:
    whole prompts by word of VIEW_WORDS, also used in place of the fine words of that view.
    """
    known = set(known_views or ())
    texts: dict[str, str] = {}
    for word in FINE_VIEW_WORDS if known.issuperset(FINE_VIEW_WORDS) else VIEW_WORDS:
        prompt_word = word if word in known else PLAIN_WORDS.get(word, word)
        forms = {
            "suffix": f"{prompt}, {prompt_word} view",
            "prefix": f"{prompt_word} view of {prompt}",
            "none": prompt,
        }
        texts[word] = forms[placement]
    return texts | {word: text for word, text in (overrides or {}).items() if text}


def perp_neg_weights(azimuth_deg: float) -> tuple[float, float]:
    """Perp-Neg's weights, 0 or negative, of the two view prompts that a view is pushed away from.

    These are threestudio's decaying exponentials. In the front half the weights belong to front
    and side, in the back half to side and front. A weight is nearly 0 where its word is right and
    grows in size with the camera's distance from that view.
    """
    around = abs((azimuth_deg + 180.0) % 360.0 - 180.0) / 90.0  # 0 front, 1 side, 2 back

    def decay(height: float, shift: float, fraction: float) -> float:
        return -max(0.0, height * math.exp(-0.5 * fraction) + shift)

    if around < 1.0:
        return decay(4.0, -2.426, 1.0 - around), decay(4.0, -2.426, around)
    return decay(1.0, -0.606, 2.0 - around), decay(1.0, 0.967, 2.0 - around)


class ViewPrompts:
    """Text embeddings for each view of an object, chosen by the camera's viewpoint."""

    def __init__(
        self,
        embed: Callable[[list[str]], Tensor],
        texts: dict[str, str],
        negatives: dict[str, str],
        coarse: dict[str, str] | None = None,
    ):
        """Embed all texts once.

        embed: N texts -> [N, L, D]. texts: from ``view_texts``. negatives: the negative prompt for
        each of VIEW_WORDS. coarse: the prompt for each of VIEW_WORDS that Perp-Neg pushes views
        away from; None: no Perp-Neg.
        """
        tables = (texts, negatives, coarse or {})
        distinct = list(dict.fromkeys(text for table in tables for text in table.values()))
        embedded = dict(zip(distinct, embed(distinct).split(1), strict=True))
        self.texts, self.negatives, self.coarse = (
            {word: embedded[text] for word, text in table.items()} for table in tables
        )

    def at(self, azimuth_deg: Tensor, elevation_deg: Tensor) -> Conditions:
        """The embeddings for V cameras: angles [V] on the CPU -> Conditions of [V, L, D] each."""
        views = list(zip(azimuth_deg.tolist(), elevation_deg.tolist(), strict=True))
        coarse = [view_word(*view) for view in views]
        words = tuple(
            word if word in self.texts else fine_view_word(*view)
            for word, view in zip(coarse, views, strict=True)
        )
        text = cat([self.texts[word] for word in words])
        negative = cat([self.negatives[word] for word in coarse])
        if not self.coarse:
            return Conditions(negative, text, words=words)
        rows = [self._perp_neg_prompts(*view) for view in views]
        others = tuple(cat([row[0][n] for row in rows]) for n in range(2))
        weights = torch.tensor([row[1] for row in rows], dtype=text.dtype)  # [V, 2]
        if text.is_cuda:  # without waiting for what the GPU is doing
            weights = weights.pin_memory().to(text.device, non_blocking=True)
        return Conditions(negative, text, others, weights.unbind(1), words)

    def _perp_neg_prompts(
        self, azimuth_deg: float, elevation_deg: float
    ) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
        """The embeddings that Perp-Neg pushes a view away from, and their weights, 0 overhead."""
        wrapped = (azimuth_deg + 180.0) % 360.0 - 180.0
        side = self.coarse["right side" if wrapped > 0 else "left side"]
        front = self.coarse["front"]
        pair = (front, side) if abs(wrapped) < 90.0 else (side, front)
        overhead = view_word(azimuth_deg, elevation_deg) == "overhead"
        return pair, (0.0, 0.0) if overhead else perp_neg_weights(azimuth_deg)
