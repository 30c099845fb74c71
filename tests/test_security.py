"""What SECURITY.md promises: no file runs code, leaves its folder or fills a disk."""

import ast
import importlib
import json
import os
import pickle
import re
import stat
import struct
import zipfile
from pathlib import Path

import download
import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from nerf.build import load_scene
from nerf.datasets.images import inside
from nerf.flags import nerf as nerf_flags

FOLDERS = ("nerf", "guidance", "data", "benchmarks")
CODE = [
    *REPOSITORY.glob("*.py"),
    *(
        p
        for f in ("nerf", "guidance", "data", "benchmarks")
        for p in (REPOSITORY / f).rglob("*.py")
    ),
]
RUNS_CODE = set(
    "eval exec os.system os.popen pickle.load pickle.loads joblib.load dill.load marshal.loads "
    "yaml.load yaml.unsafe_load shutil.unpack_archive torch.hub.load".split()
)


def calls(path):
    """(dotted name, its constant keywords, line) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", "?") for k in node.keywords}
            yield ast.unparse(node.func), keywords, f"{path.name}:{node.lineno}"


def dangerous(path) -> list[str]:
    """The calls of a file that could run code found in another file."""
    bad = []
    for name, keywords, where in calls(path):
        bad += [f"{where} {name}"] * (
            name in RUNS_CODE or keywords.get("shell", False) is not False
        )
        if name == "torch.load" and keywords.get("weights_only") is not True:
            bad.append(f"{where} {name} without weights_only=True")
        if name.endswith("np.load") and keywords.get("allow_pickle", False) is not False:
            bad.append(f"{where} {name} with pickles")
        if keywords.get("trust_remote_code", False) is not False:
            bad.append(f"{where} {name} runs a repository's code")
    return bad


def test_no_call_in_the_project_could_run_code_from_a_file():
    assert len(CODE) > 50
    assert [line for path in CODE for line in dangerous(path)] == []


def test_that_check_sees_what_it_looks_for(tmp_path):
    lines = ["torch.load(a)", "torch.load(a, weights_only=False)", "np.load(a, allow_pickle=True)"]
    lines += ["pickle.load(f)", "subprocess.run(c, shell=True)", "eval(text)", "torch.hub.load(a)"]
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert len(dangerous(tmp_path / "a.py")) == len(lines)


OUTSIDE = ["../out.png", "a/../../out.png", "/etc/hostname", "..\\out.png", "a/b/../../..", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_a_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of the data folder"):
        inside(tmp_path, name, "x.json")


def test_names_within_a_folder_are_kept_and_links_followed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    assert inside(data, "./a/../b.png", "x") == data / "b.png"
    assert inside(data, "a\\b.png", "x") == data / "a" / "b.png"
    assert inside(data, str(data / "c.png"), "x") == data / "c.png"
    (tmp_path / "real").mkdir()
    (data / "link").symlink_to(tmp_path / "real")
    assert inside(data, "link/c.png", "x") == data / "link" / "c.png"
    beside = tmp_path / "data2" / "c.png"  # begins with the folder's name, is not in it
    with pytest.raises(ValueError, match="leads out"):
        inside(data, str(beside), "x")


def load(folder, kind):
    flags = ["--datadir", str(folder), "--dataset_type", kind, "--testskip", "1", "--factor", "1"]
    return load_scene(nerf_flags.parse(flags), print)


@pytest.mark.parametrize("kind", ["blender", "linemod", "transforms"])
@pytest.mark.parametrize("absolute", [True, False])
def test_pictures_outside_are_refused_in_every_json_format(demo_copy, tmp_path, kind, absolute):
    folder = demo_copy(kind)
    file = next(iter(sorted(folder.glob("transforms*.json"))))
    content = json.loads(file.read_text())
    frame = content["frames"][0]
    named = (folder / frame["file_path"]).with_suffix("")
    real = next(path for path in named.parent.iterdir() if path.with_suffix("") == named)
    real.rename(tmp_path / "secret.png")  # it exists and is a picture: only its place is wrong
    frame["file_path"] = str(tmp_path / "secret.png") if absolute else "../secret.png"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="leads out of the data folder") as caught:
        load(folder, {"linemod": "LINEMOD"}.get(kind, kind))
    assert "secret.png" in str(caught.value)


def test_colmap_image_names_cannot_leave_the_picture_folder(demo_copy):
    folder = demo_copy("colmap")
    changed = 0
    for file in folder.rglob("images.*"):
        content = file.read_bytes()
        name = re.search(rb"[\w/]+\.png", content)[0]
        outside = b"../" + name[3:]  # of the same length, so that the binary file stays whole
        file.write_bytes(content.replace(name, outside, 1))
        changed += 1
    assert changed
    with pytest.raises(ValueError, match="leads out of the data folder"):
        load(folder, "colmap")


# -------------------------------------------------------------------------------------- pickles


class Canary:
    """Pickles to a call that makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil_file(path: Path, canary: Path) -> None:
    evil = Canary(canary)
    if path.suffix == ".npy":
        np.save(path, np.array([evil], dtype=object), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, np.array([evil], dtype=object), allow_pickle=True)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save({"global_step": 1, "network_fn_state_dict": evil}, path)


FILE_FLAGS = {
    "run_nerf": ["--ft_path", "--ft_weights"],
    "run_dreamfusion": ["--ft_path", "--ft_weights", "--init_from", "--lora_file"],
}


@pytest.mark.parametrize("kind", ["tar", "pt", "npy", "npz", "pkl"])
@pytest.mark.parametrize(
    "name, flag", [(name, flag) for name, flags in FILE_FLAGS.items() for flag in flags]
)
def test_no_flag_that_takes_a_file_runs_what_is_in_it(request, tmp_path, capsys, name, flag, kind):
    canary, path = tmp_path / "canary", tmp_path / f"given.{kind}"
    evil_file(path, canary)
    flags = ["--basedir", str(tmp_path / "logs"), "--device", "cpu", flag, str(path)]
    if name == "run_nerf":
        flags += ["--expname", "run", "--datadir", str(request.getfixturevalue("demo_blender"))]
        flags += ["--dataset_type", "blender"]
    else:
        flags += ["--config", str(REPOSITORY / "configs" / "dream_tiny.txt"), "--prompt", "a cube"]
        flags += ["--guidance", "vsd" if flag == "--lora_file" else "sds"]
    script = importlib.import_module(name)
    for more in ([], ["--render_only"]):
        if more and flag != "--ft_path":
            continue
        assert script.main([*flags, *more]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(name)]
        assert len(said) == 1 and path.name in said[0], said
        assert not canary.exists()
    evil = Canary(canary)
    pickle.loads(pickle.dumps(evil))  # noqa: S301  that this canary would sing
    assert canary.exists()


# ------------------------------------------------------------------------------------- archives


def scene_archive(path: Path, *extra: zipfile.ZipInfo, content=b"x") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("lego/transforms_train.json", "{}")
        for info in extra:
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, content)
    return path


def entry(name: str, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename, info.create_system = name, 3
    info.external_attr = (kind | 0o644) << 16
    return info


ESCAPES = {
    "up": entry("../canary"),
    "up from within": entry("lego/../../canary"),
    "absolute": entry("/tmp/canary_of_an_archive"),
    "backslashes": entry("..\\canary"),
    "drive": entry("C:/canary"),
    "symlink": entry("lego/link", stat.S_IFLNK),
    "device": entry("lego/device", stat.S_IFCHR),
    "fifo": entry("lego/fifo", stat.S_IFIFO),
}


@pytest.mark.parametrize("how", ESCAPES)
def test_archives_cannot_write_outside_or_make_links(tmp_path, how):
    root = tmp_path / "data"
    root.mkdir()
    archive = scene_archive(root / "x.zip", ESCAPES[how], content=b"/etc/passwd")
    with pytest.raises(download.DownloadError, match="nothing is unpacked"):
        download.unpack(archive, "lego", root / "lego")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "x.zip"]
    assert not Path("/tmp/canary_of_an_archive").exists()


def test_zip_bombs_are_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    bomb = scene_archive(tmp_path / "x.zip", entry("lego/a.png"), content=bytes(150 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(download.DownloadError, match="claim to hold"):
        download.unpack(bomb, "lego", tmp_path / "lego")
    many = scene_archive(tmp_path / "y.zip", *(entry(f"lego/{i}.png") for i in range(40)))
    monkeypatch.setattr(download, "MAX_MEMBERS", 40)
    with pytest.raises(download.DownloadError, match="41 files"):
        download.unpack(many, "lego", tmp_path / "lego")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.zip", "y.zip"]


def test_an_archive_that_lies_about_a_size_is_cut_off_there(tmp_path):
    """The declared size bounds what is written, so that the check before it means something."""
    path = scene_archive(tmp_path / "x.zip", entry("lego/a.png"), content=bytes(1 << 20))
    data = bytearray(path.read_bytes())
    while (at := data.find(struct.pack("<I", 1 << 20))) >= 0:  # in both headers
        data[at : at + 4] = struct.pack("<I", 10)
    path.write_bytes(data)
    with pytest.raises(download.DownloadError, match="damaged"):
        download.unpack(path, "lego", tmp_path / "lego")
    assert list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------- the network


def test_servers_listen_on_this_machine_only_unless_told():
    """The viewer is the only server here; TensorBoard is started by its user, on localhost."""
    assert nerf_flags.parse([]).viewer_host == "127.0.0.1"
    listening = [
        (name, keywords, where)
        for path in CODE
        for name, keywords, where in calls(path)
        if name.endswith(("Server", ".listen", ".bind", "launch_tensorboard"))
    ]
    assert [(n, "host" in k) for n, k, _ in listening if "Viser" in n] == [
        ("viser.ViserServer", True)
    ]
    ports = [name for name, _, _ in listening if ".bind" in name]  # asked whether they are free
    soak = (REPOSITORY / "benchmarks" / "soak_inputs.py").read_text(encoding="utf-8")
    archives = soak.count('ThreadingHTTPServer(("127.0.0.1", 0)')  # what data/download.py fetches
    assert len(listening) == 1 + len(ports) + archives, listening


# ------------------------------------------------------------------------------- the document


def test_every_promise_names_a_test_that_exists():
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", text)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 8 and all("::test_" in row for row in rows)
    for file, name in named:
        source = (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{file} has no {name}"
