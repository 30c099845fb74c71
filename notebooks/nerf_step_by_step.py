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
# embedded demo scene, in about two minutes on two CPU cores. Each step ends with where the
# project does the same thing. Run it from the repository's root or from `notebooks/`; the scene is
# rendered on first use, and nothing is downloaded.

# %%
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "run_nerf.py").exists())
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 2000))  # tests run a few
torch.manual_seed(0)


def show(picture, name):
    """Display [H, W, 3] in [0, 1]; outside a notebook, save it where NOTEBOOK_PICTURES says."""
    image = Image.fromarray((picture.clamp(0, 1) * 255).byte().cpu().numpy())
    image = image.resize((4 * image.width, 4 * image.height), Image.NEAREST)
    if "get_ipython" in globals():
        display(image, include=["image/png"])  # noqa: F821
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
images = torch.stack([scene.picture(view) for view in train])  # [V, H, W, 3], over white
masks = scene.images[train][..., 3] > 0  # [V, H, W], where a picture shows more than background
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
    def __init__(self, width=64, position=7, direction=2):
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
        # Never negative; times 10, because a surface is opaque within a tenth of the scene's units.
        sigma = 10 * nn.functional.softplus(self.density(features)[..., 0] - 1.0)
        seen = encode(nn.functional.normalize(directions, dim=-1), self.direction)
        return sigma, self.color(torch.cat([features, seen], -1)).sigmoid()


# %% [markdown]
# ## 4. From samples to a color
# Light that reaches the camera from a sample has passed all samples before it. With intervals
# $\delta_i$, opacity $\alpha_i = 1 - e^{-\sigma_i \delta_i}$ and transmittance
# $T_i = e^{-\sum_{j<i} \sigma_j \delta_j}$, the weights are $w_i = T_i \alpha_i$ (equation 3).
# Samples are jittered in their intervals, so that over many steps every depth is asked for.
# *In the project:* `nerf/volume.py`; the last lines of the cell check that both agree.


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


# %% [markdown]
# ## 5. Where nothing can be
# Most of a ray passes through empty air, and every sample there costs as much as one on a surface.
# The pictures say where the air is: a point that *any* picture shows as background is empty. What
# is left is the visual hull, here as a grid of 64 x 64 x 64 cells. The field is evaluated only for
# samples inside it, one in ten. That also leaves no room for white fog around the object, which
# would fit the training pictures and no others. Below: the hull from the front, the side and
# above. What lies under the floor stays, because no camera looks there.
#
# NeRF itself knows no masks; it trains a second network whose samples lie where a first one found
# density (section 5.2). *In the project:* `nerf/scene_bounds.py` (`--hull_init`) and
# `nerf/occupancy.py`, a grid that follows the density while it is learned; NeRF's own way is
# `sample_pdf` in `nerf/volume.py`.

# %%
CELLS, BOUND = 64, 1.25  # the scene lies within [-BOUND, BOUND] in x, y and z


def visual_hull():
    """Cells [CELLS, CELLS, CELLS] bool that no picture shows as background."""
    middle = (torch.arange(CELLS) + 0.5) / CELLS * 2 * BOUND - BOUND
    points = torch.stack(torch.meshgrid(middle, middle, middle, indexing="ij"), -1)
    possible = torch.ones(CELLS, CELLS, CELLS, dtype=torch.bool)
    for mask, c2w in zip(masks, poses[train], strict=True):
        x, y, z = ((points - c2w[:, 3]) @ c2w[:, :3]).unbind(-1)  # in the camera, which looks at -z
        column, row = (focal * x / -z + W / 2).long(), (focal * -y / -z + H / 2).long()
        # A cell is about as wide as a pixel: one pixel of margin keeps all that touch the object.
        wide = nn.functional.max_pool2d(mask[None].float(), 3, stride=1, padding=1)[0] > 0
        inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
        possible &= ~inside | wide[row.clamp(0, H - 1), column.clamp(0, W - 1)]
    return possible


hull = visual_hull()
print(f"{hull.float().mean():.0%} of the box may hold something")
front, side, top = (hull.float().mean(axis) for axis in (1, 0, 2))  # how full, along each axis
plan = torch.cat([front.T.flip(0), side.T.flip(0), top.T.flip(0)], dim=1)
show(1 - plan[..., None].expand(-1, -1, 3), "hull")


# %%
def in_hull(points):
    cell = ((points / BOUND + 1) / 2 * CELLS).long()
    inside = ((cell >= 0) & (cell < CELLS)).all(-1)
    x, y, z = cell.clamp(0, CELLS - 1).unbind(-1)
    return inside & hull[x, y, z]


def render(field, origins, directions, samples=96, jitter=True):
    t = torch.linspace(2.0, 6.0, samples + 1)
    shift = torch.rand(len(origins), samples) if jitter else 0.5
    t = t[:-1] + (t[1:] - t[:-1]) * shift  # one sample in each interval
    t = t.expand(len(origins), samples)
    points = origins[:, None] + t[..., None] * directions[:, None]
    kept = in_hull(points)
    sigma, rgb = torch.zeros(points.shape[:-1]), torch.zeros(points.shape)  # elsewhere: empty
    sigma[kept], rgb[kept] = field(points[kept], directions[:, None].expand_as(points)[kept])
    return composite(sigma, rgb, t, directions.norm(dim=-1, keepdim=True))


@torch.no_grad()
def picture_of(field, c2w):
    """The field seen from c2w [3, 4]: color [H, W, 3], depth [H, W, 1] and opacity [H, W, 1]."""
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    rays = rays_of(c2w, column.reshape(-1).float(), row.reshape(-1).float())
    blocks = zip(*(part.split(1024) for part in rays), strict=True)
    parts = [render(field, *block, jitter=False) for block in blocks]
    color = torch.cat([part[0] for part in parts]).view(H, W, 3)
    opacity = torch.cat([part[2].sum(-1) for part in parts]).view(H, W, 1)
    depth = torch.cat([part[1] for part in parts]).view(H, W, 1) / opacity.clamp(min=1e-3)
    return color, depth, opacity


# %% [markdown]
# ## 6. Training
# Random rays of random pictures, squared error, Adam: that is all. Below, a view that is never
# trained on, after 1/40, 1/10, 1/4 and all of the steps. *In the project:* `run_nerf.py` adds
# precision, checkpoints and several processes; its fast path replaces the MLP by features on
# planes, which learn faster still.

# %%
field = Field()
optimizer = torch.optim.Adam(field.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
looks = []
for step in range(STEPS):
    view, row, column = (torch.randint(n, (1024,)) for n in (len(images), H, W))
    rays = rays_of(poses[torch.as_tensor(train)[view]], column.float(), row.float())
    color, _, _ = render(field, *rays)
    loss = ((color - images[view, row, column]) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % max(1, STEPS // 8) == 0:
        print(f"step {step}: PSNR of the batch {-10 * loss.log10().item():.1f} dB")
    if step + 1 in (STEPS // 40, STEPS // 10, STEPS // 4, STEPS):
        looks.append(picture_of(field, poses[test[0]])[0])
show(torch.cat(looks, dim=1), "training")

# %% [markdown]
# ## 7. Views that were never trained on
# Left to right: the photo, ours, where they differ, and depth. PSNR is $-10 \log_{10}$ of the mean
# squared error: 20 dB is blurred, 30 dB is good. What differs most are highlights and the edges of
# textures.

# %%
rows, psnrs = [], []
for view in test:
    color, depth, opacity = picture_of(field, poses[view])
    target = scene.picture(view)
    psnrs.append(-10 * ((color - target) ** 2).mean().log10().item())
    near = ((6 - depth) / 4 * opacity).expand(-1, -1, 3)
    rows.append(torch.cat([target, color, (color - target).abs(), near], dim=1))
show(torch.cat(rows[:2]), "test_views")
print("PSNR of each test view:", ", ".join(f"{psnr:.1f}" for psnr in psnrs))
print(f"mean of {len(test)} test views: {sum(psnrs) / len(psnrs):.1f} dB")

# %% [markdown]
# ## What to try
# * `encode` with no frequencies: blur, whatever else you do.
# * `jitter=False` in training: samples are always at the same depths.
# * Leave the view direction out: highlights stick to the surface.
# * `hull = torch.ones_like(hull)`: the whole box is evaluated, four times as many samples a step.
#
# What each such detail costs in dB is measured in `docs/details.md`.
