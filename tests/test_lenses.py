"""nerf.lenses: every model against OpenCV and COLMAP, and what must hold without them."""

import numpy as np
import pytest
import torch

from nerf import lenses
from nerf.rays import pixels_to_rays

SIZE = (200, 150)  # width, height
CAMERAS = {
    "SIMPLE_PINHOLE": [100, 98, 76],
    "PINHOLE": [100, 110, 98, 76],
    "SIMPLE_RADIAL": [150, 98, 76, -0.1],
    "RADIAL": [100, 98, 76, -0.2, 0.05],
    "OPENCV": [100, 110, 98, 76, -0.2, 0.05, 0.01, -0.004],
    "FULL_OPENCV": [100, 110, 98, 76, -0.2, 0.05, 0.01, -0.004, 0.02, 0.03, -0.01, 0.002],
    "OPENCV_FISHEYE": [80, 81, 98, 76, 0.05, -0.01, 0.003, -0.001],
    "SIMPLE_RADIAL_FISHEYE": [60, 98, 76, 0.05],
    "RADIAL_FISHEYE": [60, 98, 76, 0.05, -0.01],
    "THIN_PRISM_FISHEYE": [80, 81, 98, 76, 0.05, -0.01, 0.002, -0.003, 4e-3, -1e-3, 1e-3, -2e-3],
    "SIMPLE_FISHEYE": [60, 98, 76],
    "FISHEYE": [60, 61, 98, 76],
    "FOV": [100, 110, 98, 76, 0.9],
    "SIMPLE_DIVISION": [100, 98, 76, -0.2],
    "DIVISION": [100, 101, 98, 76, -0.2],
    "EUCM": [100, 101, 98, 76, 0.6, 1.1],
}
PIXELS = torch.cartesian_prod(torch.arange(0, 201, 10.0), torch.arange(0, 151, 10.0)).double()


def camera(model):
    return torch.tensor(lenses.from_colmap(model, CAMERAS[model]), dtype=torch.float64)


def directions_of(row, pixels=PIXELS):
    """Directions [N, 3] of pixels, x right, y down, z forward."""
    return lenses.directions((pixels - row[2:4]) / row[:2], row[4:])


def test_the_table_holds_every_model_but_the_two_that_are_refused():
    refused = {"RAD_TAN_THIN_PRISM_FISHEYE", "EQUIRECTANGULAR"}
    assert set(CAMERAS) == set(lenses.COLMAP_MODELS) - refused
    for name in refused:
        with pytest.raises(ValueError, match=name):
            lenses.from_colmap(name, [0.0] * lenses.COLMAP_MODELS[name][1])
    for name, params in CAMERAS.items():
        assert len(params) == lenses.COLMAP_MODELS[name][1]


@pytest.mark.parametrize("model", CAMERAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_pixels_come_back_through_the_world(model, dtype, tolerance):
    row, pixels = camera(model).to(dtype), PIXELS.to(dtype)
    assert lenses.sees((pixels - row[2:4]) / row[:2], row[4:]).all()
    back = lenses.project(directions_of(row, pixels), row[4:]) * row[:2] + row[2:4]
    torch.testing.assert_close(back, pixels, rtol=0, atol=tolerance)  # pixels


@pytest.mark.parametrize("model", ["PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV"])
def test_opencv_projects_our_directions_to_their_pixels(model):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    row, given = camera(model), CAMERAS[model]
    tail = given[4:] if len(given) > 5 else given[3:] if model != "PINHOLE" else []
    coefficients = np.array([*tail, *[0.0] * (8 - len(tail))])
    matrix = torch.tensor([[row[0], 0, row[2]], [0, row[1], row[3]], [0, 0, 1]]).numpy()
    zero = torch.zeros(3, dtype=torch.float64).numpy()
    found, _ = cv2.projectPoints(directions_of(row).numpy(), zero, zero, matrix, coefficients)
    torch.testing.assert_close(torch.from_numpy(found[:, 0]), PIXELS, rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", ["OPENCV_FISHEYE", "FISHEYE"])
def test_opencv_projects_our_fisheye_directions_to_their_pixels(model):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    row = camera(model)
    bearing = directions_of(row)
    ahead = bearing[:, 2] > 0.01  # its function divides by z
    assert ahead.sum() > 200
    matrix = torch.tensor([[row[0], 0, row[2]], [0, row[1], row[3]], [0, 0, 1]]).numpy()
    zero = torch.zeros(3, dtype=torch.float64).numpy()
    points = bearing[ahead][:, None].numpy()
    found, _ = cv2.fisheye.projectPoints(points, zero, zero, matrix, row[5:9].numpy())
    torch.testing.assert_close(torch.from_numpy(found[:, 0]), PIXELS[ahead], rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", CAMERAS)
def test_colmap_projects_our_directions_to_their_pixels(model):
    pycolmap = pytest.importorskip("pycolmap", reason="needs pycolmap")
    theirs = pycolmap.Camera(
        model=model, width=SIZE[0], height=SIZE[1], params=[float(v) for v in CAMERAS[model]]
    )
    compared = 0
    for bearing, pixel in zip(directions_of(camera(model)), PIXELS, strict=True):
        found = theirs.img_from_cam(bearing.numpy())
        if found is not None:  # None: behind the camera
            compared += 1
            torch.testing.assert_close(torch.tensor(found), pixel, rtol=0, atol=1e-9)
    assert compared > 100


def test_depth_is_along_the_axis_and_behind_fisheye_lenses_a_distance():
    for model in CAMERAS:
        bearing = directions_of(camera(model))
        if "FISHEYE" in model or model == "EUCM":
            torch.testing.assert_close(bearing.norm(dim=-1), torch.ones(len(bearing)).double())
        else:
            torch.testing.assert_close(bearing[:, 2], torch.ones(len(bearing)).double())


def test_equidistant_angles_grow_with_the_radius():
    # f = 100 pixels a radian: 157.08 pixels right of the middle is straight to the side.
    row = torch.tensor(lenses.from_colmap("SIMPLE_FISHEYE", [100.0, 0.0, 0.0])).double()
    angle = torch.tensor([0.0, 0.5, torch.pi / 2, 2.5]).double()
    pixels = torch.stack([100 * angle, torch.zeros(4).double()], dim=-1)
    expected = torch.stack([torch.sin(angle), torch.zeros(4), torch.cos(angle)], dim=-1)
    torch.testing.assert_close(directions_of(row, pixels), expected, rtol=0, atol=1e-9)


def test_no_direction_exists_where_the_polynomial_folds_over():
    # r (1 - 0.1 r^2) is largest, 1.217, at r = 1.826: farther out no ray arrives.
    row = torch.tensor(lenses.from_colmap("SIMPLE_RADIAL", [1.0, 0.0, 0.0, -0.1])).double()
    plane = torch.tensor([[1.0, 0.0], [1.20, 0.0], [1.23, 0.0], [5.0, 5.0]]).double()
    assert lenses.sees(plane, row[4:]).tolist() == [True, True, False, False]


def test_an_ideal_lens_gives_the_pinholes_rays():
    pinhole = torch.tensor([120.0, 110.0, 50.0, 40.0])
    with_lens = torch.cat([pinhole, torch.tensor(lenses.lens())])
    assert lenses.is_ideal(with_lens)
    x, y = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) * 100
    c2w = torch.eye(4)[:3]
    for one, other in zip(
        pixels_to_rays(x, y, pinhole, c2w, (0.0, 1.0)),
        pixels_to_rays(x, y, with_lens, c2w, (0.0, 1.0)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_cameras_of_several_kinds_in_one_batch_do_not_mix():
    rows = torch.stack([camera(model) for model in CAMERAS])
    pixels = torch.tensor([[30.0, 40.0]]).double().expand(len(rows), 2)
    joint = lenses.directions((pixels - rows[:, 2:4]) / rows[:, :2], rows[:, 4:])
    alone = torch.cat([directions_of(row, pixels[:1]) for row in rows])
    torch.testing.assert_close(joint, alone, rtol=0, atol=1e-12)
