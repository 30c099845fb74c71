"""guidance.sample against diffusers' own StableDiffusionPipeline, for every kind of noise schedule.

Prediction types epsilon, v_prediction and sample, with and without zero terminal SNR, for every
scheduler whose noise schedule ``--scheduler`` accepts.
"""

import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers import CPU
from tiny_models import SIDE, draw

from guidance import sds
from guidance.model_files import load_noise_schedule
from guidance.sample import ddim, sample, script
from guidance.stable_diffusion import StableDiffusion

PROMPT, NEGATIVE, SCALE, STEPS = "a red cube", "a green sphere", 3.0, 5
TYPES = ("epsilon", "v_prediction", "sample")
SCHEDULERS = (
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler",
    "DDPMParallelScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler",
    "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


def edit_scheduler(folder, **changes):
    file = folder / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))
    return config


@pytest.fixture
def copy(sd_folder, tmp_path):
    return shutil.copytree(sd_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def model(sd_folder):
    return StableDiffusion(sd_folder, CPU)


@pytest.fixture(scope="module")
def pipeline(model):
    pipeline = StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        unet=model.unet, scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled_by_diffusers(pipeline, chosen, prediction, noise, **options):
    """Latents by the pipeline, with DDIM on the noise schedule of the scheduler ``chosen``."""
    pipeline.scheduler = DDIMScheduler.from_config(
        chosen.config, prediction_type=prediction, timestep_spacing="trailing",
        set_alpha_to_one=True, clip_sample=False,
    )  # fmt: skip
    pipeline.scheduler.alphas_cumprod = chosen.alphas_cumprod
    options = {"output_type": "latent"} | options
    return pipeline(
        PROMPT, negative_prompt=NEGATIVE, guidance_scale=SCALE, num_inference_steps=STEPS,
        latents=noise, **options,
    ).images  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some schedulers give thousands
@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_latents_are_the_pipelines(copy, model, pipeline, kind, zero_snr):
    config = edit_scheduler(copy, _class_name=kind, rescale_betas_zero_snr=zero_snr)
    chosen = getattr(diffusers, kind).from_config(config)
    schedule, _ = load_noise_schedule(copy, None)
    for prediction in TYPES:
        if prediction == "epsilon" and schedule[-1] == 0:
            continue  # refused below; diffusers samples NaN
        prior = SimpleNamespace(
            alphas_cumprod=schedule, prediction_type=prediction, predict=model.predict
        )
        noise = draw(1, 4, SIDE, SIDE)
        wanted = sampled_by_diffusers(pipeline, chosen, prediction, noise)
        ours = ddim(prior, noise, model.embed([NEGATIVE]), model.embed([PROMPT]), SCALE, STEPS)
        assert wanted.isfinite().all()
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_scheduler_that_is_accepted_is_compared(sd_folder):
    """The list above holds all of the installed diffusers' that ``--scheduler`` takes."""
    accepted = set()
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            try:
                load_noise_schedule(sd_folder, name)
            except ValueError:
                continue
            accepted.add(name)
    assert accepted <= {*SCHEDULERS, "DPMSolverSDEScheduler"}  # the last one needs torchsde


def test_a_noise_schedule_of_other_models_is_refused(sd_folder):
    """CogVideoX shifts the schedule, whatever the config says."""
    with pytest.raises(ValueError, match="--scheduler cogvideox_ddim: .* not the one that"):
        load_noise_schedule(sd_folder, "cogvideox_ddim")


def test_a_scheduler_that_cannot_have_zero_snr_is_named(copy):
    edit_scheduler(copy, _class_name="DDIMScheduler", rescale_betas_zero_snr=True)
    expected = {None: [], "euler_discrete": ["changes nothing"], "pndm": ["zero terminal SNR"]}
    for name, words in expected.items():
        messages = []
        StableDiffusion(copy, CPU, scheduler=name, warn=messages.append)
        assert len(messages) == len(words)
        for message, part in zip(messages, words, strict=True):
            assert f"--scheduler {name}: " in message and part in message


@pytest.mark.parametrize("prediction", TYPES[1:])
def test_pictures_of_a_zero_snr_model_are_the_pipelines(copy, pipeline, prediction):
    config = edit_scheduler(
        copy, _class_name="DDIMScheduler", prediction_type=prediction, rescale_betas_zero_snr=True
    )
    model = StableDiffusion(copy, CPU)
    assert model.alphas_cumprod[-1] == 0
    noise = torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))[None]
    chosen = DDIMScheduler.from_config(config)
    wanted = sampled_by_diffusers(pipeline, chosen, prediction, noise, output_type="pt")
    ours = sample(model, [PROMPT], negative=NEGATIVE, scale=SCALE, steps=STEPS, seed=3)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_rescaling_a_sample_prediction_is_the_pipelines(copy, pipeline, zero_snr):
    """Where the output is x0, diffusers' guidance_rescale and ours are one formula."""
    config = edit_scheduler(
        copy, _class_name="DDIMScheduler", prediction_type="sample", rescale_betas_zero_snr=zero_snr
    )
    noise, chosen = draw(1, 4, SIDE, SIDE), DDIMScheduler.from_config(config)
    wanted = sampled_by_diffusers(pipeline, chosen, "sample", noise, guidance_rescale=0.7)
    model = StableDiffusion(copy, CPU)
    ours = ddim(model, noise, model.embed([NEGATIVE]), model.embed([PROMPT]), SCALE, STEPS, 0.7)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_epsilon_with_zero_snr_is_refused(copy, tmp_path, capsys):
    edit_scheduler(copy, _class_name="DDIMScheduler", rescale_betas_zero_snr=True)
    out = tmp_path / "sample.png"
    with pytest.raises(SystemExit) as stop:
        script(["--prompt", PROMPT, "--sd_model", str(copy), "--out", str(out), "--device", "cpu"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and not out.exists() and message.count("\n") == 1
    assert "prediction_type" in message and "zero terminal SNR" in message


def test_more_steps_than_timesteps_are_refused(sd_folder):
    with pytest.raises(ValueError, match="--steps 1001: .* use at most 1000"):
        sample(StableDiffusion(sd_folder, CPU), [PROMPT], steps=1001)


# ------------------------------------------------------------- distillation at the last timestep


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("kind", ["sds", "csd"])
def test_no_view_is_dropped_at_zero_snr(copy, prediction, kind):
    """Its gradient there is zero for v and sample: pure noise does not depend on the picture."""
    edit_scheduler(
        copy, _class_name="DDIMScheduler", prediction_type=prediction, rescale_betas_zero_snr=True
    )
    model = StableDiffusion(copy, CPU)
    images = draw(2, 3, 8 * SIDE, 8 * SIDE).sigmoid()
    conditions = sds.Conditions(model.embed([NEGATIVE] * 2), model.embed([PROMPT] * 2))
    noise = sds.draw_noise(2, (4, SIDE, SIDE), torch.Generator().manual_seed(0))
    for rescale in (0.0, 0.5):
        recipe = sds.Recipe(kind=kind, scale=7.5, t_range=(1.0, 1.0), rescale=rescale)
        found = sds.distill(model, images, conditions, noise, recipe)
        assert (found.t == 999).all() and found.skipped == 0
        assert found.gradient.isfinite().all()
        assert (found.gradient.abs().max() == 0) == (prediction != "epsilon")


def test_rescaling_beside_a_view_of_zero_snr_keeps_the_others_bit_for_bit():
    alpha_bar = torch.tensor([0.5, 0.0, 0.0047])
    noisy, strong, text = (draw(3, 4, SIDE, SIDE, seed=seed) for seed in range(3))
    found = sds.rescaled(strong, text, noisy, alpha_bar, 0.5)
    assert torch.equal(found[1], strong[1])
    some = [0, 2]
    alone = sds.rescaled(strong[some], text[some], noisy[some], alpha_bar[some], 0.5)
    assert torch.equal(found[some], alone)


def test_a_falling_t_falls_at_zero_snr():
    """The weight of t = T - 1 is infinite there: t stayed at T - 1 for the whole run."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = DDIMScheduler(**config, rescale_betas_zero_snr=True).alphas_cumprod
    places = [sds.falling_timestep(part, 1000, schedule) for part in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert places == sorted(places, reverse=True) and len(set(places)) == 5
    assert 400 < places[3] < 800
