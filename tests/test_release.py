"""A checkpoint of the first release opens for ever: the files in fixtures/ are never made again.

PYTHONPATH=data python tests/test_release.py NAME    # made each; for a new kind of checkpoint only
"""

import shutil
import sys
from pathlib import Path

import imageio.v3 as iio
import make_demo
import numpy as np
import pytest
import torch
from helpers import run_script

from nerf.training.checkpoint import finished_updates, load_checkpoint

FIXTURES = Path(__file__).resolve().parent / "fixtures"
STEPS, SIZE = 300, 16
NERF = (
    "--use_viewdirs --white_bkgd --N_samples 16 --multires 4 --device cpu --i_img 0 --i_video 0 "
    "--ckpt_secs 0 --dataset_type blender --testskip 1 --ema_decay 0.9 --lr_schedule exp "
)
SMALL = (
    "--netdepth 2 --netwidth 32 --netdepth_fine 2 --netwidth_fine 32 --N_importance 16 "
    "--N_rand 128 --lrate 5e-3"
)
FAST = "--fast --amp off --target_samples 2048 --occ_res 16 --grid_res 16 --netwidth 16"
DREAM = (
    "--guidance gaussian --prompt ball --device cpu --netdepth 2 --netwidth 16 --multires 2 "
    "--train_res 12 --batch_views 2 --march_steps 24 --occ_res 16 --lrate 1e-2 --i_img 0 "
    "--ckpt_secs 0 --eval_res 16 --video_frames 3 --guidance_scale 1 --background learned"
)
CASES = {  # name: (script, flags, folder with the pictures)
    "vanilla": ("run_nerf.py", NERF + SMALL, "render_test"),
    "fast": ("run_nerf.py", f"{FAST} {NERF}", "render_test"),
    "dream": ("run_dreamfusion.py", DREAM, "render_path"),
}


def command(name: str, folder: Path, *more) -> tuple[list, str]:
    """Flags and script of a case; its data, which is drawn by formula, is made if need be."""
    script, flags, _ = CASES[name]
    words = [*flags.split(), "--basedir", folder, "--expname", "run", *more]
    if script == "run_nerf.py":
        data = folder / "data"
        if not data.exists():
            make_demo.make(data, "blender", SIZE, {"train": 6, "val": 1, "test": 2})
        words += ["--datadir", data]
    return words, script


def run(name: str, folder: Path, *more):
    words, script = command(name, folder, *more)
    done = run_script(words, script=script, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def pictures(name: str, run_folder: Path) -> np.ndarray:
    """What the newest rendering of the run shows, [N, H, W, 3] in [0, 1]."""
    folder = sorted(run_folder.glob(CASES[name][2] + "_*"))[-1]
    return np.stack([iio.imread(path) for path in sorted(folder.glob("[0-9]*.png"))]) / 255.0


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_the_first_release_opens_renders_and_goes_on(name, tmp_path):
    saved = tmp_path / "run" / f"{STEPS:06d}.tar"
    saved.parent.mkdir()
    shutil.copy(FIXTURES / f"{name}.tar", saved)
    assert finished_updates(load_checkpoint(saved)) == STEPS
    view = ["--render_only"] if name == "dream" else ["--render_only", "--render_test"]
    run(name, tmp_path, *view)
    seen = pictures(name, tmp_path / "run")
    expected = iio.imread(FIXTURES / f"{name}.png") / 255.0
    seen = np.concatenate(list(seen), axis=1)
    assert np.abs(seen - expected).mean() < 0.5 / 255 and np.abs(seen - expected).max() < 6 / 255
    done = run(name, tmp_path, "--N_iters", STEPS + 1)
    changed = [line for line in done.stderr.splitlines() if line.startswith("changed since")]
    assert changed == [f"changed since the checkpoint: N_iters: {STEPS} -> {STEPS + 1}"]
    assert f"at step {STEPS}" in done.stderr
    before, after = load_checkpoint(saved), load_checkpoint(saved.with_name(f"{STEPS + 1:06d}.tar"))
    networks = [state["network_fn_state_dict"] for state in (before, after)]
    assert any(not torch.equal(networks[1][key], value) for key, value in networks[0].items())
    seen = np.concatenate(list(pictures(name, tmp_path / "run")), axis=1)
    assert np.abs(seen - expected).mean() < 8 / 255  # one step on, not begun anew


def make(name: str, folder: Path) -> None:
    """Train, and keep the checkpoint and what it looks like."""
    FIXTURES.mkdir(exist_ok=True)
    if (FIXTURES / f"{name}.tar").exists():
        sys.exit(f"{FIXTURES / name}.tar is there; a release's checkpoint is never made again")
    run(name, folder, "--N_iters", STEPS)
    state = load_checkpoint(folder / "run" / f"{STEPS:06d}.tar")
    for key in ("basedir", "datadir"):  # of one machine
        state["args"].pop(key, None)
    torch.save(state, FIXTURES / f"{name}.tar")
    shown = (np.concatenate(list(pictures(name, folder / "run")), axis=1) * 255).round()
    iio.imwrite(FIXTURES / f"{name}.png", shown.astype(np.uint8))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        make(sys.argv[1], Path(scratch))
