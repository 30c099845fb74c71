"""Lenses: what bends a ray between the picture plane and the world.

A camera is 4 numbers, fx fy cx cy in pixels, and where its lens is not ideal LENS more. Axes here
are OpenCV's and COLMAP's: x right, y down, z forward. A pixel's place on the plane is
((x - cx) / fx, (y - cy) / fy). From the world to the plane: a projection (perspective,
equidistant, ...), then polynomial distortion of what it gives. From the plane to the world nothing
is resampled: the polynomial is inverted for each ray by Newton's method.
(Models: OpenCV's calibration documentation; COLMAP's list of camera models.)
"""

import torch
from torch import Tensor

PERSPECTIVE, EQUIDISTANT, FOV, DIVISION, UNIFIED = range(5)
# Columns after fx fy cx cy: projection, numerator of r^2 r^4 r^6 r^8, denominator of r^2 r^4 r^6,
# tangential p1 p2, thin prism sx sy, two numbers of the projection.
LENS = 14
ITERATIONS = 12  # convergence is quadratic: 4 to 6 serve real lenses, the rest the far corners
UNSOLVED = 1e-3  # plane units; about a pixel, and far above what float32 leaves

# COLMAP's name -> (its number, how many parameters it has).
COLMAP_MODELS = {
    "SIMPLE_PINHOLE": (0, 3),
    "PINHOLE": (1, 4),
    "SIMPLE_RADIAL": (2, 4),
    "RADIAL": (3, 5),
    "OPENCV": (4, 8),
    "OPENCV_FISHEYE": (5, 8),
    "FULL_OPENCV": (6, 12),
    "FOV": (7, 5),
    "SIMPLE_RADIAL_FISHEYE": (8, 4),
    "RADIAL_FISHEYE": (9, 5),
    "THIN_PRISM_FISHEYE": (10, 12),
    "RAD_TAN_THIN_PRISM_FISHEYE": (11, 16),
    "SIMPLE_DIVISION": (12, 4),
    "DIVISION": (13, 5),
    "SIMPLE_FISHEYE": (14, 3),
    "FISHEYE": (15, 4),
    "EUCM": (16, 6),
    "EQUIRECTANGULAR": (17, 2),
}
ONE_FOCAL = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "SIMPLE_RADIAL_FISHEYE")
ONE_FOCAL += ("RADIAL_FISHEYE", "SIMPLE_DIVISION", "SIMPLE_FISHEYE")


def lens(projection=PERSPECTIVE, numerator=(), denominator=(), tangential=(), prism=(), shape=()):
    """The LENS numbers of a lens; what is left out is 0."""
    groups = ((numerator, 4), (denominator, 3), (tangential, 2), (prism, 2), (shape, 2))
    return [float(projection)] + [
        float(value) for given, size in groups for value in (*given, *[0.0] * (size - len(given)))
    ]


def from_colmap(model: str, params: list[float]) -> list[float]:
    """fx fy cx cy and the lens of a COLMAP camera. ValueError for models without a pixel plane."""
    if model in ("RAD_TAN_THIN_PRISM_FISHEYE", "EQUIRECTANGULAR"):
        raise ValueError(
            f"camera model {model} is not supported; undistort the pictures (colmap "
            "image_undistorter), or calibrate with OPENCV or OPENCV_FISHEYE"
        )
    if model in ONE_FOCAL:
        params = [params[0], *params]
    pinhole, k = list(params[:4]), list(params[4:])
    if model in ("SIMPLE_PINHOLE", "PINHOLE"):
        return pinhole + lens()
    if model in ("SIMPLE_RADIAL", "RADIAL"):
        return pinhole + lens(numerator=k)
    if model == "OPENCV":
        return pinhole + lens(numerator=k[:2], tangential=k[2:])
    if model == "FULL_OPENCV":
        return pinhole + lens(numerator=(*k[:2], k[4]), denominator=k[5:], tangential=k[2:4])
    if model == "THIN_PRISM_FISHEYE":
        return pinhole + lens(EQUIDISTANT, (*k[:2], *k[4:6]), (), k[2:4], k[6:])
    if model == "FOV":
        return pinhole + lens(FOV, shape=k)
    if model in ("SIMPLE_DIVISION", "DIVISION"):
        return pinhole + lens(DIVISION, shape=k)
    if model == "EUCM":
        return pinhole + lens(UNIFIED, shape=k)
    return pinhole + lens(EQUIDISTANT, k)  # the fisheye models with radial terms only


def is_ideal(intrinsics: Tensor) -> bool:
    """Whether cameras [..., 4 + LENS] are all pinholes: their first 4 numbers are enough."""
    return not bool(intrinsics[..., 4:].any())


def _distort(x: Tensor, y: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
    """The polynomial at x, y [...]: the distorted place and its derivatives (xx, xy, yx, yy)."""
    n1, n2, n3, n4, d1, d2, d3, p1, p2, sx, sy = coefficients[..., 1:12].unbind(-1)
    r2 = x * x + y * y
    top = 1 + r2 * (n1 + r2 * (n2 + r2 * (n3 + r2 * n4)))
    bottom = 1 + r2 * (d1 + r2 * (d2 + r2 * d3))
    radial = top / bottom
    slope = n1 + r2 * (2 * n2 + r2 * (3 * n3 + r2 * 4 * n4))
    slope = 2 * (slope - radial * (d1 + r2 * (2 * d2 + r2 * 3 * d3))) / bottom  # of r^2, doubled
    u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + sx * r2
    v = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y) + sy * r2
    mixed = x * y * slope + 2 * p1 * x + 2 * p2 * y
    xx = radial + x * x * slope + 2 * p1 * y + 6 * p2 * x + 2 * sx * x
    yy = radial + y * y * slope + 2 * p2 * x + 6 * p1 * y + 2 * sy * y
    return u, v, xx, mixed + 2 * sx * y, mixed + 2 * sy * x, yy


def undistort(plane: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the polynomial: plane [..., 2] -> the place before distortion [..., 2], and whether
    there is one [...].

    Where the polynomial folds over, far outside of what the lens was calibrated for, there is none.
    """
    x, y = plane.unbind(-1)
    goal_x, goal_y = x, y
    for _ in range(ITERATIONS):
        u, v, xx, xy, yx, yy = _distort(x, y, coefficients)
        error_x, error_y = u - goal_x, v - goal_y
        determinant = xx * yy - xy * yx
        # At a fold the step would be infinite; a short one stays beside it and counts as unsolved.
        determinant = torch.where(determinant.abs() < 1e-3, 1e-3, determinant)
        x = x - (yy * error_x - xy * error_y) / determinant
        y = y - (xx * error_y - yx * error_x) / determinant
    u, v, xx, xy, yx, yy = _distort(x, y, coefficients)
    close = (u - goal_x).abs() + (v - goal_y).abs() < UNSOLVED
    found = close & (xx * yy - xy * yx > 0) & (xx + yy > 0)  # and not turned inside out
    return torch.stack([x, y], dim=-1), found


def directions(plane: Tensor, coefficients: Tensor) -> Tensor:
    """Where places on the plane [..., 2] look: [..., 3].

    z is 1, so that distances along the ray are depths; but behind fisheye lenses (EQUIDISTANT,
    UNIFIED), which may see more than half the world, the length is 1.
    """
    places, _ = undistort(plane, coefficients)
    return _bearings(places, coefficients)


def sees(plane: Tensor, coefficients: Tensor) -> Tensor:
    """Whether light from anywhere reaches places on the plane [..., 2], as the model has it."""
    places, found = undistort(plane, coefficients)
    bearing = _bearings(places, coefficients)
    wide = coefficients[..., 0] == EQUIDISTANT
    return found & bearing.isfinite().all(-1) & ~(wide & (places.norm(dim=-1) > torch.pi))


def _bearings(places: Tensor, coefficients: Tensor) -> Tensor:
    kind = coefficients[..., 0]
    a, b = coefficients[..., 12], coefficients[..., 13]
    radius = places.norm(dim=-1)
    one = torch.ones_like(radius)
    # Each candidate: how much the place is stretched, and z. Limits at the center are 1.
    small = torch.where(radius < 1e-6, 1e-6, radius)
    half = torch.where(kind == FOV, a, one)
    fov = torch.tan(radius * half) / (2 * torch.tan(half / 2)) / small
    fov = torch.where((radius < 1e-6) | (radius * half >= torch.pi / 2), torch.nan, fov)
    fov = torch.where(radius < 1e-6, half / (2 * torch.tan(half / 2)), fov)
    division = 1 + a * radius**2
    division = torch.where(division > 0, division, torch.nan)
    unified = (1 - b * a**2 * radius**2) / (
        a * torch.sqrt(1 - (2 * a - 1) * b * radius**2) + (1 - a)
    )
    stretch, z = one, one
    stretch = torch.where(kind == EQUIDISTANT, torch.sin(small) / small, stretch)
    z = torch.where(kind == EQUIDISTANT, torch.cos(radius), z)
    stretch = torch.where(kind == FOV, fov, stretch)
    stretch = torch.where(kind == DIVISION, 1 / division, stretch)
    length = torch.sqrt(radius**2 + unified**2)
    stretch = torch.where(kind == UNIFIED, 1 / length, stretch)
    z = torch.where(kind == UNIFIED, unified / length, z)
    return torch.cat([places * stretch[..., None], z[..., None]], dim=-1)


def project(points: Tensor, coefficients: Tensor) -> Tensor:
    """Where points [..., 3] in front of the camera land on the plane: [..., 2]."""
    kind = coefficients[..., 0]
    a, b = coefficients[..., 12], coefficients[..., 13]
    xy, z = points[..., :2], points[..., 2]
    side = xy.norm(dim=-1).clamp(min=1e-12)
    flat = side / z
    fov = torch.where(kind == FOV, a, torch.ones_like(a))
    scale = 1 / z
    scale = torch.where(kind == EQUIDISTANT, torch.atan2(side, z) / side, scale)
    seen = torch.atan(2 * flat * torch.tan(fov / 2)) / fov / side
    scale = torch.where(kind == FOV, seen, scale)
    root = torch.sqrt((1 - 4 * a * flat**2).clamp(min=0))
    scale = torch.where(kind == DIVISION, 2 / (1 + root) / z, scale)
    unified = a * torch.sqrt(b * side**2 + z**2) + (1 - a) * z
    scale = torch.where(kind == UNIFIED, 1 / unified, scale)
    u, v, *_ = _distort(*(xy * scale[..., None]).unbind(-1), coefficients)
    return torch.stack([u, v], dim=-1)
