"""Pictures that are too large: sizes before pixels, and what fits into how much memory."""

import json
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from PIL import ImageFile

from nerf.build import load_scene
from nerf.cameras import orbit_path
from nerf.datasets import identity, images, store
from nerf.datasets.images import read_image
from nerf.flags import nerf as nerf_flags
from nerf.outputs import html
from nerf.outputs import scene as scene_outputs
from nerf.training.checkpoint import list_checkpoints

MEGAPIXELS_144 = {"same proportions": 375, "other proportions": (13_000, 11_000)}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, width: int, height: int, *, last: bytes = b"", row: bytes = b"\0\xf0") -> None:
    """A black and white PNG, written without its pixels ever being in memory; ``last``: chunks."""
    line = b"\0" + (row * width)[: (width + 7) // 8]
    packer, lines = zlib.compressobj(1), 64
    data = b"".join(packer.compress(line * lines) for _ in range(height // lines))
    data += packer.compress(line * (height % lines)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)
    path.write_bytes(content + last + chunk(b"IEND", b""))


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of all pictures that Pillow decodes during the test."""
    sizes, load = [], ImageFile.ImageFile.load

    def noted(self):
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    return sizes


def load(folder, kind, *flags):
    said = []
    words = ["--datadir", folder, "--dataset_type", {"linemod": "LINEMOD"}.get(kind, kind)]
    words += ["--testskip", 1, "--factor", 1, *flags]
    words += ["--shape", "demo"] if kind == "deepvoxels" else []
    return load_scene(nerf_flags.parse([str(word) for word in words]), said.append), said


KINDS = ("blender", "transforms", "llff", "colmap", "deepvoxels", "linemod")


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_144_megapixels_for_a_small_camera_is_never_decoded(
    demo_copy, kind, decoded, recwarn
):
    """It is left out and named, whatever its proportions; Pillow prints no warning."""
    folder = demo_copy(kind)
    found = sorted(
        p for p in folder.rglob("*.png") if "mask" not in str(p) and "depth" not in p.name
    )
    train = [path for path in found if path.parent.name == "train"] or found
    victim = train[1]
    with images.open_image(victim) as image:
        small = image.size
    for scale in MEGAPIXELS_144.values():
        size = scale if isinstance(scale, tuple) else (scale * small[0], scale * small[1])
        write_png(victim, *size)
        scene, said = load(folder, kind)
        assert any(victim.name in line and "left out" in line for line in said), said
        assert max(scene.images.shape[1:3]) <= 64
    assert decoded and max(width * height for width, height in decoded) <= 64 * 64
    assert not [w for w in recwarn if "bomb" in str(w.message)]


ROTATED = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")


def test_neither_is_one_that_is_damaged_or_rotated_nor_a_mask(demo_copy, decoded, tmp_path):
    folder = demo_copy("blender")
    rotated, damaged = folder / "train" / "r_1.png", folder / "train" / "r_2.png"
    write_png(rotated, 12_000, 12_000, last=ROTATED)  # Pillow would decode all to find it
    write_png(damaged, 12_000, 12_000)
    damaged.write_bytes(damaged.read_bytes()[:-30])
    scene, said = load(folder, "blender")
    text = " ".join(said)
    assert "r_1.png" in text and "r_2.png (damaged)" in text and len(scene.images) == 8
    write_png(tmp_path / "mask.png", 12_000, 12_000)
    with pytest.raises(ValueError, match="12000x12000 pixels, its camera is for 20x15"):
        read_image(tmp_path / "mask.png", (20, 15))
    with pytest.raises(ValueError, match="r_0.png"):
        images.read_images([folder / "train" / "r_0.png", rotated])
    assert max(width * height for width, height in decoded) <= 64 * 64


def test_a_page_names_a_picture_that_cannot_be_read(tmp_path, decoded):
    write_png(tmp_path / "huge.png", 20_000, 20_000)
    (tmp_path / "half.png").write_bytes((tmp_path / "huge.png").read_bytes()[:40])
    for name in ("huge.png", "half.png"):
        assert "cannot be read" in html.picture(tmp_path / name, 100)
    assert "is missing" in html.picture(tmp_path / "none.png", 100) and not decoded


def test_what_does_not_fit_says_what_would(monkeypatch, demo_blender):
    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(images, "with_alpha", full)
    with pytest.raises(ValueError, match="10 pictures do not fit .* --data_store mmap"):
        load(demo_blender, "blender")


def test_free_memory_knows_a_limit_of_the_address_space(monkeypatch):
    used = int(store.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (64 << 20)
    monkeypatch.setattr(store.resource, "getrlimit", lambda kind: (limit, limit))
    assert store.free_memory() <= 64 << 20
    monkeypatch.setattr(store.resource, "getrlimit", lambda kind: (1, 1))
    assert store.free_memory() == 0


def test_strips_of_a_large_picture_are_the_whole(monkeypatch, demo_blender):
    """Its mean color and its reduction, which are computed strip by strip."""
    scene, _ = load(demo_blender, "blender")
    mean, factors = identity._mean_color(scene, 3), (2, 3, 5)
    reduced = [scene_outputs.target_picture(scene, 3, factor) for factor in factors]
    monkeypatch.setattr(identity, "STRIP", 100)
    monkeypatch.setattr(scene_outputs, "STRIP", 100)
    torch.testing.assert_close(identity._mean_color(scene, 3), mean)
    for factor, whole in zip(factors, reduced, strict=True):
        assert np.array_equal(scene_outputs.target_picture(scene, 3, factor), whole)


LIMITED = """
import resource, sys

import run_nerf

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
sys.exit(run_nerf.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ten_8k_pictures_in_2_gib_of_address_space_train_from_the_store(tmp_path):
    """In memory they do not fit, and the line says what does."""
    data, frames = tmp_path / "data", []
    (data / "images").mkdir(parents=True)
    for number, pose in enumerate(orbit_path(10)):
        write_png(data / "images" / f"{number}.png", 7680, 4320, row=bytes([number, 0xF0]))
        matrix = [*np.asarray(pose)[:3].tolist(), [0, 0, 0, 1]]
        frames.append({"file_path": f"images/{number}.png", "transform_matrix": matrix})
    camera = {"fl_x": 8000, "fl_y": 8000, "cx": 3840, "cy": 2160, "w": 7680, "h": 4320}
    (data / "transforms.json").write_text(json.dumps({**camera, "frames": frames}))
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    flags = "--use_viewdirs --netdepth 2 --netwidth 16 --N_samples 8 --N_importance 0 --N_rand 64"
    flags += " --device cpu --i_img 0 --i_video 0 --i_testset 0 --ckpt_secs 0 --N_iters 5"
    flags += f" --dataset_type transforms --datadir {data} --basedir {tmp_path} --llffhold 0"
    results = {}
    for kind in (
        "memory",
        "auto",
    ):  # in processes of their own: forks of a server have more in them
        command = [sys.executable, script, *flags.split(), "--expname", kind, "--data_store", kind]
        results[kind] = subprocess.run(
            [*map(str, command), "--render_factor", "48"], cwd=REPOSITORY, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
    assert results["memory"].returncode == 2
    [line] = results["memory"].stderr.strip().splitlines()
    assert "10 pictures do not fit" in line and "--data_store mmap" in line
    auto = results["auto"]
    assert "step 5/5" in auto.stderr and "Traceback" not in auto.stderr
    assert list_checkpoints(tmp_path / "auto")[0].name == "000005.tar"
    # The end of the run renders a view, for which little is left.
    assert auto.returncode == 0 or "out of memory" in auto.stderr.splitlines()[-1], auto.stderr


if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)
