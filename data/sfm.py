"""Structure from motion: photos -> camera poses. The only file that imports pycolmap.

Pictures of one size share one camera. Matching is exhaustive up to EXHAUSTIVE pictures; frames of a
longer video are matched with their neighbors in time.

An object that looks alike from two sides (a label printed twice around a can, a table with two
equal ends) folds a walk around it into half a walk: pictures from opposite sides match on the
object and on nothing around it. Therefore pairs that are not neighbors by name are used only if
their matches cover WIDE of the largest area that either picture shares with any other.
"""

import checkout  # noqa: F401  first: finds nerf/, says in a sentence what is missing

# isort: split
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# Pillow comes in through these, and must be loaded before pycolmap: the other way round the two
# share symbols of an image library, and writing a PNG corrupts the heap (pycolmap 4.2.1).
from nerf.datasets import capture
from nerf.datasets.colmap_model import read_model

EXHAUSTIVE = 200  # pictures up to which all pairs are matched
NEIGHBORS = 12  # frames before and after that are matched in longer videos
FEATURE_SIDE = 1600  # pixels of the longer side at which features are extracted
MAX_FEATURES = 4096  # per picture
WIDE = 0.3  # fraction of a picture's largest matched area that a pair's matches must cover
ADJACENT = 6  # pairs at most this far apart in order of names are always used
ENOUGH = 0.95  # fraction of registered pictures below which the distrusted pairs are used too
INSTALL = "data/from_photos.py needs pycolmap: pip install pycolmap==4.2.1"


class Reconstruction(NamedTuple):
    """The result for N pictures; the lists have one entry per picture."""

    folder: Path | None  # of the sparse model; None: no picture was registered
    names: list[str]
    registered: list[bool]
    features: list[int]
    partners: list[int]  # number of other pictures with verified matches
    error: float  # mean reprojection error, pixels
    num_models: int  # separate reconstructions; only the largest is kept
    distrusted: int  # pairs not used because their matches cover too small an area


def require() -> None:
    """ValueError with the command that installs pycolmap, if it is missing."""
    try:
        found = importlib.util.find_spec("pycolmap")
    except ValueError:  # raised if sys.modules holds None, or a module without __spec__
        found = None
    if found is None:
        raise ValueError(INSTALL)


def run(images: Path, work: Path, **settings: Any) -> Reconstruction:
    """``reconstruct`` in a process of its own, so that a crash of COLMAP is a ValueError here.

    settings: the keyword arguments of ``reconstruct`` except log.
    """
    work.mkdir(parents=True)
    job = {"images": str(images), "work": str(work), **settings}
    (work / "job.json").write_text(json.dumps(job))
    with open(work / "log.txt", "w") as log:
        command = [sys.executable, __file__, work / "job.json", str(os.getpid())]
        done = subprocess.run(command, stderr=log)
    if done.returncode:
        lines = (work / "log.txt").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        raise ValueError(
            f"structure from motion failed (exit code {done.returncode}: {last.strip()[:200]}); "
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
    log: Callable[[str], object],
) -> Reconstruction:
    """Find the cameras of the pictures in ``images``; writes the best model to work/sparse/0.

    sizes: name -> width and height, for every picture. in_order: they are frames of a video.
    all_pairs: use all pairs with verified matches, also those on a small area.
    """
    import pycolmap

    pycolmap.logging.minloglevel = int(pycolmap.logging.FATAL)  # hide its log from the user
    pycolmap.set_random_seed(0)
    sizes = {name: (width, height) for name, (width, height) in sizes.items()}
    database, names = work / "database.db", sorted(sizes)
    _extract_features(pycolmap, database, images, sizes, camera_model, threads)
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
        log(f"{distrusted} pairs match on a small area of their pictures only: not used")
    best, found = None, {}
    for number, attempt in enumerate(attempts):
        log("estimating the camera poses ...")
        models = _map(pycolmap, attempt, images, work / f"models_{number}", threads)
        largest = max(models.values(), key=_quality, default=None)
        if largest is not None and (best is None or _quality(largest) > _quality(best)):
            best, found, distrusted = largest, models, distrusted if attempt == trusted else 0
        if best is not None and best.num_reg_images() >= ENOUGH * len(names):
            break
    if best is None:
        return Reconstruction(None, names, *empty)
    registered = {best.image(number).name for number in best.reg_image_ids()}
    folder = work / "sparse" / "0"
    _write_upright(pycolmap, best, folder)
    return Reconstruction(
        folder,
        names,
        [name in registered for name in names],
        features,
        partners,
        best.compute_mean_reprojection_error(),
        len(found),
        distrusted,
    )


def _quality(model: Any) -> tuple[int, int]:
    """Registered images, then points: the larger, the better."""
    return model.num_reg_images(), model.num_points3D()


def _map(
    pycolmap: ModuleType, database: Path, images: Path, folder: Path, threads: int
) -> dict[int, Any]:
    """Incremental mapping: number -> reconstruction, also written to ``folder``."""
    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads, options.random_seed, options.min_model_size = threads, 0, 3
    folder.mkdir()
    return pycolmap.incremental_mapping(database, images, folder, options)


def _drop_narrow(pycolmap: ModuleType, database: Path, trusted: Path, names: list[str]) -> int:
    """Copy the database to ``trusted`` without pairs that match on a small area; their number."""
    shutil.copyfile(database, trusted)
    opened = pycolmap.Database.open(trusted)
    order = {name: number for number, name in enumerate(names)}
    images = {image.image_id: image.name for image in opened.read_all_images()}
    points = {number: np.asarray(opened.read_keypoints(number))[:, :2] for number in images}
    areas: dict[tuple[int, int], list[float]] = {}
    widest = dict.fromkeys(images, 0.0)
    for pair, count in zip(*opened.read_two_view_geometry_num_inliers(), strict=True):
        if count:
            both = pycolmap.pair_id_to_image_pair(pair)
            matches = np.asarray(opened.read_two_view_geometry(*both).inlier_matches)
            for side, number in enumerate(both):
                matched = points[number][matches[:, side]]
                area = float(np.prod(np.diff(np.percentile(matched, [5, 95], axis=0), axis=0)))
                areas.setdefault((both[0], both[1]), []).append(area)
                widest[number] = max(widest[number], area)
    dropped = 0
    for both, (first, second) in areas.items():
        narrow = min(first / max(widest[both[0]], 1.0), second / max(widest[both[1]], 1.0)) < WIDE
        if narrow and abs(order[images[both[0]]] - order[images[both[1]]]) > ADJACENT:
            opened.delete_two_view_geometry(*both)
            opened.delete_matches(*both)
            dropped += 1
    opened.close()
    return dropped


def _write_upright(pycolmap: ModuleType, model: Any, folder: Path) -> None:
    """Write a reconstruction to ``folder``, moved to the layout ``capture.around``."""
    folder.mkdir(parents=True)
    model.write_binary(folder)
    to_scene = np.linalg.inv(capture.around(read_model(folder).c2w).to_world)
    model.transform(pycolmap.Sim3d(to_scene[:3]))
    model.write_binary(folder)


def _extract_features(
    pycolmap: ModuleType,
    database: Path,
    images: Path,
    sizes: dict[str, tuple[int, int]],
    camera_model: str,
    threads: int,
) -> None:
    """Write SIFT features of all pictures to the database, with one camera for each size."""
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


def _match(pycolmap: ModuleType, database: Path, count: int, in_order: bool, threads: int) -> None:
    """Match the ``count`` pictures' features, in all pairs or in a video's neighboring frames."""
    matching = pycolmap.FeatureMatchingOptions()
    matching.num_threads = threads
    common = {"matching_options": matching, "device": pycolmap.Device.cpu}
    if in_order and count > EXHAUSTIVE:
        pairing = pycolmap.SequentialPairingOptions()
        pairing.overlap = NEIGHBORS
        pycolmap.match_sequential(database, pairing_options=pairing, **common)
    else:
        pycolmap.match_exhaustive(database, **common)


def _counts(pycolmap: ModuleType, database: Path, names: list[str]) -> tuple[list[int], list[int]]:
    """For each picture: its features, and the other pictures with verified matches."""
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


def end_with(parent: int) -> None:
    """End this process when ``parent``, which started it, ends in any way, such as by SIGKILL.

    On Linux the system does so at once; elsewhere a thread looks every second.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=watch, daemon=True).start()  # also if it ended before that


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    job = json.loads(Path(sys.argv[1]).read_text())
    images, work = Path(job.pop("images")), Path(job.pop("work"))
    outcome = reconstruct(images, work, **job, log=lambda line: print(line, flush=True))
    folder = str(outcome.folder) if outcome.folder else None
    result = {**outcome._asdict(), "folder": folder}
    (work / "result.json").write_text(json.dumps(result))
