"""nerf.field and nerf.encodings against the network of the paper, written naively."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from nerf.column_order import keep_file_order, to_file_order
from nerf.encodings import FrequencyEncoding, IdentityEncoding, TriPlane
from nerf.field import FeatureField, NeRFField, query_packed
from nerf.training.ema import EMA

RAYS = 4  # rays; sample counts below differ from it so that swapped axes fail
SAMPLES = 6


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = 4 * torch.rand(RAYS, SAMPLES, 3, generator=generator) - 2
    return points, F.normalize(torch.randn(RAYS, 3, generator=generator), dim=-1)


def make_field(seed=0, **settings):
    torch.manual_seed(seed)
    return NeRFField(**{"depth": 8, "width": 32, **settings})


def plain_encoding(x, num_frequencies):
    parts = [x]
    for level in range(num_frequencies):
        for function in (torch.sin, torch.cos):
            parts.append(function(x * 2.0**level))
    return torch.cat(parts, -1)


def naive(field, points, viewdirs, multires=10, multires_views=4):
    """Fig. 7 of the paper in nerf-pytorch's arrangement: every layer, at every sample."""
    encoded = plain_encoding(points.reshape(-1, 3), multires)
    h = encoded
    for i, layer in enumerate(field.pts_linears):
        h = F.relu(F.linear(h, to_file_order(layer.weight, layer.weight), layer.bias))
        if i == 4:
            h = torch.cat([encoded, h], -1)
    if not field.use_viewdirs:
        raw = field.output_linear(h)
    else:
        alpha, feature = field.alpha_linear(h), field.feature_linear(h)
        views = plain_encoding(viewdirs[:, None].expand_as(points).reshape(-1, 3), multires_views)
        layer = field.views_linears[0]
        weight = to_file_order(layer.weight, layer.weight)  # nerf-pytorch's, differentiable
        h = F.relu(F.linear(torch.cat([feature, views], -1), weight, layer.bias))
        raw = torch.cat([field.rgb_linear(h), alpha], -1)
    raw = raw.view(*points.shape[:2], -1)
    return raw[..., 3], raw[..., :3]


CASES = [
    {"depth": 8},
    {"depth": 4},
    {"depth": 6},
    {"depth": 2, "multires": 3, "multires_views": 2},
    {"depth": 8, "use_viewdirs": False},
    {"depth": 8, "use_viewdirs": False, "out_channels": 5},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_field_equals_the_naive_network_in_values_and_gradients(settings):
    field = make_field(**settings)
    points, viewdirs = inputs()
    frequencies = {key: settings[key] for key in ("multires", "multires_views") if key in settings}
    parameters = [p for p in field.parameters() if p.requires_grad]
    results = []
    for density, rgb in (field(points, viewdirs), naive(field, points, viewdirs, **frequencies)):
        loss = (density**2).sum() + (torch.sigmoid(rgb) ** 2).sum()
        results.append((density, rgb, torch.autograd.grad(loss, parameters)))
    (density, rgb, fast), (density_ref, rgb_ref, slow) = results
    assert density.shape == (RAYS, SAMPLES) and rgb.shape == (RAYS, SAMPLES, 3)
    torch.testing.assert_close(density, density_ref, rtol=0, atol=1e-5)
    torch.testing.assert_close(rgb, rgb_ref, rtol=0, atol=1e-5)
    for a, b in zip(fast, slow, strict=True):
        # float32 sums in another order: relative to the largest entry.
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-3)


def test_density_alone_equals_the_density_beside_color():
    points, viewdirs = inputs()
    for use_viewdirs in (True, False):
        field = make_field(use_viewdirs=use_viewdirs)
        expected = field(points, viewdirs)[0]
        torch.testing.assert_close(field.density(points), expected, rtol=0, atol=1e-6)


def test_color_sees_the_direction_and_density_does_not():
    field = make_field()
    points, viewdirs = inputs()
    density, rgb = field(points, viewdirs)
    turned_density, turned_rgb = field(points, -viewdirs)
    assert torch.equal(density, turned_density)
    assert (rgb - turned_rgb).abs().max() > 1e-4


TRUNK = [
    ("pts_linears.0", 256, 63),
    ("pts_linears.1", 256, 256),
    ("pts_linears.2", 256, 256),
    ("pts_linears.3", 256, 256),
    ("pts_linears.4", 256, 256),
    ("pts_linears.5", 256, 319),
    ("pts_linears.6", 256, 256),
    ("pts_linears.7", 256, 256),
]
WITH_VIEWS = [
    *TRUNK,
    ("views_linears.0", 128, 283),
    ("feature_linear", 256, 256),
    ("alpha_linear", 1, 256),
    ("rgb_linear", 3, 128),
]
WITHOUT_VIEWS = [*TRUNK, ("views_linears.0", 128, 256), ("output_linear", 5, 256)]


@pytest.mark.parametrize(("use_viewdirs", "layers"), [(True, WITH_VIEWS), (False, WITHOUT_VIEWS)])
def test_parameters_are_nerf_pytorchs_in_its_order(use_viewdirs, layers):
    field = NeRFField(use_viewdirs=use_viewdirs, out_channels=5)
    expected = []
    for name, rows, columns in layers:
        expected += [(f"{name}.weight", (rows, columns)), (f"{name}.bias", (rows,))]
    assert [(name, tuple(p.shape)) for name, p in field.named_parameters()] == expected
    assert list(field.state_dict()) == [name for name, _ in expected]


def trained(seed: int, steps: int = 3):
    """A small field after a few steps of Adam, its optimizer and its average."""
    field = make_field(seed, multires=3, multires_views=2)
    optimizer, ema = torch.optim.Adam(field.parameters(), lr=1e-2), EMA(field, 0.9)
    keep_file_order(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        density, rgb = field(*inputs(step))
        (density.square().mean() + rgb.square().mean()).backward()
        optimizer.step()
        ema.update()
    return field, optimizer, ema


def test_files_hold_weights_moments_and_averages_in_nerf_pytorchs_order():
    field, optimizer, ema = trained(0)
    peer = torch.nn.Linear(21, 32)  # of nerf-pytorch's first layer
    peer.load_state_dict({k: field.state_dict()[f"pts_linears.0.{k}"] for k in ("weight", "bias")})
    points = inputs()[0].reshape(-1, 3)
    expected = field.pts_linears[0](field.encoding(points))
    torch.testing.assert_close(peer(plain_encoding(points, 3)), expected, rtol=0, atol=1e-6)
    columns = field.encoding.columns
    assert not torch.equal(columns, columns.sort().values)
    own = field.pts_linears[0].weight
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(moment[:, columns], optimizer.state[own]["exp_avg"])
    assert torch.equal(ema.state_dict()["shadow"][0][:, columns], ema.shadow[0])


def test_a_field_from_files_goes_on_as_if_never_saved():
    field, optimizer, ema = trained(0)
    saved = [part.state_dict() for part in (field, optimizer, ema)]
    saved = pickle.loads(pickle.dumps(saved))
    again = trained(1)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    finals = []
    for net, adam, average in ((field, optimizer, ema), again):
        adam.zero_grad()
        net(*inputs(7))[1].square().mean().backward()
        adam.step()
        average.update()
        finals.append([*net.parameters(), *average.shadow])
    for first, second in zip(*finals, strict=True):
        assert torch.equal(first, second)


def test_depth_5_is_refused():
    with pytest.raises(ValueError, match="depth 5"):
        NeRFField(depth=5)


# ------------------------------------------------------------------------------------ encodings


@pytest.mark.parametrize("num_frequencies", [1, 4, 10])
def test_frequency_encoding_equals_a_plain_loop(num_frequencies):
    points = inputs()[0]
    encoding = FrequencyEncoding(num_frequencies)
    found = encoding(points)
    assert found.shape == (*points.shape[:-1], encoding.out_dim)
    assert encoding.out_dim == 3 + 6 * num_frequencies
    assert torch.equal(found, plain_encoding(points, num_frequencies)[..., encoding.columns])


def test_no_encoding_is_the_identity():
    points, viewdirs = inputs()
    assert torch.equal(IdentityEncoding()(points), points)
    field = make_field(encode=False)
    assert field.pts_linears[0].in_features == 3
    density, _ = field(points, viewdirs)
    torch.testing.assert_close(density, naive(field, points, viewdirs, 0, 0)[0], rtol=0, atol=1e-5)


def test_encoding_stays_float32_under_autocast():
    points = inputs()[0]
    exact = plain_encoding(points.double(), 10)[..., FrequencyEncoding(10).columns]
    with torch.autocast("cpu", torch.bfloat16):
        found = FrequencyEncoding(10)(points)
    assert found.dtype == torch.float32
    # float32 holds 2^9 x, |x| <= 2, to 2^-14; bfloat16 would be off by whole turns.
    assert (found - exact).abs().max() <= 2**-13


@pytest.mark.parametrize("use_viewdirs", [True, False])
def test_outputs_are_float32_and_near_under_autocast(use_viewdirs):
    field = make_field(use_viewdirs=use_viewdirs)
    points, viewdirs = inputs()
    exact = field(points, viewdirs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = field(points, viewdirs)
        density = field.density(points)
    sum(member.sum() for member in rounded).backward()
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 0.02 * max(1.0, b.abs().max().item())  # 8 bits, 8 layers
    assert density.dtype == torch.float32
    for parameter in field.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_packed_queries_come_in_few_shapes_and_padding_changes_no_value():
    """Every new shape costs a library time and memory that it keeps."""
    torch.manual_seed(0)
    field, shapes = FeatureField(TriPlane(16)), set()

    def spy(points, viewdirs, ray_indices):
        shapes.add((len(points), len(viewdirs)))
        return field(points, viewdirs, ray_indices)

    for num_rays, num_samples in ((3, 1), (500, 700), (1000, 1023), (1024, 1024), (1, 900)):
        points, viewdirs = torch.rand(num_samples, 3) * 2 - 1, torch.randn(num_rays, 3)
        ray_indices = torch.randint(num_rays, (num_samples,)).sort()[0]
        found = query_packed(spy, points, viewdirs, ray_indices)
        for own, exact in zip(found, field(points, viewdirs, ray_indices), strict=True):
            torch.testing.assert_close(own, exact)
    assert shapes == {(1024, 1024)}
