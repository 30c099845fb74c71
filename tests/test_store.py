"""nerf.datasets.store: pictures in a mapped file, and rays drawn from it block by block."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import FAST_TINY, REPOSITORY, assert_same_training, free_port, run_script

import run_nerf
from nerf.build import load_scene
from nerf.datasets import store
from nerf.datasets.store import BLOCK, BlockOrder
from nerf.flags import nerf as nerf_flags
from nerf.training.checkpoint import list_checkpoints, load_checkpoint

TINY = (
    "--use_viewdirs --white_bkgd --netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 "
    "--N_samples 8 --N_importance 8 --multires 4 --N_rand 64 --lrate 5e-3 --device cpu --i_img 0 "
    "--i_video 0 --i_print 5 --ckpt_secs 0 --expname tiny --dataset_type blender --testskip 1 "
    "--data_store mmap"
).split()


def load(folder, kind="blender", *flags, warn=print):
    words = ["--datadir", str(folder), "--dataset_type", kind, "--testskip", "1", "--factor", "1"]
    return load_scene(nerf_flags.parse([*words, *flags]), warn)


NAMES = {"linemod": "LINEMOD"}
FORMATS = {kind: kind for kind in ("blender", "llff", "deepvoxels", "linemod")}
FORMATS |= {"transforms": "blender"}  # a capture of one size, without masks


@pytest.mark.parametrize("kind", FORMATS)
def test_a_store_holds_what_memory_would_in_every_format(demo_copy, kind):
    folder, flags = demo_copy(FORMATS[kind]), ("--shape", "demo")[: 2 * (kind == "deepvoxels")]
    memory = load(folder, NAMES.get(kind, kind), *flags)
    mapped = load(folder, NAMES.get(kind, kind), "--data_store", "mmap", *flags)
    assert mapped.stored and not memory.stored
    assert torch.equal(mapped.images, memory.images)
    assert torch.equal(mapped.intrinsics, memory.intrinsics) and mapped.splits == memory.splits
    assert len(list(folder.glob(".pictures_*.npy"))) == 1


def test_pictures_with_and_without_alpha_and_reduced_ones(demo_copy):
    from PIL import Image

    folder = demo_copy("blender")
    first = folder / "train" / "r_0.png"
    Image.open(first).convert("RGB").save(first)  # RGB first: the store finds alpha later
    flags = ("--downscale", "2")
    mapped, memory = (
        load(folder, "blender", "--data_store", "mmap", *flags),
        load(folder, "blender", *flags),
    )
    assert mapped.images.shape[-1] == 4 and torch.equal(mapped.images, memory.images)


def test_a_store_is_made_once_and_again_when_a_picture_changes(demo_copy):
    folder, said = demo_copy("blender"), []
    flags = ("--data_store", "mmap")
    load(folder, "blender", *flags, warn=said.append)
    load(folder, "blender", *flags, warn=said.append)
    assert sum(line.startswith("writing") for line in said) == 1
    shutil.copy(folder / "train" / "r_1.png", folder / "train" / "r_0.png")
    scene = load(folder, "blender", *flags, warn=said.append)
    assert torch.equal(scene.images[0], scene.images[1])
    assert sum("other pictures" in line for line in said) == 1
    assert len(list(folder.glob(".pictures_*.npy*"))) == 1


def test_a_damaged_or_unfinished_store_is_made_again(demo_copy):
    folder, said = demo_copy("blender"), []
    whole = load(folder, "blender", "--data_store", "mmap").images.clone()
    path = next(folder.glob(".pictures_*.npy"))
    for keep in (0, 60, path.stat().st_size - 1):
        with open(path, "r+b") as file:
            file.truncate(keep)
        path.with_name(path.name + ".part").write_bytes(b"half")
        again = load(folder, "blender", "--data_store", "mmap", warn=said.append)
        assert torch.equal(again.images, whole)
        assert not list(folder.glob("*.part"))
    assert sum("writing it again" in line for line in said) == 3


def test_a_store_that_is_not_of_these_pictures_is_made_again(demo_copy):
    """Its shape, its channels, its first picture and rows all over it are compared."""
    folder, said = demo_copy("blender"), []
    whole = load(folder, "blender", "--data_store", "mmap").images.clone()
    path = next(folder.glob(".pictures_*.npy"))
    kept, (count, height, width, channels) = path.read_bytes(), whole.shape
    start = len(kept) - 64 - whole.numel()

    def changed(at: int, value: int | None = None) -> bytes:
        return kept[:at] + bytes([kept[at] ^ 1 if value is None else value]) + kept[at + 1 :]

    def shaped(*shape: int) -> bytes:
        old, new = (str(s).encode() for s in ((count, height, width, channels), shape))
        assert len(new) <= len(old)
        return kept.replace(old, new.ljust(len(old)), 1)

    wrong = {
        "a color of the first picture": (changed(start), "first picture is another"),
        "a color of the last row": (changed(len(kept) - 65), "checksum"),
        "its checksum": (changed(len(kept) - 1), "checksum"),
        "no checksum": (kept[:-64], "checksum"),
        "sides": (shaped(count, height // 2, 2 * width, channels), "expected"),
        "fewer": (shaped(count - 1, height, width, channels), "expected"),
        "channels": (shaped(count, height, width, 3), "expected"),
        "one channel": (shaped(count, height, width, 1), "expected"),
        "more": (shaped(99, height, width, channels), "bytes; expected"),
        "3 numbers": (shaped(count, height, width), "expected uint8"),
        "another kind": (kept.replace(b"|u1", b"|i1", 1), "expected uint8"),
        "another version": (changed(6, 3), "version"),
        "no npy": (changed(0), "is no .npy file"),
        "code": (kept.replace(b"False", b"a()  ", 1), "is no .npy file"),
        "nothing": (b"", "is no .npy file"),
    }
    for what, (content, complaint) in wrong.items():
        path.write_bytes(content)
        said.clear()
        again = load(folder, "blender", "--data_store", "mmap", warn=said.append)
        assert torch.equal(again.images, whole), what
        assert any(complaint in s and "writing it again" in s for s in said), (what, said)
        assert path.read_bytes() == kept


CUTTING = """
import os, sys
from pathlib import Path

import run_nerf
from nerf.training.state import TrainState

advance, (folder, *flags) = TrainState.advance, sys.argv[1:]


def advance_and_cut(self, num_rays):
    advance(self, num_rays)
    if self.step == 16 and os.environ.get("RANK", "1") == "1":
        [path] = Path(folder).glob(".pictures_*.npy")
        os.truncate(path, path.stat().st_size // 2)


TrainState.advance = advance_and_cut
sys.exit(run_nerf.main(flags))
"""


@pytest.mark.parametrize("way", [[], ["--no_batching"], FAST_TINY], ids=["", "random", "fast"])
def test_a_store_cut_off_while_training_is_one_line_and_the_step_is_saved(
    demo_blender, tmp_path, way
):
    """Not SIGBUS; the same command goes on. Drawn in order, and from random places of a view.

    What is saved is what a run of so many steps saves, the occupancy grid, which each 16th step
    begins with updating, included.
    """
    flags = [*TINY, "--datadir", str(demo_blender), "--basedir", str(tmp_path), *way]
    # A schedule that does not know the number of steps.
    flags += ["--store_dir", str(tmp_path / "store"), "--lr_schedule", "exp"]
    script = tmp_path / "cutting.py"
    script.write_text(CUTTING)
    result = run_script([tmp_path / "store", *flags, "--N_iters", "400"], script=str(script))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result
    [line] = [line for line in result.stderr.splitlines() if "while it was in use" in line]
    assert "training is saved; run the same command again" in line
    cut = load_checkpoint(list_checkpoints(tmp_path / "tiny")[0])
    assert cut["global_step"] == 16
    assert run_nerf.main([*flags, "--N_iters", "16", "--expname", "whole"]) == 0
    assert_same_training(cut, load_checkpoint(list_checkpoints(tmp_path / "whole")[0]))
    assert run_nerf.main([*flags, "--N_iters", "18"]) == 0


def test_a_store_cut_off_under_one_of_two_ranks_ends_both_with_the_step_saved(
    demo_blender, tmp_path
):
    """Rank 1 cuts the file at the end of a step, whatever rank 0 has read by then."""
    flags = [*TINY, "--datadir", str(demo_blender), "--basedir", str(tmp_path), "--N_iters", "400"]
    script = tmp_path / "cutting.py"
    script.write_text(CUTTING)
    words = [tmp_path / "store", *flags, "--store_dir", tmp_path / "store"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *map(str, words)],
            cwd=REPOSITORY, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank,
                 "PYTHONPATH": str(REPOSITORY)},
        )
        for rank in "01"
    ]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    for error in errors:
        assert "Traceback" not in error and "training is saved" in error
        assert sum("while it was in use" in line for line in error.splitlines()) == 1
    saved = list_checkpoints(tmp_path / "tiny")
    assert [load_checkpoint(path)["global_step"] for path in saved] == [16]


def test_a_full_disk_is_one_line_and_leaves_nothing(demo_copy, tmp_path, monkeypatch, capsys):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    flags = [*TINY, "--datadir", str(demo_copy("blender")), "--basedir", str(tmp_path)]
    flags += ["--store_dir", str(tmp_path / "stores"), "--N_iters", "1"]
    assert run_nerf.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in error and "--store_dir" in error
    assert [path.name for path in (tmp_path / "stores").iterdir()] == [".pictures.lock"]


def test_what_a_store_cannot_do_is_one_line(demo_copy):
    from PIL import Image

    folder = demo_copy("blender")
    Image.new("RGBA", (8, 8)).save(folder / "train" / "r_3.png")
    with pytest.raises(ValueError, match="needs one size"):
        load(folder, "blender", "--data_store", "mmap")
    for kind in ("transforms", "colmap"):  # these demo scenes have sizes of all kinds and masks
        with pytest.raises(ValueError, match="--data_store memory"):
            load(demo_copy(kind), kind, "--data_store", "mmap")
    with pytest.raises(ValueError, match="--data_store memory"):
        load(demo_copy("llff"), "llff", "--data_store", "mmap", "--factor", "2")


# ------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("pixels", [7 * 5, BLOCK, 3 * BLOCK + 17])
def test_every_pixel_is_drawn_once_an_epoch_in_whatever_steps(monkeypatch, pixels):
    monkeypatch.setattr(store, "WINDOW", 3)
    images = torch.arange(6 * pixels).view(6, 1, pixels, 1)  # a color is its own number
    order = BlockOrder(images, [0, 2, 3, 5], 7, "cpu")
    drawn, position = [], 0
    for count in (1, 11, pixels, 2 * pixels, pixels - 12, 4 * pixels):
        numbers, colors = order.draw(position, count)
        assert torch.equal(numbers, colors[:, 0])
        drawn.append(numbers)
        position += count
    drawn = torch.cat(drawn).view(2, 4 * pixels)
    expected = images[[0, 2, 3, 5]].flatten()
    assert torch.equal(drawn.sort(-1).values, expected.expand(2, -1))
    assert not torch.equal(drawn[0], drawn[1])  # another epoch, another order
    place = 4 * pixels + 5
    elsewhere = BlockOrder(images, [0, 2, 3, 5], 7, "cpu").draw(place, 9)[0]
    assert torch.equal(elsewhere, order.draw(place, 9)[0])  # by the position alone, as on resume
    single = torch.cat([order.draw(place + row, 1)[0] for row in range(9)])
    assert torch.equal(elsewhere.sort().values, single.sort().values)
    other = BlockOrder(images, [0, 2, 3, 5], 8, "cpu").draw(0, 4 * pixels)[0]
    assert not torch.equal(other, drawn[0])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_read_views_of_their_own_and_draw_one_process_rays(demo_blender, size):
    scene = load(demo_blender, "blender", "--data_store", "mmap")
    views, pixels = scene.splits["train"], scene.height * scene.width
    one, ranks = scene.block_order(0), [scene.block_order(0) for _ in range(size)]
    batch, seen = 48, [[] for _ in ranks]
    for position in range(0, len(views) * pixels, batch):
        whole, _ = one.draw(position, batch)
        shares = [slice(r * batch // size, (r + 1) * batch // size) for r in range(size)]
        parts = [o.draw(position, batch, s)[0] for o, s in zip(ranks, shares, strict=True)]
        assert torch.equal(torch.cat(parts), whole)
        for own, part in zip(seen, parts, strict=True):
            own.append(part)
    for rank, own in enumerate(seen):
        read = set((torch.cat(own) // pixels).tolist())
        # Shards do not end with views, nor shares with shards.
        assert len(read) <= len(views) // size + 2
        assert views[rank * len(views) // size] in read


@pytest.mark.parametrize("position, count", [(0, 5), (3, 5), (7, 64), (1000, 1), (13, 4099)])
def test_batches_of_any_size_follow_one_another_without_gaps(position, count):
    order = BlockOrder(torch.zeros(6, 4, 4, 3, dtype=torch.uint8), [1, 2, 5], 0, "cpu")
    assert order.shards == 8
    before = order.draw(0, position)[0] if position else torch.zeros(0, dtype=torch.long)
    numbers = torch.cat([before, order.draw(position, count)[0]])
    counts = torch.bincount(numbers, minlength=96).view(6, 16)
    assert not counts[[0, 3, 4]].any()
    drawn = len(numbers) / 48  # times each pixel
    counts = counts[[1, 2, 5]]
    assert int(drawn) - 1 <= counts.min() and counts.max() <= int(drawn) + 2


@pytest.mark.parametrize("flags", [{}, {"one_image": True}, {"crop": 0.5}])
@pytest.mark.parametrize("kind", ["blender", "colmap"])
def test_a_share_is_that_part_of_the_whole_batch(request, kind, flags):
    """Of random draws too: which rays a step sees does not depend on the number of processes."""
    scene = load(request.getfixturevalue(f"demo_{kind}"), kind)

    def draw(shard=None):
        rays, colors = scene.sample_rays(12, torch.Generator().manual_seed(3), shard=shard, **flags)
        return [*rays, colors]

    whole, parts = draw(), [draw(slice(start, start + 4)) for start in (0, 4, 8)]
    for member, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(member, torch.cat(pieces))


def test_batches_are_spread_as_evenly_as_random_ones():
    """Views and places in a batch: the order's spread is that of independent draws or better."""
    images = torch.zeros(40, 128, 128, 3, dtype=torch.uint8)
    order = BlockOrder(images, list(range(40)), 0, "cpu")
    counts = []
    for batch in range(150):  # 640 blocks: one window
        numbers, _ = order.draw(batch * 4096, 4096)
        counts.append(torch.bincount(numbers // 128**2, minlength=40))
    counts = torch.stack(counts).double()
    independent = 4096 / 40 * (1 - 1 / 40)  # variance of a multinomial
    assert counts.var(0).mean() < 1.15 * independent
    assert (counts.mean(0) - 4096 / 40).abs().max() < 4 * (independent / 150) ** 0.5


def flat(state):
    parts = [
        *state["network_fn_state_dict"].values(),
        *(state.get("network_fine_state_dict") or {}).values(),
    ]
    parts += [v for s in state["optimizer_state_dict"]["state"].values() for v in s.values()]
    return torch.cat([torch.as_tensor(part).double().flatten() for part in parts])


@pytest.mark.parametrize("mode", ["vanilla", "precrop", "fast"])
def test_resuming_is_bit_exact(demo_blender, tmp_path, mode):
    flags = [*TINY, "--datadir", str(demo_blender), "--basedir", str(tmp_path)]
    flags += ["--store_dir", str(tmp_path / "store")]
    flags += {"vanilla": [], "precrop": ["--precrop_iters", "6"]}.get(mode, [])
    if mode == "fast":  # its rays a step change: only their count tells where it stands
        flags = ["--fast", "--amp", "off", "--target_samples", "512", "--occ_res", "16", *flags]
        flags.remove("--N_importance")
        flags.remove("8")
    for name, stops in {"whole": (16,), "halves": (7, 16)}.items():
        for stop in stops:  # in cosine schedules N_iters counts: stop by time would, too
            more = ["--lr_schedule", "exp", "--expname", name, "--N_iters", str(stop)]
            assert run_nerf.main([*flags, *more]) == 0
    whole, halves = (
        load_checkpoint(list_checkpoints(tmp_path / name)[0]) for name in ("whole", "halves")
    )
    assert whole["rays_drawn"] == halves["rays_drawn"] > 0
    if mode == "fast":
        assert whole["rays_drawn"] != 16 * 64
    assert torch.equal(flat(whole), flat(halves))


def test_two_processes_train_as_one_from_a_store(demo_blender, tmp_path):
    flags = [*TINY, "--datadir", str(demo_blender), "--basedir", str(tmp_path), "--N_iters", "6"]
    flags += ["--store_dir", str(tmp_path / "store")]
    result = run_script([*flags, "--expname", "two"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert run_nerf.main([*flags, "--expname", "one"]) == 0
    one, two = (load_checkpoint(list_checkpoints(tmp_path / n)[0]) for n in ("one", "two"))
    names = ("network_fn_state_dict", "network_fine_state_dict")
    for key in names:
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_memory_and_store_give_the_same_quality(demo_blender, tmp_path):
    """120 steps of the fast path: the spread over three seeds covers the difference."""
    psnr = {}
    for kind in ("memory", "mmap"):
        for seed in (0, 1, 2):
            flags = ["--fast", "--amp", "off", "--target_samples", "2048", "--occ_res", "16"]
            flags += [*TINY, "--datadir", str(demo_blender), "--basedir", str(tmp_path)]
            flags += ["--store_dir", str(tmp_path / "store"), "--data_store", kind]
            flags += ["--expname", f"{kind}{seed}", "--seed", str(seed), "--N_iters", "120"]
            assert run_nerf.main(flags) == 0
            metrics = tmp_path / f"{kind}{seed}" / "metrics.json"
            psnr[kind, seed] = json.loads(metrics.read_text())["psnr"]
    means = [np.mean([v for (k, _), v in psnr.items() if k == kind]) for kind in ("memory", "mmap")]
    spread = np.std([v for (k, _), v in psnr.items() if k == "memory"])
    assert abs(means[0] - means[1]) < max(0.5, 3 * spread), psnr
