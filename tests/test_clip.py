"""benchmarks/clip: R-precision by its definition, and a CLIP folder as transformers writes it."""

import pytest
import torch
from helpers import REPOSITORY  # noqa: F401  (puts the repository on the path)
from transformers import CLIPConfig, CLIPModel

from benchmarks import judge, text_to_3d
from benchmarks.clip import Clip, r_precision
from guidance.tiny import build


class OneHot:
    """A CLIP that reads the number of a text, and sees the number of a picture's red."""

    def texts(self, texts):
        return torch.eye(4)[[int(text) for text in texts]]

    def pictures(self, pictures):
        return torch.eye(4)[pictures[:, 0, 0, 0].round().long()]


def test_r_precision_is_the_share_of_views_nearest_to_their_prompt():
    views = [torch.full((2, 3, 4, 4), float(n)) for n in range(4)]
    names = ["0", "1", "2", "3"]
    assert r_precision(OneHot(), views, names) == 1.0
    assert r_precision(OneHot(), views, names[::-1]) == 0.0
    views[3] = torch.stack([views[3][0], views[0][0]])  # one view looks like another object
    assert r_precision(OneHot(), views, names) == 7 / 8
    assert r_precision(OneHot(), [views[0], views[0]], ["0", "0"]) == 1.0  # one prompt, twice


def test_the_judges_r_precision_counts_views_of_the_right_object_and_color():
    """A judge that reads the object from red and the color from green; "none" is no answer."""

    def reads(pictures):
        objects, colors = pictures[:, 0, 0, 0] * 100, pictures[:, 1, 0, 0] * 100
        found = torch.nn.functional.one_hot(objects.round().long(), len(judge.OBJECTS)).float()
        found[:, -1] = 2.0  # surest of "none"
        return judge.Verdict(found, torch.eye(len(judge.COLORS))[colors.round().long()])

    name, color = judge.OBJECTS[3], judge.COLORS[2]
    lit, bare = torch.zeros(2, 2, 8, 3, 4, 4)  # [E, V, 3, H, W] each
    lit[:, :, 0], lit[:, :, 1] = 0.03, 0.02
    lit[0, :4, 1] = 0.05  # another color in a quarter of the views
    bare[1, :, 0] = 0.03  # the right shape in half of them
    seen = text_to_3d.ObjectViews(None, None, lit, bare)
    assert text_to_3d.r_precision(seen, name, color, reads) == (0.75, 0.5)


def test_a_clip_folder_gives_the_models_own_features(tmp_path):
    tokenizer = build.make_tokenizer(["a", "red", "cube", "cone"], tmp_path / "words")
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text,
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    clip = Clip(tmp_path / "clip")
    texts, pictures = ["a red cube", "a cone"], torch.rand(3, 3, 32, 32)
    words, seen = clip.texts(texts), clip.pictures(pictures)
    torch.testing.assert_close(words.norm(dim=-1), torch.ones(2))
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = model(**tokens, pixel_values=(pictures - clip.mean) / clip.std)
    torch.testing.assert_close(
        model.logit_scale.exp() * seen @ words.T, whole.logits_per_image, atol=1e-4, rtol=1e-4
    )
    assert 0 <= r_precision(clip, [pictures, pictures], texts) <= 1


def test_a_folder_without_clip_is_one_line(tmp_path):
    with pytest.raises(
        ValueError, match="--clip .*: no CLIP model in transformers' layout"
    ) as said:
        Clip(tmp_path)
    assert "\n" not in str(said.value)
