"""Small captures as exporters write them, made on the spot: a pattern, cameras on a circle.

Each function makes a folder of one format; ``make`` calls the one of a dataset type.
"""

import json

import numpy as np
from PIL import Image

from nerf.build import load_scene
from nerf.cameras import look_at
from nerf.datasets.colmap_model import Camera, Model
from nerf.datasets.colmap_write import write_model
from nerf.flags import nerf as nerf_flags

WIDTH, HEIGHT, FOCAL = 32, 24, 35.0
ANGLE_X = 2 * np.arctan(WIDTH / 2 / FOCAL)


def poses(count, distance=4.0):
    """c2w [count, 4, 4] on a cone around the z axis, looking at the origin."""
    turns = np.linspace(0, 2 * np.pi, count, endpoint=False)
    rows = np.tile(np.eye(4), (count, 1, 1))
    for row, turn in zip(rows, turns, strict=True):
        place = [0.8 * np.cos(turn), 0.8 * np.sin(turn), 0.6]
        row[:3] = look_at(distance * np.array(place), np.zeros(3))
    return rows


def picture(number, mode="RGB", size=(WIDTH, HEIGHT)):
    """A picture with squares of its own colors; with alpha, its middle is opaque."""
    width, height = size
    rng = np.random.default_rng(number)
    squares = rng.integers(0, 255, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    pixels = squares.repeat(8, 0).repeat(8, 1)[:height, :width]
    if mode == "RGBA":
        alpha = np.zeros((height, width, 1), np.uint8)
        alpha[height // 4 : -height // 4, width // 4 : -width // 4] = 255
        pixels = np.concatenate([pixels, alpha], -1)
    return Image.fromarray(pixels)


def exported(folder, name="transforms_train.json", count=6, distance=4.0, mode="RGB", **top):
    """A folder with one transforms file; ``top`` are its top-level keys."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    frames = []
    for number, pose in enumerate(poses(count, distance)):
        picture(number, mode).save(folder / "images" / f"v{number}.png")
        frames.append({"file_path": f"images/v{number}.png", "transform_matrix": pose.tolist()})
    content = {"camera_angle_x": ANGLE_X, **top, "frames": frames}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(content))
    return folder


def edit(folder, change, name="transforms_train.json"):
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def load(folder, *flags, kind="auto", said=None):
    args = nerf_flags.parse(
        ["--datadir", str(folder), *(["--dataset_type", kind] if kind else []), *flags]
    )
    lines = []
    scene = load_scene(args, lines.append)
    if said is not None:
        said += lines
    return scene


def colmap(folder, count=6, names=None, width=WIDTH, height=HEIGHT):
    """A COLMAP scene: one pinhole camera and a few points around the origin."""
    names = names or [f"v{number}.png" for number in range(count)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    c2w = poses(count)[:, :3]
    points = np.random.default_rng(0).normal(0, 0.5, (20, 3))
    tracks = np.array([(point, view) for point in range(20) for view in range(count)])
    camera = Camera("PINHOLE", width, height, (FOCAL, FOCAL, width / 2, height / 2))
    colors = np.zeros((20, 3), np.uint8)
    model = Model({1: camera}, names, [1] * count, c2w, points, colors, tracks)
    write_model(folder / "sparse" / "0", model)
    return folder


def llff(folder, count=6, mode="RGB", size=(WIDTH, HEIGHT)):
    """An LLFF capture of cameras that look the same way."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        picture(number, mode, size).save(folder / "images" / f"v{number}.png")
        place = np.array([0.2 * number - 0.5, 0.1 * (number % 3), 0.05 * number]) + 7
        # columns: down, right, back, position, (height, width, focal)
        matrix = np.stack([[0, -1, 0], [1, 0, 0], [0, 0, 1], place, [size[1], size[0], FOCAL]], 1)
        rows.append(np.append(matrix.ravel(), [2.0, 9.0]))
    np.save(folder / "poses_bounds.npy", np.array(rows, float))
    return folder


def deepvoxels(folder, count=6):
    """A DeepVoxels object named cube, with poses and pictures of the same names."""
    base = folder / "train" / "cube"
    for name in ("rgb", "pose"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for number, pose in enumerate(poses(count)):
        picture(number).save(base / "rgb" / f"v{number}.png")
        rows = pose @ np.diag([1.0, -1.0, -1.0, 1.0])
        (base / "pose" / f"v{number}.txt").write_text(" ".join(map(str, rows.ravel())))
    (base / "intrinsics.txt").write_text(
        f"{FOCAL} {WIDTH / 2} {HEIGHT / 2} 0\n0 0 0\n1\n1\n{HEIGHT} {WIDTH}\n"
    )
    return folder


def linemod(folder, count=6):
    """A LINEMOD scene with one file."""
    matrix = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
    exported(folder, count=count, near=2.0, far=7.0)
    change = {"intrinsic_matrix": matrix}
    return edit(folder, lambda top: [frame.update(change) for frame in top["frames"]])


MAKERS = {
    "blender": exported,
    "transforms": exported,
    "colmap": colmap,
    "llff": llff,
    "deepvoxels": deepvoxels,
    "LINEMOD": linemod,
}
FLAGS = {
    "llff": ("--factor", "1"),
    "colmap": ("--factor", "1"),
    "deepvoxels": ("--shape", "cube"),
}


def make(folder, kind, **settings):
    """A folder in the format of a dataset type."""
    return MAKERS[kind](folder, **settings)


def pictures_in(folder, kind):
    """The folder of the pictures that ``make`` made."""
    return folder / "train" / "cube" / "rgb" if kind == "deepvoxels" else folder / "images"


def read_back(folder, kind, *flags):
    """The scene of a folder that ``make`` made, at full size, and the lines of its log."""
    said = []
    return load(folder, *FLAGS.get(kind, ()), *flags, kind=kind, said=said), said
