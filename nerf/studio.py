"""What a run of text to 3D shows of its objects: previews, turntables, meshes.

All of it is of the averaged weights, where a run averages, and of every object, where several learn
together (``nerf.particles``): the first one's files have the plain names.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from nerf import mesh, runtime, turntable
from nerf.cameras import OrbitCameras
from nerf.ema import EMA
from nerf.logs import RunFolder
from nerf.particles import objects


class Studio(NamedTuple):
    """The objects of a run, and where the cameras that photograph them stand."""

    run: RunFolder
    world: runtime.World
    renderer: nn.Module  # of one object, or Particles
    ema: EMA
    amp: str
    size: int  # pixels a side
    background: str
    elevation_deg: float
    radius: float
    fov_deg: float
    bound: float  # half a side of the objects' cube
    flat: bool = False  # pictures are optimised (--space 2d), not objects

    def cameras(self, num_views: int) -> OrbitCameras:
        return turntable.orbit(
            num_views, self.elevation_deg, self.radius, self.fov_deg, self.world.device
        )

    def views(self):
        """(ending of the file names, (rays, look) -> what that object looks like)."""

        def view_of(shown: nn.Module):
            def view(rays, look):
                with runtime.autocast(self.world.device, self.amp):
                    return shown(rays, look)

            return view

        return [(ending, view_of(shown)) for ending, shown in objects(self.renderer)]

    @property
    def look(self) -> tuple[str, tuple[float, float]]:
        """The background, and between which depths colours change."""
        return self.background, (max(0.05, self.radius - self.bound), self.radius + self.bound)


def write_preview(studio: Studio, step: int, num_views: int, size: int) -> None:
    """previews/STEP.png: ``num_views`` sides; the pictures themselves if flat."""
    if not studio.world.is_main:
        return
    cameras = studio.cameras(num_views)
    with studio.ema.swap():
        sheets = [
            turntable.preview(view, cameras, size, *studio.look, flat=studio.flat)
            for _, view in studio.views()
        ]
    studio.run.picture(step, "preview", np.concatenate(sheets))


def write_turntable(studio: Studio, step: int, num_frames: int) -> None:
    """render_path_STEP/: frames and, where a video can be written, one of each kind of picture."""
    cameras, videos = studio.cameras(num_frames), []
    with studio.ema.swap():
        for ending, view in studio.views():
            folder = studio.run.folder / f"render_path{ending}_{step:06d}"
            videos += turntable.render_turntable(
                view, cameras, studio.size, *studio.look, folder, studio.world, studio.run.say
            ) or [f"frames only, in {folder}/"]
    studio.run.say("turntable: " + ", ".join(map(str, videos)))


def write_mesh(studio: Studio, path: Path, *, resolution: int, level: float = 0.0) -> None:
    """Each object as a mesh with coloured vertices.

    level: density of the surface; 0 takes the median of where rays become opaque.
    """
    if not studio.world.is_main:
        return
    for ending, shown in objects(studio.renderer):
        with studio.ema.swap(), torch.no_grad():
            surface = _surface(studio, shown, resolution, level)
        own = path.with_stem(path.stem + ending)
        mesh.write_mesh(own, surface)
        counts = f"{len(surface.vertices)} vertices, {len(surface.faces)} triangles"
        studio.run.say(f"mesh: {own} ({counts})")


def _surface(studio: Studio, renderer: nn.Module, resolution: int, level: float):
    box, side = renderer.space, studio.size // 2
    if not level:
        solid = renderer.surface_density(studio.cameras(8).rays(side, side))
        level = solid.median().item() if len(solid) else mesh.surface_level(box.step)
    return mesh.extract_mesh(
        lambda points: renderer.density(box.to_unit(points)),
        lambda points: renderer.albedo(box.to_unit(points)),
        box.low,
        box.high,
        resolution=resolution,
        level=level,
        warn=studio.run.say,
    )
