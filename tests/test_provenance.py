"""What a run folder tells of the program that made it: command, place, GPU, changes, copies."""

import os
import shutil
import subprocess

import pytest
import torch
from helpers import NERF_TINY, REPOSITORY, run_python

from nerf.training import provenance


def git(project, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=project, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path):
    """The program's files in a folder of their own, outside of any repository."""
    folder = tmp_path / "project"
    for pattern in provenance.PROGRAM:
        for path in REPOSITORY.glob(pattern):
            target = folder / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    return folder


@pytest.fixture
def repository(project):
    """The same under git, with a change, new files, ignored ones, and a run inside of it."""
    (project / ".gitignore").write_text("__pycache__/\n/data/\n")
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "first")
    with open(project / "nerf" / "losses.py", "a") as file:
        file.write("# a local change\n")
    (project / "mine.py").write_text("new = 1\n")
    (project / "lists").mkdir()
    (project / "lists" / "prompts.txt").write_text("a red cone\n")
    (project / "notes.md").write_text("neither .py nor .txt")
    (project / "long.txt").write_text("x" * (provenance.MAX_FILE + 1))
    (project / "data").mkdir()
    (project / "data" / "ignored.py").write_text("")
    (project / "runs" / "old" / "code").mkdir(parents=True)
    (project / "runs" / "old" / "args.json").write_text("{}")
    (project / "runs" / "old" / "code" / "old.py").write_text("")
    return project


def run(project, data, tmp_path, *more):
    words = [*NERF_TINY, "--datadir", data, "--basedir", tmp_path / "logs", "--N_iters", 1]
    result = run_python(project / "run_nerf.py", *words, *more, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    return tmp_path / "logs" / "tiny"


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_copies_what_git_does_not_know(repository, data, tmp_path):
    folder = run(repository, data, tmp_path)
    assert files_in(folder / "code") == {"001/mine.py", "001/lists/prompts.txt"}
    assert (folder / "code" / "001" / "mine.py").read_text() == "new = 1\n"
    text = (folder / "cmd.txt").read_text()
    where = f"# in {REPOSITORY}, on {provenance.gpu_names()}\n"  # run_python starts it there
    assert where in text and str(repository / "run_nerf.py") in text
    assert "# files unknown to git: 2, in code/001/\n" in text
    assert "not copied (at most 1 MB a file, 8 MB in all): long.txt\n" in text
    assert "+# a local change" in text and text.endswith("\n\n")
    # Of a start with the same files there is no second copy; of one with others there is.
    for content, place in (("new = 1\n", "001"), ("new = 2\n", "002"), ("new = 2\n", "002")):
        (repository / "mine.py").write_text(content)
        (line, _) = provenance.copy_unknown(folder, repository)
        assert line.endswith(f"code/{place}/")
        assert (folder / "code" / place / "mine.py").read_text() == content
    assert (folder / "code" / "001" / "mine.py").read_text() == "new = 1\n"


def test_without_git_a_run_copies_the_program(project, data, tmp_path):
    (project / "nerf" / "other.txt").write_text("not a part of the program")
    folder = run(project, data, tmp_path)
    expected = {name for name in files_in(project) if name.endswith(".py")}
    assert files_in(folder / "code" / "001") == expected
    assert {"run_nerf.py", "nerf/field.py", "guidance/sds.py"} <= expected
    for name in expected:
        assert (folder / "code" / "001" / name).read_bytes() == (project / name).read_bytes()
    text = (folder / "cmd.txt").read_text()
    assert "# commit unknown\n" in text
    assert f"# no git: the program's files: {len(expected)}, in code/001/\n" in text


def test_copies_are_bounded_and_leave_nothing_when_the_disk_is_full(
    repository, tmp_path, monkeypatch
):
    for number in range(12):
        (repository / f"large_{number:02d}.py").write_text("#" * (provenance.MAX_FILE - 100))
    os.symlink("/etc/hostname", repository / "link.txt")
    _, line = provenance.copy_unknown(tmp_path / "run", repository)
    copied = files_in(tmp_path / "run" / "code")
    sizes = [(tmp_path / "run" / "code" / name).stat().st_size for name in copied]
    assert sum(sizes) <= provenance.MAX_TOTAL and len(copied) == 10 and "001/mine.py" in copied
    assert line.endswith("large_08.py, large_09.py, large_10.py and 2 more")
    copyfile = shutil.copyfile

    def full(source, target):
        if source.name == "large_03.py":
            raise OSError(28, "No space left on device")
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        provenance.copy_unknown(tmp_path / "full", repository)
    assert not files_in(tmp_path / "full")


def test_gpus_are_named_with_their_number(monkeypatch):
    names = ["NVIDIA H100", "NVIDIA H100", "NVIDIA T4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])
    assert provenance.gpu_names() == "2 x NVIDIA H100, NVIDIA T4"
