"""A fresh machine: an old Python, missing packages, no NVIDIA driver. One sentence for each."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import NERF_TINY, REPOSITORY, run_python

PROGRAMS = [
    "run_nerf.py", "run_dreamfusion.py", "nerf/report.py", "nerf/compare.py", "guidance/sample.py",
    "data/make_demo.py", "data/demo_surface.py", "data/download.py", "data/from_photos.py",
    "data/sfm.py",
]  # fmt: skip
MODULES = [path for path in PROGRAMS if path.startswith(("nerf/", "guidance/"))]
# Read by an old Python before it is found to be old.
READ_FIRST = [
    *PROGRAMS, "nerf/__init__.py", "guidance/__init__.py", "nerf/training/__init__.py",
    "nerf/training/installed.py", "data/checkout.py",
]  # fmt: skip


def words_of(program: str) -> list[str]:
    """The command line that starts it, after "python"."""
    if program in MODULES:
        return ["-m", program.removesuffix(".py").replace("/", ".")]
    return [program]


@pytest.mark.parametrize("path", READ_FIRST)
def test_what_an_old_python_reads_is_in_its_grammar(path):
    """The syntax of 3.8, the oldest in use anywhere."""
    ast.parse((REPOSITORY / path).read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Variables of a Python that has torch, numpy and Pillow no more; of another version too."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Blocked:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name in os.environ.get('BLOCKED', '').split():\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked)\n"
        "if os.environ.get('OLD'):\n"
        "    sys.version_info = (3, 9, 1, 'final', 0)\n"
    )
    return {"PYTHONPATH": str(folder)}


def sentence(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("program", [path for path in PROGRAMS if path != "data/download.py"])
def test_a_missing_package_is_one_sentence(program, bare):
    said = sentence(run_python(*words_of(program), **bare, BLOCKED="torch numpy PIL"))
    assert said.startswith(f"{Path(program).name}: the package ")
    assert " is not installed; " in said and ("requirements.txt" in said or ".venv" in said)


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_old_python_is_one_sentence(program, bare):
    said = sentence(run_python(*words_of(program), **bare, OLD="1"))
    assert "this is Python 3.9, 3.11 or newer is needed; " in said


def test_a_package_missed_later_is_one_sentence_too(bare, demo_blender, tmp_path):
    """TensorBoard is imported with the first metrics; what is there by then stays."""
    flags = [*NERF_TINY, "--datadir", demo_blender, "--basedir", tmp_path, "--N_iters", 1]
    result = run_python("run_nerf.py", *flags, **bare, BLOCKED="tensorboard")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "the package tensorboard is not installed; " in result.stderr.splitlines()[-1]


def test_other_mistakes_keep_their_traceback():
    code = "import nerf.training.installed; import nerf.nothing"
    result = run_python("-c", code)
    assert result.returncode == 1 and "No module named 'nerf.nothing'" in result.stderr


def test_programs_of_data_find_the_checkout_they_are_in(tmp_path):
    """Also from another folder, where nothing is installed."""
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; sys.path.append(sys.argv[1]); import checkout;"
         "import nerf; print(nerf.__file__)", str(REPOSITORY / "data")],
        cwd=tmp_path, env={}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.strip() == str(REPOSITORY / "nerf" / "__init__.py"), result.stderr


# ------------------------------------------------------------------------------- the Makefile

FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*--index-url*) exit "$UNREACHABLE" ;;
*ensurepip*) exit "${NO_VENV:-0}" ;;
esac
"""
TORCH = next(
    line
    for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
    if line.startswith("torch==")
)
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
needs_make = pytest.mark.skipif(
    shutil.which("make") is None or sys.platform != "linux", reason="needs make on Linux"
)


def make(folder: Path, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess, str]:
    """``make .venv/ready`` with a Python that only writes down what it is asked; those lines."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    python, calls = folder / "python", folder / "calls"
    python.write_text(FAKE)
    python.chmod(0o755)
    result = subprocess.run(
        ["make", ".venv/ready", f"PYTHON={python}", *words],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "CALLS": str(calls), "UNREACHABLE": "0", **environment},
    )  # fmt: skip
    return result, calls.read_text() if calls.exists() else ""


@needs_make
@pytest.mark.skipif(bool(HAS_DRIVER), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("unreachable", ["0", "1"])
def test_make_takes_the_cpu_build_where_there_is_no_driver(tmp_path, unreachable):
    result, calls = make(tmp_path, UNREACHABLE=unreachable)
    assert result.returncode == 0, result.stderr
    assert "no NVIDIA driver" in result.stdout and "GB to download" in result.stdout
    first, second = [line for line in calls.splitlines() if "pip install" in line][:2]
    assert "https://download.pytorch.org/whl/cpu" in first and first.endswith(TORCH)
    assert second.endswith("-r requirements.txt") and "--index-url" not in second
    assert ("cannot be reached: torch comes from PyPI" in result.stdout) == (unreachable == "1")


@needs_make
def test_make_takes_the_usual_build_with_a_driver_or_when_told(tmp_path):
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    path = f"{driver.parent}{os.pathsep}{os.environ['PATH']}"
    for words, variables in ([], {"PATH": path}), (["CPU_TORCH="], {}):
        folder = tmp_path / f"case{len(words)}"
        folder.mkdir()
        result, calls = make(folder, *words, **variables)
        assert result.returncode == 0 and "with CUDA" in result.stdout, result.stderr
        assert "--index-url" not in calls and "-r requirements.txt" in calls


@needs_make
def test_make_says_what_is_missing(tmp_path):
    result, calls = make(tmp_path, "PYTHON=no-such-python")
    assert result.returncode and "install Python 3.11 or newer" in result.stderr
    result, calls = make(tmp_path, NO_VENV="1")
    assert result.returncode and "apt install python3-venv" in result.stderr
    assert "pip install" not in calls
