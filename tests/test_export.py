"""Meshes and point clouds of scenes: in place, closed, the right way out, in color, in files."""

import math

import demo_scene
import demo_surface
import numpy as np
import pytest
import torch
from helpers import run_script

import run_nerf
from nerf.cameras import orbit_path
from nerf.datasets.scene import Scene
from nerf.occupancy import Contraction, OccupancyGrid
from nerf.outputs import export
from nerf.outputs.mesh_grid import SamplingGrid, sample_near_surface
from nerf.outputs.point_cloud import estimate_normals, write_points
from nerf.rays import ndc_to_world, pixels_to_rays, rays_to_ndc
from nerf.renderer import Rendered
from nerf.volume import blend_weights, composite, interval_lengths, stratified_t

trimesh = pytest.importorskip("trimesh")

SIZE, RADIUS = 64, 0.6


def color_of(points):
    """A color for every place, the same from everywhere."""
    return 0.5 + 0.4 * torch.sin(3 * points)


class Ball(torch.nn.Module):
    """A hard ball, as a renderer: known density and color in the rays' coordinates."""

    def __init__(self, scene_of, center, density=200.0, ndc=False):
        super().__init__()
        self.scene_of, self.center, self.solid, self.ndc = scene_of, center, density, ndc

    def world(self, points):
        if not self.ndc:
            return points
        scene = self.scene_of()
        points = points.clamp(max=points.new_tensor([9.0, 9.0, 0.999]))  # nearer than infinity
        return ndc_to_world(points, scene.height, scene.width, scene.intrinsics[0])

    def density(self, points):
        inside = (self.world(points) - torch.tensor(self.center)).norm(dim=-1) < RADIUS
        return self.solid * inside

    def color(self, points, viewdirs):
        return color_of(self.world(points))

    def render(self, rays):
        t = stratified_t(rays.near, rays.far, 400)
        points = rays.origins[:, None] + rays.directions[:, None] * t[..., None]
        sigma = self.density(points.flatten(0, 1)).view(t.shape)
        rgb = color_of(self.world(points))
        weights = blend_weights(sigma, interval_lengths(t, rays.directions))
        return Rendered(*composite(rgb, weights, t, 1.0))


def capture_of(poses, center, *, near, far, alpha=False, ndc=False, bound=0.0, density=200.0):
    """A scene of cameras ``poses`` that look at the ball, as an export takes it; what was said."""
    said = []
    num_views = len(poses)
    scene = Scene(
        images=torch.full((num_views, SIZE, SIZE, 3 + alpha), 255, dtype=torch.uint8),
        c2w=torch.tensor(np.stack(poses), dtype=torch.float32),
        intrinsics=torch.tensor([60.0, 60.0, SIZE / 2, SIZE / 2]).expand(num_views, 4).clone(),
        splits={"train": list(range(num_views))},
        names=[str(number) for number in range(num_views)],
        near=near,
        far=far,
        render_poses=torch.zeros(1, 3, 4),
        background=1.0,
        ndc=ndc,
        pixel_center=True,
    )
    ball = Ball(lambda: scene, center, density, ndc)
    if alpha:
        pixels = torch.arange(SIZE * SIZE)
        for view in range(num_views):
            rays = scene.view_rays(scene.c2w[view], scene.intrinsics[view])(pixels)
            o, d = rays.origins - torch.tensor(center), rays.viewdirs
            nearest = (o - (o * d).sum(-1, keepdim=True) * d).norm(dim=-1)
            scene.images[view, ..., 3] = 255 * (nearest < RADIUS).view(SIZE, SIZE)
    return export.TrainedScene(ball, scene, ball.render, 512, bound, said.append), said


CENTER = (0.2, -0.1, 0.15)
ORBIT = [*orbit_path(12, 25.0, 3.0), *orbit_path(12, -35.0, 3.0)]
AHEAD = (0.3, -0.2, -3.0)


def around(**options):
    return capture_of(ORBIT, CENTER, near=1.0, far=5.0, **options)


def ahead():
    """Cameras side by side before the ball, which hand out NDC rays."""
    places = [(x, y, 0.0) for x in (-0.4, 0.0, 0.4) for y in (-0.3, 0.3)]
    poses = [np.concatenate([np.eye(3), np.array(place)[:, None]], 1) for place in places]
    return capture_of(poses, AHEAD, near=0.0, far=1.0, ndc=True)


def assert_is_ball(mesh, center, rel=0.03):
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=rel)  # positive: outwards
    assert np.allclose(mesh.center_mass, center, atol=0.01)
    expected = 255 * color_of(torch.from_numpy(mesh.vertices.copy())).numpy()
    assert np.abs(mesh.visual.vertex_colors[:, :3] - expected).max() < 1.1


@pytest.mark.parametrize("alpha", [False, True], ids=["opaque pictures", "alpha masks"])
def test_mesh_of_a_ball_is_closed_in_place_and_colored(alpha):
    capture, said = around(alpha=alpha)
    assert_is_ball(export.scene_mesh(capture, resolution=64, level=0.0), CENTER)
    assert not [line for line in said if "soft" in line or "cut" in line]


def test_ndc_scene_comes_back_to_the_world_the_right_way_out():
    capture, _ = ahead()
    # Cells grow with depth, hence the tolerance. Only its front is seen, so the box cuts it behind.
    mesh = export.scene_mesh(capture, resolution=96, level=0.0)
    assert mesh.is_watertight and mesh.volume > 0
    front = mesh.vertices[mesh.vertex_normals[:, 2] > 0.3]  # towards the cameras at z = 0
    distance = np.linalg.norm(front - AHEAD, axis=1)
    assert len(front) > 500 and np.abs(distance - RADIUS).mean() < 0.02
    rim = np.linalg.norm(mesh.vertices - AHEAD, axis=1) > RADIUS - 0.03
    outwards = (mesh.vertex_normals * (mesh.vertices - AHEAD)).sum(1)
    assert (outwards[rim] > 0).mean() > 0.9


def own_world(capture, turn, unit=2.5, shift=(7.0, -3.0, 40.0)):
    """The same scene of files that have another world: p -> unit * turn @ p + shift."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3], matrix[:3, 3] = unit * turn, torch.tensor(shift)
    capture.scene.to_world = matrix
    return capture, lambda points: points @ matrix[:3, :3].numpy().T + matrix[:3, 3].numpy()


TURN = torch.linalg.matrix_exp(torch.tensor([[0, -1.0, 0.3], [1.0, 0, 0.7], [-0.3, -0.7, 0]]))
MIRROR = TURN.double() @ torch.diag(torch.tensor([1.0, 1.0, -1.0]).double())


@pytest.mark.parametrize("turn", [TURN.double(), MIRROR], ids=["rotated", "mirrored"])
def test_exports_are_in_the_world_of_the_files_unless_asked_otherwise(turn):
    capture, to_files = own_world(around()[0], turn)
    kept = export.scene_mesh(capture._replace(file_world=False), resolution=48, level=0.0)
    mesh = export.scene_mesh(capture, resolution=48, level=0.0)
    np.testing.assert_allclose(mesh.vertices, to_files(kept.vertices), atol=1e-9)
    assert mesh.is_watertight and mesh.volume == pytest.approx(
        2.5**3 * kept.volume
    )  # > 0: outwards
    center = to_files(np.array(CENTER))
    assert np.allclose(mesh.center_mass, center, atol=0.03)
    cloud = export.scene_points(capture, 4000)
    outwards = (cloud.points - center) / np.linalg.norm(cloud.points - center, axis=1)[:, None]
    distance = np.linalg.norm(cloud.points - center, axis=1)
    assert np.median(distance) == pytest.approx(2.5 * RADIUS, rel=0.02)
    assert np.median((cloud.normals * outwards).sum(1)) > 0.97
    assert "world of its files" in capture.unit and "scene units" in kept_unit(capture)


def kept_unit(capture):
    return capture._replace(file_world=False).unit


def test_an_ndc_scene_goes_through_the_world_to_that_of_its_files():
    capture, to_files = own_world(ahead()[0], TURN.double())
    mesh = export.scene_mesh(capture, resolution=64, level=0.0)
    front = np.linalg.norm(mesh.vertices - to_files(np.array(AHEAD)), axis=1)
    assert (np.abs(front - 2.5 * RADIUS) < 0.05).sum() > 300 and mesh.volume > 0
    cloud = export.scene_points(capture, 4000)
    distance = np.linalg.norm(cloud.points - to_files(np.array(AHEAD)), axis=1)
    assert np.median(distance) == pytest.approx(2.5 * RADIUS, rel=0.02)


def test_a_cube_of_an_ndc_scene_is_refused():
    capture, _ = ahead()
    with pytest.raises(ValueError, match="--export_bound is in scene units.*leave it out"):
        export.scene_mesh(capture._replace(bound=1.0), resolution=32, level=0.0)


def test_ndc_to_world_is_the_inverse_of_rays_to_ndc():
    generator = torch.Generator().manual_seed(0)
    x, y = 64 * torch.rand(2, 50, generator=generator)
    intrinsics = torch.tensor([60.0, 70.0, 32.0, 24.0])
    pose = torch.eye(3, 4)
    pose[:, 3] = torch.tensor([0.1, -0.2, 0.05])
    rays = pixels_to_rays(x, y, intrinsics, pose, (0.0, 1.0))
    ndc = rays_to_ndc(rays, 48, 64, intrinsics)
    points = ndc_to_world(ndc.origins + 0.7 * ndc.directions, 48, 64, intrinsics)
    towards = torch.nn.functional.normalize(points - rays.origins, dim=-1)
    assert torch.allclose(towards, rays.viewdirs, atol=1e-5)
    # t' = 0.7 is 1 - o_z / (o_z + t d_z), measured from the near plane at z = -1 (appendix C).
    assert torch.allclose(points[:, 2], torch.full((50,), -1 / 0.3), rtol=1e-5)


def test_unbounded_scene_gives_the_uncontracted_cube_and_says_how_to_change_it():
    capture, said = around()
    capture.renderer.space = Contraction(0.1, 5.0, 64, 0.01)
    assert_is_ball(export.scene_mesh(capture, resolution=64, level=0.0), CENTER)
    assert any("half side 1 " in line and "--export_bound" in line for line in said)
    capture, said = around(bound=0.5)  # cuts the ball
    mesh = export.scene_mesh(capture, resolution=64, level=0.0)
    assert mesh.is_watertight and mesh.bounds[1, 0] == pytest.approx(0.5, abs=1e-3)
    assert any("side" in line and "cut" in line for line in said)


def test_soft_and_empty_scenes_are_said():
    capture, said = around(density=2.0)
    mesh = export.scene_mesh(capture, resolution=48, level=0.0)
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.12)
    assert any("surfaces are soft" in line for line in said)
    capture, _ = around(density=0.0)
    with pytest.raises(ValueError, match="nothing to export: .*train longer"):
        export.scene_mesh(capture, resolution=48, level=0.0)
    with pytest.raises(ValueError, match="nothing to export"):
        export.scene_points(capture, 1000)


@pytest.mark.parametrize("ndc", [False, True], ids=["world", "NDC"])
def test_points_lie_on_the_ball_with_normals_outwards_and_its_colors(ndc, tmp_path):
    capture, _ = ahead() if ndc else around(alpha=True)
    center = AHEAD if ndc else CENTER
    cloud = export.scene_points(capture, 6000)
    outwards = cloud.points - center
    distance = np.linalg.norm(outwards, axis=1)
    # A four-hundredth of the ray from sample to sample, and in NDC those are unequal.
    assert np.abs(distance - RADIUS).mean() < 0.02 and len(cloud.points) > 500
    assert np.allclose(np.linalg.norm(cloud.normals, axis=1), 1, atol=1e-6)
    cosine = (cloud.normals * outwards).sum(1) / distance
    assert np.median(cosine) > 0.97 and (cosine > 0).mean() > 0.98
    expected = 255 * color_of(torch.from_numpy(cloud.points)).numpy()
    assert np.abs(cloud.rgb - expected).mean() < 5

    path = tmp_path / "new" / "ball.ply"
    write_points(path, cloud)
    read = trimesh.load(path, process=False)
    assert np.allclose(read.vertices, cloud.points, atol=1e-6)
    assert (read.visual.vertex_colors[:, :3] == cloud.rgb).all()
    header, _, body = path.read_bytes().partition(b"end_header\n")
    rows = np.frombuffer(body, np.dtype([("f", "<f4", 6), ("c", "u1", 3)]))
    assert (
        np.allclose(rows["f"][:, 3:], cloud.normals, atol=1e-6) and b"property float nx" in header
    )


def test_points_that_stand_alone_are_left_out():
    random = np.random.default_rng(0)
    plane = np.pad(random.uniform(-1, 1, (2000, 2)), ((0, 0), (0, 1)))
    alone = random.uniform(1, 3, (20, 3))
    points = np.concatenate([plane, alone])
    normals, kept = estimate_normals(points, np.array([[0.0, 0.0, 9.0]]).repeat(len(points), 0))
    assert kept[:2000].mean() > 0.98 and not kept[2000:].any()
    assert np.allclose(normals[:2000][kept[:2000]], [0, 0, 1], atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_looking_near_the_surface_finds_the_same_surface(seed):
    """Smooth noise: every change of sign between neighbors is the full grid's."""
    generator = torch.Generator().manual_seed(seed)
    counts = (41, 30, 23)
    noise = torch.nn.functional.interpolate(
        torch.rand(1, 1, 5, 4, 3, generator=generator), counts, mode="trilinear"
    )
    full = (noise - 0.6)[0, 0].numpy()

    def height_at(numbers):
        return full.reshape(-1)[numbers.numpy()]

    near = sample_near_surface(height_at, SamplingGrid(torch.zeros(3), torch.ones(3), counts))
    # Noise has specks between the corners of blocks: at most a few points may differ in sign.
    assert ((near > 0) != (full > 0)).mean() < 2e-3
    for axis in range(3):
        changed = np.diff(near > 0, axis=axis)
        for side in (slice(None, -1), slice(1, None)):
            where = [slice(None)] * 3
            where[axis] = side
            assert (near[tuple(where)] == full[tuple(where)])[changed].all()


def test_looking_near_the_surface_asks_for_little():
    count, asked = 129, 0
    axes = torch.linspace(-1, 1, count)

    def height_at(numbers):
        nonlocal asked
        asked += len(numbers)
        place = [numbers // count**2, numbers // count % count, numbers % count]
        return (0.7 - torch.stack([axes[p] for p in place]).norm(dim=0)).numpy()

    sample_near_surface(height_at, SamplingGrid(-torch.ones(3), torch.ones(3), (count,) * 3))
    assert asked < 0.25 * count**3


def test_occupied_cells_are_found_by_place():
    grid = OccupancyGrid(16)
    grid.occupied.copy_(torch.arange(16**3) == 3 * 256 + 5 * 16 + 7)
    inside = grid.cell_points(torch.tensor([3 * 256 + 5 * 16 + 7]))
    assert grid.occupied_at(inside).tolist() == [True]
    assert not grid.occupied_at(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).any()


def test_exact_surface_of_the_demo_scene():
    """Its samples are on it; a known distance away they are that far; rays meet it."""
    points = demo_surface.sample(20_000)
    assert demo_surface.distance(points).max() < 1e-6
    sphere = demo_scene.Solid("sphere", (0, 0, 0), (0.5,), ((1, 1, 1), (1, 1, 1)))
    solids = [
        sphere,
        sphere._replace(shape="box", size=(0.2, 0.3, 0.4), yaw_deg=20.0),
        sphere._replace(shape="cylinder", size=(0.3, 0.4), axis=0),
        sphere._replace(shape="cone", size=(0.3, 0.4)),
    ]
    random = np.random.default_rng(1)
    for solid in solids:
        on, area = demo_surface._on_solid(solid, 200_000, random)
        frame = demo_scene.rotation_of(solid).numpy().astype(np.float64)
        some = random.uniform(-0.9, 0.9, (2000, 3))
        nearest = np.linalg.norm(some[:, None] - (on @ frame)[None, :4000], axis=-1).min(1)
        signed = demo_surface.signed_distance(solid, some)
        # To the nearest of 4000 samples it is a little farther than to the surface itself.
        assert (nearest - np.abs(signed)).min() > -1e-6
        assert (nearest - np.abs(signed)).mean() < 0.02
        # Even by area: equal halves of the surface hold equal numbers, and volume by divergence.
        inside = (
            demo_surface.signed_distance(solid, random.uniform(-1, 1, (200_000, 3))) < 0
        ).mean()
        volumes = {"sphere": 4 / 3 * math.pi * 0.125, "box": 8 * 0.024}
        volumes |= {"cylinder": math.pi * 0.09 * 0.8, "cone": math.pi * 0.09 * 0.8 / 3}
        assert 8 * inside == pytest.approx(volumes[solid.shape], rel=0.05)
        areas = {"sphere": math.pi, "box": 8 * (0.06 + 0.08 + 0.12)}
        areas |= {"cylinder": 2 * math.pi * 0.3 * (0.8 + 0.3)}
        areas |= {"cone": math.pi * 0.3 * (math.hypot(0.3, 0.8) + 0.3)}
        assert area == pytest.approx(areas[solid.shape])
    picture_rays = pixels_to_rays(
        *(128 * torch.rand(2, 500, generator=torch.Generator().manual_seed(0))),
        demo_scene.intrinsics_of(128),
        torch.tensor(orbit_path(1)[0], dtype=torch.float32),
        (0.0, 10.0),
    )
    _, t = demo_scene.cast(picture_rays)
    hit = t.isfinite()
    met = picture_rays.origins[hit] + picture_rays.directions[hit] * t[hit, None]
    assert demo_surface.distance(met.double().numpy()).max() < 1e-4
    figures = demo_surface.compare(demo_surface.sample(100_000, seed=5))
    assert figures["accuracy"] < 1e-6 and figures["chamfer"] < 0.005  # spacing of the samples
    assert figures["found_0.02"] > 0.99


TINY = (
    "--use_viewdirs --white_bkgd --netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 "
    "--N_samples 8 --N_importance 8 --multires 4 --N_rand 64 --device cpu --i_img 0 --i_video 0 "
    "--ckpt_secs 0 --dataset_type blender --testskip 1 --pixel_center"
).split()


def test_the_script_exports_a_trained_run(demo_blender, tmp_path, capsys):
    """Fast path, 60 steps: a mesh near the truth, a point cloud, and one line for each mistake."""
    flags = [*TINY, "--datadir", demo_blender, "--basedir", tmp_path, "--expname", "run"]
    fast = ["--fast", "--N_iters", 60, "--target_samples", 4096, *flags]
    assert run_nerf.main([str(word) for word in fast]) == 0
    before = (tmp_path / "run" / "args.json").read_text()
    out, cloud = tmp_path / "new" / "mesh.ply", tmp_path / "cloud.ply"
    reading = [*fast, "--export", out, "--export_points", cloud]
    result = run_script([*reading, "--num_points", 5000, "--mesh_res", 48])
    assert result.returncode == 0, result.stderr
    assert "watertight" in result.stderr and "scene units" in result.stderr
    mesh = trimesh.load_mesh(out, process=False)
    assert mesh.is_watertight and mesh.volume > 0
    figures = demo_surface.compare(trimesh.sample.sample_surface(mesh, 20_000, seed=0)[0])
    assert figures["chamfer"] < 0.2
    assert len(trimesh.load(cloud).vertices) > 1000
    assert (tmp_path / "run" / "args.json").read_text() == before
    mistakes = {
        "ends in .glb .obj .ply": ["--export", "mesh.stl"],
        "ends in .ply": ["--export_points", "points.obj"],
        "contradict each other": ["--export", "mesh.ply", "--no_reload"],
        "no checkpoint to render or export": ["--export", "mesh.ply", "--expname", "none"],
        "cannot be written": ["--export", tmp_path / "run" / "args.json" / "mesh.ply",
                              "--mesh_res", 16],
    }  # fmt: skip
    for message, extra in mistakes.items():
        capsys.readouterr()
        assert run_nerf.main([str(word) for word in (*fast, *extra)]) == 2
        said = capsys.readouterr().err
        assert message in said.strip().splitlines()[-1] and "Traceback" not in said, said


def test_the_script_exports_a_vanilla_run_and_renders_too(demo_blender, tmp_path):
    flags = [*TINY, "--datadir", demo_blender, "--basedir", tmp_path, "--expname", "run"]
    flags += ["--N_iters", 40, "--lrate", 5e-3, "--ema_decay", 0.5]
    assert run_nerf.main([str(word) for word in flags]) == 0
    mesh = ["--export", tmp_path / "mesh.obj", "--mesh_res", 32, "--mesh_level", 0.5]
    reading = [*flags, *mesh, "--render_only", "--render_test"]
    assert run_nerf.main([str(word) for word in reading]) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "ema weights" in log and "test: PSNR" in log
    assert trimesh.load_mesh(tmp_path / "mesh.obj").volume != 0
