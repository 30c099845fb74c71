"""data/from_photos.py: what it keeps of photos and videos, poses against the truth, refusals."""

import shlex
import subprocess
import sys

import from_photos
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import photos
import pytest
import sfm
from helpers import REPOSITORY, run_script
from PIL import Image, ImageFilter

from nerf.build import load_scene
from nerf.datasets import capture
from nerf.datasets.colmap_model import read_model
from nerf.flags import nerf as nerf_flags

BEER = REPOSITORY.parent / "shared" / "data" / "llff_beer"


def texture(seed, size=(96, 64)):
    """A picture like no other: smooth random colors."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5))


def fill(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        texture(number).save(folder / f"photo_{number:02d}.jpg")
    return folder


def take(folder, max_side=1600):
    said = []
    out = folder.parent / "images"
    return photos.take_photos(folder, out, max_side, said.append), said, out


def run(monkeypatch, capsys, *words):
    """from_photos.py in this process: exit code, its lines on stdout and on stderr."""
    monkeypatch.setattr(sys, "argv", ["from_photos.py", *map(str, words)])
    code = from_photos.main()
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


# -------------------------------------------------------------------------- photos and frames


def test_sharpness_falls_as_a_picture_is_blurred():
    pictures = [texture(0).filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 1, 2, 4)]
    values = [photos.measured("a.jpg", picture).sharpness for picture in pictures]
    assert values == sorted(values, reverse=True) and values[0] > 5 * values[-1]
    kept = [photos.measured(f"{i}.jpg", texture(i)) for i in range(4)]
    blurred = photos.measured("blurred.jpg", texture(9).filter(ImageFilter.GaussianBlur(8)))
    assert photos.blurred([*kept, blurred]) == ["blurred.jpg"]


def test_what_is_no_new_picture_is_left_out_by_name(tmp_path):
    folder = fill(tmp_path / "mine", 3)
    (folder / "notes.txt").write_text("kitchen, Tuesday")
    (folder / "broken.jpg").write_bytes((folder / "photo_00.jpg").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "masks").mkdir()
    texture(1).save(folder / "copy.png")
    texture(7).save(folder / "photo_02.png")  # another picture of the same name
    kept, said, out = take(folder)
    names = ["photo_00.jpg", "photo_02.jpg", "photo_02_2.jpg"]
    assert sorted(p.name for p in out.iterdir()) == sorted(photo.name for photo in kept)
    assert [photo.name for photo in kept] == ["copy.jpg", *names]
    reasons = ("broken.jpg (", "empty.jpg (empty)")
    for word in ("notes.txt", "photo_01.jpg", "masks/", *reasons):
        assert sum(word in line for line in said) == 1
    assert all(path.exists() for path in folder.iterdir()) and len(list(folder.iterdir())) == 9


def test_pictures_are_kept_upright_and_not_too_large(tmp_path):
    folder = fill(tmp_path / "mine", 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    texture(5).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    kept, _, out = take(folder, max_side=48)
    for photo in kept:
        with Image.open(out / photo.name) as image:
            assert image.size == (photo.width, photo.height) == (48, 32)
            assert image.getexif().get(0x0112, 1) == 1
    with Image.open(out / "turned.jpg") as found:
        expected = texture(5).resize((48, 32), Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 8  # JPEG


def test_frames_of_a_video_are_evenly_spaced_and_sharp(tmp_path):
    big = np.asarray(texture(3, (200, 64)))
    frames = []
    for number in range(40):
        frame = Image.fromarray(big[:, 2 * number : 2 * number + 96])
        frames.append(frame if number % 5 == 2 else frame.filter(ImageFilter.GaussianBlur(3)))
    video = tmp_path / "walk.mp4"
    iio.imwrite(video, np.stack([np.asarray(frame) for frame in frames]), fps=10, codec="libx264")
    kept = photos.take_frames(video, tmp_path / "images", 8, 1600)
    assert [photo.name for photo in kept] == [f"frame_{n:06d}.jpg" for n in range(2, 40, 5)]
    still = tmp_path / "still.mp4"
    iio.imwrite(still, np.stack([np.asarray(frames[2])] * 20), fps=10, codec="libx264")
    assert len(photos.take_frames(still, tmp_path / "still", 8, 1600)) == 1


def test_a_phones_lying_video_comes_upright_where_it_says_so(tmp_path):
    """Phones store an upright video as lying frames and a quarter turn in its header."""
    upright = texture(5, (64, 96))
    lying = np.asarray(upright.transpose(Image.Transpose.ROTATE_90))
    iio.imwrite(tmp_path / "lying.mp4", np.stack([lying] * 4), fps=10, codec="libx264")
    turned = tmp_path / "turned.mp4"
    turn = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-display_rotation", "-90"]
    command = [*turn, "-i", str(tmp_path / "lying.mp4"), "-c", "copy", str(turned)]
    subprocess.run(command, check=True)
    (kept,) = photos.take_frames(turned, tmp_path / "images", 1, 1600)
    assert (kept.width, kept.height) == (64, 96)
    found = np.asarray(Image.open(tmp_path / "images" / kept.name), dtype=float)
    assert np.abs(found - np.asarray(upright, dtype=float)).mean() < 8  # what two codecs leave


# --------------------------------------------------------------------------------------- poses


def aligned(found, truth):
    """Rotation errors in degrees [V] and position errors [V] after the best similarity.

    Positions are relative to the root mean square distance of the true cameras from their middle.
    """
    (a, b) = (poses[:, :, 3] - poses[:, :, 3].mean(0) for poses in (found, truth))
    left, spread, right = np.linalg.svd(b.T @ a)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    turn = left @ flip @ right
    scale = (spread * np.diag(flip)).sum() / (a**2).sum()
    offset = np.linalg.norm(scale * a @ turn.T - b, axis=-1) / np.sqrt((b**2).sum(-1).mean())
    relative = np.swapaxes(turn @ found[:, :, :3], 1, 2) @ truth[:, :, :3]
    cosine = (np.trace(relative, axis1=1, axis2=2) - 1) / 2
    return np.degrees(np.arccos(np.clip(cosine, -1, 1))), offset


def check_scene(out, truth_of):
    """The folder is complete, loads, and its poses are the true ones. Returns the scene."""
    assert sorted(p.name for p in out.iterdir()) == [
        "cameras.png",
        "config.txt",
        "images",
        "report.txt",
        "sparse",
    ]
    model = read_model(out / "sparse" / "0")
    truth = np.stack([truth_of[name.rsplit(".", 1)[0]] for name in model.names])
    degrees, offset = aligned(model.c2w, truth)
    args = nerf_flags.parse(["--config", str(out / "config.txt")])
    scene = load_scene(args, lambda line: None)
    assert len(scene.images) == len(model.names)
    with Image.open(out / "cameras.png") as sheet:
        assert len(sheet.getcolors(1 << 20)) > 10
    return scene, degrees, offset


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Pictures that pycolmap draws of a cloud of points, and their true poses by name."""
    pycolmap = pytest.importorskip("pycolmap", reason="needs pycolmap")
    pycolmap.set_random_seed(3)
    dataset = pycolmap.SyntheticDatasetOptions()
    dataset.num_rigs, dataset.num_frames_per_rig, dataset.num_points3D = 1, 10, 100
    dataset.camera_width, dataset.camera_height = 640, 480
    dataset.camera_params = [800.0, 320.0, 240.0, 0.02]
    truth = pycolmap.synthesize_dataset(dataset)
    folder = tmp_path_factory.mktemp("synthetic") / "photos"
    folder.mkdir()
    pycolmap.synthesize_images(pycolmap.SyntheticImageOptions(), truth, folder)
    flip = np.diag([1.0, -1.0, -1.0, 1.0])
    poses = {
        image.name.rsplit(".", 1)[0]: image.cam_from_world().inverse().matrix() @ flip
        for image in truth.images.values()
    }
    return folder, poses


def test_photos_become_a_scene_with_the_true_poses(synthetic, tmp_path, monkeypatch, capsys):
    folder, poses = synthetic
    out = tmp_path / "mine \u00e9 #2"  # what is printed can be pasted, what is written read
    words = (folder, "--out", out, "--camera_model", "SIMPLE_RADIAL", "--threads", 1)
    code, said, errors = run(monkeypatch, capsys, *words)
    assert code == 0, errors
    _, degrees, offset = check_scene(out, poses)
    assert len(degrees) == 10 and degrees.max() < 0.5 and offset.max() < 0.01
    assert any("registered 10 of 10" in line for line in said)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    following = shlex.split(said[-1].partition("next: ")[2])
    assert following[0] == "python" and following[1].endswith("run_nerf.py")
    assert following[2:] == ["--config", f"{out}/config.txt"]
    assert nerf_flags.parse(following[2:]).expname == out.name
    # Set upright around what the cameras look at, their distance 1.
    model = read_model(out / "sparse" / "0")
    np.testing.assert_allclose(capture.around(model.c2w).to_world, np.eye(4), rtol=0, atol=1e-6)
    code, _, errors = run(monkeypatch, capsys, *words)
    assert code == 2 and "exists already" in errors[0]


@pytest.mark.slow
@pytest.mark.skipif(not BEER.is_dir(), reason="needs ../shared/data/llff_beer")
def test_a_real_walk_around_is_not_folded_and_agrees_piece_by_piece(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    code, _, errors = run(monkeypatch, capsys, BEER / "images", "--out", tmp_path / "mine")
    assert code == 0, errors
    model = read_model(tmp_path / "mine" / "sparse" / "0")
    given = read_model(BEER / "sparse" / "0")
    assert len(model.names) == 71
    turns = np.swapaxes(model.c2w[:-1, :, :3], 1, 2) @ model.c2w[1:, :, :3]
    steps = np.degrees(np.arccos((np.trace(turns, axis1=1, axis2=2) - 1) / 2))
    assert steps.max() < 20  # a person walked: no step of half a turn
    # The given model jumps by half a turn at three places: the can shows its label twice.
    for first, last in ((0, 13), (14, 34), (35, 52), (53, 70)):
        piece = slice(first, last + 1)
        degrees, _ = aligned(model.c2w[piece], given.c2w[piece])
        assert np.median(degrees) < 1.2 and degrees.max() < 1.8


def test_pairs_that_agree_on_little_are_left_aside_unless_neighbors(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="needs pycolmap")
    names = [f"{number:02d}.jpg" for number in range(12)]
    random = np.random.default_rng(0)
    wide, small = random.uniform(0, 100, (40, 2)), random.uniform(40, 50, (40, 2))
    points = np.concatenate([wide, small]).astype(np.float32)
    database = pycolmap.Database.open(tmp_path / "all.db")
    camera = pycolmap.Camera(model="SIMPLE_PINHOLE", width=100, height=100, params=[90, 50, 50])
    number = database.write_camera(camera)
    for place, name in enumerate(names):
        database.write_image(pycolmap.Image(name=name, camera_id=number, image_id=place + 1), True)
        database.write_keypoints(place + 1, np.pad(points, ((0, 0), (0, 4))))
    # Whom the first picture meets: (place, over all of the picture or a tenth of its side).
    for place, part in ((1, wide), (5, small), (8, small), (11, wide)):
        rows = np.arange(40) + (0 if part is wide else 40)
        geometry = pycolmap.TwoViewGeometry()
        geometry.inlier_matches = np.stack([rows, rows], -1).astype(np.uint32)
        geometry.config = pycolmap.TwoViewGeometryConfiguration.CALIBRATED
        database.write_two_view_geometry(1, place + 1, geometry)
    for place in (5, 8):  # these have seen more with others
        rows = np.arange(40)
        geometry = pycolmap.TwoViewGeometry()
        geometry.inlier_matches = np.stack([rows, rows], -1).astype(np.uint32)
        geometry.config = pycolmap.TwoViewGeometryConfiguration.CALIBRATED
        database.write_two_view_geometry(place + 1, place + 2, geometry)
    database.close()
    dropped = sfm._drop_narrow(pycolmap, tmp_path / "all.db", tmp_path / "trusted.db", names)
    opened = pycolmap.Database.open(tmp_path / "trusted.db")
    left = [place for place in range(2, 13) if opened.exists_two_view_geometry(1, place)]
    opened.close()
    assert dropped == 1 and left == [2, 6, 12]


def found(**changes):
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    plain = sfm.Reconstruction(None, names, [False] * 4, [900] * 4, [0] * 4, np.nan, 0, 0)
    return plain._replace(**changes)


def test_every_photo_that_failed_is_named_with_the_reason():
    lines = from_photos.verdicts(
        found(registered=[True, False, False, False], features=[900, 20, 900, 900],
              partners=[1, 1, 0, 2]), ["d.jpg"]
    )  # fmt: skip
    assert [line.split(":")[0] for line in lines] == ["b.jpg", "c.jpg", "d.jpg"]
    for line, word in zip(lines, ("20 features", "no other", "blurred"), strict=True):
        assert word in line


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "no two of them overlap"),
        ({"features": [10, 20, 30, 900]}, "3 of 4 are blurred, dark or plain"),
        ({"partners": [1, 1, 0, 0]}, "1 pairs overlap"),
    ],
)
def test_no_scene_is_answered_with_the_likeliest_reason(tmp_path, changes, why):
    with pytest.raises(ValueError, match=why) as caught:
        from_photos.check_registered(tmp_path, found(**changes))
    assert "\n" not in str(caught.value) and "30 to 100" in str(caught.value)


# ----------------------------------------------------------------------------------- bad input


def heic(folder):
    (fill(folder, 3) / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    return folder


def same(folder):
    folder.mkdir()
    for number in range(5):
        texture(0).save(folder / f"{number}.jpg")
    return folder


def mostly_broken(folder):
    fill(folder, 4)
    for number in range(9):
        (folder / f"broken{number}.jpg").write_bytes(b"no picture")
    return folder


def written(name, content=b"no picture"):
    def make(folder):
        folder.mkdir()
        (folder / name).write_bytes(content)
        return folder / name if name.endswith("mp4") or "." not in name else folder

    return make


def plain(folder):
    folder.mkdir()
    for number in range(4):
        slope = np.linspace(20 * number, 255, 96, dtype=np.uint8)
        Image.fromarray(np.tile(slope, (64, 1))).save(folder / f"{number}.png")
    return folder


BAD = {
    "no such folder": (lambda folder: folder, "does not exist"),
    "text only": (written("notes.txt"), "holds no photo"),
    "a video in the folder": (
        lambda folder: written("clip.mp4")(folder).parent,
        "for a video, give its path",
    ),
    "neither folder nor video": (written("notes"), "neither a folder of photos nor a video"),
    "video without frames": (written("clip.mp4", b""), "holds no video"),
    "photos in folders": (lambda folder: fill(folder / "left", 3).parent, "photos lie in folders"),
    "mostly unreadable": (mostly_broken, "9 of 13 pictures are unreadable"),
    "one photo": (lambda folder: fill(folder, 1), "1 different picture;"),
    "two photos": (lambda folder: fill(folder, 2), "2 different pictures;"),
    "identical photos": (same, "1 different picture;"),
    "HEIC": (heic, "convert them to JPEG"),
    "nothing in common": (lambda folder: fill(folder, 4), "0 of 4 photos could be registered"),
    "nothing to see": (plain, "4 of 4 are blurred, dark or plain"),
}


@pytest.mark.parametrize(("make", "named"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    make, named, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    source = make(tmp_path / "mine")
    before = sorted(tmp_path.rglob("*"))
    code, _, errors = run(monkeypatch, capsys, source, "--out", tmp_path / "out", "--threads", 1)
    assert code == 2 and len(errors) == 1 and named in errors[0], errors
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_made_leaves_no_empty_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycolmap", reason="needs pycolmap")
    (tmp_path / "photos").mkdir()
    words = [tmp_path / "photos", "--out", tmp_path / "scenes" / "new" / "mine"]
    code, _, errors = run(monkeypatch, capsys, *words)
    assert code == 2 and "holds no photo" in errors[0]
    assert [path.name for path in tmp_path.rglob("*")] == ["photos"]


def test_a_missing_pycolmap_is_one_line_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    folder = fill(tmp_path / "mine", 4)
    code, _, errors = run(monkeypatch, capsys, folder, "--out", tmp_path / "out")
    assert (code, errors) == (2, [f"from_photos.py: {sfm.INSTALL}"])


def test_the_script_itself_ends_with_2_and_one_line(tmp_path):
    result = run_script([tmp_path, "--out", tmp_path / "out"], script="data/from_photos.py")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
