"""A phone's video made into a scene, and a phone's photos as a transforms.json.

    python benchmarks/phone.py --photos <folder of photos, in walking order>

``video``: the photos become the frames of an upright video, stored on its side with a rotation tag
as phones do; data/from_photos.py makes a scene of that file, which then trains. ``transforms``: 50
of the photos, enlarged to 1080 x 1920, with the estimated poses, as the transforms.json that users
of instant-ngp and nerfstudio have; it trains with the same settings. Measured for both: training
time, test PSNR of whole views and of their central half, and the sharpness of that half: the mean
absolute Laplacian of the render divided by the photo's (1: as sharp as the photo).
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image
from scipy import ndimage

from nerf.datasets.colmap_model import read_model

ROOT = Path(__file__).resolve().parents[1]

SIZE, COUNT = (1080, 1920), 50  # of the photos with a transforms.json
TRAINED_SIDE = 400  # pixels of the longer side, as data/from_photos.py's config has it


def call(*command) -> float:
    """Run a script of this project; seconds it took. If it fails, exit with its output."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return time.monotonic() - start


def write_video(photos: list[Path], path: Path) -> None:
    """Write an MP4 of frames on their side, with the tag to rotate them by 90 degrees."""
    with Image.open(photos[0]) as first:
        width, height = first.size
    sideways = path.with_name("sideways.mp4")
    writer = imageio_ffmpeg.write_frames(str(sideways), (height, width), fps=6, quality=9)
    writer.send(None)
    for photo in photos:
        with Image.open(photo) as image:
            turned = image.convert("RGB").transpose(Image.Transpose.ROTATE_90)
        writer.send(np.ascontiguousarray(turned))
    writer.close()
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    command = [*ffmpeg, "-display_rotation", "-90", "-i", str(sideways), "-c", "copy", str(path)]
    subprocess.run(command, check=True)
    sideways.unlink()


def write_transforms(scene: Path, out: Path) -> None:
    """Write COUNT photos of from_photos.py's scene, enlarged to SIZE, with a transforms.json."""
    model = read_model(scene / "sparse" / "0")
    (out / "images").mkdir(parents=True)
    order = np.argsort(model.names)
    frames = []
    for index in order[np.linspace(0, len(order) - 1, COUNT).round().astype(int)]:
        name, camera = model.names[index], model.cameras[model.camera_ids[index]]
        with Image.open(scene / "images" / name) as image:
            image.resize(SIZE, Image.Resampling.LANCZOS).save(out / "images" / name, quality=95)
        larger = SIZE[0] / camera.width, SIZE[1] / camera.height
        focal_center = np.array(camera.params[:4]) * np.tile(larger, 2)
        pose = np.vstack([model.c2w[index], [0, 0, 0, 1]]).tolist()
        frame = dict(zip(("fl_x", "fl_y", "cx", "cy"), focal_center.tolist(), strict=True))
        frame |= dict(zip(("k1", "k2", "p1", "p2"), camera.params[4:], strict=True))
        frames.append({"file_path": f"images/{name}", "transform_matrix": pose, **frame})
    content = {"camera_model": "OPENCV", "w": SIZE[0], "h": SIZE[1], "frames": frames}
    (out / "transforms.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def central_quality(run: Path) -> tuple[float, float]:
    """Mean PSNR and sharpness of the central half of a run's newest test views."""
    folder = max(run.glob("render_test_*"))
    psnr, sharpness = [], []
    for path in sorted(folder.glob("*.png")):
        pair = [
            np.asarray(Image.open(file)) / 255.0 for file in (path, folder / "target" / path.name)
        ]
        height, width = pair[0].shape[:2]
        part = slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4))
        render, photo = (picture[part] for picture in pair)
        psnr.append(-10 * np.log10(np.square(render - photo).mean()))
        edges = [np.abs(ndimage.laplace(picture.mean(-1))).mean() for picture in (render, photo)]
        sharpness.append(edges[0] / edges[1])
    return float(np.mean(psnr)), float(np.mean(sharpness))


def train(name: str, config: Path, out: Path, flags: list[str]) -> None:
    """Train and print one row of the table."""
    place = ["--basedir", out, "--expname", name, "--i_video", 0]
    seconds = call("run_nerf.py", "--config", config, *place, *flags)
    metrics = json.loads((out / name / "metrics.json").read_text(encoding="utf-8"))
    psnr, sharpness = central_quality(out / name)
    width, height = metrics["resolution"]
    print(
        f"| {name} | {width}x{height} | {seconds:.0f} | {metrics['psnr']:.2f} | "
        f"{metrics['ssim']:.3f} | {psnr:.2f} | {sharpness:.2f} | {metrics['num_views']} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of .jpg files")
    parser.add_argument("--parts", nargs="+", choices=("video", "transforms"), default=["video"])
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "phone")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="flags for run_nerf.py"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    photos = sorted(args.photos.glob("*.jpg"))
    scene, video = args.out / "scene", args.out / "walk.mp4"
    if not scene.exists():
        write_video(photos, video)
        seconds = call("data/from_photos.py", video, "--out", scene, "--frames", len(photos))
        print(f"from_photos.py: {seconds:.0f} s. {(scene / 'report.txt').read_text()}")
    print("| scene | size | s | PSNR | SSIM | PSNR, middle | sharpness, middle | views |")
    print("|---|---|---|---|---|---|---|---|")
    if "video" in args.parts:
        train("video", scene / "config.txt", args.out, args.flags)
    if "transforms" in args.parts:
        other = args.out / "phone_photos"
        if not other.exists():
            write_transforms(scene, other)
        config = (scene / "config.txt").read_text(encoding="utf-8")
        config = config.replace("dataset_type = colmap", "dataset_type = transforms")
        config = config.replace(str(scene), str(other)).replace(
            "expname = scene", "expname = phone"
        )
        config = re.sub(r"factor = \d+", f"downscale = {-(-max(SIZE) // TRAINED_SIDE)}", config)
        (other / "config.txt").write_text(config, encoding="utf-8")
        train("transforms", other / "config.txt", args.out, args.flags)


if __name__ == "__main__":
    main()
