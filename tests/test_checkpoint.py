"""Checkpoints: whole or not there, checked at every byte, and never code."""

import os
import pickle
import zipfile

import pytest
import torch
from helpers import small_state, write_checkpoint

from nerf.training import checkpoint, checkpoint_choice
from nerf.training.checkpoint import CheckpointError


def test_round_trip_is_exact_and_leaves_no_other_file(tmp_path):
    path = write_checkpoint(tmp_path, 7)
    loaded = checkpoint.load_checkpoint(path)
    for name, value in small_state(7)["network_fn_state_dict"].items():
        assert torch.equal(loaded["network_fn_state_dict"][name], value)
    assert [file.name for file in tmp_path.iterdir()] == ["000007.tar"]
    assert checkpoint.finished_updates(loaded) == 7


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, 7)
    before = path.read_bytes()

    def full_disk(state, file):
        file.write(b"half a checkp")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(path, small_state(7))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["000007.tar"]


@pytest.mark.parametrize("part", range(64))
def test_truncation_is_noticed(tmp_path, part):
    path = write_checkpoint(tmp_path, 7)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * part // 64])
    with pytest.raises(CheckpointError, match="000007.tar"):
        checkpoint.load_checkpoint(path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    path = write_checkpoint(tmp_path, 7)
    data = bytearray(path.read_bytes())
    needle = small_state(7)["network_fn_state_dict"]["layer.weight"].numpy().tobytes()
    place = bytes(data).index(needle)
    for offset in range(0, len(needle), 97):
        flipped = data.copy()
        flipped[place + offset] ^= 1 << (offset % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="checksum"):
            checkpoint.load_checkpoint(path)


class Canary:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, kind):
    canary, path = tmp_path / "canary", tmp_path / "000001.tar"
    evil = {**small_state(1), "args": Canary(canary)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="000001.tar"):
        checkpoint.load_checkpoint(path)
    assert not canary.exists()


def test_nan_weights_and_foreign_files_are_refused(tmp_path):
    bad = small_state(3)
    bad["network_fn_state_dict"]["layer.bias"][4] = float("nan")
    torch.save(bad, tmp_path / "a.tar")
    with pytest.raises(CheckpointError, match="layer.bias holds NaN"):
        checkpoint.load_checkpoint(tmp_path / "a.tar")
    torch.save([1, 2], tmp_path / "b.tar")
    with pytest.raises(CheckpointError, match="not a NeRF checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "b.tar")
    with zipfile.ZipFile(tmp_path / "c.tar", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "c.tar")


def test_only_exact_names_count_and_the_highest_step_wins(tmp_path):
    for step in (999_999, 1_000_000, 20):
        write_checkpoint(tmp_path, step)
    for name in ("start.png", "000030.tar.bak", ".000040.tar.tmp", "target.tar", "12.tar"):
        (tmp_path / name).write_bytes(b"")
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["1000000.tar", "999999.tar", "000020.tar"]


def test_the_newest_good_one_is_used_and_the_bad_one_named(tmp_path):
    write_checkpoint(tmp_path, 10)
    (tmp_path / "000020.tar").write_bytes(b"torn")
    warnings = []
    path, loaded = checkpoint_choice.newest_checkpoint(tmp_path, warnings.append)
    assert path.name == "000010.tar" and loaded["global_step"] == 10
    assert len(warnings) == 1 and "000020.tar" in warnings[0]
    (tmp_path / "000010.tar").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints"):
        checkpoint_choice.newest_checkpoint(tmp_path, warnings.append)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    checkpoint_choice.prune_checkpoints(tmp_path, keep=2, best_steps=[10])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000010.tar",
        "000030.tar",
        "000040.tar",
    ]


def test_a_network_of_another_shape_is_refused_with_the_weight_named(tmp_path):
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(10, 20)})
    with pytest.raises(CheckpointError, match="layer.weight.*netwidth"):
        checkpoint.load_strictly(module, small_state()["network_fn_state_dict"], "x.tar")
