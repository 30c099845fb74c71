"""Meshes from density fields: closed, in place, the right way out, colored, and written."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch

from nerf.outputs.mesh import MESH_FORMATS, extract_mesh, surface_level, write_mesh

trimesh = pytest.importorskip("trimesh")

LOW, HIGH = torch.tensor([-1.0, -1.2, -0.8]), torch.tensor([1.1, 1.0, 1.3])


def soft(distance):
    """Density 10 at signed distance 0, e times as much every 0.02 inwards."""
    return 10 * (-distance / 0.02).clamp(-80, 6).exp()


def hard(distance):
    return torch.where(distance < 0, 1000.0, 0.0)


def ball(center, radius, falloff=soft):
    return lambda points: falloff((points - torch.tensor(center)).norm(dim=-1) - radius)


def torus(points):
    ring = points[:, :2].norm(dim=-1) - 0.6
    return soft(torch.stack([ring, points[:, 2]], dim=-1).norm(dim=-1) - 0.2)


def octant(points):
    return (points > 0).to(points)


def extract(field, color_at=octant, **options):
    """The mesh of a field in the box, and what was said."""
    said = []
    settings = {"resolution": 48, "level": 10.0, "warn": said.append, **options}
    return extract_mesh(field, color_at, LOW, HIGH, **settings), said


def turned_back(vertices):
    """glTF's y-up axes to the scene's z-up axes."""
    return np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=-1)


def read_glb(path):
    """The JSON of a .glb, and a function from an accessor's number to its floats [M, 3]."""
    content = path.read_bytes()
    length = int.from_bytes(content[12:16], "little")
    tree, data = json.loads(content[20 : 20 + length]), content[28 + length :]

    def floats(number):
        accessor = tree["accessors"][number]
        assert (accessor["componentType"], accessor["type"]) == (5126, "VEC3")  # float32
        start = tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
        count = 3 * accessor["count"]
        return np.frombuffer(data, np.float32, count, start + accessor["byteOffset"]).reshape(-1, 3)

    return tree, floats


def test_surface_level_is_half_opacity_in_one_step():
    for step in (0.01, 0.5, 3.0):
        assert 1 - math.exp(-surface_level(step) * step) == pytest.approx(0.5)


@pytest.mark.parametrize("falloff", [soft, hard])
def test_ball_is_closed_in_place_and_as_large_as_it_is(falloff):
    center, radius = (0.3, -0.4, 0.2), 0.45
    mesh, said = extract(ball(center, radius, falloff), resolution=64)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.euler_number == 2
    # 2 %: the volume between a chord and its arc, and the hard ball's steps.
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)
    assert np.allclose(mesh.center_mass, center, atol=0.005)
    outwards = mesh.triangles_center - center
    assert ((mesh.face_normals * outwards).sum(-1) > 0).all()
    distance = np.linalg.norm(mesh.vertices - center, axis=-1)
    cell = 2 * (radius + 2 * 2.2 / 47) / 63  # of a grid two coarse cells wider than the ball
    assert np.abs(distance - radius).max() < (0.1 if falloff is soft else 1.0) * cell
    pattern = r"density in the box: min \S+, median \S+, max (\S+); surface at 10"
    assert len(said) == 1
    # At most 10 exp(6), the soft ball's inside, or 1000.
    assert 900 < float(re.fullmatch(pattern, said[0])[1]) < 4040


def test_axes_are_neither_swapped_nor_mirrored():
    """Four balls of different sizes on thin bars: each is found at its own place."""
    places = {0.15: (0.8, 0.0, 0.0), 0.2: (0.0, 0.7, 0.0), 0.25: (0.0, 0.0, 0.6), 0.1: (0, 0, 0)}

    def field(points):
        each = [(points - torch.tensor(c)).norm(dim=-1) - r for r, c in places.items()]
        bars = [
            (points - points[:, [a]].clamp(0, 0.7) * torch.eye(3)[a]).norm(dim=-1) - 0.06
            for a in range(3)
        ]
        return soft(torch.stack(each + bars).amin(0))

    mesh, _ = extract(field, resolution=64)
    assert np.allclose(mesh.bounds, [[-0.25, -0.25, -0.2], [0.95, 0.9, 0.85]], atol=0.01)
    for radius, center in places.items():
        if radius > 0.1:
            distance = np.linalg.norm(mesh.vertices - center, axis=-1)
            assert distance.min() == pytest.approx(radius, abs=0.01)


def test_colors_are_those_of_the_vertices():
    mesh, _ = extract(ball((0, 0, 0), 0.5), lambda points: points + 0.5)
    # One level: float32 at a rounding edge.
    assert np.abs(mesh.visual.vertex_colors[:, :3] - 255 * (mesh.vertices + 0.5)).max() < 1
    mesh, _ = extract(ball((0.05, 0.05, 0.05), 0.5))
    assert (mesh.visual.vertex_colors[:, :3] == 255 * (mesh.vertices > 0)).all()
    assert (mesh.visual.vertex_colors[:, 3] == 255).all()


def test_torus_keeps_its_hole():
    mesh, _ = extract(torus)
    assert mesh.is_watertight and mesh.euler_number == 0
    assert mesh.volume == pytest.approx(2 * math.pi**2 * 0.6 * 0.2**2, rel=0.02)


def test_hollow_ball_is_filled_unless_all_is_kept():
    def shell(points):
        return soft((points.norm(dim=-1) - 0.5).abs() - 0.1)

    mesh, said = extract(shell)
    assert mesh.euler_number == 2 and len(said) == 1
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02)
    mesh, _ = extract(shell, keep_largest=False)
    assert mesh.is_watertight and mesh.euler_number == 4
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * (0.6**3 - 0.4**3), rel=0.02)


def test_only_the_larger_of_two_balls_is_kept_and_it_is_said():
    small, large = ball((-0.6, 0, 0), 0.2), ball((0.5, 0, 0), 0.4)
    mesh, said = extract(lambda points: small(points) + large(points), resolution=64)
    assert mesh.euler_number == 2 and mesh.is_watertight
    assert np.allclose(mesh.center_mass, [0.5, 0, 0], atol=0.005)
    share = float(said[1].split("(")[1].split("%")[0])
    assert "1 small piece was removed" in said[1] and "the largest is kept" in said[1]
    assert share == pytest.approx(100 * 0.2**3 / (0.2**3 + 0.4**3), abs=1)
    # Fitted to the piece: finer than a grid over both, 1.7 long.
    assert mesh.edges_unique_length.max() < math.sqrt(3) * (0.8 + 4 * 1.7 / 63) / 63
    both, said = extract(lambda points: small(points) + large(points), keep_largest=False)
    assert both.euler_number == 4 and len(said) == 1


def test_a_thin_shell_of_fog_around_the_object_is_not_the_largest():
    """It encloses and covers more, but there is less of it."""

    def field(points):
        return soft((points.norm(dim=-1) - 0.75).abs() - 0.03) + ball((0, 0, 0), 0.6)(points)

    mesh, _ = extract(field, resolution=96)
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02)


@pytest.mark.parametrize("falloff", [soft, hard])
def test_surface_cut_by_the_box_is_closed_and_said(falloff):
    field = ball((0.0, 0.0, float(HIGH[2])), 0.5, falloff)
    mesh, said = extract(field, resolution=64)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(2 / 3 * math.pi * 0.5**3, rel=0.02)
    assert mesh.bounds[1, 2] == pytest.approx(float(HIGH[2]), abs=1e-3)
    assert len(said) == 2 and "side +z:" in said[1]
    mesh, said = extract(ball((0, 0, 0), 1.7))  # only the box's corners are outside it
    assert mesh.is_watertight and "-x, +x, -y, +y, -z, +z" in said[1]


def test_what_the_first_look_misses_is_found():
    """A speck and a needle thinner than the first look's cells."""
    mesh, _ = extract(ball((0.013, 0.013, 0.013), 0.015), resolution=200)
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.015**3, rel=0.05)

    def field(points):
        needle = (points - points[:, [0]].clamp(0, 0.9) * torch.eye(3)[0] - 0.013).norm(dim=-1)
        return soft(torch.minimum(points.norm(dim=-1) - 0.3, needle - 0.016))

    mesh, _ = extract(field, resolution=128)
    assert mesh.bounds[1, 0] == pytest.approx(0.93, abs=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_any_field_gives_a_closed_surface(seed):
    """Noise; for odd seeds in steps of 5, so that many points lie exactly on the surface."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 1, 12, 12, 12, generator=generator) * 20

    def field(points):
        density = torch.nn.functional.grid_sample(
            noise, points[None, :, None, None], align_corners=True, padding_mode="border"
        ).view(-1)
        return (density / 5).round() * 5 if seed % 2 else density

    for keep_largest in (True, False):
        mesh, _ = extract(field, resolution=40, keep_largest=keep_largest)
        assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0


@pytest.mark.parametrize("value", [0.0, 3.0, 10.0, 1e4])
def test_empty_and_constant_fields_raise(value):
    ripple = 1e-3 * value

    def field(points):
        return value + ripple * points[:, 0].sin()

    with pytest.raises(ValueError, match="nothing to export: .*train longer"):
        extract(field)


def test_solid_box_raises():
    with pytest.raises(ValueError, match="nothing to export"):
        extract(lambda points: 1000 + 900 * points[:, 0].sin())


def test_fallback_to_a_percentile_is_said():
    mesh, said = extract(lambda points: 5 * (-points.norm(dim=-1) / 0.2).exp())
    assert "no density reaches 10" in said[0] and "the 99.9 percentile" in said[0]
    assert mesh.is_watertight and np.allclose(mesh.center_mass, 0, atol=0.01)
    level = float(said[0].split("taken at ")[1].split(",")[0])
    radius = np.linalg.norm(mesh.vertices, axis=-1).mean()
    assert radius == pytest.approx(-0.2 * math.log(level / 5), rel=0.02)
    # A faint body with an even inside: all percentiles are its density.
    mesh, said = extract(lambda points: ball((0, 0, 0), 0.5, hard)(points) / 500, resolution=64)
    assert "taken at 1, midway" in said[0]
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_density_raises(value):
    def field(points):
        return torch.where(points[:, 0] > 0.5, value, soft(points.norm(dim=-1) - 0.4))

    with pytest.raises(ValueError, match="density is NaN or infinite at"):
        extract(field)
    with pytest.raises(ValueError, match="color is NaN at"):
        extract(ball((0, 0, 0), 0.5), lambda points: points * math.nan)


def test_resolution_sets_the_cells():
    coarse, _ = extract(ball((0, 0, 0), 0.5), resolution=32)
    fine, _ = extract(ball((0, 0, 0), 0.5), resolution=64)
    # Faces go with the cells across a surface: a square, 10 % for the rim of the first look.
    assert len(fine.faces) / len(coarse.faces) == pytest.approx((63 / 31) ** 2, rel=0.1)
    assert fine.edges_unique_length.max() < math.sqrt(3) * (1 + 4 * 2.2 / 47) / 63


def test_chunks_change_nothing_and_are_not_exceeded():
    largest = 0

    def field(points):
        nonlocal largest
        largest = max(largest, len(points))
        return torus(points)

    one, _ = extract(field, chunk=1 << 20)
    largest = 0
    many, _ = extract(field, chunk=1001)
    assert largest == 1001
    assert (one.vertices == many.vertices).all() and (one.faces == many.faces).all()
    assert (one.visual.vertex_colors == many.visual.vertex_colors).all()


@pytest.mark.parametrize("ending", MESH_FORMATS)
def test_files_hold_the_mesh(tmp_path, ending):
    mesh, _ = extract(ball((0.3, -0.2, 0.1), 0.5), lambda points: (points + 1) / 2, resolution=32)
    path = tmp_path / "new" / f"ball{ending}"
    write_mesh(path, mesh)
    write_mesh(path, mesh)  # over the old one
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    read = trimesh.load_mesh(path, process=False, skip_materials=True)
    vertices = turned_back(read.vertices) if ending == ".glb" else read.vertices
    assert len(read.vertices) == len(mesh.vertices) and (read.faces == mesh.faces).all()
    assert np.allclose(vertices, mesh.vertices, atol=1e-6)  # float32
    assert read.is_watertight and read.volume == pytest.approx(mesh.volume, rel=1e-5)
    normals = turned_back(read.vertex_normals) if ending == ".glb" else read.vertex_normals
    assert ((normals * (vertices - [0.3, -0.2, 0.1])).sum(-1) > 0).all()
    if ending != ".glb":
        assert (read.visual.vertex_colors == mesh.visual.vertex_colors).all()


def test_glb_is_y_up_with_linear_colors_and_normals_and_is_no_metal(tmp_path):
    mesh, _ = extract(ball((0.0, 0.0, 0.6), 0.5), lambda points: (points + 1) / 2, resolution=32)
    write_mesh(tmp_path / "ball.glb", mesh)
    tree, floats = read_glb(tmp_path / "ball.glb")
    primitive = tree["meshes"][0]["primitives"][0]
    attributes = primitive["attributes"]
    assert set(attributes) == {"POSITION", "NORMAL", "COLOR_0"}
    assert np.allclose(floats(attributes["POSITION"]).mean(0), [0, 0.6, 0], atol=0.05)
    linear = floats(attributes["COLOR_0"]).astype(np.float64)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.allclose(srgb * 255, mesh.visual.vertex_colors[:, :3], atol=0.01)  # the curve's seam
    material = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert material["metallicFactor"] == 0


def test_bad_names_and_places_raise_one_line(tmp_path):
    mesh = trimesh.creation.box()
    for name in ("mesh.stl", "mesh", "mesh.glb.tmp"):
        with pytest.raises(ValueError, match=r"\.glb, \.obj, \.ply") as caught:
            write_mesh(tmp_path / name, mesh)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.ply").mkdir()
    for path in (tmp_path / "file" / "mesh.ply", tmp_path / "folder.ply"):
        with pytest.raises(ValueError, match="cannot be written") as caught:
            write_mesh(path, mesh)
        assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.ply"]


@pytest.mark.parametrize("package", ["trimesh", "skimage"])
def test_missing_package_is_named_with_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{package}.*pip install scikit-image trimesh"):
        extract(torus)
