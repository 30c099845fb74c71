"""Photos or a video -> a scene for run_nerf.py: camera poses, a report and a config.

    python data/from_photos.py my_photos/ --out data/mine
    python data/from_photos.py walk_around.mp4 --out data/mine --frames 80
    python run_nerf.py --config data/mine/config.txt

The folder --out is complete or does not exist. It holds images/ (upright), sparse/0/ (COLMAP's
model, z up, root mean square camera distance 1), report.txt, cameras.png and config.txt.
"""

import checkout  # noqa: F401  first: finds nerf/, says in a sentence what is missing

# isort: split
import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sfm
from photos import VIDEOS, Photo, blurred, some, take_frames, take_photos
from PIL import Image, ImageDraw

from nerf.datasets import capture, colmap
from nerf.datasets.colmap_model import Model, read_model
from nerf.datasets.wrong_folder import DATA, quoted
from nerf.training import last_net
from nerf.training.arguments import ArgumentParser
from nerf.training.files import folders_above, unfinished_folder
from nerf.training.plain_text import one_line

FEWEST = 3  # registered photos without which there is no scene
POOR = 150  # features; a photo with fewer is plain or blurred
TRAINED_SIDE = 400  # pixels; the config's --factor reduces the longer side to at most this
Log = Callable[[str], object]
ADVICE = (
    "take 30 to 100 sharp photos of a static scene in even light, from all around, with one zoom; "
    "each should overlap the next by two thirds; move between photos instead of turning on the "
    "spot, and avoid mirrors"
)
SETTINGS = """use_viewdirs = True
pixel_center = True

occ_grid = True
field = triplane
{space}
amp = bf16
lrate = 2e-3
lrate_warmup = 20
lr_schedule = cosine
i_img = 500
"""
AROUND = """by_device = capture
contract = True
cone_angle = 0.02
resample = 32
near_scaling = 2
lambda_tv = 0.003
"""


def gather(source: Path, images: Path, args: argparse.Namespace, log: Log) -> list[Photo]:
    """Write upright pictures of a folder or a video to ``images``. ValueError if too few."""
    if not source.exists():
        raise ValueError(f"{source}: does not exist; give a folder of photos or a video")
    if source.is_dir():
        photos = take_photos(source, images, args.max_side, log)
    elif source.suffix.lower() in VIDEOS:
        photos = take_frames(source, images, args.frames, args.max_side)
    else:
        raise ValueError(
            f"{source}: is neither a folder of photos nor a video ({', '.join(VIDEOS)}); give one"
        )
    if len(photos) < FEWEST:
        raise ValueError(
            f"{source}: {len(photos)} different picture{'s' * (len(photos) != 1)}; expected "
            f"{FEWEST} or more from different places, and 30 to 100 for a good scene"
        )
    return photos


def verdicts(found: sfm.Reconstruction, fuzzy: list[str]) -> list[str]:
    """One line for each photo that was not registered, with the likely reason.

    fuzzy: names of blurred photos.
    """
    lines = []
    for name, inside, features, partners in zip(
        found.names, found.registered, found.features, found.partners, strict=True
    ):
        if inside:
            continue
        if features < POOR:
            why = f"only {features} features: too plain, too dark or blurred"
        elif name in fuzzy:
            why = "blurred, much less sharp than the others"
        elif not partners:
            why = "overlaps no other photo"
        else:
            why = f"overlaps {partners} others, but too little or taken from the same place"
        lines.append(f"{name}: {why}")
    return lines


def check_registered(source: Path, found: sfm.Reconstruction) -> None:
    """ValueError, with the likely reason, if fewer than FEWEST photos were registered."""
    count, total = sum(found.registered), len(found.names)
    if count >= FEWEST:
        return
    poor = [name for name, few in zip(found.names, found.features, strict=True) if few < POOR]
    if 2 * len(poor) >= total:
        why = f"{len(poor)} of {total} are blurred, dark or plain ({some(poor, 3)})"
    elif not any(found.partners):
        why = "no two of them overlap"
    else:
        pairs = sum(found.partners) // 2
        why = f"{pairs} pairs overlap, but too little or taken from the same place"
    raise ValueError(
        f"{source}: {count} of {total} photos could be registered, expected {FEWEST} or more: "
        f"{why}; {ADVICE}"
    )


def report(found: sfm.Reconstruction, photos: list[Photo], model: Model, seconds: float) -> str:
    """The text of report.txt: what was registered, how well, and what to improve."""
    fuzzy, failed = blurred(photos), verdicts(found, blurred(photos))
    lengths = np.bincount(model.tracks[:, 0]) if len(model.tracks) else np.zeros(1)
    count = sum(found.registered)
    lines = [
        f"registered {count} of {len(found.names)} pictures in {seconds:.0f} s; reprojection error "
        f"{found.error:.2f} pixels; {len(model.points)} points of {lengths.mean():.1f} views each"
    ]
    lines += [f"not registered: {line}" for line in failed]
    if failed and found.num_models > 1:
        lines.append(
            f"the pictures form {found.num_models} groups that do not overlap; only the largest is "
            "kept: take more photos between the groups"
        )
    if found.distrusted:
        lines.append(
            f"{found.distrusted} pairs of pictures match on a small area only, as happens with "
            "objects that look alike from two sides; they were not used (--all_pairs uses them)"
        )
    if fuzzy:
        lines.append(f"much less sharp than the others: {some(fuzzy)}")
    if found.error > 1.5:
        lines.append("the reprojection error is high: keep the scene still and the zoom fixed")
    if count < 20:
        lines.append(f"{count} pictures are few; 30 to 100 make a better scene")
    if failed:
        lines.append(ADVICE)
    return "\n".join(lines)


def draw(model: Model, path: Path, side: int = 480) -> None:
    """Write a picture of the points and cameras from above and from the side to ``path``.

    side: pixels of each of its two square panels.
    """
    around = capture.around(model.c2w)
    inverse = np.linalg.inv(around.to_world)
    points = model.points @ inverse[:3, :3].T + inverse[:3, 3]
    positions, forward = around.c2w[:, :, 3], -around.c2w[:, :, 2]
    reach = 1.3 * np.abs(positions).max()
    near = (np.abs(points) < reach).all(-1)
    sheet = Image.new("RGB", (2 * side, side), "white")
    pen = ImageDraw.Draw(sheet)
    for panel, (right, up) in enumerate(((0, 1), (0, 2))):

        def project(
            xyz: np.ndarray, panel: int = panel, right: int = right, up: int = up
        ) -> tuple[float, float]:
            scaled = xyz / reach * side / 2
            return (panel * side + side / 2 + scaled[right], side / 2 - scaled[up])

        for xyz, color in zip(points[near], model.colors[near], strict=True):
            x, y = project(xyz)
            pen.rectangle((x, y, x + 1, y + 1), fill=tuple(int(level) for level in color))
        for xyz, direction in zip(positions, forward, strict=True):
            pen.line((project(xyz), project(xyz + 0.15 * direction)), fill=(200, 60, 40), width=1)
            x, y = project(xyz)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(200, 60, 40))
        pen.text((panel * side + 8, 8), ("from above", "from the side")[panel], fill="black")
    pen.line((side, 0, side, side), fill=(180, 180, 180))
    sheet.save(path)


def value(text: str) -> str:
    """A text as a value of a config file: in quotes if it is not plain, as after " #" it ends."""
    return text if re.fullmatch(r"[\w./:-]+", text) else f'"{text}"'


def config(out: Path, photos: list[Photo], model: Model) -> str:
    """The text of config.txt, for run_nerf.py: NDC or a contracted scene, and a --factor."""
    longest = max(max(photo.width, photo.height) for photo in photos)
    factor = max(1, -(-longest // TRAINED_SIDE))
    white = any(photo.name.endswith(".png") for photo in photos)  # transparent in parts
    facing = capture.faces_forward(model.c2w) and colmap.depth_bounds(model) is not None
    kind = "Forward-facing cameras: NDC." if facing else "Cameras around a scene: contracted."
    return (
        f"# Made by data/from_photos.py. {kind}\n"
        f"# Pictures {factor} times smaller; with a GPU lower it.\n"
        f"expname = {value(out.name)}\nbasedir = ./logs\ndatadir = {value(str(out))}\n"
        "dataset_type = colmap\n"
        f"factor = {factor}\nllffhold = 8\n{'white_bkgd = True' * white}\n"
        + SETTINGS.format(space="by_device = facing\n" if facing else AROUND)
    )


def make(source: Path, out: Path, args: argparse.Namespace, log: Log) -> None:
    """Make the scene of ``source`` in a temporary folder, and rename that to ``out`` at the end.

    ValueError if ``out`` exists, pycolmap is missing, or no scene can be made of the photos.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it first, or give another --out")
    sfm.require()
    start = time.monotonic()
    with folders_above(out), unfinished_folder(out) as work:
        photos = gather(source, work / "images", args, log)
        log(f"{len(photos)} pictures, {photos[0].width}x{photos[0].height}; finding features ...")
        found = sfm.run(
            work / "images",
            work / "sfm",
            sizes={photo.name: (photo.width, photo.height) for photo in photos},
            camera_model=args.camera_model,
            in_order=source.is_file(),
            all_pairs=args.all_pairs,
            threads=args.threads,
        )
        check_registered(source, found)
        (work / "sfm" / "sparse").rename(work / "sparse")
        shutil.rmtree(work / "sfm")
        model = read_model(work / "sparse" / "0")
        text = report(found, photos, model, time.monotonic() - start)
        for line in text.splitlines():
            log(line)
        (work / "report.txt").write_text(text + "\n")
        (work / "config.txt").write_text(config(out, photos, model))
        draw(model, work / "cameras.png")
        os.chmod(work, 0o755)
        work.rename(out)
    log(f"next: python {quoted(DATA.parent / 'run_nerf.py')} --config {quoted(out / 'config.txt')}")


def positive(text: str) -> int:
    """A flag's value as an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number of 1 or more")
    return int(text)


def main() -> int:
    """Parse the command line and make the scene; the process's exit code."""
    parser = ArgumentParser("from_photos.py", __doc__)
    add = parser.add_argument
    add("source", type=Path, help="folder of photos, or a video file")
    add("--out", type=Path, required=True, help="folder to make")
    add("--frames", type=positive, default=80, help="number of frames to take from a video")
    add("--max_side", type=positive, default=1600, help="longest side of saved photos, in pixels")
    add("--camera_model", default="OPENCV", help="COLMAP's lens model", choices=CAMERA_MODELS)
    add("--all_pairs", action="store_true", help="use pairs that match on a small area, too")
    add("--threads", type=positive, default=os.cpu_count() or 1, help="processor threads")
    args = parser.parse_args()
    log = lambda line: print(one_line(line), flush=True)  # noqa: E731
    return last_net.exit_code("from_photos.py", lambda: make(args.source, args.out, args, log))


CAMERA_MODELS = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE")

if __name__ == "__main__":
    sys.exit(main())
