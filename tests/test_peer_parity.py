"""The same numbers as nerf-pytorch: against renders, gradients and losses that it computed itself.

Runs where ../shared/peer is beside the checkout.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from nerf import build
from nerf.flags import nerf as nerf_flags
from nerf.rays import Rays, pixels_to_rays, rays_to_ndc
from nerf.renderer import Rendered
from nerf.training import checkpoint
from nerf.volume import disparity

PEER = Path(__file__).resolve().parents[2] / "shared" / "peer"
pytestmark = pytest.mark.skipif(not PEER.is_dir(), reason="needs ../shared/peer")

RUNS = {"lego_small": "004251.tar", "fern_paper": "000012.tar"}


class Run:
    """One reference run: our renderer with its weights, and what it recorded."""

    def __init__(self, name: str):
        folder = PEER / name
        self.args = nerf_flags.parse(["--config", str(folder / "config.txt")])
        self.path = folder / RUNS[name]
        self.state = checkpoint.load_checkpoint(self.path)
        self.reference = np.load(folder / "reference.npz")
        self.renderer = build.build_renderer(self.args)
        checkpoint.load_strictly(
            self.renderer.coarse, self.state["network_fn_state_dict"], "coarse"
        )
        checkpoint.load_strictly(self.renderer.fine, self.state["network_fine_state_dict"], "fine")
        self.height, self.width = int(self.reference["H"]), int(self.reference["W"])
        matrix = self.reference["K"]
        self.intrinsics = torch.tensor(
            [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]], dtype=torch.float32
        )
        self.bounds = float(self.reference["near"]), float(self.reference["far"])

    def to_ndc(self, rays: Rays) -> Rays:
        if self.args.dataset_type == "llff":
            return rays_to_ndc(rays, self.height, self.width, self.intrinsics)
        return rays

    def view(self, number: int) -> tuple[Rays, np.ndarray]:
        key = f"pix_{number}"
        pixels = np.arange(self.height * self.width)
        if key in self.reference:
            pixels = self.reference[key]
        x, y = torch.tensor(pixels % self.width), torch.tensor(pixels // self.width)
        c2w = torch.from_numpy(self.reference["poses"][number])
        rays = pixels_to_rays(x.float(), y.float(), self.intrinsics, c2w, self.bounds)
        return self.to_ndc(rays), pixels

    def batch(self) -> tuple[Rays, torch.Tensor]:
        origins = torch.from_numpy(self.reference["traj_rays_o"])
        directions = torch.from_numpy(self.reference["traj_rays_d"])
        near, far = (torch.full((len(origins), 1), bound) for bound in self.bounds)
        viewdirs = directions / directions.norm(dim=-1, keepdim=True)
        rays = Rays(origins, directions, viewdirs, near, far)
        return self.to_ndc(rays), torch.from_numpy(self.reference["traj_target"])

    def loss(self, rays: Rays, target: torch.Tensor) -> torch.Tensor:
        return sum(((level.rgb - target) ** 2).mean() for level in self.renderer(rays))


@pytest.fixture(params=RUNS, scope="module")
def run(request) -> Run:
    return Run(request.param)


@pytest.mark.parametrize("number", [0, 1])
def test_renders_agree_within_1e_4(run, number):
    rays, pixels = run.view(number)
    with torch.no_grad():
        parts = [
            run.renderer(rays.part(slice(start, start + 1000)))
            for start in range(0, len(pixels), 1000)
        ]
    coarse, fine = (
        Rendered(*(torch.cat(members) for members in zip(*level, strict=True)))
        for level in zip(*parts, strict=True)
    )

    def reference(name: str) -> torch.Tensor:
        return torch.from_numpy(run.reference[f"{name}_{number}"]).reshape(len(pixels), -1)

    assert (fine.rgb - reference("rgb")).abs().max() < 1e-4
    assert (coarse.rgb - reference("rgb0")).abs().max() < 1e-4
    opacity = reference("acc")[:, 0]
    assert (fine.opacity - opacity).abs().max() < 1e-4
    seen = opacity > 0.01
    assert (disparity(fine.depth) - reference("disp")[:, 0])[seen].abs().max() < 1e-4
    assert torch.isfinite(disparity(fine.depth)).all()


@pytest.mark.slow
def test_first_gradients_and_twenty_losses_agree():
    for name in RUNS:
        run = Run(name)  # fresh weights: this test trains them
        rays, target = run.batch()
        optimizer = torch.optim.Adam(run.renderer.parameters(), lr=5e-4, fused=True)
        losses = []
        for step in range(20):
            loss = run.loss(rays, target)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                norms = [parameter.grad.norm().item() for parameter in run.renderer.parameters()]
                np.testing.assert_allclose(norms, run.reference["traj_grad_norm"], rtol=1e-4)
            optimizer.step()
            losses.append(loss.item())
        np.testing.assert_allclose(losses, run.reference["traj_losses"], rtol=1e-4)


def test_its_optimizer_state_and_step_resume(run):
    optimizer = torch.optim.Adam(run.renderer.parameters(), lr=5e-4, fused=True)
    checkpoint.load_optimizer(optimizer, run.state["optimizer_state_dict"], "peer")
    saved = run.state["optimizer_state_dict"]["state"]
    for number, parameter in enumerate(run.renderer.parameters()):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], saved[number]["exp_avg"])
    assert optimizer.param_groups[0]["fused"] is True
    assert checkpoint.finished_updates(run.state) == int(saved[0]["step"])
