"""Triangle meshes: the surface of a density field with a color per vertex, and files of it.

Surface: where a step of a given length has opacity 0.5 (``surface_level``). Marching cubes
(Lorensen and Cline 1987; Lewiner et al. 2003) runs on that opacity, 1 - 2^(-density / level). It is
bounded, so a surface between an empty and a full point lies midway however dense the inside is; on
the density itself it would be drawn to the empty point, half a cell too far out.

Axes: meshes have the scene's (right-handed, z up by our scenes' custom), and so have .obj and .ply.
glTF demands y up: a .glb holds (x, z, -y), a rotation, which viewers and Blender expect.
Colors: RGB as rendered, that is sRGB, 8 bits; .obj and .ply hold it as it is, which MeshLab and
Blender expect. glTF defines COLOR_0 as linear, and three.js and Blender read it so: sRGB stored
there looks washed out. A .glb therefore holds linear float32, 8 bits being too coarse in the
dark, and a matte material: glTF's default is a metal, black where there is nothing to mirror.
trimesh converts nothing: it reads linear colors back, with ``skip_materials=True``.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nerf.media import MESH_FORMATS
from nerf.metrics import to_8bit
from nerf.outputs.mesh_grid import Grid, heights_near_surface, sample_density

COARSE = 48  # points along the box's longest side in the first look
PERCENTILES = (99.9, 99.0, 95.0)  # of the positive density, tried where nothing reaches the level
# Marching cubes leaves holes where a point lies exactly on the surface; such points go outside.
ON_SURFACE = 1e-4  # of opacity
# Below the surface, in opacity: so deep that a surface which the box cuts is closed at the box's
# side and not halfway to the rim, and not so deep that float32 loses the place (-1e6 does).
RIM = -1e3


def surface_level(step: float) -> float:
    """The density at which one rendering step of this length has opacity 0.5."""
    return math.log(2.0) / step


@torch.no_grad()
def extract_mesh(
    density_at: Callable[[Tensor], Tensor],
    color_at: Callable[[Tensor], Tensor] | None,
    low: Tensor,
    high: Tensor,
    *,
    resolution: int = 128,
    level: float,
    chunk: int = 1 << 16,
    keep_largest: bool = True,
    smallest_piece: float = 1.0,
    near_surface: bool = False,
    warn=print,
) -> "trimesh.Trimesh":  # noqa: F821
    """The closed surface of a density field, faces outwards, with an sRGB color per vertex.

    density_at: scene points [M, 3] -> density [M] >= 0, per scene unit; color_at: scene points
    [M, 3] -> RGB [M, 3] in [0, 1], None: no colors; at most ``chunk`` points a call. low, high:
    corners [3] of the box. resolution: points along the longest side of the grid, which is fitted
    to what the box holds. level: the surface's density; where nothing reaches it, a percentile of
    what there is. keep_largest: only the piece with the most solid volume. Not the largest area,
    which crumpled fog has, nor the largest enclosed volume, which a thin shell of fog around the
    scene has. Cavities without a way out are filled with it. smallest_piece: with it stay pieces of
    at least this part of its volume. near_surface: ask for the density near the surface alone, for
    slow fields (``heights_near_surface``). ValueError where there is no object.
    """
    trimesh, measure = _libraries()
    assert resolution >= 2 and level > 0 and bool((high > low).all())
    sample = partial(sample_density, density_at, chunk)
    box = low, high
    survey, height, level = _survey(sample, box, resolution, level, warn)

    def look(grid: Grid) -> np.ndarray:
        if near_surface:
            return heights_near_surface(lambda numbers: _height(sample(grid, numbers), level), grid)
        return _height(sample(grid), level)

    grid, height = _fit(look, survey, height, resolution, box)
    if keep_largest:
        piece, num_kept, num_pieces, dropped = _large_pieces(height, measure, smallest_piece)
        if num_kept < num_pieces:
            kept = "the largest" if num_kept == 1 else f"the {num_kept} largest"
            warn(
                f"{kept} of {num_pieces} pieces {'is' if num_kept == 1 else 'are'} kept; the "
                f"others, {dropped:.2%} of the solid volume, are left out"
            )
            # The grid was fitted to all of them.
            piece_low, piece_high = grid.around(piece > 0)
            if (piece_high - piece_low).max() < 0.8 * (grid.high - grid.low).max():
                grid, height = _fit(look, grid, piece, resolution, box)
                piece = _large_pieces(height, measure, smallest_piece)[0]
        height = piece
    _warn_cut(grid, height > 0, box, warn)
    padded = np.pad(height, 1, constant_values=RIM)
    # "ascent": the inside is higher than the outside. It decides which way the faces look.
    places, faces, _, _ = measure.marching_cubes(padded, 0.0, gradient_direction="ascent")
    vertices = grid.low.cpu().numpy() + (places.astype(np.float64) - 1) * grid.spacing.cpu().numpy()
    colors = None
    if color_at is not None:
        parts = torch.from_numpy(vertices).to(low).split(chunk)
        colors = rgba(torch.cat([color_at(part).float().cpu() for part in parts]))
    # process=True would merge vertices that nearly coincide, and open holes where they touch.
    return trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False)


def write_mesh(path: Path, mesh) -> None:
    """The mesh as .glb, .obj or .ply, by the name's ending; its folder is made.

    For axes and colors in the file see above. At any moment the old file or the new is whole.
    """
    kind = path.suffix.lower()
    if kind not in MESH_FORMATS:
        raise ValueError(f"{path}: a mesh is written as {', '.join(MESH_FORMATS)}; end its name so")
    if kind == ".glb":
        content = _glb(mesh)
    elif kind == ".obj":
        content = mesh.export(file_type="obj", include_normals=True).encode()
    else:
        content = mesh.export(file_type="ply", vertex_normal=True)
    replace_file(path, content)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that the old one or the new is whole; its folder is made."""
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


def _height(density: np.ndarray, level: float) -> np.ndarray:
    """The opacity of a step for which ``level`` means 0.5, less 0.5: positive inside."""
    height = 0.5 - np.exp2(-density / np.float32(level))
    height[np.abs(height) < ON_SURFACE] = -ON_SURFACE
    return height


def _survey(sample, box, resolution: int, level: float, warn):
    """A look at the whole box: its grid, heights on it, and the level that shows something."""
    grid = Grid.over(*box, min(COARSE, resolution))
    density = sample(grid)
    height = _height(density, level)
    if not (height > 0).any() and resolution > COARSE:  # it may lie between the points
        grid = Grid.over(*box, resolution)
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


def _fit(look, grid: Grid, height: np.ndarray, resolution: int, box):
    """The fine grid around what is solid on another grid, and heights on it.

    A side that cuts through something solid goes outwards, at most to the box's: the first look
    misses what is thinner than its cells. Half as long again a turn, few turns reach any size.
    """
    low, high = grid.around(height > 0)
    while True:
        fine = Grid.over(low, high, resolution)
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


def _large_pieces(height: np.ndarray, measure, smallest: float):
    """Heights with the large pieces only, how many of how many, and the others' part of the volume.

    Pieces hang together along the grid's lines. smallest: volume of those kept, as a part of the
    largest one's. Cavities in them are filled.
    """
    pieces = measure.label(height > 0, connectivity=1)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    large = sizes >= max(1, smallest * sizes.max())
    if smallest == 1.0:  # one, also where two are the same size
        large = np.arange(len(sizes)) == sizes.argmax()
    kept = large[pieces]
    outside = measure.label(np.pad(~kept, 1, constant_values=True), connectivity=3)
    outside = (outside == outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    height = np.where(kept, height, np.where(outside, np.minimum(height, -ON_SURFACE), 0.5))
    return height, int(large.sum()), len(sizes) - 1, 1 - sizes[large].sum() / sizes.sum()


def _warn_cut(grid: Grid, solid: np.ndarray, box, warn) -> None:
    """Say at which of the box's sides the surface is cut."""
    at_box = torch.stack([grid.low == box[0], grid.high == box[1]])  # [2, 3]
    cut = (grid.touched(solid) & at_box).tolist()
    sides = [f"{'-+'[end]}{'xyz'[axis]}" for axis in range(3) for end in range(2) if cut[end][axis]]
    if sides:
        warn(f"the object reaches the box's side {', '.join(sides)}: it is cut and closed there")


def rgba(rgb: Tensor) -> np.ndarray:
    """RGBA [V, 4] uint8 of vertices' RGB [V, 3] in [0, 1]. ValueError where it is NaN."""
    if bad := int(rgb.isnan().any(-1).sum()):
        raise ValueError(
            f"the color is NaN at {bad} of {len(rgb)} vertices: the field is broken, "
            "export an earlier checkpoint"
        )
    return np.pad(to_8bit(rgb.float().cpu().numpy()), ((0, 0), (0, 1)), constant_values=255)


def _glb(mesh) -> bytes:
    """A mesh in scene axes as binary glTF: y up, linear colors, matte."""
    trimesh, _ = _libraries()
    linear = trimesh.visual.color.srgb_to_linear(mesh.visual.vertex_colors[:, :3])
    turned = trimesh.Trimesh(
        mesh.vertices[:, [0, 2, 1]] * [1.0, 1.0, -1.0],
        mesh.faces,
        # trimesh writes vertex colors with 8 bits only, other attributes as they are ...
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
