"""The best checkpoints: which are kept, what best.json says, which one a reading mode opens."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from helpers import DREAM_TINY, NERF_TINY, newest, run_main, small_state, write_checkpoint
from torch.distributed.run import get_args_parser

import run_dreamfusion
import run_nerf
from nerf.flags import dreamfusion as dream_flags
from nerf.flags import nerf as nerf_flags
from nerf.outputs import evaluation, validation
from nerf.training import checkpoint_choice
from nerf.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from nerf.training.checkpoint_choice import BEST, Ranking, Scored
from nerf.training.run_folder import RunFolder


def steps(folder):
    return sorted(int(path.stem) for path in list_checkpoints(folder))


def best(folder):
    return json.loads((folder / BEST).read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------- ranking


@pytest.mark.parametrize("monitor", ["psnr", "sds:min", "opacity:max"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_k_best_of_any_scores_are_ranked(monitor, size):
    scores = torch.rand(20, generator=torch.Generator().manual_seed(size)).tolist()
    ranking = Ranking(monitor, size)
    for step, score in enumerate(scores):
        before = ranking
        ranking = ranking.recorded(step, score, "val")
        assert (step in ranking.steps) == (ranking is not before)
        ranking = ranking.written()
    expected = sorted(scores, reverse=monitor != "sds:min")[:size]
    assert [entry.score for entry in ranking.top] == expected
    assert ranking.best == Scored(scores.index(expected[0]), expected[0])
    assert Ranking(monitor, size).restored(ranking.checkpoint_state(), "x") == ranking


def test_equal_scores_keep_the_earlier_one_and_nan_is_none():
    ranking = Ranking().recorded(1, 20.0, "val").recorded(2, 20.0, "val")
    assert ranking.recorded(3, float("nan"), "val").steps == [1]
    assert Ranking(None).recorded(1, 20.0, None).best is None


def test_rankings_of_earlier_versions_of_other_monitors_and_of_strangers():
    old = {"best": {"step": 7, "psnr": 21.0}}
    assert Ranking().restored(old, "x").best == Scored(7, 21.0)
    assert Ranking("ssim").restored(old, "x").best is None
    assert Ranking().restored({"best": {"step": None, "psnr": float("-inf")}}, "x").best is None
    state = Ranking("ssim").recorded(3, 0.5, "val").checkpoint_state()
    assert state["best"] == {"step": 3, "psnr": float("-inf")}  # an earlier version keeps the file
    for top in ({"x": 1.0}, {"3": "y"}, [3], None):
        with pytest.raises(CheckpointError, match="ranking is not a table"):
            Ranking().restored({"ranking": {"monitor": "psnr", "split": None, "top": top}}, "x")


@pytest.mark.parametrize("killed_at", ["write_best", "prune_checkpoints"])
def test_a_kill_during_a_save_leaves_best_json_with_a_file_that_is_there(
    tmp_path, monkeypatch, killed_at
):
    with RunFolder(tmp_path, is_main=True, lock=False) as run:

        def save(step, score, ranking, keep=1):
            ranking = ranking.recorded(step, score, "val")
            return checkpoint_choice.save_run(
                run, step, small_state(step), keep=keep, ranking=ranking
            )

        ranking = save(2, 11.0, save(1, 10.0, Ranking()))
        assert steps(tmp_path) == [2] and best(tmp_path)["step"] == 2

        def killed(*given):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint_choice, killed_at, killed)
            save(3, 12.0, ranking)
        assert (tmp_path / best(tmp_path)["file"]).exists()
        # A resumed run goes on from the newest checkpoint's own ranking.
        state = load_checkpoint(list_checkpoints(tmp_path)[0])
        ranking = Ranking().restored(state, "x").existing(tmp_path)
        assert ranking.best == Scored(3, 12.0)
        assert save(4, 5.0, ranking, keep=2).best == Scored(3, 12.0)
        assert steps(tmp_path) == [3, 4] and best(tmp_path)["step"] == 3


def test_best_is_found_without_best_json_and_others_are_named(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    with RunFolder(tmp_path, is_main=True, lock=False) as run:
        ranking = Ranking(size=2).recorded(20, 5.0, "val").recorded(10, 7.0, "val")
        checkpoint_choice.save_run(run, 40, small_state(40), keep=0, ranking=ranking)
        (tmp_path / BEST).unlink()
        assert checkpoint_choice.best_step(run, run.log) == 10
        (tmp_path / BEST).write_text('{"step": 99}')
        assert checkpoint_choice.best_step(run, run.log) == 10
        (tmp_path / "000010.tar").unlink()
        assert checkpoint_choice.best_step(run, run.log) == 20
        with pytest.raises(ValueError, match=r"--ckpt 10: .* it has 20 \(best\), 30, 40$"):
            checkpoint_choice.chosen_checkpoint(run, "10", run.log)


# --------------------------------------------------------------------------------- the real scripts

SCORES = {5: 20.0, 10: 25.0, 15: 22.0, 20: 10.0, 25: 9.0, 30: 8.0}


def nerf(*arguments):
    return run_main(run_nerf.main, *arguments)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run whose validations scored SCORES, and its text: keeps two newest and two best."""
    base, steps_of = tmp_path_factory.mktemp("ranked"), iter(SCORES.values())
    flags = [*NERF_TINY, "--datadir", data, "--basedir", base, "--N_iters", 30, "--i_img", 5]
    flags += ["--i_weights", 5, "--save_top_k", 2, "--ema_decay", 0.9]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "validation_psnr", lambda outputs: next(steps_of))
        result = nerf(*flags)
    assert result.returncode == 0, result.stderr
    return base, result.stderr


@pytest.fixture
def ranked(trained, tmp_path):
    """A copy of that run's folder, and flags that read it."""
    shutil.copytree(trained[0], tmp_path / "logs")
    read = ["--basedir", tmp_path / "logs", "--expname", "tiny", "--device", "cpu"]
    return tmp_path / "logs" / "tiny", read


def test_the_best_are_kept_beside_the_newest_and_named(trained):
    run, log = trained[0] / "tiny", trained[1]
    assert steps(run) == [10, 15, 25, 30]
    score = {"score": 25.0, "monitor": "psnr", "split": "val"}
    assert best(run) == {"file": "000010.tar", "step": 10, **score}
    said = [line for line in log.splitlines() if line.startswith("best so far")]
    assert said[-1] == "best so far: 000010.tar, 25 (PSNR of the val views)" and len(said) == 2
    row = "<td>best checkpoint</td><td>000010.tar, 25 (PSNR of the val views)</td>"
    assert row in (run / "report.html").read_text()
    saved = newest(run)
    assert saved["best"] == {"step": 10, "psnr": 25.0}  # as before there were rankings
    assert saved["ranking"]["top"] == {"10": 25.0, "15": 22.0}


def test_each_reading_mode_opens_the_chosen_checkpoint(ranked, tmp_path):
    run, read = ranked
    before = (run / "metrics.json").read_bytes(), (run / "report.html").read_bytes()
    out = tmp_path / "out.safetensors"
    more = ["--render_only", "--render_test", "--validate", "--export_weights", out]
    result = nerf(*read, "--ckpt", "best", *more)
    assert result.returncode == 0, result.stderr
    assert "000010.tar: step 10, ema weights" in result.stderr
    # Measured beside the run's own evaluation, which is of its newest checkpoint.
    assert ((run / "metrics.json").read_bytes(), (run / "report.html").read_bytes()) == before
    test = json.loads((run / "render_test_000010_ckpt" / "metrics.json").read_text())
    assert test["split"] == "test" and test["step"] == 10
    val = json.loads((run / "render_val_000010_ckpt" / "metrics.json").read_text())
    assert val["split"] == "val" and val["num_views"] == len(val["views"]) == 2
    assert val["checkpoint"].endswith("000010.tar") and val["weights"] == "ema"
    assert val["psnr"] == pytest.approx(sum(view["psnr"] for view in val["views"]) / 2)
    assert 0 < val["ssim"] < 1 and (run / "render_val_000010_ckpt" / "001.png").exists()

    state = load_checkpoint(run / "000010.tar")
    written = safetensors.torch.load_file(out)
    levels = {"coarse": "network_fn_state_dict", "fine": "network_fine_state_dict"}
    expected = {f"{n}.{k}": v for n, key in levels.items() for k, v in state[key].items()}
    assert written.keys() == expected.keys()
    average = state["ema_state_dict"]["shadow"]
    for value, shadow in zip((written[name] for name in expected), average, strict=True):
        assert torch.equal(value, shadow)
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "10" and metadata["format"] == "pt" and metadata["weights"] == "ema"
    assert json.loads(metadata["args"])["N_samples"] == 8


def test_a_step_and_the_newest_without_a_best_one_and_refusals(ranked, tmp_path):
    run, read = ranked
    result = nerf(*read, "--ckpt", 25, "--export", tmp_path / "a.ply", "--mesh_res", 16)
    assert "000025.tar: step 25" in result.stderr
    refused = {
        "--ckpt 20 --validate": "has no checkpoint of this step; it has 10 (best), 15, 25, 30",
        "--ckpt 20 --render_only --viewer": "of this step; it has 10 (best), 15, 25, 30",
        "--ckpt best": "a run resumes from its newest checkpoint",
        "--ckpt last --validate": "expected newest, best, or a checkpoint's step",
        f"--ckpt best --ft_path {run}/000025.tar --validate": "both choose a checkpoint",
        "--validate --render_factor 2": "leave out --render_factor",
        "--export_weights a.pt": "expected a name that ends in .safetensors",
    }
    for words, line in refused.items():
        result = nerf(*read, *words.split())
        assert result.returncode == 2 and line in result.stderr.splitlines()[-1], result.stderr
        assert "Traceback" not in result.stderr


def test_a_resumed_run_heals_best_json_and_forgets_a_file_that_is_gone(ranked, data):
    run, _ = ranked
    (run / BEST).unlink()
    words = [*NERF_TINY, "--datadir", data, "--basedir", run.parent, "--save_top_k", 2]
    words += ["--ema_decay", 0.9]
    assert nerf(*words, "--N_iters", 30).returncode == 0  # nothing is left to do
    assert best(run)["step"] == 10
    (run / "000010.tar").unlink()
    assert nerf(*words, "--N_iters", 32).returncode == 0
    assert best(run)["step"] == 15 and steps(run) == [15, 30, 32]


def test_a_scene_without_validation_views_is_one_line(ranked, data, tmp_path):
    run, read = ranked
    shutil.copytree(data, tmp_path / "scene")
    (tmp_path / "scene" / "transforms_val.json").unlink()
    result = nerf(*read, "--validate", "--datadir", tmp_path / "scene")
    assert result.returncode == 2 and "scene has no validation views; " in result.stderr
    assert not list(run.glob("render_val_*"))


def test_weights_only_resumes_with_a_fresh_optimizer_and_ssim_chooses(tiny, tmp_path, monkeypatch):
    values = iter([0.5, 0.7])
    monkeypatch.setattr(validation, "patch_ssim", lambda outputs, split: next(values))
    flags = [*tiny, "--save_weights_only", "--monitor", "ssim", "--i_img", 10]
    result = nerf(*flags, "--N_iters", 10)
    assert result.returncode == 0, result.stderr
    assert "optimizer_state_dict" not in newest(tmp_path / "tiny")
    result = nerf(*flags, "--N_iters", 20, "--no-save_weights_only", "--i_testset", 0)
    (line,) = [line for line in result.stderr.splitlines() if "holds weights only" in line]
    assert "Adam starts fresh" in line
    after = newest(tmp_path / "tiny")
    assert after["global_step"] == 20
    assert {float(entry["step"]) for entry in after["optimizer_state_dict"]["state"].values()} == {
        10.0
    }
    assert best(tmp_path / "tiny")["monitor"] == "ssim" and best(tmp_path / "tiny")["score"] == 0.7
    assert after["ranking"]["top"] == {"20": 0.7}


def test_ssim_of_patches_is_1_for_the_truth_and_falls_with_noise(data):
    """Through the evaluation's own renderer, replaced by one that knows the pictures."""
    from nerf import build
    from nerf.outputs.scene import SceneOutputs
    from nerf.renderer import Rendered
    from nerf.training.distributed import World

    scene = build.load_scene(nerf_flags.parse([*NERF_TINY, "--datadir", str(data)]))
    world, noise = World(0, 1, torch.device("cpu")), 0.0
    colors: list[torch.Tensor] = []
    pick = scene.pick

    def picked(*places):
        rays, target = pick(*places)
        colors.append(target)
        return rays, target

    scene.pick = picked

    def render(rays):
        torch.manual_seed(0)
        part, colors[-1] = colors[-1].split(
            [len(rays.origins), len(colors[-1]) - len(rays.origins)]
        )
        return Rendered(part + noise * torch.randn_like(part), part[:, 0], part[:, 0])

    outputs = SceneOutputs(render, scene, 128, world)
    assert validation.patch_ssim(outputs, "val") == pytest.approx(1.0, abs=1e-6)
    noise = 0.2
    assert validation.patch_ssim(outputs, "val") < 0.9


def test_text_to_3d_has_a_best_checkpoint_only_by_what_is_stated(tmp_path):
    def dream(*words):
        return run_main(run_dreamfusion.main, *DREAM_TINY, "--basedir", tmp_path, *words)

    result = dream("--N_iters", 10, "--monitor", "opacity:max", "--i_weights", 5, "--keep_ckpts", 0)
    assert result.returncode == 0, result.stderr
    run, out = tmp_path / "ball", tmp_path / "out.safetensors"
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("opacity")
    opacity = {int(row.split(",")[0]): float(row.split(",")[column]) for row in rows[1:]}
    top = max(opacity, key=opacity.get)
    assert best(run)["step"] == top and best(run)["split"] is None
    assert best(run)["score"] == pytest.approx(opacity[top], rel=1e-5)
    assert f"0000{top:02d}.tar" in result.stderr and "not a measure of quality" in result.stderr
    result = dream("--ckpt", "best", "--export_weights", out)
    assert f"0000{top:02d}.tar: step {top}, ema weights" in result.stderr, result.stderr
    assert {"grid.occupied", "field.output_linear.bias"} <= safetensors.torch.load_file(out).keys()

    def refused(*words):
        result = dream("--expname", "other", *words)
        assert result.returncode == 2, result.stderr
        return result.stderr.splitlines()[-1]

    assert "has no column beauty; it has sds, " in refused(
        "--N_iters", 5, "--monitor", "beauty:max"
    )
    assert "expected none, NAME:min or NAME:max" in refused("--monitor", "sds")
    assert "--save_top_k 2 needs --monitor" in refused("--save_top_k", 2)
    assert dream("--expname", "other", "--N_iters", 5).returncode == 0
    assert "text to 3D needs --monitor" in refused("--render_only", "--ckpt", "best")


@pytest.mark.parametrize("flags", [nerf_flags.nerf_parser(), dream_flags.dream_parser()])
def test_each_flag_has_a_name_that_torchrun_does_not_take_for_its_own(flags):
    """--monitor would be a beginning of torchrun's --monitor-interval and --monitor_interval."""

    def passes(option):
        try:
            return launcher.parse_args(["x.py", option, "y"]).training_script_args == [option, "y"]
        except SystemExit:
            return False

    launcher = get_args_parser()
    for action in flags._actions:
        long = [name for name in action.option_strings if name.startswith("--")]
        assert any(passes(name) for name in long), long
