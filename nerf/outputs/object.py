"""Pictures, turntable videos and meshes of the objects of a text-to-3D run.

Everything is rendered with the averaged weights (EMA) where the run averages, and for every object
where several are trained together (``nerf.text3d.particles``). Files of the first object have the
plain names; the others' names end in _1, _2 and so on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from nerf.media import (
    colorize,
    forget_videos,
    has_video,
    labeled_grid,
    nearness,
    write_png,
    write_videos,
)
from nerf.metrics import to_8bit
from nerf.outputs import mesh
from nerf.outputs.render import clip_rays
from nerf.rays import Rays
from nerf.text3d.orbit import OrbitCameras, orbit_cameras
from nerf.text3d.particles import members_of
from nerf.text3d.renderer import ObjectRendered, ObjectRenderer, PixelImages
from nerf.text3d.shading import Lighting, preview_lighting
from nerf.training import distributed, system
from nerf.training.ema import EMA
from nerf.training.plain_text import one_line
from nerf.training.progress import frames
from nerf.training.run_folder import RunFolder

if TYPE_CHECKING:
    from trimesh import Trimesh

AMBIENT = 0.3  # share of ambient light in lit pictures
BLOCK = 4096  # rays rendered together
MIN_TOGETHER = 4  # frames, between signs of progress
# Kinds of picture: rgb is the albedo alone; lit has light from the camera.
MODES = ("rgb", "lit", "normal", "depth", "opacity")
PREVIEW = ("rgb", "lit", "normal", "opacity")  # rows of a preview

RenderRays = Callable[[Rays, Lighting], ObjectRendered]


class ObjectOutputs(NamedTuple):
    """The objects of a run, and the orbit of the cameras that render them."""

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
    stop: system.StopSignal | None = None  # with a signal caught, turntables raise Interrupted
    save_raw: bool = False  # turntables hold depth and normals as .npy files, too
    # The view word of azimuth and elevation, written over previews
    view_word: Callable[[float, float], str] = lambda azimuth, elevation: ""

    def cameras(self, num_views: int) -> OrbitCameras:
        """Cameras evenly around the object; the first one sees its front."""
        one = torch.ones(num_views, device=self.world.device)
        azimuth = torch.arange(num_views, device=self.world.device) * (360.0 / num_views)
        return orbit_cameras(
            azimuth, self.elevation_deg * one, self.radius * one, self.fov_deg * one
        )

    def renderers(self) -> list[tuple[str, RenderRays]]:
        """For each object the ending of its file names and a function that renders its rays."""

        def with_autocast(renderer: nn.Module) -> RenderRays:
            def render(rays: Rays, lighting: Lighting) -> ObjectRendered:
                with system.autocast(self.world.device, self.amp):
                    return renderer(rays, lighting)

            return render

        return [(ending, with_autocast(renderer)) for ending, renderer in members_of(self.renderer)]

    @property
    def depth_range(self) -> tuple[float, float]:
        """Near and far bound of the colors of depth maps: the cube as seen from the orbit."""
        return max(0.05, self.radius - self.bound), self.radius + self.bound


# ---------------------------------------------------------------------------------- pictures


def render_cameras(
    render: RenderRays, cameras: OrbitCameras, size: int, background: str, *, lit: bool = False
) -> list[ObjectRendered]:
    """One picture [size, size, ...] for every camera, on the CPU. lit: with light and normals."""
    num_pixels, device = size * size, cameras.c2w.device
    pictures: list[list] = [[None] * -(-num_pixels // BLOCK) for _ in cameras.c2w]

    def render_block(job: tuple[int, int]) -> None:
        view, block = job
        part = slice(block * BLOCK, min((block + 1) * BLOCK, num_pixels))
        camera = cameras.part(slice(view, view + 1))
        lighting = preview_lighting(
            camera.c2w[:, :, 3], background, ambient=AMBIENT if lit else 1.0
        )
        lighting = lighting.per_pixel(part.stop - part.start)
        with torch.no_grad():  # a setting of each thread
            rendered = render(camera.rays(size, size).part(part), lighting)
        pictures[view][block] = ObjectRendered(*(member.cpu() for member in rendered))

    jobs = [(view, block) for view, blocks in enumerate(pictures) for block in range(len(blocks))]
    system.map_on_threads(render_block, jobs, device)
    whole = []
    for blocks in pictures:
        members = (torch.cat(member) for member in zip(*blocks, strict=True))
        whole.append(ObjectRendered(*(m.view(size, size, *m.shape[1:]) for m in members)))
    return whole


def as_pictures(
    albedo: ObjectRendered, lit: ObjectRendered, near: float, far: float
) -> dict[str, np.ndarray]:
    """A picture [H, W, 3] in [0, 1] for each of MODES, of a camera's albedo and lit rendering.

    Depth is bright where near, between the distances near and far.
    """
    opacity = lit.opacity.clamp(0, 1).numpy()
    depth = nearness(lit.depth.numpy(), near, far, ndc=False)
    return {
        "rgb": albedo.rgb.clamp(0, 1).numpy(),
        "lit": lit.rgb.clamp(0, 1).numpy(),
        "normal": ((lit.normal + 1) / 2).clamp(0, 1).numpy(),
        "depth": colorize(depth * opacity),
        "opacity": opacity[..., None].repeat(3, -1),
    }


def render_free_view(
    outputs: ObjectOutputs,
    c2w: np.ndarray,
    fov: float,
    size: tuple[int, int],
    mode: str,
    box: np.ndarray | None,
    stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """The first object from any camera as [H, W, 3] in [0, 1], for ``viewer.Viewer``.

    c2w [3, 4]; fov: vertical, radians; size: height and width; mode of MODES; box: corners [2, 3]
    of the part that is shown, None: all. Interrupted if stopped().
    """
    height, width = size
    pose = torch.tensor(c2w, dtype=torch.float32, device=outputs.world.device)[None]
    angle = pose.new_tensor([np.degrees(fov)])
    rays = OrbitCameras(pose, angle, 0 * angle, 0 * angle).rays(height, width)
    in_box = torch.ones(height * width, dtype=torch.bool)
    if box is not None:
        rays, meets_box = clip_rays(rays, pose.new_tensor(np.asarray(box)))
        in_box = meets_box.cpu()
    lit = mode in ("lit", "normal")
    lighting = preview_lighting(pose[:, :, 3], outputs.background, ambient=AMBIENT if lit else 1.0)
    parts, (_, render) = [], outputs.renderers()[0]
    with torch.no_grad(), outputs.ema.swap():
        for start in range(0, height * width, BLOCK):
            if stopped():
                raise system.Interrupted
            part = rays.part(slice(start, start + BLOCK))
            parts.append(render(part, lighting.per_pixel(len(part.origins))))
    members = [torch.cat(member).cpu() for member in zip(*parts, strict=True)]
    rendered = ObjectRendered(*(m * in_box.view(-1, *(1,) * (m.dim() - 1)) for m in members))
    background = lighting.background[0].cpu()
    rendered = rendered._replace(rgb=torch.where(in_box[:, None], rendered.rgb, background))
    rendered = ObjectRendered(*(m.view(height, width, *m.shape[1:]) for m in rendered))
    return as_pictures(rendered, rendered, *outputs.depth_range)[mode]


def write_preview(outputs: ObjectOutputs, step: int, num_views: int, size: int) -> None:
    """previews/STEP.png: ``num_views`` sides of each object; if flat, the pictures in a row."""
    if not outputs.world.is_main:
        return
    with outputs.ema.swap(), torch.no_grad():
        if outputs.flat:
            assert isinstance(outputs.renderer, PixelImages)
            sheet = to_8bit(np.concatenate(outputs.renderer.pictures().cpu().numpy(), axis=1))
        else:
            cameras = outputs.cameras(num_views)
            sheet = _preview_sheet(outputs, cameras, size, step)
    outputs.run.picture(step, "preview", sheet)


def _preview_sheet(
    outputs: ObjectOutputs, cameras: OrbitCameras, size: int, step: int
) -> np.ndarray:
    """Labeled rows of rgb, lit, normal and opacity of each object; a column per camera."""
    rows, names = [], []
    for ending, render in outputs.renderers():
        albedo = render_cameras(render, cameras, size, outputs.background)
        lit = render_cameras(render, cameras, size, outputs.background, lit=True)
        pictures = [
            as_pictures(*pair, *outputs.depth_range) for pair in zip(albedo, lit, strict=True)
        ]
        for name in PREVIEW:
            rows.append([each[name] for each in pictures])
            names.append(f"{name}{ending}")
    angles = zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True)
    views = [f"azimuth {angle[0]:.0f}°\n{outputs.view_word(*angle)}" for angle in angles]
    title = f"step {step}, elevation {outputs.elevation_deg:g}°, {outputs.ema.kind} weights"
    return labeled_grid(rows, names, views, title)


def path_cameras(outputs: ObjectOutputs, poses: np.ndarray, fov_deg: np.ndarray) -> OrbitCameras:
    """Cameras at poses [F, 3, 4] with vertical fields of view [F], of ``camera_path.read_path``."""
    device, none = outputs.world.device, torch.zeros(len(poses))
    tensors = (torch.tensor(poses).float(), torch.tensor(fov_deg).float(), none, none)
    return OrbitCameras(*(tensor.to(device) for tensor in tensors))


def write_turntable(
    outputs: ObjectOutputs,
    step: int,
    num_frames: int,
    cameras: OrbitCameras | None = None,
    name: str = "",
) -> None:
    """render_path_STEP/: frames of each of MODES, and their videos where ffmpeg is installed.

    cameras: of ``path_cameras``, instead of a circle of num_frames. name: how the folder ends. With
    ``outputs.save_raw`` also depth/NNN.npy [H, W] and normal/NNN.npy [H, W, 3], float32: mean z on
    the camera's axis in scene units, 0 where a ray is empty, and normals in world axes.
    """
    cameras = cameras or outputs.cameras(num_frames)
    made = []
    with outputs.ema.swap():
        for ending, render in outputs.renderers():
            suffix = name and f"_{one_line(name)}"
            folder = outputs.run.folder / f"render_path{ending}_{step:06d}{suffix}"
            if outputs.world.is_main:
                forget_videos(folder)
            first, *others = _write_frames(outputs, render, cameras, folder) or [folder]
            beside = ", ".join(path.stem for path in others)
            made.append(f"{first} (beside it: {beside})" if others else f"frames only, in {first}/")
    outputs.run.log("turntable: " + ", ".join(made))


def has_turntable(outputs: ObjectOutputs, step: int) -> bool:
    """Whether every object's turntable of ``step`` is there; the same answer on all ranks."""
    endings = [ending for ending, _ in members_of(outputs.renderer)]
    folders = [outputs.run.folder / f"render_path{ending}_{step:06d}" for ending in endings]
    made = all(has_video(folder, MODES[-1]) for folder in folders)
    return bool(outputs.world.gather(made)[0])


def _write_frames(
    outputs: ObjectOutputs, render: RenderRays, cameras: OrbitCameras, folder: Path
) -> list[Path]:
    """Frames and videos of one object; returns the videos that were made.

    rgb's frames are in ``folder``, those of the other MODES in a folder each inside it. Cameras are
    split over the ranks.
    """
    world, count = outputs.world, len(cameras.c2w)
    own_numbers = range(world.rank, count, world.size)
    together = max(MIN_TOGETHER, torch.get_num_threads())
    starts = range(0, len(own_numbers), together)
    with world.raise_on_all_ranks():
        for start in frames(starts, "frame", outputs.run.log, total=count,
                            stride=together * world.size, show=world.is_main):  # fmt: skip
            if outputs.stop is not None:
                outputs.stop.check()
            numbers = own_numbers[start : start + together]
            part = cameras.part(slice(numbers.start, numbers.stop, world.size))
            albedo = render_cameras(render, part, outputs.size, outputs.background)
            lit = render_cameras(render, part, outputs.size, outputs.background, lit=True)
            for number, pair in zip(numbers, zip(albedo, lit, strict=True), strict=True):
                for name, picture in as_pictures(*pair, *outputs.depth_range).items():
                    write_png(
                        (folder if name == "rgb" else folder / name) / f"{number:03d}.png", picture
                    )
                if outputs.save_raw:
                    np.save(folder / "depth" / f"{number:03d}.npy", pair[1].depth.numpy())
                    np.save(folder / "normal" / f"{number:03d}.npy", pair[1].normal.numpy())
    if not world.is_main:
        return []
    return write_videos(folder, MODES, len(cameras.c2w), outputs.run.log)


# ------------------------------------------------------------------------------------ meshes


def write_mesh(outputs: ObjectOutputs, path: Path, *, resolution: int, level: float = 0.0) -> None:
    """Write each object as a mesh with colored vertices, and log the size of each.

    resolution: points along the longest side of the sampling grid. level: density of the surface;
    0: the median density where rays become opaque.
    """
    if not outputs.world.is_main:
        return
    for ending, renderer in members_of(outputs.renderer):
        assert isinstance(renderer, ObjectRenderer), "a picture has no mesh"
        with outputs.ema.swap(), torch.no_grad():
            surface = _extract_surface(outputs, renderer, resolution, level)
        object_path = path.with_stem(path.stem + ending)
        mesh.write_mesh(object_path, surface)
        counts = f"{len(surface.vertices)} vertices, {len(surface.faces)} triangles"
        outputs.run.log(f"mesh: {object_path} ({counts})")


def _extract_surface(
    outputs: ObjectOutputs, renderer: ObjectRenderer, resolution: int, level: float
) -> "Trimesh":
    box, side = renderer.space, outputs.size // 2
    if not level:
        density = renderer.surface_density(outputs.cameras(8).rays(side, side))
        level = density.median().item() if len(density) else mesh.surface_level(box.step)
    return mesh.extract_mesh(
        lambda points: renderer.density(box.to_unit(points)),
        lambda points: renderer.albedo(box.to_unit(points)),
        box.low,
        box.high,
        resolution=resolution,
        level=level,
        warn=outputs.run.log,
    )
