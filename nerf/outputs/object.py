"""What a run of text to 3D shows of its objects: previews, turntables, meshes.

All of it is of the averaged weights, where a run averages, and of every object, where several learn
together (``nerf.text3d.particles``): the first one's files have the plain names.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from nerf.outputs import mesh, turntable
from nerf.outputs.viewer import clip_rays
from nerf.text3d.orbit import OrbitCameras
from nerf.text3d.particles import members_of
from nerf.text3d.renderer import ObjectRendered
from nerf.text3d.shading import preview_lighting
from nerf.training import distributed, system
from nerf.training.ema import EMA
from nerf.training.run_folder import RunFolder

MODES = ("rgb", *turntable.PARTS)  # of ``look_at``


class ObjectOutputs(NamedTuple):
    """The objects of a run, and where the cameras that photograph them stand."""

    run: RunFolder
    world: distributed.World
    renderer: nn.Module  # of one object, or Particles
    ema: EMA
    amp: str
    size: int  # pixels a side
    background: str
    elevation_deg: float
    radius: float
    fov_deg: float
    bound: float  # half a side of the objects' cube
    flat: bool = False  # pictures are optimized (--space 2d), not objects

    def cameras(self, num_views: int) -> OrbitCameras:
        return turntable.orbit(
            num_views, self.elevation_deg, self.radius, self.fov_deg, self.world.device
        )

    def views(self):
        """(ending of the file names, (rays, look) -> what that object looks like)."""

        def view_of(shown: nn.Module):
            def view(rays, lighting):
                with system.autocast(self.world.device, self.amp):
                    return shown(rays, lighting)

            return view

        return [(ending, view_of(shown)) for ending, shown in members_of(self.renderer)]

    @property
    def lighting(self) -> tuple[str, tuple[float, float]]:
        """The background, and between which depths colors change."""
        return self.background, (max(0.05, self.radius - self.bound), self.radius + self.bound)


def look_at(
    outputs: ObjectOutputs, c2w: np.ndarray, fov: float, size: tuple[int, int], mode: str, box
):
    """What a free camera sees of the first object, [H, W, 3] in [0, 1], for ``viewer.Viewer``.

    c2w [3, 4]; fov: vertical, radians; size: height and width; mode of MODES; box: [2, 3] outside
    of which nothing is shown, or None.
    """
    height, width = size
    pose = torch.tensor(c2w, dtype=torch.float32, device=outputs.world.device)[None]
    angle = pose.new_tensor([np.degrees(fov)])
    rays = OrbitCameras(pose, angle, 0 * angle, 0 * angle).rays(height, width)
    hit = torch.ones(height * width, dtype=torch.bool)
    if box is not None:
        rays, inside = clip_rays(rays, pose.new_tensor(np.asarray(box)))
        hit = inside.cpu()
    lit = mode in ("lit", "normal")
    lighting = preview_lighting(
        pose[:, :, 3], outputs.background, ambient=turntable.AMBIENT if lit else 1.0
    )
    parts, (_, view) = [], outputs.views()[0]
    with torch.no_grad(), outputs.ema.swap():
        for start in range(0, height * width, turntable.RAYS):
            part = rays.part(slice(start, start + turntable.RAYS))
            parts.append(view(part, lighting.per_pixel(len(part.origins))))
    whole = (torch.cat(member).cpu() for member in zip(*parts, strict=True))
    behind = lighting.background[0].cpu()
    seen = ObjectRendered(*(member * hit.view(-1, *(1,) * (member.dim() - 1)) for member in whole))
    seen = seen._replace(rgb=torch.where(hit[:, None], seen.rgb, behind))
    seen = ObjectRendered(*(m.view(height, width, *m.shape[1:]) for m in seen))
    return turntable.as_pictures(seen, seen, *outputs.lighting[1])[mode]


def write_preview(outputs: ObjectOutputs, step: int, num_views: int, size: int) -> None:
    """previews/STEP.png: ``num_views`` sides; the pictures themselves if flat."""
    if not outputs.world.is_main:
        return
    cameras = outputs.cameras(num_views)
    with outputs.ema.swap():
        sheets = [
            turntable.preview(view, cameras, size, *outputs.lighting, flat=outputs.flat)
            for _, view in outputs.views()
        ]
    outputs.run.picture(step, "preview", np.concatenate(sheets))


def path_cameras(outputs: ObjectOutputs, poses: np.ndarray, fov_deg: np.ndarray) -> OrbitCameras:
    """Cameras at poses [F, 3, 4] with vertical fields of view [F], of ``camera_path.read_path``."""
    device, none = outputs.world.device, torch.zeros(len(poses))
    tensors = (torch.tensor(poses).float(), torch.tensor(fov_deg).float(), none, none)
    return OrbitCameras(*(tensor.to(device) for tensor in tensors))


def write_turntable(outputs: ObjectOutputs, step: int, num_frames: int, cameras=None) -> None:
    """render_path_STEP/: frames and, where a video can be written, one of each kind of picture.

    cameras: ``path_cameras`` instead of a circle of num_frames.
    """
    cameras, videos = cameras or outputs.cameras(num_frames), []
    with outputs.ema.swap():
        for ending, view in outputs.views():
            folder = outputs.run.folder / f"render_path{ending}_{step:06d}"
            videos += turntable.render_turntable(
                view,
                cameras,
                outputs.size,
                *outputs.lighting,
                folder,
                outputs.world,
                outputs.run.log,
            ) or [f"frames only, in {folder}/"]
    outputs.run.log("turntable: " + ", ".join(map(str, videos)))


def write_mesh(outputs: ObjectOutputs, path: Path, *, resolution: int, level: float = 0.0) -> None:
    """Each object as a mesh with colored vertices.

    level: density of the surface; 0 takes the median of where rays become opaque.
    """
    if not outputs.world.is_main:
        return
    for ending, shown in members_of(outputs.renderer):
        with outputs.ema.swap(), torch.no_grad():
            surface = _surface(outputs, shown, resolution, level)
        own = path.with_stem(path.stem + ending)
        mesh.write_mesh(own, surface)
        counts = f"{len(surface.vertices)} vertices, {len(surface.faces)} triangles"
        outputs.run.log(f"mesh: {own} ({counts})")


def _surface(outputs: ObjectOutputs, renderer: nn.Module, resolution: int, level: float):
    box, side = renderer.space, outputs.size // 2
    if not level:
        solid = renderer.surface_density(outputs.cameras(8).rays(side, side))
        level = solid.median().item() if len(solid) else mesh.surface_level(box.step)
    return mesh.extract_mesh(
        lambda points: renderer.density(box.to_unit(points)),
        lambda points: renderer.albedo(box.to_unit(points)),
        box.low,
        box.high,
        resolution=resolution,
        level=level,
        warn=outputs.run.log,
    )
