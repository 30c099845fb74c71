"""guidance/attention: recorded passes equal fused ones, processors are restored, maps replaced."""

import pytest
import torch
from helpers import CPU
from tiny_models import SIDE, draw

from guidance.attention import (
    picked_tokens,
    recorded_attention,
    swap_attn_processors,
    token_maps,
)
from guidance.stable_diffusion import StableDiffusion


@pytest.fixture
def model(sd_folder):
    return StableDiffusion(sd_folder, CPU)


def passed(model, text, **kwargs):
    """One pass of the U-Net on fixed latents."""
    with torch.no_grad():
        words = model.embed([text] * 2)
        x, t = draw(2, 4, SIDE, SIDE), torch.tensor([7, 500])
        return model.unet(x, t, encoder_hidden_states=words, **kwargs).sample


def test_a_recorded_pass_is_the_pass_and_rows_are_probabilities(model):
    plain = passed(model, "a red cube")
    before = dict(model.unet.attn_processors)
    with recorded_attention(model.unet) as kept:
        recorded = passed(model, "a red cube")
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-4)
    assert model.unet.attn_processors == before
    assert torch.equal(passed(model, "a red cube"), plain)
    assert kept and all("attn2" in name for name in kept)  # text, not the pixels themselves
    for value in kept.values():
        torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:2]))


def test_swapping_restores_after_an_exception_and_keeps_the_dict(model):
    before = dict(model.unet.attn_processors)
    new = {name: object() for name in before}
    kept = dict(new)
    with pytest.raises(KeyError), swap_attn_processors(model.unet, new):
        assert model.unet.attn_processors == new
        raise KeyError
    assert model.unet.attn_processors == before and new == kept


def test_maps_of_one_prompt_go_into_the_pass_of_another(model):
    """Prompt-to-Prompt: the maps of the first prompt with the values of the second."""
    with recorded_attention(model.unet) as kept:
        passed(model, "a red cube")
        maps = {name: value.clone() for name, value in kept.items()}
        plain = passed(model, "a green sphere")
        swapped = passed(model, "a green sphere", cross_attention_kwargs={"attention_maps": maps})
        assert all(torch.equal(kept[name], maps[name]) for name in maps)
        same = passed(model, "a red cube", cross_attention_kwargs={"attention_maps": maps})
        own = passed(model, "a red cube")
    assert not torch.allclose(swapped, plain, atol=1e-6)
    torch.testing.assert_close(same, own)


def test_token_maps_average_heads_and_layers(model):
    with recorded_attention(model.unet) as kept:
        passed(model, "a red cube")
        maps = token_maps(kept, 2)
    tokens = model.embed([""]).shape[1]
    assert maps.shape == (2, tokens, SIDE, SIDE)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, SIDE, SIDE))
    finest = [value for value in kept.values() if value.shape[1] == SIDE * SIDE]
    by_hand = torch.stack([v.view(2, -1, SIDE * SIDE, tokens).mean(1) for v in finest]).mean(0)
    torch.testing.assert_close(maps[1, 2].flatten(), by_hand[1, :, 2])
    with pytest.raises(ValueError, match="no attention maps of 5 x 5"):
        token_maps(kept, 2, side=5)
    with pytest.raises(ValueError, match="no attention maps were recorded"):
        token_maps({}, 2)


def test_tokens_are_the_prompts_words_and_unknown_ones_are_refused(model):
    words = model.tokens("a red cube")
    assert words == ["a", "red", "cube"]
    assert picked_tokens(words, None) == [0, 1, 2] and picked_tokens(words, "cube, a") == [2, 0]
    with pytest.raises(
        ValueError, match="--attn_tokens cone: not in the prompt, whose tokens are a"
    ):
        picked_tokens(words, "cone")


def test_a_maps_token_is_where_its_embedding_is(model):
    """The embedding of each token at its place + 1: changing a word moves that place's map."""
    first = model.attention(
        draw(1, 4, SIDE, SIDE), torch.tensor([100]), model.embed(["a red cube"])
    )
    other = model.attention(
        draw(1, 4, SIDE, SIDE), torch.tensor([100]), model.embed(["a red sphere"])
    )
    moved = (first - other).abs().flatten(2).amax(-1)[0]
    assert moved[:3].max() < moved[3]  # start, a, red | cube: the text encoder looks back only
