"""Features on grids: how planes are read and refined, and how large hash tables are."""

import math

import pytest
import torch

from nerf.encodings import PLANE_LOOKUPS, HashGrid, TriPlane, resized_planes

# Entries, cell borders, the sides and points beyond them; the rest is random.
EDGES = [-1.7, -1.0, -1.0 + 1e-7, -0.5, 0.0, 1e-7, 0.5, 1.0 - 1e-7, 1.0, 2.3]


def coordinates(count=300):
    edges = torch.tensor([[x, y] for x in EDGES for y in EDGES])
    inside = torch.rand(3, count, 2) * 2.4 - 1.2
    return torch.cat([edges.expand(3, -1, -1), inside], dim=1)


def interpolated(plane, x, y):
    """Plane [C, H, W] at (x, y) in [-1, 1], by the definition of bilinear interpolation."""
    _, height, width = plane.shape
    column = min(max((x + 1) / 2, 0.0), 1.0) * (width - 1)
    row = min(max((y + 1) / 2, 0.0), 1.0) * (height - 1)
    total = torch.zeros(len(plane), dtype=plane.dtype)
    for i in {math.floor(row), math.ceil(row)}:
        for j in {math.floor(column), math.ceil(column)}:
            total += plane[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


@pytest.mark.parametrize("lookup", PLANE_LOOKUPS)
def test_planes_are_interpolated_between_their_entries(lookup):
    torch.manual_seed(0)
    planes, places = torch.randn(3, 4, 5, 7, dtype=torch.float64), coordinates(20).double()
    found = PLANE_LOOKUPS[lookup](planes, places)
    assert found.shape == (3, places.shape[1], 4)
    for number in range(3):
        for place, value in zip(places[number].tolist(), found[number], strict=True):
            torch.testing.assert_close(value, interpolated(planes[number], *place))


@pytest.mark.parametrize("size", [(16, 16), (4, 9), (2, 2)])
def test_rows_have_the_values_and_gradients_of_grid_sample(size):
    torch.manual_seed(1)
    planes, places = torch.randn(3, 8, *size), coordinates()
    weight, found = torch.randn(3, places.shape[1], 8), []
    for lookup in ("grid_sample", "rows"):
        inputs = planes.clone().requires_grad_(), places.clone().requires_grad_()
        values = PLANE_LOOKUPS[lookup](*inputs)
        (values * weight).sum().backward()
        # At a border between two cells the slope along it depends on the side: compare the others.
        smooth = inputs[1].grad[:, len(EDGES) ** 2 :]
        found.append((values.detach(), inputs[0].grad, smooth))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smooth", [False, True])
def test_tri_planes_have_the_same_features_and_gradients_however_they_are_read(smooth):
    points, found = torch.rand(500, 3) * 2.2 - 1.1, []
    weight = torch.randn(500, 24)
    for lookup in ("grid_sample", "rows"):
        torch.manual_seed(2)
        encoding = TriPlane(32, smooth=smooth, lookup=lookup)
        features = encoding(points)
        (features * weight).sum().backward()
        found.append((features.detach(), *[plane.grad for plane in encoding.planes]))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_rows_can_be_differentiated_twice():
    torch.manual_seed(3)
    planes = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(3, 5, 2, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    assert torch.autograd.gradgradcheck(PLANE_LOOKUPS["rows"], (planes, places))


def test_planes_lie_on_disk_as_ever():
    shapes = {name: tuple(value.shape) for name, value in TriPlane(64).state_dict().items()}
    assert shapes == {f"planes.{i}": (3, 8, 16 << i, 16 << i) for i in range(3)}
    other = TriPlane(64, lookup="rows")
    other.load_state_dict(TriPlane(64, lookup="grid_sample").state_dict())


def test_finer_planes_are_the_coarse_ones_interpolated():
    torch.manual_seed(4)
    encoding, points = TriPlane(20), torch.rand(200, 3) * 2 - 1
    old, before = list(encoding.parameters()), encoding(points)
    replaced = encoding.resize(96)
    assert encoding.finest == 96 and [p.shape[-1] for p in encoding.planes] == [24, 48, 96]
    assert list(replaced) == old and list(replaced.values()) == list(encoding.parameters())
    for coarse, fine in replaced.items():
        for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            assert torch.equal(fine[..., row, column], coarse[..., row, column])
        places = torch.linspace(-1, 1, fine.shape[-1])
        grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1).view(1, -1, 2)
        expected = PLANE_LOOKUPS["grid_sample"](coarse, grid.expand(3, -1, -1))
        torch.testing.assert_close(fine.flatten(2).transpose(1, 2), expected)
    # Not equal: the entries of the coarse planes are no longer among those of the fine ones.
    assert (encoding(points) - before).abs().mean() < 0.1 * before.std()


def test_doubling_the_cells_leaves_the_function_as_it_was():
    planes, places = torch.randn(3, 2, 9, 9), coordinates()
    finer = resized_planes(planes, (3, 2, 17, 17))
    for lookup in PLANE_LOOKUPS.values():
        torch.testing.assert_close(lookup(finer, places), lookup(planes, places))


def test_hash_tables_have_at_most_two_to_the_log2_size_entries():
    small, large = HashGrid(128, log2_size=10), HashGrid(128, log2_size=14)
    assert [len(table) for table in small.tables] == [1024] * 8
    assert len(large.tables[0]) == 17**3 and len(large.tables[-1]) == 2**14
    assert large(torch.rand(5, 3)).shape == (5, 32)


def test_a_dense_level_of_the_hash_grid_interpolates_between_eight_corners():
    torch.manual_seed(5)
    grid, points = HashGrid(16, levels=1, channels=2, log2_size=14), torch.rand(100, 3) * 2 - 1
    table = grid.tables[0].detach().view(17, 17, 17, 2).permute(3, 2, 1, 0)[None]
    expected = torch.nn.functional.grid_sample(
        table, points[None, :, None, None], align_corners=True
    )[0, :, :, 0, 0].T
    torch.testing.assert_close(grid(points), expected, rtol=1e-4, atol=1e-9)
