"""nerf.renderer: micro-batches, whole pictures, the empty scene, and optional compilation."""

import pytest
import torch
import torch.nn.functional as F

from nerf.build import compile_renderer
from nerf.encodings import TriPlane
from nerf.field import FeatureField, NeRFField
from nerf.occupancy import Box, OccupancyGrid
from nerf.occupancy_renderer import OccupancyRenderer
from nerf.outputs.render import block_size, render_view
from nerf.rays import Rays
from nerf.renderer import NeRFRenderer, Rendered, Renderer, squared_error

NUM_RAYS = 23
WIDTH = 32


def some_rays(count=NUM_RAYS, seed=0, dtype=torch.float32) -> Rays:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, 3, generator=generator).to(dtype)
    near = torch.full((count, 1), 2.0, dtype=dtype)
    return Rays(-4 * F.normalize(directions, dim=-1), directions, F.normalize(directions, dim=-1),
                near, near + 4)  # fmt: skip


def make_renderer(seed=0, num_importance=6, **settings) -> NeRFRenderer:
    torch.manual_seed(seed)
    coarse = NeRFField(4, WIDTH)
    fine = NeRFField(4, WIDTH) if num_importance else None
    return NeRFRenderer(coarse, fine, num_samples=8, num_importance=num_importance, **settings)


def assert_same(found: Rendered, expected: Rendered, atol: float):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ----------------------------------------------------------------------------- random numbers


@pytest.mark.parametrize("num_importance", [0, 6])
def test_gradient_of_micro_batches_adds_up_to_the_whole_batchs(num_importance):
    renderer = make_renderer(num_importance=num_importance, raw_noise_std=0.5).double()
    rays = some_rays(dtype=torch.float64)
    target = torch.rand(NUM_RAYS, 3, generator=torch.Generator().manual_seed(1)).double()
    noise = renderer.draw_noise(NUM_RAYS, torch.Generator().manual_seed(2))
    gradients = []
    for block in (NUM_RAYS, 7, 1):
        renderer.zero_grad()
        for start in range(0, NUM_RAYS, block):
            part = slice(start, start + block)
            levels = renderer(rays.part(part), noise.part(part))
            weight = len(target[part]) / NUM_RAYS
            sum(squared_error(level.rgb, target[part]) * weight for level in levels).backward()
        used = [p.grad.flatten() for p in renderer.parameters() if p.grad is not None]
        gradients.append(torch.cat(used))
    assert gradients[0].norm() > 0
    for found in gradients[1:]:  # the fields return float32, the rest is float64
        assert (found - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


@pytest.mark.parametrize("raw_noise_std", [0.0, 0.5])
def test_skipping_empty_samples_changes_no_value_and_no_gradient(raw_noise_std):
    renderer = make_renderer(raw_noise_std=raw_noise_std)
    rays, target = some_rays(), torch.rand(NUM_RAYS, 3, generator=torch.Generator().manual_seed(1))
    noise = renderer.draw_noise(NUM_RAYS, torch.Generator().manual_seed(2))
    results = []
    for skip in (False, True):
        renderer.zero_grad()
        renderer._skip_empty = skip
        renderer._query_where_dense, whole = count_calls(renderer._query_where_dense)
        levels = renderer(rays, noise)
        sum(squared_error(level.rgb, target) for level in levels).backward()
        results.append((levels, [p.grad for p in renderer.parameters() if p.grad is not None]))
        assert bool(whole) is skip
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert_same(one, other, atol=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm() + 1e-9


def count_calls(function):
    """The function, and a list that grows with each call."""
    calls = []

    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted, calls


def test_noise_is_drawn_only_where_it_is_wanted():
    def shapes(**settings):
        noise = make_renderer(**settings).draw_noise(5, torch.Generator().manual_seed(0))
        drawn = noise._asdict().items()
        return {name: tuple(member.shape) for name, member in drawn if member is not None}

    jitter = {"jitter": (5, 8), "u": (5, 6)}
    density = {"density_coarse": (5, 8), "density_fine": (5, 14)}
    assert shapes() == jitter
    assert shapes(perturb=False) == {}
    assert shapes(raw_noise_std=1.0) == {**jitter, **density}
    alone = shapes(num_importance=0, raw_noise_std=1.0)
    assert alone == {"jitter": (5, 8), "density_coarse": (5, 8)}


def test_each_kind_of_noise_has_an_effect_and_none_is_deterministic():
    renderer, rays = make_renderer(raw_noise_std=1.0), some_rays()
    noise = renderer.draw_noise(NUM_RAYS, torch.Generator().manual_seed(0))
    plain = renderer(rays)[-1].rgb
    assert torch.equal(plain, renderer(rays, None)[-1].rgb)
    for name in ("jitter", "u", "density_coarse", "density_fine"):
        only = noise._replace(**{other: None for other in noise._fields if other != name})
        assert not torch.equal(renderer(rays, only)[-1].rgb, plain), name


def test_only_the_generator_decides_the_noise():
    renderer = make_renderer(raw_noise_std=1.0)
    draws = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        draws.append(renderer.draw_noise(4, torch.Generator().manual_seed(3)))
    pairs = [pair for pair in zip(*draws, strict=True) if pair != (None, None)]
    assert len(pairs) == 4 and all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("num_importance", [0, 6])
@pytest.mark.parametrize("lindisp", [False, True])
def test_render_is_the_last_level_of_forward(num_importance, lindisp):
    renderer = make_renderer(num_importance=num_importance, lindisp=lindisp, background=1.0)
    rays = some_rays()
    levels = renderer(rays, None)
    assert len(levels) == (2 if num_importance else 1)
    assert_same(renderer.render(rays), levels[-1], atol=1e-6)  # float32; the same sums


def test_fine_samples_gather_where_the_coarse_field_is_dense():
    class Shell(torch.nn.Module):
        """Density only around t = 4, at radius 1 from rays that start 4 + 1 away."""

        def density(self, points):
            return 20.0 * ((points[..., 2] + 1).abs() < 0.3)

        def hidden(self, points):
            self.seen = points
            return points.reshape(-1, 3)

        density_of = density

        def color_of(self, hidden, viewdirs, ray_indices):
            return torch.zeros_like(hidden)

    coarse, fine = Shell(), Shell()
    renderer = NeRFRenderer(coarse, fine, num_samples=32, num_importance=64)
    down = torch.tensor([[0.0, 0.0, -1.0]])
    start = torch.tensor([[0.0, 0.0, 3.0]])
    rays = Rays(start, down, down, torch.tensor([[2.0]]), torch.tensor([[6.0]]))
    rendered = renderer.render(rays)
    heights = fine.seen[0, :, 2]
    assert heights.shape == (96,) and (heights.diff() <= 0).all()
    assert ((heights + 1).abs() < 0.5).sum() >= 64
    assert rendered.depth.item() == pytest.approx(3.7, abs=0.15)  # the shell's face
    assert rendered.opacity.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("background", [0.0, 0.5, 1.0])
def test_an_empty_scene_is_exactly_its_background(background):
    renderer = make_renderer(background=background)
    for field in (renderer.coarse, renderer.fine):
        torch.nn.init.constant_(field.alpha_linear.bias, -1e3)
    for rendered in (*renderer(some_rays()), renderer.render(some_rays())):
        assert (rendered.rgb == background).all()
        assert (rendered.opacity == 0).all()
        assert rendered.depth.isfinite().all()


def test_training_a_level_leaves_the_other_alone():
    renderer, rays = make_renderer(), some_rays()
    renderer(rays)[1].rgb.sum().backward()  # importance sampling passes no gradient back
    assert all(p.grad is None for p in renderer.coarse.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in renderer.fine.parameters())


# ------------------------------------------------------------------------------ whole pictures


@pytest.mark.parametrize("block", [1, 7, 30, 1000])
def test_every_block_size_gives_the_same_picture(block):
    renderer = make_renderer()
    height, width = 5, 6
    rays = some_rays(height * width)
    size = (height, width)
    found = render_view(renderer.render, rays.part, size, block, "cpu")
    expected = renderer.render(rays)
    shaped = Rendered(
        expected.rgb.view(5, 6, 3), expected.opacity.view(size), expected.depth.view(size)
    )
    assert_same(found, shaped, atol=1e-6)  # float32; matrix products depend on the batch


def test_pixels_go_row_by_row_and_blocks_keep_their_limit():
    sizes = []

    def render(numbers):
        sizes.append(len(numbers))
        value = numbers.float()
        return Rendered(value[:, None].repeat(1, 3), value, value)

    picture = render_view(render, lambda numbers: numbers, (3, 4), 5, "cpu")
    assert sizes == [5, 5, 2]
    assert picture.depth.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(picture.rgb[..., 2], picture.depth)


def test_block_size_respects_every_limit():
    assert block_size(192, 256, 32768, 65536, "cuda") == 65536 // 192
    assert block_size(192, 256, 100, 65536, "cuda") == 100
    assert block_size(64, 256, 32768, 65536, "cuda:1") == 1024
    on_cpu = block_size(192, 256, 32768, 65536, "cpu")
    assert 1 <= on_cpu < 65536 // 192
    assert block_size(192, 128, 32768, 65536, "cpu") > on_cpu
    assert block_size(192, 256, 10, 65536, "cpu") == 10
    assert block_size(192, 1 << 20, 32768, 65536, "cpu") == 1
    assert block_size(192, 256, 32768, 5, "cuda") == 1


# --------------------------------------------------------------------------------- compilation


def cannot_compile(function, dynamic):
    raise RuntimeError("no compiler here\nand a long trace")


def compiles_to_something_that_fails(function, dynamic):
    def fail(*args, **kwargs):
        raise OSError("cc: not found")

    return fail


def compiles_to(change):
    def compile(function, dynamic):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            return (result[0], result[1] + change) if isinstance(result, tuple) else result

        return call

    return compile


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (cannot_compile, "no compiler here"),
        (compiles_to_something_that_fails, "cc: not found"),
        (compiles_to(0.5), "colors differ"),
        (compiles_to(float("nan")), "colors differ"),
    ],
    ids=["compile raises", "call raises", "wrong colors", "NaN colors"],
)
def test_a_compiler_that_fails_costs_one_warning(monkeypatch, broken, reason):
    renderer, rays = make_renderer(background=1.0), some_rays()
    for field in (renderer.coarse, renderer.fine):
        torch.nn.init.constant_(field.alpha_linear.bias, 1.0)  # so that there is color at all
    before = renderer(rays)
    monkeypatch.setattr(torch, "compile", broken)
    warnings = []
    assert compile_renderer(renderer, rays, warnings.append) is False
    assert len(warnings) == 1 and reason in warnings[0] and "\n" not in warnings[0]
    for a, b in zip(renderer(rays), before, strict=True):
        assert_same(a, b, atol=0)
    assert all(p.grad is None for p in renderer.parameters())


@pytest.mark.parametrize("static", [False, True])
def test_all_that_training_and_rendering_call_is_compiled(monkeypatch, static):
    renderer, rays = make_renderer(static_shapes=static), some_rays()
    called = set()

    def compiled(function, dynamic):
        assert dynamic is (None if static else True)

        def call(*args, **kwargs):
            called.add(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    warnings = []
    assert compile_renderer(renderer, rays, warnings.append) is True and warnings == []
    sampling = {"_level", "_importance_sample"} if static else set()
    assert called == {"forward", "density", "hidden", "density_of", "color_of"} | sampling
    assert all(p.grad is None for p in renderer.parameters())


@pytest.mark.parametrize("use_viewdirs", [True, False])
def test_rendering_gives_the_same_as_the_training_forward(use_viewdirs):
    torch.manual_seed(0)
    fields = [NeRFField(4, 32, use_viewdirs=use_viewdirs, out_channels=5) for _ in range(2)]
    renderer = NeRFRenderer(*fields, num_samples=16, num_importance=16, background=1.0)
    directions = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    near, far = torch.full((50, 1), 2.0), torch.full((50, 1), 6.0)
    rays = Rays(torch.randn(50, 3), directions, directions, near, far)
    with torch.no_grad():
        expected, found = renderer(rays)[-1], renderer.render(rays)
    # ``render`` computes color where weights are above 0; sums are in another order.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_both_renderers_have_every_method_of_the_protocol():
    """mypy checks the signatures by this list's type; isinstance only that the names exist."""
    space = Box(torch.full((3,), -1.0), torch.full((3,), 1.0), 100)
    occupancy_renderer = OccupancyRenderer(
        FeatureField(TriPlane(16)), OccupancyGrid(8), space, background=1.0
    )
    renderers: list[Renderer] = [make_renderer(), occupancy_renderer]
    assert all(isinstance(renderer, Renderer) for renderer in renderers)
