"""Structure from motion: photos to camera poses. The only file that touches pycolmap.

Pictures of one size share one camera. Matching is exhaustive up to EXHAUSTIVE pictures; video
frames beyond that are matched with their neighbors in time.

What looks alike from two sides (a label printed twice around a can, a table with two equal ends)
folds a walk around it into half of one: such pairs agree on the thing itself and on nothing around
it. So pairs that are not neighbors by name count only if they agree over a good part of what
either picture shares with any other.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Pillow comes in through these, and must be loaded before pycolmap: the other way round the two
# share symbols of an image library, and writing a PNG corrupts the heap (pycolmap 4.2.1).
from nerf.datasets import capture
from nerf.datasets.colmap_model import read_model

EXHAUSTIVE = 200  # pictures; pairs grow with the square
NEIGHBOURS = 12  # frames before and after, for longer videos
FEATURE_SIDE = 1600  # pixels of the longer side at which features are looked for
MAX_FEATURES = 4096  # per picture
WIDE = 0.3  # of a picture's widest overlap: what a pair must agree over
ADJACENT = 6  # by name: these may agree on less, their order speaks for them
ENOUGH = 0.95  # of the pictures, or the distrusted pairs are tried as well
INSTALL = "data/from_photos.py needs pycolmap: pip install pycolmap==4.2.1"


class Reconstruction(NamedTuple):
    """What became of N pictures; lists go by their order."""

    folder: Path | None  # of the sparse model; None: no picture found its place
    names: list[str]
    registered: list[bool]
    features: list[int]
    partners: list[int]  # other pictures that each verifiably overlaps with
    error: float  # mean reprojection error, pixels
    num_models: int  # parts that the pictures fell into
    distrusted: int  # pairs left aside because they agree on too little


def require() -> None:
    """ValueError with the line that installs pycolmap, if it is missing."""
    try:
        found = importlib.util.find_spec("pycolmap")
    except ValueError:  # what stands for a module that is blocked
        found = None
    if found is None:
        raise ValueError(INSTALL)


def run(images: Path, work: Path, **settings) -> Reconstruction:
    """``reconstruct`` in a process of its own: should COLMAP crash, that is all that is lost."""
    work.mkdir(parents=True)
    job = {"images": str(images), "work": str(work), **settings}
    (work / "job.json").write_text(json.dumps(job))
    with open(work / "log.txt", "w") as log:
        done = subprocess.run([sys.executable, __file__, work / "job.json"], stderr=log)
    if done.returncode:
        lines = (work / "log.txt").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        raise ValueError(
            f"structure from motion broke off (exit code {done.returncode}: {last.strip()[:200]}); "
            "try fewer or smaller photos (--max_side 1000), or --threads 1"
        )
    result = json.loads((work / "result.json").read_text())
    folder = result.pop("folder")
    return Reconstruction(folder=Path(folder) if folder else None, **result)


def reconstruct(
    images: Path,
    work: Path,
    *,
    sizes: dict[str, tuple[int, int]],
    camera_model: str,
    in_order: bool,
    all_pairs: bool,
    threads: int,
    log,
) -> Reconstruction:
    """Find the cameras of the pictures in ``images``; the best model is written to work/sparse/0.

    sizes: name -> width and height, for every picture. in_order: they are frames of a video.
    all_pairs: trust all overlaps.
    """
    import pycolmap

    pycolmap.logging.minloglevel = int(pycolmap.logging.FATAL)  # its log is not for the user
    pycolmap.set_random_seed(0)
    sizes = {name: tuple(size) for name, size in sizes.items()}
    database, names = work / "database.db", sorted(sizes)
    _features(pycolmap, database, images, sizes, camera_model, threads)
    log(f"features of {len(names)} pictures: done")
    _match(pycolmap, database, len(names), in_order, threads)
    features, partners = _counts(pycolmap, database, names)
    pairs = sum(partners) // 2
    log(f"matching: {pairs} of {len(names) * (len(names) - 1) // 2} pairs overlap")
    empty = [False] * len(names), features, partners, np.nan, 0, 0
    if not pairs:
        return Reconstruction(None, names, *empty)
    trusted = work / "trusted.db"
    distrusted = 0 if all_pairs else _drop_narrow(pycolmap, database, trusted, names)
    attempts = [database]
    if distrusted:
        attempts = [trusted, database]
        log(f"{distrusted} pairs agree on a small part of their pictures only: left aside")
    best, found = None, {}
    for number, attempt in enumerate(attempts):
        log("placing the cameras ...")
        models = _map(pycolmap, attempt, images, work / f"models_{number}", threads)
        largest = max(models.values(), key=_quality, default=None)
        if largest is not None and (best is None or _quality(largest) > _quality(best)):
            best, found, distrusted = largest, models, distrusted if attempt == trusted else 0
        if best is not None and best.num_reg_images() >= ENOUGH * len(names):
            break
    if best is None:
        return Reconstruction(None, names, *empty)
    inside = {best.image(number).name for number in best.reg_image_ids()}
    folder = work / "sparse" / "0"
    folder.mkdir(parents=True)
    best.write_binary(folder)
    best.transform(pycolmap.Sim3d(_upright(read_model(folder).c2w)[:3]))
    best.write_binary(folder)
    return Reconstruction(
        folder,
        names,
        [name in inside for name in names],
        features,
        partners,
        best.compute_mean_reprojection_error(),
        len(found),
        distrusted,
    )


def _quality(model) -> tuple[int, int]:
    return model.num_reg_images(), model.num_points3D()


def _map(pycolmap, database: Path, images: Path, folder: Path, threads: int) -> dict:
    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads, options.random_seed, options.min_model_size = threads, 0, 3
    folder.mkdir()
    return pycolmap.incremental_mapping(database, images, folder, options)


def _drop_narrow(pycolmap, database: Path, trusted: Path, names: list[str]) -> int:
    """Copy the database to ``trusted`` without pairs that agree on little; how many those are."""
    shutil.copyfile(database, trusted)
    opened = pycolmap.Database.open(trusted)
    place = {name: number for number, name in enumerate(names)}
    images = {image.image_id: image.name for image in opened.read_all_images()}
    points = {number: np.asarray(opened.read_keypoints(number))[:, :2] for number in images}
    areas, widest = {}, dict.fromkeys(images, 0.0)
    for pair, count in zip(*opened.read_two_view_geometry_num_inliers(), strict=True):
        if count:
            both = pycolmap.pair_id_to_image_pair(pair)
            matches = np.asarray(opened.read_two_view_geometry(*both).inlier_matches)
            for side, number in enumerate(both):
                seen = points[number][matches[:, side]]
                area = float(np.prod(np.diff(np.percentile(seen, [5, 95], axis=0), axis=0)))
                areas.setdefault(tuple(both), []).append(area)
                widest[number] = max(widest[number], area)
    dropped = 0
    for both, (first, second) in areas.items():
        narrow = min(first / max(widest[both[0]], 1.0), second / max(widest[both[1]], 1.0)) < WIDE
        if narrow and abs(place[images[both[0]]] - place[images[both[1]]]) > ADJACENT:
            opened.delete_two_view_geometry(*both)
            opened.delete_matches(*both)
            dropped += 1
    opened.close()
    return dropped


def _upright(c2w: np.ndarray) -> np.ndarray:
    """The similarity [4, 4] from COLMAP's world to one with z up and the cameras at distance 1."""
    return np.linalg.inv(capture.around(c2w).to_world)


def _features(pycolmap, database: Path, images: Path, sizes, camera_model: str, threads) -> None:
    extraction = pycolmap.FeatureExtractionOptions()
    extraction.max_image_size, extraction.num_threads = FEATURE_SIDE, threads
    extraction.sift.max_num_features = MAX_FEATURES
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model = camera_model
    for size in sorted(set(sizes.values())):
        pycolmap.extract_features(
            database,
            images,
            [name for name in sorted(sizes) if sizes[name] == size],
            camera_mode=pycolmap.CameraMode.SINGLE,
            reader_options=reader,
            extraction_options=extraction,
            device=pycolmap.Device.cpu,
        )


def _match(pycolmap, database: Path, count: int, in_order: bool, threads: int) -> None:
    matching = pycolmap.FeatureMatchingOptions()
    matching.num_threads = threads
    common = {"matching_options": matching, "device": pycolmap.Device.cpu}
    if in_order and count > EXHAUSTIVE:
        pairing = pycolmap.SequentialPairingOptions()
        pairing.overlap = NEIGHBOURS
        pycolmap.match_sequential(database, pairing_options=pairing, **common)
    else:
        pycolmap.match_exhaustive(database, **common)


def _counts(pycolmap, database: Path, names: list[str]) -> tuple[list[int], list[int]]:
    """Features of each picture, and with how many others it shares verified matches."""
    opened = pycolmap.Database.open(database)
    try:
        numbers = {image.image_id: image.name for image in opened.read_all_images()}
        features = {name: opened.num_keypoints_for_image(i) for i, name in numbers.items()}
        pair_ids, inliers = opened.read_two_view_geometry_num_inliers()
        partners = dict.fromkeys(names, 0)
        for pair, count in zip(pair_ids, inliers, strict=True):
            if count > 0:
                for number in pycolmap.pair_id_to_image_pair(pair):
                    partners[numbers[number]] += 1
    finally:
        opened.close()
    return [features.get(name, 0) for name in names], [partners[name] for name in names]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    images, work = Path(job.pop("images")), Path(job.pop("work"))
    outcome = reconstruct(images, work, **job, log=lambda line: print(line, flush=True))
    result = outcome._replace(folder=str(outcome.folder) if outcome.folder else None)._asdict()
    (work / "result.json").write_text(json.dumps(result))
