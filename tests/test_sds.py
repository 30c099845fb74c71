"""Score distillation against closed forms: conversions, guidance scale, the gradient itself."""

import pytest
import torch
from torch.nn import functional as F

from guidance import sds
from guidance.gaussian import Gaussian, ball

SIZE = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, generator=generator(seed))


ALPHA_BAR = torch.tensor([0.9991, 0.5, 0.0047])
CLEAN, NOISE = normal(3, 4, SIZE, SIZE, seed=1), normal(3, 4, SIZE, SIZE, seed=2)


@pytest.mark.parametrize("kind", sorted(sds.TO_EPSILON))
def test_every_prediction_type_converts_to_the_noise(kind):
    noisy = sds.add_noise(CLEAN, NOISE, ALPHA_BAR)
    a = ALPHA_BAR.view(-1, 1, 1, 1)
    perfect = {
        "epsilon": NOISE,
        "v_prediction": a.sqrt() * NOISE - (1 - a).sqrt() * CLEAN,
        "sample": CLEAN,
    }[kind]
    found = sds.to_epsilon(perfect, noisy, ALPHA_BAR, kind)
    # From x0, rounding errors in the noise grow by 1 / sqrt(1 - a), most at the smallest t.
    torch.testing.assert_close(found, NOISE, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(sds.predict_x0(found, noisy, ALPHA_BAR), CLEAN, atol=2e-4, rtol=1e-3)


def test_guidance_scale_one_is_the_text_and_zero_is_without_it():
    negative, text = CLEAN, NOISE
    torch.testing.assert_close(sds.guide(negative, text, 1.0), text)
    torch.testing.assert_close(sds.guide(negative, text, 0.0), negative)
    torch.testing.assert_close(sds.guide(negative, text, 3.0), 3 * text - 2 * negative)


@pytest.mark.parametrize("limits", [(0.02, 0.98), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_timesteps_fill_their_range_and_never_leave_it(limits):
    u = torch.linspace(0, 1, 10001)[:-1]
    t = sds.timesteps(u, limits, 1000)
    low, high = int(limits[0] * 1000), min(int(limits[1] * 1000), 999)
    assert (t.min(), t.max()) == (min(low, 999), high) and t.dtype == torch.long
    assert len(t.unique()) == high - min(low, 999) + 1


def test_weightings_at_both_ends():
    a = torch.tensor([1.0, 0.0])
    for progress in (0.0, 1.0):
        assert sds.WEIGHTINGS["sds"](a, progress).tolist() == [0, 1]
        assert sds.WEIGHTINGS["uniform"](a, progress).tolist() == [1, 1]
        assert sds.WEIGHTINGS["fantasia3d"](a, progress).tolist() == [0, 0]


def test_the_annealed_weighting_goes_from_sds_to_uniform():
    a = torch.linspace(0.01, 0.99, 9)
    annealed = sds.WEIGHTINGS["annealed"]
    torch.testing.assert_close(annealed(a, 0.0), sds.WEIGHTINGS["sds"](a, 0.0))
    torch.testing.assert_close(annealed(a, 1.0), sds.WEIGHTINGS["uniform"](a, 1.0))
    assert (annealed(a, 0.5) > annealed(a, 0.0)).all()


@pytest.mark.parametrize("factor", [1.0, 1024.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_is_scaled_by_loss_weight_and_scaler(factor, dtype):
    latents = CLEAN.clone().to(dtype).detach().requires_grad_()
    gradient = (0.01 * NOISE).detach().requires_grad_()
    loss = sds.SpecifyGradient.apply(latents, gradient)
    (factor * loss).backward()
    torch.testing.assert_close(latents.grad, (factor * gradient).to(dtype), rtol=1e-3, atol=0)
    assert gradient.grad is None and loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), 0.5 * gradient.detach().square().sum())


def test_one_sds_step_against_algebra():
    """For x0 ~ N(mu, s^2) the expected gradient is w sqrt(1-a) sqrt(a) (x - mu) / (a s^2 + 1-a)."""
    prior = Gaussian(torch.device("cpu"), deviation=0.3)
    mu = torch.rand(1, 3, SIZE, SIZE, generator=generator(3)).expand(2048, -1, -1, -1)
    images = torch.full((2048, 3, SIZE, SIZE), 0.5, requires_grad=True)
    noise = sds.draw_noise(2048, prior.latent_shape(SIZE, SIZE), generator(4))
    noise = noise._replace(epsilon=torch.cat([noise.epsilon[:1024], -noise.epsilon[:1024]]))
    recipe = sds.Recipe(t_range=(0.4, 0.4), scale=7.0)
    out = sds.distill(prior, images, sds.Conditions(mu, mu), noise, recipe)
    out.loss.backward()
    a = prior.alphas_cumprod[400]
    assert (out.t == 400).all() and out.skipped == 0
    expected = (
        (1 - a) * (1 - a).sqrt() * a.sqrt() * (2 * (0.5 - mu[0])) / (a * 0.3**2 + 1 - a)
    )  # per latent; a latent is 2 pixel - 1
    # The rest of the gradient is odd in the noise, so +noise and -noise cancel it.
    torch.testing.assert_close(images.grad.sum(0) / 2, expected, atol=1e-4, rtol=1e-3)


def test_sds_turns_any_picture_into_mu():
    """Gradient descent on pixels ends at mu, whatever it starts from."""
    prior = Gaussian(torch.device("cpu"))
    mu = torch.rand(2, 3, SIZE, SIZE, generator=generator(5))
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator(6), requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.03)
    for step in range(300):
        noise = sds.draw_noise(2, prior.latent_shape(SIZE, SIZE), generator(step))
        recipe = sds.Recipe(t_range=(0.02, 0.5), scale=1.0)
        sds.distill(prior, images, sds.Conditions(mu, mu), noise, recipe).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
    assert F.mse_loss(images, mu) < 10 ** (-25 / 10)


class Broken(Gaussian):
    """A prior that overflows on the first view of a batch."""

    def predict(self, noisy, t, mu):
        output = super().predict(noisy, t, mu).clone()
        output[0, 0, 0, 0] = float("inf")
        return output


def test_a_view_that_overflows_is_left_out_and_counted():
    images = torch.rand(3, 3, SIZE, SIZE, generator=generator(7), requires_grad=True)
    noise = sds.draw_noise(3, (3, SIZE, SIZE), generator(8))
    recipe = sds.Recipe(t_range=(0.1, 0.9), scale=2.0, weighting="uniform")
    conditions = sds.Conditions(torch.zeros_like(images), torch.ones_like(images))
    out = sds.distill(Broken(torch.device("cpu")), images, conditions, noise, recipe)
    out.loss.backward()
    assert out.skipped == 1 and images.grad[0].abs().max() == 0
    whole = images.detach().clone().requires_grad_()
    sds.distill(Gaussian(torch.device("cpu")), whole, conditions, noise, recipe).loss.backward()
    torch.testing.assert_close(images.grad[1:], whole.grad[1:])


def test_the_loss_is_a_mean_over_views():
    prior = Gaussian(torch.device("cpu"))
    images = torch.rand(4, 3, SIZE, SIZE, generator=generator(9), requires_grad=True)
    mu, noise = torch.zeros(4, 3, SIZE, SIZE), sds.draw_noise(4, (3, SIZE, SIZE), generator(10))
    recipe = sds.Recipe(scale=1.0)
    sds.distill(prior, images, sds.Conditions(mu, mu), noise, recipe).loss.backward()
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        own = images.detach()[part].requires_grad_()
        conditions = sds.Conditions(mu[part], mu[part])
        sds.distill(prior, own, conditions, noise.part(part), recipe).loss.backward()
        halves.append(own.grad / 2)  # as DDP averages
    torch.testing.assert_close(images.grad, torch.cat(halves))


def scores(**others):
    """Random scores of two views."""
    shape = (2, 4, SIZE, SIZE)
    made = [torch.randn(shape, generator=generator(n)) for n in range(3)]
    return sds.Scores(*made, **others)


def test_residuals_differ_by_what_they_subtract():
    """sds - csd is u - eps; vsd is sds if eps_phi is eps, and csd if it is u."""
    predicted = scores()
    epsilon = sds.guided(predicted, 7.5)
    residuals = {kind: residual(epsilon, predicted._replace(lora=predicted.epsilon))
             for kind, residual in sds.RESIDUALS.items()}  # fmt: skip
    torch.testing.assert_close(
        residuals["sds"] - residuals["csd"], predicted.negative - predicted.epsilon
    )
    torch.testing.assert_close(residuals["vsd"], residuals["sds"])
    own = sds.vsd_residual(epsilon, predicted._replace(lora=predicted.negative))
    torch.testing.assert_close(own, residuals["csd"])
    text_alone = sds.csd_residual(sds.guided(predicted, 3.0), predicted)
    torch.testing.assert_close(text_alone, 3.0 * (predicted.text - predicted.negative))


def test_rescaling_gives_the_clean_latents_the_contrast_of_the_text_alone():
    """std(x0) goes from that of the guided to that of the text's x0; its direction stays."""
    alpha_bar = ALPHA_BAR[:2]
    noisy = sds.add_noise(CLEAN[:2], NOISE[:2], alpha_bar)
    predicted = scores()
    strong = sds.guided(predicted, 7.5)

    def x0(epsilon):
        return sds.predict_x0(epsilon, noisy, alpha_bar).flatten(1)

    weak, guided = x0(predicted.text), x0(strong)
    for fraction in (0.0, 0.25, 1.0):
        found = x0(sds.rescaled(strong, predicted.text, noisy, alpha_bar, fraction))
        wanted = (1 - fraction) * guided.std(1) + fraction * weak.std(1)
        torch.testing.assert_close(found.std(1), wanted, rtol=1e-4, atol=1e-5)
        cosine = F.cosine_similarity(found, guided)
        torch.testing.assert_close(cosine, torch.ones(2), rtol=0, atol=1e-5)
    same = sds.rescaled(predicted.text, predicted.text, noisy, alpha_bar, 1.0)  # as at scale 1
    torch.testing.assert_close(same, predicted.text, rtol=1e-4, atol=1e-4)


def test_rescaling_shrinks_the_gradient_and_zero_keeps_it_bit_for_bit():
    prior = Gaussian(torch.device("cpu"))
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator(11))
    noise = sds.draw_noise(2, (3, SIZE, SIZE), generator(12))
    other, text = torch.rand(2, 2, 3, SIZE, SIZE, generator=generator(13))

    def gradient(**fields):
        recipe = sds.Recipe(scale=7.5, t_range=(0.1, 0.8), **fields)
        return sds.distill(prior, images, sds.Conditions(other, text), noise, recipe).gradient

    plain = gradient()
    assert torch.equal(gradient(rescale=0.0), plain)
    assert gradient(rescale=1.0).norm() < 0.8 * plain.norm()


def test_resizing_keeps_ramps_means_and_what_fits():
    images = torch.rand(2, 3, 8, 8, generator=generator(14))
    assert sds.resized(images, 8) is images
    ramp = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    larger, smaller = sds.resized(ramp, 32), sds.resized(ramp, 4)
    step = (larger[0, 0, 0, 1:] - larger[0, 0, 0, :-1])[4:-4]  # but for the rim
    torch.testing.assert_close(step, torch.full_like(step, 1 / 28), atol=1e-5, rtol=0)
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 3, 8, 8)
    assert (sds.resized(stripes, 4) - 0.5).abs().max() < 0.15  # averaged, not picked
    torch.testing.assert_close(smaller.mean(), ramp.mean())


def test_the_perpendicular_part_is_perpendicular_and_the_rest_is_parallel():
    vector, axis = (torch.randn(3, 4, 5, 6, generator=generator(n)) for n in (1, 2))
    away = sds.perpendicular(vector, axis)
    assert (away * axis).sum((1, 2, 3)).abs().max() < 1e-4
    parallel = (vector - away).flatten(1)
    cosine = F.cosine_similarity(parallel, axis.flatten(1)).abs()
    torch.testing.assert_close(cosine, torch.ones(3))
    torch.testing.assert_close(
        sds.perpendicular(axis, axis), torch.zeros_like(axis), atol=1e-5, rtol=0
    )


def test_perp_neg_keeps_what_both_texts_share():
    predicted = scores()
    direction = predicted.text - predicted.negative
    plain = sds.guide(predicted.negative, predicted.text, 7.5)
    alike = predicted.negative + 2.0 * direction
    weight = torch.tensor([-1.0, -0.3])
    shared = predicted._replace(others=(alike,), weights=(weight,))
    torch.testing.assert_close(sds.guided(shared, 7.5), plain, atol=1e-4, rtol=1e-4)
    off = predicted._replace(others=(predicted.epsilon,), weights=(torch.zeros(2),))
    torch.testing.assert_close(sds.guided(off, 7.5), plain)
    pushed = sds.guided(predicted._replace(others=(predicted.epsilon,), weights=(weight,)), 7.5)
    other = predicted.epsilon - predicted.negative
    # It moves against the other text, and not along the prompt's own direction.
    moved = pushed - plain
    assert ((moved * other).sum((1, 2, 3)) < 0).all()
    assert (moved * direction).sum((1, 2, 3)).abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["linear", "sqrt", "falling"])
def test_annealed_timesteps_fall_from_end_to_end(kind):
    a = Gaussian(torch.device("cpu")).alphas_cumprod
    u, limits = torch.rand(3, generator=generator(1)), (0.02, 0.98)
    fell = [
        sds.pick_timesteps(u, sds.Recipe(t_range=limits, t_anneal=kind, progress=p / 50), a)
        for p in range(51)
    ]
    assert all((t == t[0]).all() for t in fell)
    values = [int(t[0]) for t in fell]
    assert values == sorted(values, reverse=True)
    assert values[0] == 980 and values[-1] <= 60
    if kind == "sqrt":
        assert values[25] < 500  # sooner down than along a line
    if kind == "linear":
        assert values[25] == 500


def test_clipping_bounds_every_number_of_the_gradient():
    prior = Gaussian(torch.device("cpu"))
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator(9), requires_grad=True)
    mu, noise = torch.zeros(2, 3, SIZE, SIZE), sds.draw_noise(2, (3, SIZE, SIZE), generator(10))
    out = [
        sds.distill(prior, images, sds.Conditions(mu, mu), noise, sds.Recipe(clip=clip)).gradient
        for clip in (0.0, 0.05)
    ]
    assert out[0].abs().max() > 0.05 / 2
    torch.testing.assert_close(out[1], out[0].clamp(-0.025, 0.025))  # a mean over two views


def test_the_ball_covers_what_a_ball_covers():
    origin = torch.tensor([0.0, 3.0, 0.0]).expand(2, 3)
    directions = torch.tensor([[0.0, -1.0, 0.0], [1.0, -1.0, 0.0]])
    seen = ball(origin, directions, torch.ones(2, 3))
    assert seen[0, 0] == pytest.approx(0.9) and seen[1].tolist() == [1, 1, 1]
    away = ball(origin, -directions, torch.ones(2, 3))  # behind the camera
    assert (away == 1).all()
