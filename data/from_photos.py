"""Photos or a video to a scene that run_nerf.py trains: poses, checks, a report and a config.

    python data/from_photos.py my_photos/ --out data/mine
    python data/from_photos.py walk_around.mp4 --out data/mine --frames 80
    python run_nerf.py --config data/mine/config.txt

The folder --out appears whole or not at all: images/ (upright), sparse/0/ (COLMAP's model, z up,
the cameras' mean distance 1), report.txt, cameras.png, config.txt.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sfm
from photos import VIDEOS, Photo, blurred, some, take_frames, take_photos
from PIL import Image, ImageDraw

from nerf.datasets import capture, colmap
from nerf.datasets.colmap_model import Model, read_model

FEWEST = 3  # photos with which there is anything to reconstruct
POOR = 150  # features below which a photo is plain or blurred
TRAINED_SIDE = 400  # pixels of the longer side that the config asks for, at most
ADVICE = (
    "Photos that work: 30 to 100 of a scene that keeps still, in even light, from all around; each "
    "overlaps the next by two thirds; sharp, one zoom, not turned on the spot, nothing mirrored."
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
N_iters = 2500
i_img = 500
"""
AROUND = """contract = True
march_steps = 64
cone_angle = 0.02
resample = 32
target_samples = 16384
grid_res = 256
near_scaling = 2
lambda_tv = 0.003
"""


def gather(source: Path, images: Path, args, log) -> list[Photo]:
    """Upright pictures in ``images``; ValueError if they cannot make a scene."""
    if not source.exists():
        raise ValueError(f"{source}: no such file; give a folder of photos or a video")
    if source.is_dir():
        photos = take_photos(source, images, args.max_side, log)
    elif source.suffix.lower() in VIDEOS:
        photos = take_frames(source, images, args.frames, args.max_side)
    else:
        raise ValueError(
            f"{source}: is neither a folder nor a video ({', '.join(VIDEOS)}); give one of them"
        )
    if len(photos) < FEWEST:
        raise ValueError(
            f"{source}: {len(photos)} different picture{'s' * (len(photos) != 1)}; expected "
            f"{FEWEST} or more from different places, and 30 to 100 for a good scene"
        )
    return photos


def verdicts(found: sfm.Reconstruction, fuzzy: list[str]) -> list[str]:
    """Why each photo that was not registered was not, one line each."""
    lines = []
    for name, inside, features, partners in zip(
        found.names, found.registered, found.features, found.partners, strict=True
    ):
        if inside:
            continue
        if features < POOR:
            why = f"only {features} features: too plain, too dark or blurred"
        elif name in fuzzy:
            why = "blurred beside the others"
        elif not partners:
            why = "overlaps no other photo"
        else:
            why = f"overlaps {partners} others, but too little or from the same place"
        lines.append(f"{name}: {why}")
    return lines


def refuse_or_accept(source: Path, found: sfm.Reconstruction, fuzzy: list[str]) -> None:
    """ValueError if too few photos found their place."""
    count, total = sum(found.registered), len(found.names)
    if count >= FEWEST:
        return
    poor = [name for name, few in zip(found.names, found.features, strict=True) if few < POOR]
    if 2 * len(poor) >= total:
        why = f"{len(poor)} of {total} are blurred, dark or plain ({some(poor, 3)})"
    elif not any(found.partners):
        why = "no two of them show the same things"
    else:
        pairs = sum(found.partners) // 2
        why = f"{pairs} pairs overlap, too little or taken from the same place"
    raise ValueError(f"{source}: no scene comes out of these photos: {why}; {ADVICE}")


def report(found: sfm.Reconstruction, photos: list[Photo], model: Model, seconds: float) -> str:
    """What a person should know about the poses."""
    fuzzy, failed = blurred(photos), verdicts(found, blurred(photos))
    lengths = np.bincount(model.tracks[:, 0]) if len(model.tracks) else np.zeros(1)
    count = sum(found.registered)
    lines = [
        f"registered {count} of {len(found.names)} pictures in {seconds:.0f} s; reprojection error "
        f"{found.error:.2f} pixels; {len(model.points)} points, each seen by {lengths.mean():.1f}"
    ]
    lines += [f"not registered: {line}" for line in failed]
    if failed and found.num_models > 1:
        lines.append(
            f"the pictures fell into {found.num_models} parts that do not overlap; the largest is "
            "kept: take more between them"
        )
    if found.distrusted:
        lines.append(
            f"{found.distrusted} pairs of pictures agree on a small part only, as things do that "
            "look alike from two sides; they were left aside (--all_pairs to use them)"
        )
    if fuzzy:
        lines.append(f"much less sharp than the others: {some(fuzzy)}")
    if found.error > 1.5:
        lines.append("the reprojection error is high: did something move, or the zoom change?")
    if count < 20:
        lines.append(f"{count} pictures are few; 30 to 100 make a better scene")
    if failed:
        lines.append(ADVICE)
    return "\n".join(lines)


def draw(model: Model, path: Path, side: int = 480) -> None:
    """The points and cameras from above and from the side, as a picture."""
    around = capture.around(model.c2w)
    inverse = np.linalg.inv(around.to_world)
    points = model.points @ inverse[:3, :3].T + inverse[:3, 3]
    places, ahead = around.c2w[:, :, 3], -around.c2w[:, :, 2]
    reach = 1.3 * np.abs(places).max()
    near = (np.abs(points) < reach).all(-1)
    sheet = Image.new("RGB", (2 * side, side), "white")
    pen = ImageDraw.Draw(sheet)
    for panel, (right, up) in enumerate(((0, 1), (0, 2))):

        def place(xyz, panel=panel, right=right, up=up):  # fmt: skip
            scaled = xyz / reach * side / 2
            return (panel * side + side / 2 + scaled[right], side / 2 - scaled[up])

        for xyz, color in zip(points[near], model.colors[near], strict=True):
            x, y = place(xyz)
            pen.rectangle((x, y, x + 1, y + 1), fill=tuple(int(level) for level in color))
        for xyz, direction in zip(places, ahead, strict=True):
            pen.line((place(xyz), place(xyz + 0.15 * direction)), fill=(200, 60, 40), width=1)
            x, y = place(xyz)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(200, 60, 40))
        pen.text((panel * side + 8, 8), ("from above", "from the side")[panel], fill="black")
    pen.line((side, 0, side, side), fill=(180, 180, 180))
    sheet.save(path)


def config(out: Path, photos: list[Photo], model: Model) -> str:
    """A config for run_nerf.py that suits the capture."""
    longest = max(max(photo.width, photo.height) for photo in photos)
    factor = max(1, -(-longest // TRAINED_SIDE))
    facing = capture.faces_forward(model.c2w) and colmap.depth_bounds(model) is not None
    kind = "Cameras that face one way: NDC." if facing else "Cameras around something: contracted."
    return (
        f"# Made by data/from_photos.py. {kind} Pictures {factor} times smaller than in images/:\n"
        "# with a GPU lower factor and raise grid_res and N_iters.\n"
        f"expname = {out.name}\nbasedir = ./logs\ndatadir = {out}\ndataset_type = colmap\n"
        f"factor = {factor}\nllffhold = 8\n\n" + SETTINGS.format(space="" if facing else AROUND)
    )


def make(source: Path, out: Path, args, log) -> None:
    """Everything, in a folder that is renamed to ``out`` at the end."""
    if out.exists():
        raise ValueError(f"{out}: already there; remove it first, or give another --out")
    sfm.require()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    start = time.monotonic()
    try:
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
        refuse_or_accept(source, found, blurred(photos))
        (work / "sfm" / "sparse").rename(work / "sparse")
        shutil.rmtree(work / "sfm")
        model = read_model(work / "sparse" / "0")
        text = report(found, photos, model, time.monotonic() - start)
        log(text)
        (work / "report.txt").write_text(text + "\n")
        (work / "config.txt").write_text(config(out, photos, model))
        draw(model, work / "cameras.png")
        os.chmod(work, 0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log(f"next: python run_nerf.py --config {out / 'config.txt'}")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", type=Path, help="folder of photos, or a video file")
    add("--out", type=Path, required=True, help="folder to make")
    add("--frames", type=positive, default=80, help="frames to take from a video")
    add("--max_side", type=positive, default=1600, help="photos are kept no larger, in pixels")
    add("--camera_model", default="OPENCV", help="COLMAP's lens model", choices=CAMERA_MODELS)
    add("--all_pairs", action="store_true", help="trust pairs that agree on little, too")
    add("--threads", type=positive, default=os.cpu_count() or 1, help="processor threads")
    args = parser.parse_args()
    try:
        make(args.source, args.out, args, lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        print(f"from_photos.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


CAMERA_MODELS = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE")

if __name__ == "__main__":
    sys.exit(main())
