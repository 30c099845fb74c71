"""Reports, comparisons, LPIPS, depth with its unit and error, Weights & Biases."""

import copy
import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import make_demo
import numpy as np
import pytest
import torch

import run_nerf
from nerf import lenses, metrics
from nerf.datasets.scene import Scene
from nerf.outputs import compare, html, report
from nerf.outputs import scene as scene_outputs
from nerf.renderer import Rendered
from nerf.training.distributed import World

TINY = (
    "--use_viewdirs --white_bkgd --netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 "
    "--N_samples 8 --N_importance 8 --multires 4 --N_rand 64 --lrate 5e-3 --device cpu --i_img 5 "
    "--i_video 10 --i_print 5 --ckpt_secs 0 --dataset_type blender --testskip 1 --N_iters 10"
).split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    make_demo.make(folder / "demo", "blender", 16, {"train": 4, "val": 1, "test": 3})
    flags = [*TINY, "--datadir", str(folder / "demo"), "--basedir", str(folder)]
    flags += ["--metres_per_unit", "0.5"]
    assert run_nerf.main([*flags, "--expname", "a"]) == 0
    assert run_nerf.main([*flags, "--expname", "b", "--lrate", "1e-3", "--i_video", "0"]) == 0
    return folder


class Page(HTMLParser):
    """A page's text, tags and addresses; every tag must be closed in order."""

    def __init__(self, content: str):
        super().__init__()
        self.open, self.tags, self.sources, self.words = [], [], [], []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_a_run_leaves_one_self_contained_report_worst_view_first(runs):
    page = Page((runs / "a" / "report.html").read_text())
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert "script" not in page.tags and page.tags.count("svg") >= 4
    # rendered, target, error and depth of three views, and the validation strip; two videos
    assert page.tags.count("img") == 13 and page.tags.count("video") == 2
    said = json.loads((runs / "a" / "metrics.json").read_text())
    assert f"{said['psnr']:.4g}" in page.text and "lrate" in page.text
    assert ("LPIPS left out" in page.text) == ("lpips" not in said)
    psnrs = [float(value) for value in re.findall(r"psnr ([\d.]+)", page.text)]
    assert len(psnrs) == 3 and psnrs == sorted(psnrs)
    assert "meters" in page.text and "along the camera's axis" in page.text


def test_a_report_is_made_of_what_there_is(runs, tmp_path):
    folder = tmp_path / "young <b>"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"expname": "<b>", "N_iters": 5}))
    (folder / "metrics.csv").write_text("step,loss\n5,0.1\n10,na\n15,0.")
    page = Page(report.write_report(folder).read_text())
    assert "script" not in page.tags and "b" not in page.tags and "<b>" in page.text
    assert "No test views have been measured yet" in page.text and "svg" in page.tags
    (folder / "metrics.json").write_text("{")
    said = []
    report.try_report(folder, said.append)  # never fails a run
    assert len(said) == 1 and "metrics.json: cannot be read" in said[0]


def test_runs_side_by_side(runs, tmp_path, capsys):
    out = tmp_path / "ab.html"
    assert compare.main([str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert all(source.startswith("data:") for source in page.sources)
    # the target once, picture and error of each run, for three views
    assert page.tags.count("img") == 15
    flags = page.text.split("Differing flags")[1].split("Curves")[0]
    assert "lrate" in flags and "0.005" in flags and "0.001" in flags and "netwidth" not in flags
    assert compare.main([str(runs / "a"), str(runs / "b")]) == 0
    assert (runs / "compare.html").is_file()
    capsys.readouterr()
    mistakes = {
        "two different runs": [runs / "a", runs / "b" / ".." / "a"],
        "no such folder": [runs / "a", runs / "c"],
        "is no run folder": [runs / "a", runs / "demo"],
        "cannot be written": [runs / "a", runs / "b", "--out", runs / "none" / "page.html"],
    }
    for message, arguments in mistakes.items():
        assert compare.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_checkpoint_from_elsewhere_gets_no_report_and_no_alarm(tmp_path):
    said = []
    report.try_report(tmp_path, said.append)
    assert len(said) == 1 and said[0].startswith("no report.html: ") and "trained here" in said[0]
    assert not list(tmp_path.iterdir())
    (tmp_path / "args.json").write_text("[")  # a broken record of a run is still named
    report.try_report(tmp_path, said.append)
    assert said[1].startswith("report.html is not written: ")


def test_curves_are_well_formed_and_leave_out_what_is_no_number():
    x, y = np.arange(5.0), np.array([1.0, np.nan, 10.0, 0.0, 100.0])
    svg = ElementTree.fromstring(html.curves("a < b", {"one": (x, y), "two": (x, y + 1)}))
    lines = [line.attrib["points"].split() for line in svg.iter("polyline")]
    assert [len(line) for line in lines] == [4, 4]
    svg = ElementTree.fromstring(html.curves("log", {"one": (x, y)}, log=True))
    points = [pair.split(",") for pair in next(svg.iter("polyline")).attrib["points"].split()]
    heights = [float(height) for _, height in points]
    assert len(points) == 3  # without 0
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert {"1", "10", "100"} <= {text.text for text in svg.iter("text")}
    # less than a decade, without two of 1, 2, 5: other round numbers, none of ten digits
    svg = ElementTree.fromstring(html.curves("n", {"n": (x, x / 100 + 0.025)}, log=True))
    said = [text.text for text in svg.iter("text")]
    assert {"0.04", "0.06"} <= set(said) and max(map(len, said)) <= 5, said
    assert html.curves("none", {"one": (x, np.full(5, np.nan))}) == ""
    for value in (0.0, 3.0):  # constants and single points
        assert "svg" in html.curves("flat", {"flat": (x, np.full(5, value))})
    assert "circle" in html.curves("one", {"one": (x[:1], x[:1])})


def test_depth_error_is_measured_where_the_truth_is_known():
    truth = np.array([[1.0, 2.0], [np.inf, 4.0]])
    found = metrics.depth_error(np.array([[1.5, 2.0], [7.0, 5.0]]), truth)
    assert found == {"depth_error": pytest.approx(0.5), "depth_error_median": 0.5}
    assert metrics.depth_error(truth, np.full((2, 2), np.inf)) == {}


def test_depth_files_have_values_and_say_their_unit(runs):
    depth = runs / "a" / "render_test_000010" / "depth"
    unit = json.loads((depth / "unit.json").read_text())
    assert unit["unit"] == "meters" and unit["metres_per_scene_unit"] == 0.5
    world = json.loads((runs / "a" / "world.json").read_text())
    assert world["to_file_world"] == np.eye(4).tolist() and unit["file_units_per_scene_unit"] == 1
    assert unit["depth"].startswith("z") and "from 1 to 3" in unit["png"]  # 2 to 6 scene units
    meters = np.load(depth / "000.npy")
    truth = np.load(runs / "demo" / "depth" / "test" / "r_0.npy")
    views = json.loads((runs / "a" / "metrics.json").read_text())["views"]
    expected = np.abs(meters / 0.5 - truth)[np.isfinite(truth)].mean()  # errors are in scene units
    assert views[0]["depth_error"] == pytest.approx(expected, rel=1e-5)
    picture = np.load(runs / "b" / "render_test_000010" / "depth" / "002.npy")
    assert picture.shape == (16, 16) and picture.dtype == np.float32


def test_ndc_depth_is_given_along_the_camera_axis_in_the_world():
    """A wall at z = -4 before cameras that do not all stand at the origin."""
    c2w = torch.eye(3, 4).repeat(2, 1, 1)
    c2w[1, :, 3] = torch.tensor([0.2, -0.1, 0.3])
    scene = Scene(
        images=torch.zeros(2, 12, 16, 3, dtype=torch.uint8),
        c2w=c2w,
        intrinsics=torch.tensor([20.0, 20.0, 8.0, 6.0]).expand(2, 4).clone(),
        splits={"train": [0, 1]},
        names=["a", "b"],
        near=0.0,
        far=1.0,
        render_poses=c2w,
        ndc=True,
    )
    outputs = scene_outputs.SceneOutputs(None, scene, 64, World(0, 1, torch.device("cpu")))
    t = torch.full((12, 16), 1 - 1 / 4)  # 1 + 1 / z, from the near plane
    opacity = torch.ones(12, 16)
    opacity[0, 0] = 0
    rendered = Rendered(torch.zeros(12, 16, 3), opacity, t)
    for view, distance in ((0, 4.0), (1, 4.3)):
        depth = outputs.z_depth(rendered, scene, view)
        assert depth[0, 0] == 0
        assert np.allclose(depth[opacity.numpy() > 0], distance, atol=1e-4)


def test_depth_through_a_lens_is_along_the_axis_not_along_the_ray():
    """A wall at z = -4: rays of a fisheye lens are unit vectors, and t is the distance."""
    lens = lenses.from_colmap("OPENCV_FISHEYE", [20.0, 20.0, 8.0, 6.0, 0.1, 0.0, 0.0, 0.0])
    scene = Scene(
        images=torch.zeros(1, 12, 16, 3, dtype=torch.uint8),
        c2w=torch.eye(3, 4)[None],
        intrinsics=torch.tensor([lens]),
        splits={"train": [0]},
        names=["a"],
        near=0.1,
        far=9.0,
        render_poses=torch.eye(3, 4)[None],
    )
    rays = scene.view_rays(scene.c2w[0], scene.intrinsics[0], 16)(torch.arange(12 * 16))
    t = (-4.0 / rays.directions[:, 2]).view(12, 16)  # where each ray meets the wall
    assert (t - 4.0).abs().max() > 0.1  # so that the two differ
    outputs = scene_outputs.SceneOutputs(None, scene, 64, World(0, 1, torch.device("cpu")))
    rendered = Rendered(torch.zeros(12, 16, 3), torch.ones(12, 16), t)
    assert np.allclose(outputs.z_depth(rendered, scene, 0), 4.0, atol=1e-4)


def test_lpips_is_left_out_with_what_is_missing_and_used_where_it_is_there(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    model, missing = metrics.load_lpips("cpu")
    assert model is None and "pip install lpips" in missing and "\n" not in missing

    class Squared(torch.nn.Module):
        """In place of the network: the same call, a known result."""

        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"

        def forward(self, first, second, normalize):
            assert normalize and first.shape == (1, 3, 5, 7)
            return ((first - second) ** 2).mean().view(1, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Squared))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model, missing = metrics.load_lpips("cpu")
    assert model is None and "no VGG weights" in missing
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
    model, missing = metrics.load_lpips("cpu")
    assert missing == ""
    assert model(np.zeros((5, 7, 3)), np.full((5, 7, 3), 0.5)) == pytest.approx(0.25)


def test_wandb_gets_numbers_and_pictures_or_is_refused_in_one_line(
    runs, tmp_path, monkeypatch, capsys
):
    logged, started, pictures = [], [], []

    class Picture:
        def __init__(self, picture):
            pictures.append(picture.shape)

    class Session:
        id = "abc"

        def log(self, values, step):
            logged.append((step, set(values)))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        started.append(settings)
        return Session()

    flags = [*TINY, "--datadir", str(runs / "demo"), "--basedir", str(tmp_path), "--expname", "w"]
    flags += ["--i_video", "0", "--wandb"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run_nerf.main(flags) == 2
    assert "pip install wandb" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=Picture))
    assert run_nerf.main(flags) == 0
    assert started[0]["config"]["lrate"] == 5e-3 and started[0]["id"] is None
    steps = [entry[0] for entry in logged[:-1]]
    # at each of both steps a row, a validation and its picture; at the end the test's scores
    assert steps == [5, 5, 5, 10, 10, 10, 10] and logged[-1] == "finished"
    names = set().union(*(entry[1] for entry in logged[:-1]))
    assert {"val_psnr", "validation", "test_psnr", "test_ssim", "loss_coarse"} <= names
    assert len(pictures) == 2 and all(shape[2] == 3 for shape in pictures)
    assert Path(tmp_path / "w" / "wandb_id.txt").read_text() == "abc"
    assert run_nerf.main([*flags, "--N_iters", "12"]) == 0
    assert started[1]["id"] == "abc"
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: 1 / 0))
    assert run_nerf.main([*flags, "--N_iters", "14"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--wandb: it does not start" in last and "WANDB_MODE=offline" in last


# --------------------------------------------------------------- files that no run has written


WHOLE = {
    "step": 7,
    "psnr": 20.0,
    "ssim": 0.8,
    "num_views": 2,
    "resolution": [20, 20],
    "weights": "raw",
    "split": "test",
    "train_seconds": 3.0,
    "seconds_per_view": 0.1,
    "prompt": "a cube",
    "views": [{"name": "a", "psnr": 19.0}, {"name": "b", "psnr": 21.0}],
}
STRANGE = [
    "null",
    "true",
    '"text"',
    "[]",
    "{}",
    "[1]",
    '["a", {}]',
    '{"a": 1}',
    "NaN",
    "-Infinity",
    "1e999",
    "-1",
    "-7.5",
    "9" * 4000,
    "1e308",
    "[[[[1]]]]",
    "[" * 400 + "]" * 400,
    '"\\ud800"',
    '"<script>"',
    "[null, NaN]",
    "[1e999, 2]",
    '[{"name": [], "psnr": "x"}]',
    "[{}, 3]",
]


@pytest.mark.parametrize("name", [*WHOLE, "", "psnr of a view", "name of a view"])
def test_any_metrics_are_survived(tmp_path, name):
    """Each value in each place, and instead of all; report.html and the comparison say the rest."""
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "args.json").write_text('{"expname": "x"}')
        (tmp_path / run / "metrics.json").write_text(json.dumps(WHOLE))
    path = tmp_path / "a" / "metrics.json"
    for value in STRANGE:
        content = copy.deepcopy(WHOLE)
        if name.endswith("of a view"):
            content["views"][0][name.split()[0]] = "HERE"
        elif name:
            content[name] = "HERE"
        path.write_text(json.dumps(content).replace('"HERE"', value) if name else value)
        page = report.write_report(tmp_path / "a").read_text()
        assert "<script>" not in page
        compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html")
        if name and name != "psnr":
            assert "PSNR, dB</td><td>20" in page
        if name == "psnr" and value in ('"text"', "NaN", "[1]"):
            assert "metrics.json: psnr" in page


@pytest.mark.parametrize("name", ["args.json", "best.json", "metrics.csv", "val.csv", "log.txt"])
def test_any_other_file_is_survived_or_named(tmp_path, name):
    tables = [
        "step,loss\n1,1e308\n2,-1e308\n",
        "step,loss\n1,1e-320\n2,2e-320\n",
        "step\n",
        ",\n,\n",
        "step,loss\n1,1e20\n2,1e20\n",
        "step,loss\n1,1e999\n",
        "loss,step\n1,2\n",
        "\0\0\n\0",
    ]
    tables += [f"step,loss\n{'9' * 5000},1\n", "step,loss\n²,1\n", f"step,{'a' * 200_000}\n1,2\n"]
    (tmp_path / "metrics.json").write_text(json.dumps(WHOLE))
    for value in [*STRANGE, *tables, "[" * 100_000, "{", '{"a": ' + "9" * 5000 + "}"]:
        (tmp_path / "args.json").write_text('{"expname": "x"}')
        (tmp_path / name).write_bytes(value.encode() + b"\xff" * (name == "log.txt"))
        try:
            assert "PSNR, dB</td><td>20" in report.write_report(tmp_path).read_text()
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error) and name.endswith(".json")
    for field in ('{"file": 1, "score": "x", "monitor": []}', '{"file": "a", "score": NaN}'):
        (tmp_path / "args.json").write_text('{"expname": "x"}')
        (tmp_path / "best.json").write_text(field)
        report.write_report(tmp_path)
