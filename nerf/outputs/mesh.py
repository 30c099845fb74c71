"""Triangle meshes: the surface of a density field with a color per vertex, and mesh files.

The surface lies where a step of a given length has opacity 0.5 (``surface_level``). Marching cubes
(Lorensen and Cline 1987; Lewiner et al. 2003) runs on the signed opacity: the opacity of that step
less 0.5, which is 0.5 - 2^(-density / level), positive inside. It is bounded, so the surface
between an empty and a dense point lies midway however dense the inside is. On the density itself
the surface would move towards the empty point, half a cell too far out.

Axes: meshes, .obj and .ply files have the scene's axes (right-handed; z up in this project's
scenes). glTF demands y up: a .glb holds (x, z, -y), a rotation that viewers and Blender expect.
Colors: RGB as rendered, which is sRGB, 8 bits; .obj and .ply hold it unchanged, as MeshLab and
Blender expect. glTF defines COLOR_0 as linear, and three.js and Blender read it so: sRGB stored
in it looks washed out. A .glb therefore holds linear float32, because 8 bits are too coarse for
dark colors, and a matte material: glTF's default is a metal, black where it mirrors nothing.
trimesh converts nothing: it reads linear colors back, with ``skip_materials=True``.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nerf.media import MESH_FORMATS
from nerf.metrics import to_8bit
from nerf.outputs.mesh_grid import SamplingGrid, sample_density, sample_near_surface
from nerf.training.files import replace_file

if TYPE_CHECKING:
    from trimesh import Trimesh

COARSE_RESOLUTION = 48  # points along the box's longest side in the first, coarse pass
PERCENTILES = (99.9, 99.0, 95.0)  # of the positive density: levels to try if none reaches the level
# Marching cubes leaves holes where a point lies exactly on the surface; such points go outside.
MIN_SIGNED_OPACITY = 1e-4
# Signed opacity around the box: so low that a surface which the box cuts is closed at the box's
# side and not halfway to the padding, but not so low that float32 loses the position (-1e6 does).
PADDING = -1e3

Box = tuple[Tensor, Tensor]  # low and high corner [3]
Sample = Callable[..., np.ndarray]  # (grid, flat numbers of points or all) -> density
Log = Callable[[str], None]


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
    warn: Log = print,
) -> "Trimesh":
    """The closed surface of a density field, faces outwards, with an sRGB color per vertex.

    density_at: scene points [M, 3] -> density [M] >= 0, per scene unit; color_at: scene points
    [M, 3] -> RGB [M, 3] in [0, 1], None: no colors; both get at most ``chunk`` points a call.
    low, high: corners [3] of the box. resolution: points along the longest side of the sampling
    grid, which is fitted to the object in the box. level: the surface's density; if no density in
    the box reaches it, a percentile of the density. keep_largest: keep only the piece with the
    largest solid volume, its enclosed cavities filled. (The largest area could be crumpled fog, and
    the largest enclosed volume a thin shell of fog around the scene.) smallest_piece: with
    keep_largest, keep every piece of at least this fraction of its volume. near_surface: evaluate
    the density near the surface only, for slow fields (``sample_near_surface``). ValueError if the
    box holds no object.
    """
    trimesh, measure = _import_libraries()
    assert resolution >= 2 and level > 0 and bool((high > low).all())
    sample = partial(sample_density, density_at, chunk)
    box = low, high
    coarse_grid, signed_opacity, level = _coarse_pass(sample, box, resolution, level, warn)

    def sample_signed_opacity(grid: SamplingGrid) -> np.ndarray:
        if near_surface:
            return sample_near_surface(
                lambda numbers: _signed_opacity(sample(grid, numbers), level), grid
            )
        return _signed_opacity(sample(grid), level)

    fit = partial(_fit_grid, sample_signed_opacity, resolution=resolution, box=box)
    grid, signed_opacity = fit(coarse_grid, signed_opacity)
    if keep_largest:
        pieces = _large_pieces(signed_opacity, measure, smallest_piece)
        if pieces.num_kept < pieces.num_pieces:
            warn(_dropped_pieces(pieces))
            # The grid was fitted to all pieces.
            piece_low, piece_high = grid.box_around(pieces.signed_opacity > 0)
            if (piece_high - piece_low).max() < 0.8 * (grid.high - grid.low).max():
                grid, signed_opacity = fit(grid, pieces.signed_opacity)
                pieces = _large_pieces(signed_opacity, measure, smallest_piece)
        signed_opacity = pieces.signed_opacity
    _warn_if_cut(grid, signed_opacity > 0, box, warn)
    padded = np.pad(signed_opacity, 1, constant_values=PADDING)
    # "ascent": values are higher inside than outside. It decides which way the faces look.
    positions, faces, _, _ = measure.marching_cubes(padded, 0.0, gradient_direction="ascent")
    cells = positions.astype(np.float64) - 1
    vertices = grid.low.cpu().numpy() + cells * grid.spacing.cpu().numpy()
    colors = None
    if color_at is not None:
        parts = torch.from_numpy(vertices).to(low).split(chunk)
        colors = rgba(torch.cat([color_at(part).float().cpu() for part in parts]))
    # process=True would merge vertices that nearly coincide, and open holes where they touch.
    return trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False)


def write_mesh(path: Path, mesh: "Trimesh") -> None:
    """Write the mesh as .glb, .obj or .ply, by the path's ending; creates the folder.

    The module's docstring describes axes and colors. The file is replaced as a whole. ValueError
    for another ending, or if the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in MESH_FORMATS:
        raise ValueError(f"{path}: a mesh file ends in {', '.join(MESH_FORMATS)}; rename it")
    exported: Any  # str for .obj, bytes for .ply; trimesh declares more types
    if kind == ".glb":
        content = _glb(mesh)
    elif kind == ".obj":
        exported = mesh.export(file_type="obj", include_normals=True)
        content = exported.encode()
    else:
        exported = mesh.export(file_type="ply", vertex_normal=True)
        content = exported
    write_export(path, content)


def write_export(path: Path, content: bytes) -> None:
    """Write an exported file, replaced as a whole. ValueError if it cannot be written."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}); choose another path") from error


def _import_libraries() -> tuple[ModuleType, ModuleType]:
    """trimesh and skimage.measure, which only an export needs. ValueError if one is missing."""
    try:
        import trimesh
        from skimage import measure
    except ImportError as error:
        raise ValueError(
            f"a mesh needs two more packages ({error}): pip install scikit-image trimesh"
        ) from error
    return trimesh, measure


def _signed_opacity(density: np.ndarray, level: float) -> np.ndarray:
    """Opacity less 0.5, positive inside, of a step that has opacity 0.5 at density ``level``."""
    values = 0.5 - np.exp2(-density / np.float32(level))
    values[np.abs(values) < MIN_SIGNED_OPACITY] = -MIN_SIGNED_OPACITY
    return values


def _coarse_pass(
    sample: Sample, box: Box, resolution: int, level: float, warn: Log
) -> tuple[SamplingGrid, np.ndarray, float]:
    """A grid over the whole box, the signed opacity on it, and the level, lowered if need be."""
    grid = SamplingGrid.over(*box, min(COARSE_RESOLUTION, resolution))
    density = sample(grid)
    values = _signed_opacity(density, level)
    if not (values > 0).any() and resolution > COARSE_RESOLUTION:  # it may be between the points
        grid = SamplingGrid.over(*box, resolution)
        density = sample(grid)
        values = _signed_opacity(density, level)
    smallest, middle, largest = density.min(), np.median(density), density.max()
    flat = largest - smallest <= 0.01 * largest
    if not (values > 0).any() and not flat:
        given, (level, description) = level, _lower_level(density)
        values = _signed_opacity(density, level)
        warn(f"no density reaches {given:.4g}: the surface is taken at {level:.4g}, {description}")
    if flat or (values > 0).all():
        raise ValueError(
            f"nothing to export: the density is {smallest:.4g} to {largest:.4g} everywhere in the "
            f"box, the surface's is {level:.4g}; train longer, and check the rendered pictures"
        )
    warn(
        f"density in the box: min {smallest:.4g}, median {middle:.4g}, max {largest:.4g}; "
        f"surface at {level:.4g}"
    )
    return grid, values, level


def _lower_level(density: np.ndarray) -> tuple[float, str]:
    """A level that some of the points exceed, and its description for the log."""
    positive = density[density > 0]
    for percentile in PERCENTILES:
        level = float(np.percentile(positive, percentile))
        if (_signed_opacity(density, level) > 0).any():
            return level, f"the {percentile:g} percentile of the positive density"
    # All percentiles are the maximum: a body of even density in empty space.
    return float(density.min() + density.max()) / 2, "midway between the least and the most"


def _fit_grid(
    sample_signed_opacity: Callable[[SamplingGrid], np.ndarray],
    grid: SamplingGrid,
    signed_opacity: np.ndarray,
    *,
    resolution: int,
    box: Box,
) -> tuple[SamplingGrid, np.ndarray]:
    """A fine grid around the solid points of ``grid``, and the signed opacity on it.

    A side that cuts through something solid moves outwards, at most to the box's side, because a
    coarse grid misses what is thinner than its cells. Each time it moves by half of the longest
    side, so a few rounds reach any size.
    """
    low, high = grid.box_around(signed_opacity > 0)
    while True:
        fine_grid = SamplingGrid.over(low, high, resolution)
        fine = sample_signed_opacity(fine_grid)
        solid = fine > 0
        if not solid.any():  # a speck between the points of the fine grid
            return grid, signed_opacity
        touched = fine_grid.sides_touched(solid)
        margin = 0.5 * (high - low).max()
        grown_low = torch.where(touched[0], (low - margin).maximum(box[0]), low)
        grown_high = torch.where(touched[1], (high + margin).minimum(box[1]), high)
        if torch.equal(grown_low, low) and torch.equal(grown_high, high):
            return fine_grid, fine
        low, high = grown_low, grown_high


class _Pieces(NamedTuple):
    """What is left of a solid when its small pieces are removed."""

    signed_opacity: np.ndarray  # [X, Y, Z]
    num_kept: int
    num_pieces: int
    dropped: float  # fraction of the solid volume that was removed


def _large_pieces(signed_opacity: np.ndarray, measure: ModuleType, smallest: float) -> _Pieces:
    """Remove small pieces of the solid points and fill the cavities of the others.

    Points are connected along the grid's lines. smallest: the least volume of a piece that is kept,
    as a fraction of the largest one's; 1: exactly one piece is kept.
    """
    labels = measure.label(signed_opacity > 0, connectivity=1)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    large = sizes >= max(1, smallest * sizes.max())
    if smallest == 1.0:  # one, also where two have the same size
        large = np.arange(len(sizes)) == sizes.argmax()
    kept = large[labels]
    outside = measure.label(np.pad(~kept, 1, constant_values=True), connectivity=3)
    outside = (outside == outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    empty = np.minimum(signed_opacity, -MIN_SIGNED_OPACITY)
    values = np.where(kept, signed_opacity, np.where(outside, empty, 0.5))
    dropped = 1 - sizes[large].sum() / sizes.sum()
    return _Pieces(values, int(large.sum()), len(sizes) - 1, dropped)


def _dropped_pieces(pieces: _Pieces) -> str:
    """The warning for pieces that are left out."""
    count = pieces.num_pieces - pieces.num_kept
    removed = "1 small piece was" if count == 1 else f"{count} small pieces were"
    kept = "the largest is" if pieces.num_kept == 1 else f"the {pieces.num_kept} largest are"
    share = f"{pieces.dropped:.2%} of the solid volume"
    return f"{removed} removed from the mesh ({share}); {kept} kept"


def _warn_if_cut(grid: SamplingGrid, solid: np.ndarray, box: Box, warn: Log) -> None:
    """Log the sides of the box that cut the surface."""
    at_box = torch.stack([grid.low == box[0], grid.high == box[1]])  # [2, 3]
    cut = (grid.sides_touched(solid) & at_box).tolist()
    sides = [f"{'-+'[end]}{'xyz'[axis]}" for axis in range(3) for end in range(2) if cut[end][axis]]
    if sides:
        warn(
            f"the object reaches the box's side {', '.join(sides)}: it is cut off and closed there"
        )


def rgba(rgb: Tensor) -> np.ndarray:
    """RGBA uint8 [V, 4] for RGB [V, 3] in [0, 1]. ValueError where a color is NaN."""
    if bad := int(rgb.isnan().any(-1).sum()):
        raise ValueError(
            f"the color is NaN at {bad} of {len(rgb)} vertices: the network diverged, "
            "export an earlier checkpoint"
        )
    return np.pad(to_8bit(rgb.float().cpu().numpy()), ((0, 0), (0, 1)), constant_values=255)


def _glb(mesh: "Trimesh") -> bytes:
    """A mesh in scene axes as binary glTF: y up, linear colors, matte."""
    trimesh, _ = _import_libraries()
    colors: Any = mesh.visual  # ColorVisuals, as ``extract_mesh`` makes them
    linear = trimesh.visual.color.srgb_to_linear(colors.vertex_colors[:, :3])
    rotated = trimesh.Trimesh(
        mesh.vertices[:, [0, 2, 1]] * [1.0, 1.0, -1.0],
        mesh.faces,
        # trimesh writes vertex colors with 8 bits only, but other attributes unchanged ...
        vertex_attributes={"_COLOR_0": linear.astype(np.float32)},
        process=False,
    )

    def finish(tree: dict) -> None:
        primitive = tree["meshes"][0]["primitives"][0]
        # ... if their name begins with _, glTF's rule for custom attributes.
        primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_COLOR_0")
        tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1}}]
        primitive["material"] = 0

    return trimesh.exchange.gltf.export_glb(
        rotated.scene(), include_normals=True, tree_postprocessor=finish
    )
