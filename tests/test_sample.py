"""guidance.sample: DDIM against diffusers' scheduler, and the command line."""

import imageio.v3 as iio
import pytest
import torch
from diffusers import DDIMScheduler
from helpers import CPU, run_script
from tiny_models import SIDE, draw

from guidance.sample import ddim, sample, script, sheet
from guidance.stable_diffusion import StableDiffusion


@pytest.mark.parametrize("folder", ["sd_folder", "sd2_folder"])
def test_ddim_agrees_with_diffusers(folder, request):
    """The same U-Net, guidance and timesteps, by diffusers' scheduler."""
    path = request.getfixturevalue(folder)
    model = StableDiffusion(path, CPU)
    scheduler = DDIMScheduler.from_pretrained(
        path, subfolder="scheduler", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(5)
    text, none = model.embed(["a red cube"] * 2), model.embed([""] * 2)
    latents = noise = draw(2, 4, SIDE, SIDE)
    for t in scheduler.timesteps:
        unconditional, conditional = (
            model.predict(latents, t.repeat(2), words) for words in (none, text)
        )
        found = unconditional + 3.0 * (conditional - unconditional)
        latents = scheduler.step(found, t, latents).prev_sample
    ours = ddim(model, noise, none, text, 3.0, 5)
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-3)


def test_each_text_has_its_own_noise_whatever_the_number(sd_folder):
    model = StableDiffusion(sd_folder, CPU)
    texts = ["a red cube", "a green sphere", "a red cube"]
    three = sample(model, texts, steps=2)
    torch.testing.assert_close(sample(model, texts[:1], steps=2)[0], three[0])
    assert not torch.allclose(three[0], three[2])
    assert three.shape == (3, 3, 8 * SIDE, 8 * SIDE) and three.min() >= 0 and three.max() <= 1


def test_the_sheet_fills_its_last_row():
    picture = sheet(torch.zeros(5, 3, 16, 16), columns=4, side=32)
    assert picture.shape == (64, 128, 3)
    assert picture[:32].max() == 0 and picture[32:, 32:].min() == 255


def test_the_embedded_model_shows_a_red_cone(tmp_path):
    out = tmp_path / "deep" / "cone.png"
    flags = ["--prompt", "a red cone", "--out", out, "--number", 2, "--steps", 10]
    result = run_script(flags, script="guidance/sample.py")
    assert result.returncode == 0, result.stderr
    picture = iio.imread(out).astype(float)
    assert picture.shape == (128, 256, 3)
    middle = picture[64:96, 56:72].mean((0, 1))
    assert middle[0] > 100 and middle[0] > 2 * middle[1:].max()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--out", "x.jpg"], "expected a name that ends in .png"),
        (["--sd_model", "nowhere"], "--sd_model nowhere: no such folder"),
        (["--scheduler", "flow_match_euler_discrete"], "has no alphas_cumprod"),
        (["--size", "33"], "use a height of 32 or 34"),
        (["--number", "0"], "expected 1 or more"),
    ],
)
def test_mistakes_are_one_line(flags, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        script(["--prompt", "a cube", *flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in message and message.count("\n") == 1
