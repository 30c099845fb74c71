"""benchmarks/full_size.py: its parts add up, and both formulas are score distillation."""

from types import SimpleNamespace

import pytest
import torch
from helpers import CPU

from benchmarks import full_size
from guidance.stable_diffusion import StableDiffusion


@pytest.fixture(scope="module")
def prior(sd_folder):
    return StableDiffusion(sd_folder, CPU)


def unet(prior):
    return lambda noisy, t, text: prior.unet(noisy, t, encoder_hidden_states=text).sample


def test_parts_add_up_to_the_step(prior):
    calls = {"encode": lambda x: prior.vae.encode(x).latent_dist, "unet": unet(prior)}
    args = SimpleNamespace(views=2, steps=1, train_res=16)
    found = full_size.measure(prior, full_size.peer, calls, args, CPU)
    assert found["step"] == pytest.approx(found["encode"] + found["unet"] + found["rest"])
    assert min(found.values()) > 0


def test_the_peers_formula_gives_the_same_gradient(prior, monkeypatch):
    """The same noise for both: no posterior noise, t fixed; then the gradients are equal."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = prior.embed(["", "a cube"])
    conditions = full_size.sds.Conditions(text[:1].expand(2, -1, -1), text[1:].expand(2, -1, -1))
    size = prior.native_size
    epsilon = torch.randn(2, *prior.latent_shape(size, size))
    noise = full_size.sds.draw_noise(2, epsilon.shape[1:], torch.Generator())
    noise = noise._replace(epsilon=epsilon, posterior=torch.zeros_like(epsilon))
    monkeypatch.setattr(full_size.sds, "draw_noise", lambda *_: noise)
    monkeypatch.setattr(full_size.sds, "pick_timesteps", lambda *_: torch.tensor([500, 500]))
    monkeypatch.setattr(full_size.torch, "randint", lambda *_, **__: torch.tensor([500, 500]))
    monkeypatch.setattr(full_size.torch, "randn", lambda *_, **__: epsilon)

    def mean(pictures):  # of the posterior
        found = prior.vae.encode(pictures).latent_dist
        return SimpleNamespace(sample=lambda generator: found.mean)

    gradients = []
    programs = (
        (full_size.ours, (prior.encode, prior.predict)),
        (full_size.peer, (mean, unet(prior))),
    )
    for step, calls in programs:
        own = images.clone().requires_grad_()
        step(prior, own, conditions, torch.Generator(), *calls)
        gradients.append(own.grad)
    # Its target, latents - gradient, cuts digits off the gradient.
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()
