"""CLIP R-precision (Park et al. 2021): is a picture's own prompt the nearest of all prompts?

DreamFusion's measure. Needs a local folder of a CLIP model in transformers' layout, which is not
part of this project: nothing is downloaded.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# CLIP's normalization, for folders without preprocessor_config.json.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """CLIP's embeddings of texts and pictures: unit vectors [N, D] in one space.

    ValueError if ``folder`` holds no CLIP model.
    """

    def __init__(self, folder: Path):
        import json

        from transformers import CLIPModel, CLIPTokenizer

        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"--clip {folder}: no CLIP model in transformers' layout ({reason})"
            ) from None
        file = folder / "preprocessor_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.mean = torch.tensor(settings.get("image_mean", MEAN)).view(3, 1, 1)
        self.std = torch.tensor(settings.get("image_std", STD)).view(3, 1, 1)
        self.size = self.model.config.vision_config.image_size

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Embeddings [N, D] of texts."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        found = self.model.get_text_features(**tokens)
        return F.normalize(getattr(found, "pooler_output", found), dim=-1)

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        """Embeddings [N, D] of square pictures [N, 3, H, W] in [0, 1]."""
        side = (self.size, self.size)
        large = F.interpolate(pictures, side, mode="bicubic", antialias=True).clamp(0, 1)
        found = self.model.get_image_features(pixel_values=(large - self.mean) / self.std)
        return F.normalize(getattr(found, "pooler_output", found), dim=-1)


def r_precision(clip, pictures: list[Tensor], prompts: list[str]) -> float:
    """Share of all pictures whose own prompt has the nearest embedding.

    pictures[n] [V, 3, H, W]: views of prompts[n]. Prompts that occur twice count as one.
    """
    texts = list(dict.fromkeys(prompts))
    words, right = clip.texts(texts), []
    for own, views in zip(prompts, pictures, strict=True):
        nearest = (clip.pictures(views) @ words.T).argmax(-1)
        right += (nearest == texts.index(own)).tolist()
    return sum(right) / len(right)
