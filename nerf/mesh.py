"""Triangle meshes: the surface of a density field with a colour per vertex, and files of it.

Surface: where a step of a given length has opacity 0.5 (``surface_level``). Marching cubes
(Lorensen and Cline 1987; Lewiner et al. 2003) runs on that opacity, 1 - 2^(-density / level). It is
bounded, so a surface between an empty and a full point lies midway however dense the inside is; on
the density itself it would be drawn to the empty point, half a cell too far out.

Axes: meshes have the scene's (right-handed, z up by our scenes' custom), and so have .obj and .ply.
glTF demands y up: a .glb holds (x, z, -y), a rotation, which viewers and Blender expect.
Colours: RGB as rendered, that is sRGB, 8 bits; .obj and .ply hold it as it is, which MeshLab and
Blender expect. glTF defines COLOR_0 as linear, and three.js and Blender read it so: sRGB stored
there looks washed out. A .glb therefore holds linear float32, 8 bits being too coarse in the
dark, and a matte material: glTF's default is a metal, black where there is nothing to mirror.
trimesh converts nothing: it reads linear colours back, with ``skip_materials=True``.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nerf.metrics import to_8bit

FORMATS = (".glb", ".obj", ".ply")
COARSE = 48  # points along the box's longest side in the first look
PERCENTILES = (99.9, 99.0, 95.0)  # of the positive density, tried where nothing reaches the level
# Marching cubes leaves holes where a point lies exactly on the surface; such points go outside.
ON_SURFACE = 1e-4  # of opacity
# Below the surface, in opacity: so deep that a surface which the box cuts is closed at the box's
# side and not halfway to the rim, and not so deep that float32 loses the place (-1e6 does).
RIM = -1e3


class _Grid(NamedTuple):
    """Points in a box, its sides included, about equally far apart along all axes."""

    low: Tensor  # [3]
    high: Tensor  # [3]
    counts: tuple[int, int, int]

    @classmethod
    def over(cls, low: Tensor, high: Tensor, resolution: int) -> "_Grid":
        """``resolution`` points along the longest side, as many on the others as that spacing."""
        sides = (high - low).tolist()
        spacing = max(sides) / (resolution - 1)
        return cls(low, high, tuple(max(1, round(side / spacing)) + 1 for side in sides))

    @property
    def spacing(self) -> Tensor:
        return (self.high - self.low) / (self.low.new_tensor(self.counts) - 1)

    def around(self, solid: np.ndarray) -> tuple[Tensor, Tensor]:
        """The corners [3] of the box around solid points, a cell wider, inside this grid."""
        low, high = self.low.clone(), self.high.clone()
        for axis, used in enumerate(_used(solid)):
            first, last = used[0] - 1, used[-1] + 1
            if first > 0:
                low[axis] += first * self.spacing[axis]
            if last < self.counts[axis] - 1:
                high[axis] = self.low[axis] + last * self.spacing[axis]
        return low, high

    def touched(self, solid: np.ndarray) -> Tensor:
        """Whether solid points lie on the grid's lower and upper sides, [2, 3] bool."""
        ends = [
            (used[0] == 0, used[-1] == n - 1)
            for used, n in zip(_used(solid), self.counts, strict=True)
        ]
        return torch.tensor(ends, device=self.low.device).T


def surface_level(step: float) -> float:
    """The density at which one rendering step of this length has opacity 0.5."""
    return math.log(2.0) / step


@torch.no_grad()
def extract_mesh(
    density_at: Callable[[Tensor], Tensor],
    color_at: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    *,
    resolution: int = 128,
    level: float,
    chunk: int = 1 << 16,
    keep_largest: bool = True,
    warn=print,
) -> "trimesh.Trimesh":  # noqa: F821
    """The closed surface of a density field, faces outwards, with an sRGB colour per vertex.

    density_at: scene points [M, 3] -> density [M] >= 0, per scene unit; color_at: scene points
    [M, 3] -> RGB [M, 3] in [0, 1]; at most ``chunk`` points a call. low, high: corners [3] of the
    box. resolution: points along the longest side of the grid, which is fitted to what the box
    holds. level: the surface's density; where nothing reaches it, a percentile of what there is.
    keep_largest: only the piece with the most solid volume. Not the largest area, which crumpled
    fog has, nor the largest enclosed volume, which a thin shell of fog around the scene has.
    Cavities without a way out are filled with it. ValueError where there is no object.
    """
    trimesh, measure = _libraries()
    assert resolution >= 2 and level > 0 and bool((high > low).all())
    sample = partial(_sample, density_at, chunk)
    box = low, high
    survey, height, level = _survey(sample, box, resolution, level, warn)

    def look(grid: _Grid) -> np.ndarray:
        return _height(sample(grid), level)

    grid, height = _fit(look, survey, height, resolution, box)
    if keep_largest:
        piece, num_pieces, dropped = _largest_piece(height, measure)
        if num_pieces > 1:
            warn(
                f"the largest of {num_pieces} pieces is kept; the others, {dropped:.2%} of the "
                "solid volume, are left out"
            )
            # The grid was fitted to all of them.
            piece_low, piece_high = grid.around(piece > 0)
            if (piece_high - piece_low).max() < 0.8 * (grid.high - grid.low).max():
                grid, height = _fit(look, grid, piece, resolution, box)
                piece, _, _ = _largest_piece(height, measure)
        height = piece
    _warn_cut(grid, height > 0, box, warn)
    padded = np.pad(height, 1, constant_values=RIM)
    # "ascent": the inside is higher than the outside. It decides which way the faces look.
    places, faces, _, _ = measure.marching_cubes(padded, 0.0, gradient_direction="ascent")
    vertices = grid.low.cpu().numpy() + (places.astype(np.float64) - 1) * grid.spacing.cpu().numpy()
    colors = _colors(color_at, torch.from_numpy(vertices).to(low), chunk)
    # process=True would merge vertices that nearly coincide, and open holes where they touch.
    return trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False)


def write_mesh(path: Path, mesh) -> None:
    """The mesh as .glb, .obj or .ply, by the name's ending; its folder is made.

    For axes and colours in the file see above. At any moment the old file or the new is whole.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ValueError(f"{path}: a mesh is written as {', '.join(FORMATS)}; end its name so")
    if kind == ".glb":
        content = _glb(mesh)
    elif kind == ".obj":
        content = mesh.export(file_type="obj", include_normals=True).encode()
    else:
        content = mesh.export(file_type="ply", vertex_normal=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}); name another place") from error


def _libraries():
    """trimesh and skimage.measure, which only an export needs."""
    try:
        import trimesh
        from skimage import measure
    except ImportError as error:
        raise ValueError(
            f"a mesh needs two more packages ({error}): pip install scikit-image trimesh"
        ) from error
    return trimesh, measure


def _sample(density_at, chunk: int, grid: _Grid) -> np.ndarray:
    """The density at a grid's points [X, Y, Z]."""
    size_y, size_z = grid.counts[1:]
    total, spacing, parts = math.prod(grid.counts), grid.spacing, []
    for start in range(0, total, chunk):
        number = torch.arange(start, min(start + chunk, total), device=grid.low.device)
        place = [number // (size_y * size_z), number // size_z % size_y, number % size_z]
        density = density_at(grid.low + torch.stack(place, dim=-1) * spacing)  # [M]
        assert density.shape == number.shape, density.shape
        parts.append(density.float().cpu())
    density = torch.cat(parts)
    if bad := int((~density.isfinite()).sum()):
        raise ValueError(
            f"the density is NaN or infinite at {bad} of {total} points: the field is broken, "
            "export an earlier checkpoint"
        )
    return density.view(grid.counts).numpy()


def _height(density: np.ndarray, level: float) -> np.ndarray:
    """The opacity of a step for which ``level`` means 0.5, less 0.5: positive inside."""
    height = 0.5 - np.exp2(-density / np.float32(level))
    height[np.abs(height) < ON_SURFACE] = -ON_SURFACE
    return height


def _survey(sample, box, resolution: int, level: float, warn):
    """A look at the whole box: its grid, heights on it, and the level that shows something."""
    grid = _Grid.over(*box, min(COARSE, resolution))
    density = sample(grid)
    height = _height(density, level)
    if not (height > 0).any() and resolution > COARSE:  # it may lie between the points
        grid = _Grid.over(*box, resolution)
        density = sample(grid)
        height = _height(density, level)
    smallest, middle, largest = density.min(), np.median(density), density.max()
    flat = largest - smallest <= 0.01 * largest
    if not (height > 0).any() and not flat:
        wanted, (level, name) = level, _lower_level(density)
        height = _height(density, level)
        warn(f"no density reaches {wanted:.4g}: the surface is taken at {level:.4g}, {name}")
    if flat or (height > 0).all():
        raise ValueError(
            f"nothing to export: the density is {smallest:.4g} to {largest:.4g} everywhere in the "
            f"box, the surface's is {level:.4g}; train longer or look at the rendered pictures"
        )
    warn(
        f"density in the box: min {smallest:.4g}, median {middle:.4g}, max {largest:.4g}; "
        f"surface at {level:.4g}"
    )
    return grid, height, level


def _lower_level(density: np.ndarray) -> tuple[float, str]:
    """A level that part of the points exceed, and what it is called."""
    positive = density[density > 0]
    for percentile in PERCENTILES:
        level = float(np.percentile(positive, percentile))
        if (_height(density, level) > 0).any():
            return level, f"the {percentile:g} percentile of the positive density"
    # All percentiles are the maximum: an even body in emptiness.
    return float(density.min() + density.max()) / 2, "midway between the least and the most"


def _fit(look, grid: _Grid, height: np.ndarray, resolution: int, box):
    """The fine grid around what is solid on another grid, and heights on it.

    A side that cuts through something solid goes outwards, at most to the box's: the first look
    misses what is thinner than its cells. Half as long again a turn, few turns reach any size.
    """
    low, high = grid.around(height > 0)
    while True:
        fine = _Grid.over(low, high, resolution)
        fine_height = look(fine)
        solid = fine_height > 0
        if not solid.any():  # a speck between the points of the new grid, too
            return grid, height
        touched = fine.touched(solid)
        more = 0.5 * (high - low).max()
        grown_low = torch.where(touched[0], (low - more).maximum(box[0]), low)
        grown_high = torch.where(touched[1], (high + more).minimum(box[1]), high)
        if torch.equal(grown_low, low) and torch.equal(grown_high, high):
            return fine, fine_height
        low, high = grown_low, grown_high


def _largest_piece(height: np.ndarray, measure) -> tuple[np.ndarray, int, float]:
    """Heights with one piece only, the number there were, and the volume of the others in all.

    Pieces hang together along the grid's lines. Cavities in the one that is kept are filled.
    """
    pieces = measure.label(height > 0, connectivity=1)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    kept = pieces == sizes.argmax()
    outside = measure.label(np.pad(~kept, 1, constant_values=True), connectivity=3)
    outside = (outside == outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    height = np.where(kept, height, np.where(outside, np.minimum(height, -ON_SURFACE), 0.5))
    return height, len(sizes) - 1, 1 - sizes.max() / sizes.sum()


def _warn_cut(grid: _Grid, solid: np.ndarray, box, warn) -> None:
    """Say at which of the box's sides the surface is cut."""
    at_box = torch.stack([grid.low == box[0], grid.high == box[1]])  # [2, 3]
    cut = (grid.touched(solid) & at_box).tolist()
    sides = [f"{'-+'[end]}{'xyz'[axis]}" for axis in range(3) for end in range(2) if cut[end][axis]]
    if sides:
        warn(f"the object reaches the box's side {', '.join(sides)}: it is cut and closed there")


def _used(solid: np.ndarray) -> list[np.ndarray]:
    """For each axis the numbers of the slices that hold a solid point."""
    axes = range(3)
    return [
        solid.any(tuple(other for other in axes if other != axis)).nonzero()[0] for axis in axes
    ]


def _colors(color_at, vertices: Tensor, chunk: int) -> np.ndarray:
    """RGBA [V, 4] uint8 of vertices [V, 3]."""
    rgb = torch.cat([color_at(part).float().cpu() for part in vertices.split(chunk)])  # [V, 3]
    assert rgb.shape == vertices.shape, rgb.shape
    if bad := int(rgb.isnan().any(-1).sum()):
        raise ValueError(
            f"the colour is NaN at {bad} of {len(rgb)} vertices: the field is broken, "
            "export an earlier checkpoint"
        )
    return np.pad(to_8bit(rgb.numpy()), ((0, 0), (0, 1)), constant_values=255)


def _glb(mesh) -> bytes:
    """A mesh in scene axes as binary glTF: y up, linear colours, matte."""
    trimesh, _ = _libraries()
    linear = trimesh.visual.color.srgb_to_linear(mesh.visual.vertex_colors[:, :3])
    turned = trimesh.Trimesh(
        mesh.vertices[:, [0, 2, 1]] * [1.0, 1.0, -1.0],
        mesh.faces,
        # trimesh writes vertex colours with 8 bits only, other attributes as they are ...
        vertex_attributes={"_COLOR_0": linear.astype(np.float32)},
        process=False,
    )

    def finish(tree: dict) -> None:
        primitive = tree["meshes"][0]["primitives"][0]
        # ... under a name that begins with _, by glTF's rule for attributes of one's own.
        primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_COLOR_0")
        tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1}}]
        primitive["material"] = 0

    return trimesh.exchange.gltf.export_glb(
        turned.scene(), include_normals=True, tree_postprocessor=finish
    )
