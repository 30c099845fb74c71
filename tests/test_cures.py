"""Flags that contradict one another: the cure fits where each was set, and following it works."""

import argparse
import re

import pytest
from helpers import REPOSITORY

from guidance.build import model_differences
from nerf.datasets.settings import DataSettings
from nerf.flags import nerf as nerf_flags


def refusal(*words) -> str:
    """What the flags are refused with; "" if they are not."""
    try:
        nerf_flags.check_nerf_flags(nerf_flags.parse([*words]), 1)
    except ValueError as error:
        return str(error)
    return ""


# Lines of a config, and what is typed beside it, which contradicts them.
CASES = {
    "half_res = True": "--downscale 8",
    "downscale = 4": "--half_res",
    "field = triplane\nocc_grid = True\nlambda_tv = 0.003": "--field hashgrid",
    "field = triplane\nocc_grid = True\ngrid_start = 16\ngrid_steps = 500,1000": "--field hashgrid",
    "occ_grid = True\nprecrop_iters = 500": "--hull_rays",
    "occ_grid = True\nhull_init = on": "--contract",
}


@pytest.mark.parametrize("config", CASES)
def test_what_a_config_sets_is_overridden_not_left_out(tmp_path, config):
    path, typed = tmp_path / "mine.txt", CASES[config].split()
    path.write_text(config)
    assert not refusal("--config", str(path))
    said = refusal("--config", str(path), *typed)
    name = config.splitlines()[-1].split()[0]
    assert f"({path} sets {name})" in said and f"leave out --{name}" not in said
    cure = re.search(rf"add (--(?:no-)?{name}[^()]*) \(", said)[1].split()
    assert not refusal("--config", str(path), *typed, *cure)


def test_a_variable_of_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("NERF_HALF_RES", "True")
    said = refusal("--downscale", "8")
    assert "add --no-half_res (the variable NERF_HALF_RES sets half_res)" in said
    assert said.endswith(", or leave out --downscale")


def test_lego_fast_at_another_size():
    config = ["--config", str(REPOSITORY / "configs/lego_fast.txt"), "--downscale", "8"]
    assert "add --no-half_res (" in refusal(*config) and "lego_fast.txt sets half_res" in refusal(
        *config
    )
    assert not refusal(*config, "--no-half_res")


def test_two_reductions_name_the_flag_of_the_format(tmp_path):
    given = frozenset({"factor", "downscale"})
    settings = DataSettings(tmp_path, "llff", factor=8, downscale=4, given=given)
    with pytest.raises(ValueError, match="use --factor alone: leave out --downscale, or add"):
        settings.reduction("factor")
    assert settings._replace(downscale=1).reduction("factor") == 8  # the cure


LORA = "logs/zebra.safetensors"
MODELS = [
    # fingerprint, model and LoRA of the checkpoint; the same of this start; what is said
    (("a", "sd", None), ("a", "moved/sd", None), []),
    (("a", "sd", None), ("b", "other", None), ["--sd_model sd -> --sd_model other"]),
    (("a", "sd", None), ("b", "sd", None), ["--sd_model sd, whose files were others"]),
    (("a", "sd", None), ("a+cx1", "sd", LORA), [f"without --sd_lora -> --sd_lora {LORA}"]),
    (("a+cx1", "sd", LORA), ("a", "sd", None), [f"--sd_lora {LORA} -> without --sd_lora"]),
    (("a+cx1", "sd", LORA), ("a+dx1", "sd", LORA), [f"--sd_lora {LORA}, whose file was another"]),
    (("a+cx1", "sd", LORA), ("a+cx0.5", "sd", f"{LORA}:0.5"),
     [f"--sd_lora {LORA} -> --sd_lora {LORA}:0.5"]),
    (("a", "sd", None), ("b+cx1", "other", LORA),
     ["--sd_model sd -> --sd_model other", f"without --sd_lora -> --sd_lora {LORA}"]),
]  # fmt: skip


@pytest.mark.parametrize(("before", "now", "said"), MODELS)
def test_another_model_is_named_by_its_flags_not_by_its_hash(before, now, said):
    saved = {"model": before[0], "args": {"sd_model": before[1], "sd_lora": before[2]}}
    args = argparse.Namespace(sd_model=now[1], sd_lora=now[2], guidance="sds")
    assert model_differences(saved, args, now[0]) == said
    first_release = {"model": before[0], "args": {"sd_model": before[1]}}
    if before[2] is None:  # it had no --sd_lora
        assert model_differences(first_release, args, now[0]) == said


def test_guidance_without_a_model_differs_by_its_own_flag():
    args = argparse.Namespace(sd_model="sd", sd_lora=None, guidance="sds")
    saved = {"model": "gaussian 0.1", "args": {"guidance": "gaussian", "sd_model": "sd"}}
    assert model_differences(saved, args, "a") == []
