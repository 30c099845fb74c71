"""A disk that is really full, read-only or gone: real runs on a small tmpfs of their own.

Linux with user namespaces only (``unshare -rm``); elsewhere these are skipped.
"""

import shutil
import subprocess

import pytest
from helpers import DREAM_TINY, NERF_TINY, run_script

from nerf.training.checkpoint import list_checkpoints, load_checkpoint


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=4k", "none", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="needs Linux's user namespaces")

# In namespaces of its own, runs a script on a small disk and copies what is on it at the end. When
# the script has saved step STEP, a shell command spoils the disk.
SPOILED = """
import ctypes, os, runpy, shutil, subprocess, sys
from pathlib import Path
from nerf.training import checkpoint
size, disk, kept, step, spoil = (sys.argv.pop(1) for _ in range(5))
ids = os.getuid(), os.getgid()
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
assert ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0
Path("/proc/self/setgroups").write_text("deny")
for name, number in zip(("uid_map", "gid_map"), ids):
    Path("/proc/self", name).write_text(f"0 {number} 1")
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
save = checkpoint.save_checkpoint
def save_and_spoil(path, state):
    save(path, state)
    if path.name == f"{int(step):06d}.tar" and spoil:
        subprocess.run(spoil, shell=True, check=True)
checkpoint.save_checkpoint = save_and_spoil
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    subprocess.run(["umount", f"{disk}/run"], capture_output=True)
    shutil.copytree(disk, kept)
"""


def on_a_disk_of(size: str, tmp_path, flags, script="run_nerf.py", spoil="", at=4):
    """(exit code, what was said, copy of the run folder) of a run whose disk holds ``size``."""
    disk, kept, code = tmp_path / "disk", tmp_path / "kept", tmp_path / "spoiled.py"
    disk.mkdir()
    code.write_text(SPOILED)
    place = ["--basedir", disk, "--expname", "run"]
    words = [size, disk, kept, at, spoil.format(disk=disk), script, *flags, *place]
    done = run_script(words, script=str(code))
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr, kept / "run"


def flags_of(kind: str, folder) -> tuple[list[str], str]:
    steps = ["--N_iters", "16", "--i_weights", "4", "--i_print", "1", "--keep_ckpts", "2"]
    if kind == "nerf":
        wanted = ["--i_img", "8", "--i_video", "16", "--expname", "run"]
        return [*NERF_TINY, "--datadir", str(folder), *steps, *wanted], "run_nerf.py"
    return [*DREAM_TINY, *steps, "--i_img", "8", "--mesh"], "run_dreamfusion.py"


SIZES = ["16k", "48k", "96k", "160k", "256k", "400k"]


@pytest.mark.parametrize("size", ["48k", "160k"])
@pytest.mark.parametrize("kind", ["nerf", "dreamfusion"])
def test_a_full_disk_costs_files_but_not_the_run(data, tmp_path, kind, size):
    flags, script = flags_of(kind, data)
    code, said, run = on_a_disk_of(size, tmp_path, flags, script)
    # With no room for the flags' record it does not begin; else it trains to the end and says so.
    full = "is full" in said
    assert code == (3 if full else 0) and (full or size == SIZES[-1])
    if full and "step 16/16" in said:
        assert f"(the disk of {tmp_path}/disk/run is full, " in said and "KB free" in said
        assert "not everything is on the disk" in said and "; make room, then the same" in said
        assert "enforce fail" not in said and "Errno" not in said
    for path in list_checkpoints(run):  # whatever is there is whole
        load_checkpoint(path)
    assert not list(run.glob(".*.tar.tmp"))
    if not list_checkpoints(run):  # what cannot be done is not proposed
        assert "next: " not in said and "from the newest checkpoint" not in said


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["nerf", "dreamfusion"])
def test_a_full_disk_at_other_writes(data, tmp_path, kind, size):
    test_a_full_disk_costs_files_but_not_the_run(data, tmp_path, kind, size)


SPOILS = {
    "read-only": ("mount -t tmpfs -o ro none {disk}/run", "Read-only file system"),
    "filled by others": (
        "cat /dev/zero > {disk}/filler || true",
        "the disk of {disk}/run is full, 0 KB free",
    ),
}


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("kind", ["nerf", "dreamfusion"])
def test_a_disk_that_goes_bad_later_leaves_the_last_checkpoint(data, tmp_path, kind, how):
    flags, script = flags_of(kind, data)
    spoil, reason = SPOILS[how]
    reason = reason.format(disk=tmp_path / "disk")
    code, said, run = on_a_disk_of("8m", tmp_path, flags, script, spoil)
    assert code == 3 and "step 16/16" in said and reason in said
    for step in (8, 12, 16):  # said each time
        assert f"{step:06d}.tar (step {step}) is not written ({reason}); training goes on" in said
    assert load_checkpoint(list_checkpoints(run)[0])["global_step"] == 4


@pytest.mark.parametrize("kind", ["nerf", "dreamfusion"])
def test_a_run_folder_that_is_removed_is_made_again(data, tmp_path, kind):
    flags, script = flags_of(kind, data)
    code, said, run = on_a_disk_of("8m", tmp_path, flags, script, "rm -r {disk}/run")
    assert code == 0 and "was removed during the run; it is made again" in said
    assert load_checkpoint(list_checkpoints(run)[0])["global_step"] == 16


@pytest.mark.parametrize("kind", ["nerf", "dreamfusion"])
def test_a_read_only_folder_is_one_line_at_the_start(data, tmp_path, kind):
    flags, script = flags_of(kind, data)
    code, said, _ = on_a_disk_of("8m,ro", tmp_path, flags, script)
    assert code in (2, 3) and "Read-only file system" in said
    assert len([line for line in said.splitlines() if line.startswith(script)]) == 1
