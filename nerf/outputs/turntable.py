"""Pictures of an object: previews from four sides, and a turntable as videos."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nerf.media import colorize, nearness, write_png, write_video
from nerf.metrics import to_8bit
from nerf.text3d.orbit import OrbitCameras, orbit_cameras
from nerf.text3d.renderer import ObjectRendered
from nerf.text3d.shading import preview_lighting
from nerf.training.distributed import World
from nerf.training.system import map_on_threads

AMBIENT = 0.3  # on lit pictures
RAYS = 4096  # rendered together
PARTS = ("lit", "normal", "depth", "opacity")  # beside the color, each in a folder of its own


def orbit(num_views: int, elevation_deg: float, radius: float, fov_deg: float, device):
    """Cameras evenly around the object; the first one sees its front."""
    one = torch.ones(num_views, device=device)
    azimuth = torch.arange(num_views, device=device) * (360.0 / num_views)
    return orbit_cameras(azimuth, elevation_deg * one, radius * one, fov_deg * one)


def render_cameras(
    model: Callable, cameras: OrbitCameras, size: int, background: str, *, lit: bool = False
) -> list[ObjectRendered]:
    """One picture [size, size, ...] for every camera, on the CPU. lit: with light and normals.

    model: rays, look -> ObjectRendered.
    """
    num_pixels, device = size * size, cameras.c2w.device
    pictures = [[None] * -(-num_pixels // RAYS) for _ in cameras.c2w]

    def render(job) -> None:
        view, piece = job
        part = slice(piece * RAYS, min((piece + 1) * RAYS, num_pixels))
        camera = cameras.part(slice(view, view + 1))
        lighting = preview_lighting(
            camera.c2w[:, :, 3], background, ambient=AMBIENT if lit else 1.0
        )
        lighting = lighting.per_pixel(part.stop - part.start)
        with torch.no_grad():  # a setting of each thread
            rendered = model(camera.rays(size, size).part(part), lighting)
        pictures[view][piece] = ObjectRendered(*(member.cpu() for member in rendered))

    jobs = [(view, piece) for view, pieces in enumerate(pictures) for piece in range(len(pieces))]
    map_on_threads(render, jobs, device)
    whole = []
    for pieces in pictures:
        members = (torch.cat(member) for member in zip(*pieces, strict=True))
        whole.append(ObjectRendered(*(m.view(size, size, *m.shape[1:]) for m in members)))
    return whole


def as_pictures(
    plain: ObjectRendered, lit: ObjectRendered, near: float, far: float
) -> dict[str, np.ndarray]:
    """Name -> [H, W, 3] in [0, 1]: rgb (albedo alone), and PARTS. Depth is bright where near."""
    opacity = lit.opacity.clamp(0, 1).numpy()
    depth = nearness(lit.depth.numpy(), near, far, ndc=False)
    return {
        "rgb": plain.rgb.clamp(0, 1).numpy(),
        "lit": lit.rgb.clamp(0, 1).numpy(),
        "normal": ((lit.normal + 1) / 2).clamp(0, 1).numpy(),
        "depth": colorize(depth * opacity),
        "opacity": opacity[..., None].repeat(3, -1),
    }


def preview(
    model, cameras: OrbitCameras, size: int, background: str, bounds, *, flat: bool = False
) -> np.ndarray:
    """A sheet: one row each of rgb, lit, normal, opacity, a column per camera -> uint8 [H, W, 3].

    flat: of pictures, which have rgb alone.
    """
    plain = render_cameras(model, cameras, size, background)
    if flat:
        return to_8bit(np.concatenate([picture.rgb.numpy() for picture in plain], axis=1))
    lit = render_cameras(model, cameras, size, background, lit=True)
    columns = [as_pictures(*pair, *bounds) for pair in zip(plain, lit, strict=True)]
    rows = [
        np.concatenate([column[name] for column in columns], axis=1)
        for name in ("rgb", "lit", "normal", "opacity")
    ]
    return to_8bit(np.concatenate(rows, axis=0))


def render_turntable(
    model,
    cameras: OrbitCameras,
    size: int,
    background: str,
    bounds,
    folder: Path,
    world: World,
    warn,
) -> list[Path]:
    """000.png ... and PARTS' folders in ``folder``, and a video of each; the videos that were made.

    Cameras are split over the ranks.
    """
    mine = range(world.rank, len(cameras.c2w), world.size)
    own = cameras.part(list(mine))
    plain = render_cameras(model, own, size, background)
    lit = render_cameras(model, own, size, background, lit=True)
    with world.raise_on_all_ranks():
        for number, pair in zip(mine, zip(plain, lit, strict=True), strict=True):
            for name, picture in as_pictures(*pair, *bounds).items():
                write_png(
                    (folder if name == "rgb" else folder / name) / f"{number:03d}.png", picture
                )
    if not world.is_main:
        return []
    made = []
    for name in ("rgb", *PARTS):
        source = folder if name == "rgb" else folder / name
        frames = (source / f"{number:03d}.png" for number in range(len(cameras.c2w)))
        if write_video(folder / f"{name}.mp4", frames, warn=warn):
            made.append(folder / f"{name}.mp4")
    return made
