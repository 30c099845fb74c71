"""Why a file could not be written, in words; real disks that are full: test_disk.py."""

import errno
import os
import shutil

import pytest
import torch

from nerf.training.files import describe_lost, why_not_written
from nerf.training.run_folder import RunFolder

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small(monkeypatch):
    """300 KB are free on every disk."""
    usage = shutil.disk_usage("/")._replace(free=300 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


class Disk:
    """A file on a disk that has room for little more."""

    def write(self, content):
        if len(content) > 1000:
            raise FULL
        return len(content)


def test_a_full_disk_is_named_with_what_is_free_on_it(tmp_path, small):
    expected = f"the disk of {tmp_path}/run is full, 300 KB free"
    assert why_not_written(FULL, tmp_path / "run") == expected
    with pytest.raises(RuntimeError, match="unexpected pos") as riddle:  # torch's own words
        torch.save({"weight": torch.zeros(1000)}, Disk())
    assert why_not_written(riddle.value, tmp_path / "run") == expected


def test_other_reasons_keep_the_words_of_the_system(tmp_path, monkeypatch):
    denied = PermissionError(errno.EACCES, "Permission denied", "x")
    assert why_not_written(denied, tmp_path) == "Permission denied"
    assert why_not_written(RuntimeError("one\ntwo"), tmp_path) == "one"
    assert why_not_written(OSError("broken, on rank 1"), tmp_path) == "broken, on rank 1"
    assert "quota" in why_not_written(OSError(errno.EDQUOT, "Quota exceeded"), tmp_path)
    usage = shutil.disk_usage("/")._replace(free=5 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "with 5120 MB free: see df -i" in why_not_written(FULL, tmp_path)  # out of inodes


def test_a_run_says_once_what_is_lost_and_what_to_do(tmp_path, small, capsys):
    with RunFolder(tmp_path / "run", is_main=True, lock=True) as run:
        run.mark_failed("checkpoint", "000012.tar (step 12)", FULL)
        with run.guard("metrics.json"):
            raise FULL
        reason = f"the disk of {tmp_path}/run is full, 300 KB free"
        assert f"000012.tar (step 12) is not written ({reason}); training" in capsys.readouterr()[1]
        assert run.exit_code() == 3 and not run.has_checkpoint()
        line = f"not everything is on the disk: checkpoint, metrics.json ({reason}); make room, "
        assert f"{line}then the same command starts again" in capsys.readouterr()[1]
        (tmp_path / "run" / "000006.tar").touch()
        assert run.exit_code() == 3 and run.has_checkpoint()
        assert "goes on from the newest checkpoint" in capsys.readouterr()[1]


def test_what_a_full_disk_did_not_take_needs_no_room():
    line = describe_lost({"checkpoint": "removed with the run folder"}, has_checkpoint=False)
    assert line == "not everything is on the disk: checkpoint (removed with the run folder)"


def test_a_start_without_room_for_its_records_names_the_disk(tmp_path, small, monkeypatch):
    def full(*given):
        raise FULL

    with RunFolder(tmp_path / "run", is_main=True, lock=True) as run:
        monkeypatch.setattr(run._records, "write", full)
        with pytest.raises(OSError, match="cannot be written to") as refused:
            run.record({}, "")
    assert f"the disk of {tmp_path}/run is full, 300 KB free" in str(refused.value)
    assert "choose another --basedir" in str(refused.value)
