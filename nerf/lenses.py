"""Camera models: projection and lens distortion, and their inverse for rays.

A camera has 4 intrinsics, fx fy cx cy in pixels, and LENS more if its lens is not ideal. Axes here
are OpenCV's and COLMAP's: x right, y down, z forward. A pixel's point on the image plane is
((x - cx) / fx, (y - cy) / fy). World to plane: a projection (perspective, equidistant, ...)
followed by polynomial distortion. Plane to world: images are not resampled; the polynomial is
inverted for each ray by Newton's method.
(Models: OpenCV's calibration documentation; COLMAP's list of camera models.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PERSPECTIVE, EQUIDISTANT, FOV, DIVISION, UNIFIED = range(5)
# Columns after fx fy cx cy: projection, numerator of r^2 r^4 r^6 r^8, denominator of r^2 r^4 r^6,
# tangential p1 p2, thin prism sx sy, two parameters of the projection.
LENS = 14
# Convergence is quadratic: real lenses take 4 to 6 steps, corners far outside more.
ITERATIONS = 12
UNSOLVED = 1e-3  # residual in plane units: about a pixel, far above float32 rounding

# COLMAP's name of a model -> (its number, its count of parameters).
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
# Models with a single focal length for x and y.
ONE_FOCAL = (
    "SIMPLE_PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "SIMPLE_DIVISION",
    "SIMPLE_FISHEYE",
)


def lens(
    projection: int = PERSPECTIVE,
    numerator: Sequence[float] = (),
    denominator: Sequence[float] = (),
    tangential: Sequence[float] = (),
    prism: Sequence[float] = (),
    shape: Sequence[float] = (),
) -> list[float]:
    """The LENS coefficients of a lens, in the order above; omitted ones are 0."""
    groups = ((numerator, 4), (denominator, 3), (tangential, 2), (prism, 2), (shape, 2))
    return [float(projection)] + [
        float(value) for given, size in groups for value in (*given, *[0.0] * (size - len(given)))
    ]


def from_colmap(model: str, params: list[float]) -> list[float]:
    """The 4 + LENS intrinsics of a COLMAP camera; ValueError for models that are not supported."""
    if model in ("RAD_TAN_THIN_PRISM_FISHEYE", "EQUIRECTANGULAR"):
        raise ValueError(
            f"camera model {model} is not supported; undistort the pictures (colmap "
            "image_undistorter) or calibrate with OPENCV or OPENCV_FISHEYE"
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
    return pinhole + lens(EQUIDISTANT, k)  # the fisheye models with radial terms alone


def is_ideal(intrinsics: Tensor) -> bool:
    """Whether all cameras [..., 4 + LENS] are pinholes, so that 4 intrinsics describe them."""
    return not bool(intrinsics[..., 4:].any())


def _distort(x: Tensor, y: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
    """The distorted point u, v of plane points x, y [...], and its Jacobian xx, xy, yx, yy."""
    n1, n2, n3, n4, d1, d2, d3, p1, p2, sx, sy = coefficients[..., 1:12].unbind(-1)
    r2 = x * x + y * y
    top = 1 + r2 * (n1 + r2 * (n2 + r2 * (n3 + r2 * n4)))
    bottom = 1 + r2 * (d1 + r2 * (d2 + r2 * d3))
    radial = top / bottom
    slope = n1 + r2 * (2 * n2 + r2 * (3 * n3 + r2 * 4 * n4))
    slope = 2 * (slope - radial * (d1 + r2 * (2 * d2 + r2 * 3 * d3))) / bottom  # 2 d radial / d r^2
    u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + sx * r2
    v = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y) + sy * r2
    mixed = x * y * slope + 2 * p1 * x + 2 * p2 * y
    xx = radial + x * x * slope + 2 * p1 * y + 6 * p2 * x + 2 * sx * x
    yy = radial + y * y * slope + 2 * p2 * x + 6 * p1 * y + 2 * sy * y
    return u, v, xx, mixed + 2 * sx * y, mixed + 2 * sy * x, yy


def undistort(plane: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Points before distortion [..., 2] of plane points [..., 2], and whether they exist [...].

    None exists where the polynomial folds over, far outside of the lens's calibrated range.
    """
    x, y = plane.unbind(-1)
    goal_x, goal_y = x, y
    for _ in range(ITERATIONS):
        u, v, xx, xy, yx, yy = _distort(x, y, coefficients)
        error_x, error_y = u - goal_x, v - goal_y
        determinant = xx * yy - xy * yx
        # At a fold the step would be infinite. A bounded one stays near it and ends unsolved.
        determinant = torch.where(determinant.abs() < 1e-3, 1e-3, determinant)
        x = x - (yy * error_x - xy * error_y) / determinant
        y = y - (xx * error_y - yx * error_x) / determinant
    u, v, xx, xy, yx, yy = _distort(x, y, coefficients)
    close = (u - goal_x).abs() + (v - goal_y).abs() < UNSOLVED
    exists = close & (xx * yy - xy * yx > 0) & (xx + yy > 0)  # not on a mirrored branch
    return torch.stack([x, y], dim=-1), exists


def directions(plane: Tensor, coefficients: Tensor) -> Tensor:
    """Directions [..., 3] of the rays through plane points [..., 2].

    z is 1, so that t along the ray is depth. Fisheye lenses (EQUIDISTANT, UNIFIED) can have a
    field of view above 180 degrees; their directions have length 1 instead.
    """
    undistorted, _ = undistort(plane, coefficients)
    return _unproject(undistorted, coefficients)


def sees(plane: Tensor, coefficients: Tensor) -> Tensor:
    """Whether a direction exists in this camera model for plane points [..., 2] -> [...] bool."""
    undistorted, exists = undistort(plane, coefficients)
    direction = _unproject(undistorted, coefficients)
    wide = coefficients[..., 0] == EQUIDISTANT
    return exists & direction.isfinite().all(-1) & ~(wide & (undistorted.norm(dim=-1) > torch.pi))


def _unproject(undistorted: Tensor, coefficients: Tensor) -> Tensor:
    """Directions [..., 3] of undistorted plane points [..., 2]; NaN where none exists."""
    kind = coefficients[..., 0]
    a, b = coefficients[..., 12], coefficients[..., 13]
    radius = undistorted.norm(dim=-1)
    one = torch.ones_like(radius)
    # Every projection gives (stretch * point, z). The limit of each at the center is 1.
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
    return torch.cat([undistorted * stretch[..., None], z[..., None]], dim=-1)


def project(points: Tensor, coefficients: Tensor) -> Tensor:
    """Plane points [..., 2] of points [..., 3] in front of the camera, in this file's axes."""
    kind = coefficients[..., 0]
    a, b = coefficients[..., 12], coefficients[..., 13]
    xy, z = points[..., :2], points[..., 2]
    side = xy.norm(dim=-1).clamp(min=1e-12)
    flat = side / z
    fov = torch.where(kind == FOV, a, torch.ones_like(a))
    scale = 1 / z
    scale = torch.where(kind == EQUIDISTANT, torch.atan2(side, z) / side, scale)
    fov_scale = torch.atan(2 * flat * torch.tan(fov / 2)) / fov / side
    scale = torch.where(kind == FOV, fov_scale, scale)
    root = torch.sqrt((1 - 4 * a * flat**2).clamp(min=0))
    scale = torch.where(kind == DIVISION, 2 / (1 + root) / z, scale)
    unified = a * torch.sqrt(b * side**2 + z**2) + (1 - a) * z
    scale = torch.where(kind == UNIFIED, 1 / unified, scale)
    x, y = (xy * scale[..., None]).unbind(-1)
    u, v, *_ = _distort(x, y, coefficients)
    return torch.stack([u, v], dim=-1)
