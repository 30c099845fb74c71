# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A neural radiance field, step by step
#
# Posed pictures in, a volume that can be seen from anywhere out: everything NeRF needs
# ([Mildenhall et al. 2020](https://arxiv.org/abs/2003.08934)) in about a hundred lines, on the
# embedded demo scene, in two or three minutes on a laptop. Each step ends with where the project
# does the same thing properly. Run it from the repository's root or from `notebooks/`.

# %%
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "run_nerf.py").exists())
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 800))  # tests run a few
torch.manual_seed(0)


def show(picture, name):
    """Display [H, W, 3] in [0, 1]; outside a notebook, save it where NOTEBOOK_PICTURES says."""
    image = Image.fromarray((picture.clamp(0, 1) * 255).byte().cpu().numpy())
    image = image.resize((4 * image.width, 4 * image.height), Image.NEAREST)
    if "get_ipython" in globals():
        display(image)  # noqa: F821
    elif folder := os.environ.get("NOTEBOOK_PICTURES"):
        image.save(Path(folder) / f"{name}.png")


# %% [markdown]
# ## 1. Pictures and where they were taken from
# A scene is pictures, and for each the camera's pose `c2w`: a rotation and a position that take
# camera coordinates to world coordinates. The camera looks along its own -z; x is right, y up.

# %%
DATA = ROOT / "data" / "demo"
if not (DATA / "transforms_train.json").exists():
    subprocess.run([sys.executable, ROOT / "data" / "make_demo.py", "--out", DATA], check=True)

from nerf.datasets import blender

scene = blender.load(DATA, downscale=2, testskip=5, background=1.0)
train, test = scene.splits["train"], scene.splits["test"]
images = torch.stack([scene.picture(view) for view in train])  # [V, H, W, 3]
poses, focal = scene.c2w, float(scene.intrinsics[0, 0])
H, W = images.shape[1:3]
print(f"{len(images)} pictures of {H} x {W}, focal length {focal:.1f} pixels")
show(torch.cat(list(images[:4]), dim=1), "pictures")

# %% [markdown]
# ## 2. Rays
# Through the center of each pixel goes one ray, `o + t d`. *In the project:* `nerf/rays.py`;
# nerf-pytorch shoots through pixel corners, which `docs/details.md` says the cost of.


# %%
def rays_of(c2w, column, row):
    """Origins and directions [..., 3] of pixels; directions have z = -1 in the camera."""
    x, y = (column + 0.5 - W / 2) / focal, -(row + 0.5 - H / 2) / focal
    directions = torch.stack([x, y, -torch.ones_like(x)], -1)
    rotated = (c2w[..., :3] @ directions[..., None])[..., 0]
    return c2w[..., 3].expand_as(rotated), rotated


# %% [markdown]
# ## 3. The field: position and direction to density and color
# A small MLP cannot follow fine detail in raw coordinates; sines and cosines of growing frequency
# let it (equation 4). Density must depend on the position alone; color may depend on the
# direction, too. *In the project:* `nerf/encodings.py`, `nerf/field.py`.


# %%
def encode(x, frequencies):
    angles = (x[..., None] * 2.0 ** torch.arange(frequencies)).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], -1)


class Field(nn.Module):
    def __init__(self, width=96, position=6, direction=2):
        super().__init__()
        self.position, self.direction = position, direction
        layers, inputs = [], 3 + 6 * position
        for _ in range(4):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.trunk, self.density = nn.Sequential(*layers), nn.Linear(width, 1)
        self.color = nn.Sequential(
            nn.Linear(width + 3 + 6 * direction, width // 2), nn.ReLU(), nn.Linear(width // 2, 3)
        )

    def forward(self, points, directions):
        features = self.trunk(encode(points, self.position))
        sigma = nn.functional.softplus(self.density(features)[..., 0] - 1.0)  # never negative
        seen = encode(nn.functional.normalize(directions, dim=-1), self.direction)
        return sigma, self.color(torch.cat([features, seen], -1)).sigmoid()


# %% [markdown]
# ## 4. From samples to a color
# Light that reaches the camera from a sample has passed all samples before it. With intervals
# $\delta_i$, opacity $\alpha_i = 1 - e^{-\sigma_i \delta_i}$ and transmittance
# $T_i = e^{-\sum_{j<i} \sigma_j \delta_j}$, the weights are $w_i = T_i \alpha_i$ (equation 3).
# Samples are jittered in their intervals, so that over many steps every depth is asked for.
# *In the project:* `nerf/volume.py`, which needs a check: do both agree?


# %%
def composite(sigma, rgb, t, length):
    delta = torch.cat([t[..., 1:] - t[..., :-1], torch.full_like(t[..., :1], 1e10)], -1)
    optical = sigma * delta * length
    before = torch.cumsum(optical[..., :-1], -1)  # without the endless last one: 1e10 eats digits
    before = torch.cat([torch.zeros_like(t[..., :1]), before], -1)
    weights = torch.exp(-before) * (1 - torch.exp(-optical))
    color = (weights[..., None] * rgb).sum(-2) + (1 - weights.sum(-1, keepdim=True))  # over white
    return color, (weights * t).sum(-1), weights


from nerf.volume import blend_weights, interval_lengths

t = torch.linspace(2, 6, 16).expand(8, 16)
sigma, d = torch.rand(8, 16) * 3, torch.randn(8, 3)
mine = composite(sigma, torch.rand(8, 16, 3), t, d.norm(dim=-1, keepdim=True))[2]
project = blend_weights(sigma, interval_lengths(t, d))
print("largest difference from nerf/volume.py:", float((mine - project).abs().max()))
assert torch.allclose(mine, project, atol=1e-5)


# %%
def render(field, origins, directions, samples=48, jitter=True):
    t = torch.linspace(2.0, 6.0, samples + 1)
    shift = torch.rand(len(origins), samples) if jitter else 0.5
    t = t[:-1] + (t[1:] - t[:-1]) * shift  # one sample in each interval
    t = t.expand(len(origins), samples)
    points = origins[:, None] + t[..., None] * directions[:, None]
    sigma, rgb = field(points, directions[:, None].expand_as(points))
    return composite(sigma, rgb, t, directions.norm(dim=-1, keepdim=True))


# %% [markdown]
# ## 5. Training
# Random rays of random pictures, squared error, Adam: that is all. *In the project:* `run_nerf.py`
# adds a second, fine network, precision, checkpoints, several processes; the fast path replaces
# the MLP by features on planes and skips empty space, which is some twenty times as fast.

# %%
field = Field()
optimizer = torch.optim.Adam(field.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for step in range(STEPS):
    view, row, column = (torch.randint(n, (512,)) for n in (len(images), H, W))
    rays = rays_of(poses[torch.as_tensor(train)[view]], column.float(), row.float())
    color, _, _ = render(field, *rays)
    loss = ((color - images[view, row, column]) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % max(1, STEPS // 8) == 0:
        print(f"step {step}: PSNR of the batch {-10 * loss.log10().item():.1f} dB")

# %% [markdown]
# ## 6. A view that was never trained on
# Left to right: the photo, ours, where they differ, and depth. PSNR is
# $-10 \log_{10}$ of the mean squared error: 20 dB is blurred, 30 dB is good.

# %%
row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
with torch.no_grad():
    rays = rays_of(poses[test[0]], column.reshape(-1).float(), row.reshape(-1).float())
    blocks = zip(*(part.split(2048) for part in rays), strict=True)
    parts = [render(field, *block, jitter=False) for block in blocks]
color = torch.cat([part[0] for part in parts]).view(H, W, 3)
opacity = torch.cat([part[2].sum(-1) for part in parts]).view(H, W, 1)
depth = torch.cat([part[1] for part in parts]).view(H, W, 1) / opacity.clamp(min=1e-3)
target = scene.picture(test[0])
psnr = -10 * ((color - target) ** 2).mean().log10().item()
print(f"a test view: {psnr:.1f} dB")
near = ((6 - depth) / 4 * opacity).expand(-1, -1, 3)
show(torch.cat([target, color, (color - target).abs(), near], dim=1), "test_view")

# %% [markdown]
# ## What to try
# * `encode` with no frequencies: blur, whatever else you do.
# * `jitter=False` in training: samples are always at the same depths.
# * Leave the view direction out: highlights stick to the surface.
#
# What each such detail costs in dB is measured in `docs/details.md`.
