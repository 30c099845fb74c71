# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Score distillation in two dimensions
#
# DreamFusion ([Poole et al. 2022](https://arxiv.org/abs/2209.14988)) makes a 3-D object from a text
# with a model that only knows pictures. The idea needs no 3-D to be understood: let us optimize the
# pixels of one picture until a text-to-image model finds that it looks like the text. The model is
# the embedded one (`guidance/tiny/`): 32 x 32 pixels, 16 objects, real Stable Diffusion layout.

# %%
import os
from pathlib import Path

import torch
from PIL import Image

from guidance import sds
from guidance.gaussian import Gaussian
from guidance.sample import sample
from guidance.stable_diffusion import StableDiffusion

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "run_dreamfusion.py").exists())
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 200))  # tests run a few


def show(pictures, name):
    """Display pictures [N, 3, H, W] side by side; outside a notebook, save them."""
    row = torch.cat(list(pictures.detach().clamp(0, 1)), dim=-1).permute(1, 2, 0)
    image = Image.fromarray((row * 255).byte().cpu().numpy())
    image = image.resize((4 * image.width, 4 * image.height), Image.NEAREST)
    if "get_ipython" in globals():
        display(image, include=["image/png"])  # noqa: F821
    elif folder := os.environ.get("NOTEBOOK_PICTURES"):
        image.save(Path(folder) / f"{name}.png")


# %% [markdown]
# ## 1. What a diffusion model knows
# A picture $x_0$ is drowned in noise, $x_t = \sqrt{a_t} x_0 + \sqrt{1 - a_t}\,\epsilon$, and a
# U-Net learns to find the noise again, given the text. Ask it over and over, from pure noise: it
# *samples*.

# %%
prior = StableDiffusion(ROOT / "guidance/tiny/model", "cpu", local_files_only=True)
TEXT = "a red cone"
show(sample(prior, [TEXT] * 4, scale=5.0, steps=12), "samples")

# %% [markdown]
# ## 2. One look through noise
# The model's idea of the noise says which clean picture it has in mind, $\hat x_0 = (x_t -
# \sqrt{1 - a_t}\,\hat\epsilon) / \sqrt{a_t}$. Here is a gray picture, noised to three levels, and
# what the model takes it for. Much noise: the text decides. Little: the picture does.

# %%
gray = torch.full((1, 3, 32, 32), 0.5)
words, nothing = prior.embed([TEXT]), prior.embed([""])
generator = torch.Generator().manual_seed(0)
seen = []
with torch.no_grad():
    for t in (950, 600, 100):
        t = torch.tensor([t])
        a, latents = prior.alphas_cumprod[t], prior.encode(gray, None)
        noisy = sds.add_noise(latents, torch.randn(latents.shape, generator=generator), a)
        output = prior.predict(noisy.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([nothing, words]))
        sides = [sds.to_epsilon(o, noisy, a, prior.prediction_type) for o in output.chunk(2)]
        epsilon = sds.guide(*sides, 5.0)
        seen.append(prior.decode(sds.predict_x0(epsilon, noisy, a)))
show(torch.cat(seen), "one_look")

# %% [markdown]
# ## 3. The gradient of score distillation
# Noise our picture, let the model find the noise, and compare with what was really added:
#
# $$ \nabla = w(t)\,(\hat\epsilon(x_t; t, \text{text}) - \epsilon) $$
#
# The difference points from our picture to what the model would rather see. It is *used as* a
# gradient: the U-Net itself is never differentiated. Its "loss" has no value that means anything.
# Guidance makes the text count more: $\hat\epsilon = u + s\,(c - u)$ with the answers without and
# with text. *In the project:* `sds.distill`, which also does the weightings, VSD and CSD.


# %%
def dream(
    prior, conditions, *, scale, steps=STEPS, t_range=(0.02, 0.98), size=32, seed=0, rate=0.03
):
    """Optimize one picture; how it looked at a quarter, half and the end: [3, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.full((1, 3, size, size), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([picture], lr=rate)
    recipe, looks = sds.Recipe(kind="sds", scale=scale, t_range=t_range), []
    for step in range(steps):
        noise = sds.draw_noise(1, prior.latent_shape(size, size), generator)
        loss = sds.distill(prior, picture, conditions, noise, recipe).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in (steps // 4, steps // 2, steps):
            looks.append(picture.detach().clone())
    return torch.cat(looks)


# %% [markdown]
# ## 4. A prior that is known exactly
# Before trusting this with a network: a prior whose perfect answer is a formula, pictures normally
# distributed around one known picture $\mu$. Score distillation must find $\mu$, and it does: from
# left to right the way there, and $\mu$ itself. *In the project:* `--guidance gaussian` tests the
# whole loop in this way.

# %%
column = torch.linspace(0, 1, 32)
mu = torch.stack([column.expand(32, 32), column[:, None].expand(32, 32), torch.full((32, 32), 0.3)])
known = Gaussian(torch.device("cpu"))
looks = dream(known, sds.Conditions(mu[None], mu[None]), scale=1.0)
show(torch.cat([looks, mu[None]]), "gaussian")
error = (looks[-1] - mu).abs().mean().item()
print(f"mean distance from mu: {error:.3f} (it began at {(0.5 - mu).abs().mean():.3f})")
assert error < (0.5 - mu).abs().mean()

# %% [markdown]
# ## 5. A text, and how much it counts
# Rows: guidance scale 1, 7.5 and 50. With 1 the cone is dull, on a busy background: score
# distillation looks for the *most probable* picture, not a typical one, and averages over all that
# fit. More guidance makes it definite, and its colors too strong: DreamFusion uses 100 where
# sampling uses 7.5.

# %%
conditions = sds.Conditions(nothing, words)
for scale in (1.0, 7.5, 50.0):
    print("guidance scale", scale)
    show(dream(prior, conditions, scale=scale), f"scale_{scale:g}")

# %% [markdown]
# ## 6. Two seeds, one answer
# Samples differ from seed to seed; distilled pictures resemble each other: mode seeking.
# Variational score distillation (`--guidance vsd`) replaces $\epsilon$ by what a second network,
# which learns how our own renders look, finds, and gets samples' variety back.

# %%
last = [dream(prior, conditions, scale=7.5, seed=seed)[-1:] for seed in (1, 2)]
show(torch.cat(last), "seeds")

# %% [markdown]
# ## 7. Which noise levels
# Left: only much noise, `t` in [0.7, 0.98]: shape without detail. Right: only little, [0.02, 0.3]:
# the model believes the gray picture and makes a texture of it. The project's recipe begins with
# much and ends with little (`t_max` in `configs/dream_tiny.txt`).

# %%
ranges = ((0.7, 0.98), (0.02, 0.3))
show(torch.cat([dream(prior, conditions, scale=7.5, t_range=r)[-1:] for r in ranges]), "ranges")

# %% [markdown]
# ## 8. How a word reaches the picture: an attention processor of one's own
# In *cross-attention* each pixel asks (`q`) which words concern it (`k`) and takes up what they say
# (`v`): `softmax(q k^T) v`. diffusers calls any object that computes this. Here it is in plain
# PyTorch, with one change: the weight of one word is multiplied. From left to right "white" counts
# 0, 1 and 3 times. *In the project:* `guidance/attention.py` draws these weights (`--i_attn`), and
# `guidance.sample --prompt_target` gives one prompt's to another (prompt-to-prompt).


# %%
class Reweighted:
    """Attention in which the text's token ``token`` counts ``factor`` times (Hertz et al. 2022)."""

    def __init__(self, token, factor):
        self.token, self.factor = token, factor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        is_cross = encoder_hidden_states is not None
        words = encoder_hidden_states if is_cross else hidden_states
        inputs = ((attn.to_q, hidden_states), (attn.to_k, words), (attn.to_v, words))
        q, k, v = (attn.head_to_batch_dim(layer(x)) for layer, x in inputs)
        weights = torch.softmax(q @ k.transpose(1, 2) * attn.scale, dim=-1)  # [rows, pixels, words]
        if is_cross:  # the second half of the rows has the text, the first half has none
            weights[len(weights) // 2 :, :, self.token] *= self.factor
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


STEM = "a red mushroom with a white stem"
white = prior.tokens(STEM).index("white") + 1  # after the start token
looks, own = [], dict(prior.unet.attn_processors)
for factor in (0.0, 1.0, 3.0):
    prior.unet.set_attn_processor(Reweighted(white, factor))
    looks.append(sample(prior, [STEM], scale=5.0, steps=12, seed=1))
prior.unet.set_attn_processor(own)
show(torch.cat(looks), "reweighted")

# %% [markdown]
# From here to 3-D is one step: instead of pixels, optimize a field whose *rendering* from a random
# camera is the picture, and tell the model from where it looks ("a red cone, back view").
# `python run_dreamfusion.py --space 2d` is this notebook with every flag; without it, it is 3-D.
