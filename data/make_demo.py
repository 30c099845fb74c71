"""Render the embedded scene (``demo_scene``) and write it in any of the data formats.

python data/make_demo.py --out data/demo                     # 100 + 8 + 25 views, 128x128
python data/make_demo.py --out data/demo_llff --format llff  # the same solids, another layout
python data/make_demo.py --out data/demo_colmap --format colmap   # two lenses, wide and upright
"""

import checkout  # noqa: F401  first: finds nerf/, says in a sentence what is missing

# isort: split
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from demo_scene import (
    BACKDROP,
    CAMERA_ANGLE_X,
    SOLIDS,
    intrinsics_of,
    render_view,
    surface_points,
)

from nerf.cameras import look_at, orbit_path
from nerf.datasets.colmap_model import Camera, Model
from nerf.datasets.colmap_write import write_model
from nerf.lenses import from_colmap
from nerf.media import write_png
from nerf.training import last_net
from nerf.training.arguments import ArgumentParser
from nerf.training.files import folders_above, unfinished_folder

RADIUS = 4.0  # distance of the cameras from the origin
FORMATS = ("blender", "llff", "deepvoxels", "linemod", "transforms", "colmap")
Progress = Callable[[], object]  # called after each view


def hemisphere(count: int, seed: int) -> np.ndarray:
    """Random cameras [count, 3, 4], uniform on the upper hemisphere, facing the origin."""
    random = np.random.default_rng(seed)
    azimuth, height = random.uniform(-np.pi, np.pi, count), random.uniform(0.03, 0.97, count)
    flat = np.sqrt(1 - height**2)
    positions = RADIUS * np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), height], axis=-1)
    return np.stack([look_at(position, np.zeros(3)) for position in positions])


def facing(count: int, seed: int) -> np.ndarray:
    """Forward-facing cameras [count, 3, 4]: small random offsets in front of the scene."""
    random = np.random.default_rng(seed)
    positions = np.stack(
        [random.uniform(-0.7, 0.7, count), np.full(count, -4.2), random.uniform(0.1, 1.1, count)],
        -1,
    )
    return np.stack([look_at(position, [0.15 * position[0], 0.0, -0.2]) for position in positions])


def cameras(counts: dict[str, int]) -> dict[str, np.ndarray]:
    """c2w [V, 3, 4] by split: random on the hemisphere; for test one orbit."""
    return {
        "train": hemisphere(counts["train"], seed=1),
        "val": hemisphere(counts["val"], seed=2),
        "test": orbit_path(counts["test"], elevation_deg=30.0, radius=RADIUS),
    }


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.round(picture * 255).astype(np.uint8)


def _over_white(picture: np.ndarray) -> np.ndarray:
    """Straight RGBA in [0, 1] -> uint8 RGB over white."""
    return _to_uint8(picture[..., :3] * picture[..., 3:] + 1 - picture[..., 3:])


def write_blender(out: Path, size: int, counts: dict[str, int], progress: Progress) -> None:
    """Blender's format, RGBA, with depth/test/*.npy: exact depth t [H, W] float32, inf: no hit."""
    for split, poses in cameras(counts).items():
        frames = []
        for number, c2w in enumerate(poses):
            picture, depth = render_view(c2w, size)
            write_png(out / split / f"r_{number}.png", _to_uint8(picture))
            if split == "test":
                (out / "depth" / split).mkdir(parents=True, exist_ok=True)
                np.save(out / "depth" / split / f"r_{number}.npy", depth)
            matrix = np.vstack([c2w, [0, 0, 0, 1]]).tolist()
            frames.append({"file_path": f"./{split}/r_{number}", "transform_matrix": matrix})
            progress()
        content = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
        (out / f"transforms_{split}.json").write_text(json.dumps(content, indent=1))


def write_linemod(out: Path, size: int, counts: dict[str, int], progress: Progress) -> None:
    """LINEMOD's format, over white."""
    fx, fy, cx, cy = intrinsics_of(size).tolist()
    matrix = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
    for split, poses in cameras(counts).items():
        frames = []
        for number, c2w in enumerate(poses):
            picture, _ = render_view(c2w, size)
            write_png(out / split / f"{number:04d}.png", _over_white(picture))
            frames.append(
                {
                    "file_path": f"{split}/{number:04d}.png",
                    "transform_matrix": np.vstack([c2w, [0, 0, 0, 1]]).tolist(),
                    "intrinsic_matrix": matrix,
                }
            )
            progress()
        content = {"near": 2.3, "far": 5.7, "frames": frames}
        (out / f"transforms_{split}.json").write_text(json.dumps(content, indent=1))


def write_deepvoxels(out: Path, size: int, counts: dict[str, int], progress: Progress) -> None:
    """DeepVoxels' format, over white; the object is called "demo"."""
    focal = intrinsics_of(size)[0].item()
    folders = {"train": "train", "val": "validation", "test": "test"}
    for split, poses in cameras(counts).items():
        base = out / folders[split] / "demo"
        (base / "pose").mkdir(parents=True)
        (base / "intrinsics.txt").write_text(
            f"{focal!r} {size / 2} {size / 2} 0.\n0. 0. 0.\n1.\n1.\n{size} {size}\n"
        )
        for number, c2w in enumerate(poses):
            picture, _ = render_view(c2w, size)
            write_png(base / "rgb" / f"{number:06d}.png", _over_white(picture))
            opencv = np.vstack([c2w, [0, 0, 0, 1]]) @ np.diag([1.0, -1.0, -1.0, 1.0])
            text = " ".join(f"{value!r}" for value in opencv.ravel().tolist())
            (base / "pose" / f"{number:06d}.txt").write_text(text)
            progress()


def write_llff(out: Path, size: int, counts: dict[str, int], progress: Progress) -> None:
    """LLFF's format: forward-facing views with a backdrop, so every pixel has a depth."""
    focal, rows = intrinsics_of(size)[0].item(), []
    for number, c2w in enumerate(facing(sum(counts.values()), seed=3)):
        picture, depth = render_view(c2w, size, (*SOLIDS, *BACKDROP))
        write_png(out / "images" / f"image{number:03d}.png", _to_uint8(picture[..., :3]))
        right, up, back, position = c2w.T
        matrix = np.stack([-up, right, back, position, [size, size, focal]], axis=1)
        finite = depth[np.isfinite(depth)]
        rows.append(np.concatenate([matrix.ravel(), [finite.min(), finite.max()]]))
        progress()
    np.save(out / "poses_bounds.npy", np.stack(rows))


def capture_cameras(size: int) -> list[tuple[str, int, int, list[float]]]:
    """COLMAP's model, height, width and parameters of two cameras: one wide, one upright."""
    wide, tall = (3 * size // 4, size), (size, 3 * size // 4)
    focal = intrinsics_of(size)[0].item()
    opencv = [focal, 1.02 * focal, 0.51 * wide[1], 0.48 * wide[0], -0.12, 0.03, 0.002, -0.003]
    return [
        ("OPENCV", *wide, opencv),
        ("SIMPLE_RADIAL", *tall, [0.9 * focal, tall[1] / 2, tall[0] / 2, -0.08]),
    ]


def _captured(size: int, poses: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each pose: its camera's number (every third is the upright one), RGBA, c2w."""
    rows = [(h, w, from_colmap(model, k)) for model, h, w, k in capture_cameras(size)]
    for number, c2w in enumerate(poses):
        which = int(number % 3 == 2)
        height, width, row = rows[which]
        picture, _ = render_view(c2w, size, camera=(height, width, torch.tensor(row)))
        yield which, picture, c2w


def write_transforms(out: Path, size: int, counts: dict[str, int], progress: Progress) -> None:
    """One transforms.json: a camera at the top level, another in some frames, lists of splits."""
    opencv, radial = (
        {"fl_x": row[0], "fl_y": row[1], "cx": row[2], "cy": row[3], "w": w, "h": h}
        | {"k1": row[5], "k2": row[6], "p1": row[12], "p2": row[13]}
        for model, h, w, k in capture_cameras(size)
        for row in [from_colmap(model, k)]
    )
    # instant-ngp's unit cube is 1 / scale wide and holds exactly the scene.
    content = {
        "camera_model": "OPENCV",
        **opencv,
        "aabb_scale": 1,
        "scale": 0.35,
        "offset": [0.5] * 3,
    }
    frames: list[dict] = []
    for split, poses in cameras(counts).items():
        names = [f"images/{split}_{number}.png" for number in range(len(poses))]
        for name, (which, picture, c2w) in zip(names, _captured(size, poses), strict=True):
            write_png(out / name, _to_uint8(picture))
            matrix = np.vstack([c2w, [0, 0, 0, 1]]).tolist()
            frames.append(
                {"file_path": name, "transform_matrix": matrix} | (radial if which else {})
            )
            progress()
        content[f"{split}_filenames"] = names
    (out / "transforms.json").write_text(json.dumps({**content, "frames": frames}, indent=1))


def write_colmap(out: Path, size: int, counts: dict[str, int], progress: Progress) -> None:
    """images/ over white, and a binary sparse model whose points and tracks are exact."""
    poses = hemisphere(sum(counts.values()), seed=4)
    names, ids = [f"photo_{number:03d}.png" for number in range(len(poses))], []
    for name, (which, picture, _) in zip(names, _captured(size, poses), strict=True):
        write_png(out / "images" / name, _over_white(picture))
        ids.append(which + 1)
        progress()
    cameras_by_id = {
        number: Camera(model, w, h, tuple(k))
        for number, (model, h, w, k) in enumerate(capture_cameras(size), start=1)
    }
    points, colors, tracks = surface_points(poses, 40)
    write_model(
        out / "sparse" / "0", Model(cameras_by_id, names, ids, poses, points, colors, tracks)
    )


WRITERS: dict[str, Callable[[Path, int, dict[str, int], Progress], None]] = {
    "transforms": write_transforms,
    "colmap": write_colmap,
    "blender": write_blender,
    "llff": write_llff,
    "deepvoxels": write_deepvoxels,
    "linemod": write_linemod,
}


def make(out: Path, kind: str, size: int, counts: dict[str, int], show: bool = False) -> None:
    """Write the scene in format ``kind`` to ``out``, by renaming a complete temporary folder.

    size: pixels per side. counts: views per split. show: a progress bar. ValueError if ``out``
    exists.
    """
    from tqdm import tqdm

    if out.exists():
        raise ValueError(f"{out}: exists already; remove it first, or choose another --out")
    with folders_above(out), unfinished_folder(out) as temporary:
        with tqdm(total=sum(counts.values()), disable=not show, desc="demo scene") as bar:
            WRITERS[kind](temporary, size, counts, bar.update)
        os.chmod(temporary, 0o755)
        temporary.rename(out)


def main() -> int:
    """Parse the command line and write the scene; the process's exit code."""
    parser = ArgumentParser("make_demo.py", __doc__)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to make")
    parser.add_argument("--format", choices=FORMATS, default="blender", help="layout of the files")
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--train", type=int, default=100, help="training views")
    parser.add_argument("--val", type=int, default=8, help="validation views")
    parser.add_argument("--test", type=int, default=25, help="test views")
    args = parser.parse_args()
    counts = {"train": args.train, "val": args.val, "test": args.test}
    show = sys.stderr.isatty()
    return last_net.exit_code(
        "make_demo.py", lambda: make(args.out, args.format, args.size, counts, show=show)
    )


if __name__ == "__main__":
    sys.exit(main())
