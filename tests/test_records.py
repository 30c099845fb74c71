"""Records of text to 3D that tell what was made: names, args.json, lists of prompts, modes."""

import csv

import pytest
from helpers import run_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_dreamfusion
from nerf.flags import dreamfusion as dream_flags
from nerf.outputs import report


def dream(*arguments):
    return run_main(run_dreamfusion.main, *arguments)


def test_another_seed_makes_another_object_and_a_finished_one_stays_as_it_is(tiny_dream, tmp_path):
    assert dream(*tiny_dream, "--N_iters", 2).returncode == 0
    before = (tmp_path / "ball" / "args.json").read_bytes()
    again = dream(*tiny_dream, "--N_iters", 2, "--lrate", 0.5)
    assert again.returncode == 0
    assert "lrate" in again.stderr and "nothing is left to do" in again.stderr
    assert (tmp_path / "ball" / "args.json").read_bytes() == before
    assert dream(*tiny_dream, "--N_iters", 2, "--seed", 3).returncode == 0
    assert (tmp_path / "ball_seed3" / "metrics.json").exists()


def test_prompts_that_share_a_name_get_folders_of_their_own_and_one_refusal_stops_none(
    tiny_dream, tmp_path
):
    (tmp_path / "prompts.txt").write_text("a ball\nA ball!\nanother ball\n")
    flags = [*tiny_dream, "--N_iters", 1, "--prompt_file", tmp_path / "prompts.txt"]
    (tmp_path / "a_ball_2").write_text("a file where a run folder should be")
    result = dream(*flags)
    assert result.returncode == 2 and "a_ball_2: exit code 2" in result.stderr
    assert result.stderr.count(": done (") == 2
    assert {"a_ball", "another_ball"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("mode", ["--space 2d", "--n_particles 2", "--guidance csd", "--perp_neg"])
def test_the_embedded_models_config_runs_in_every_mode(mode, tmp_path):
    flags = "--config configs/dream_tiny.txt --N_iters 2 --batch_views 1 --march_steps 16 --no-mesh"
    flags += " --eval_res 16 --video_frames 1 --i_img 0 --device cpu --expname mode"
    words = [*flags.split(), *mode.split(), "--prompt", "a red cone", "--basedir", tmp_path]
    result = dream(*words)
    assert result.returncode == 0, result.stderr
    assert ("are not used" in result.stderr) == ("2d" in mode)


def test_a_failed_command_leaves_no_folder(tmp_path):
    words = ["--prompt", "a cone", "--sd_model", tmp_path / "nowhere", "--basedir", tmp_path / "l"]
    assert dream(*words, "--local_files_only").returncode == 2
    assert not list((tmp_path / "l").glob("*"))


def test_without_a_config_the_embedded_model_takes_its_own_recipe(capsys):
    args = dream_flags.parse(["--prompt", "a red cube"])
    assert args.config.endswith("configs/dream_tiny.txt") and args.guidance_scale == "7.5"
    assert "taking configs/dream_tiny.txt" in capsys.readouterr().err
    own = dream_flags.parse(["--prompt", "a red cube", "--sd_model", "some/model"])
    assert own.config is None


def test_a_config_of_tri_planes_serves_other_fields_too():
    words = ["--config", "configs/dream_tiny.txt", "--prompt", "a red cone", "--field", "mlp"]
    args = dream_flags.parse(words)
    dream_flags.check_dream_flags(args, 1)
    assert not args.smooth_planes and args.lambda_tv == "0"
    assert any("smooth_planes" in line and "lambda_tv" in line for line in args.left_out)


def test_columns_stay_in_their_places_whatever_a_resumed_run_adds(tiny_dream, tmp_path):
    """A loss that begins later has its column from the start; one added on resume, at the end."""
    flags = [*tiny_dream, "--lambda_entropy", "0:0,4:0,6:1", "--i_print", 1]
    assert dream(*flags, "--N_iters", 3).returncode == 0
    table = tmp_path / "ball" / "metrics.csv"
    first = table.read_text().splitlines()
    assert dream(*flags, "--N_iters", 5).returncode == 0
    assert dream(*flags, "--N_iters", 7, "--lambda_opacity", 0.1).returncode == 0
    lines = table.read_text().splitlines()
    assert lines[0] == first[0] + ",loss_opacity" and lines[1:4] == first[1:4]
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss_entropy"]) > 0 for row in rows] == [False] * 5 + [True] * 2
    assert [float(row["lambda_entropy"]) for row in rows] == [0] * 5 + [0.5, 1.0]
    assert [row["loss_opacity"] is not None for row in rows] == [False] * 5 + [True] * 2
    # Without the flag the column stays, without values; no other moves.
    assert dream(*flags, "--N_iters", 8).returncode == 0
    with open(table) as file:
        last = list(csv.DictReader(file))[-1]
    assert last["loss_opacity"] == "" and float(last["lambda_entropy"]) == 1
    assert report.Run(tmp_path / "ball").curves["loss_opacity"][0].tolist() == [6, 7]
    events = EventAccumulator(str(tmp_path / "ball" / "tb")).Reload()
    tags = events.Tags()
    assert {"loss_entropy", "lambda_entropy", "sds"} <= set(tags["scalars"])
    assert "preview" in tags["images"]
    (text,) = events.Tensors("flags/text_summary")[-1].tensor_proto.string_val
    assert b"| lambda_entropy | `0:0,4:0,6:1` |" in text
