"""guidance.sample: samplers against diffusers' own, prompt-to-prompt, and the command line."""

import json
import shlex
import shutil

import diffusers
import imageio.v3 as iio
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers import CPU, REPOSITORY, run_script
from tiny_models import SIDE, draw

from guidance.prompt_to_prompt import PromptToPrompt, token_sources
from guidance.sample import Sampling, ddim, parse, sample, sample_edits, script, sheet
from guidance.samplers import SAMPLERS, make_sampler
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
        (["--scheduler", "heun"], "expected one of ddim, ddpm, pndm, dpm++, euler, unipc"),
        (["--scheduler", "euler", "--steps", "1001"], "the model has 1000 timesteps"),
        (["--cross_steps", "0.5"], "--cross_steps is for --prompt_target"),
        (["--prompt_target", "a cone", "--self_steps", "1.5"], "--self_steps 1.5: expected 0 to 1"),
        (["--prompt_target", "a cone", "--views"], "leave one out"),
        (["--size", "33"], "use a height of 32 or 34"),
        (["--number", "0"], "expected 1 or more"),
    ],
)
def test_mistakes_are_one_line(flags, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        script(["--prompt", "a cube", *flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in message and message.count("\n") == 1


def test_a_prompt_is_printed_as_one_line_without_control_characters(sd_folder, tmp_path, capsys):
    words = ["--sd_model", str(sd_folder), "--steps", "1", "--number", "1", "--size", "16"]
    script(["--prompt", "a cube\x1b[31m\nforged", "--out", str(tmp_path / "s.png"), *words])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"a cube\x1b[31m\nforged" in printed.splitlines()[-1]


# --------------------------------------------------------------------------- diffusers' samplers


PROMPT, NEGATIVE = "a red cube", "a green sphere"


@pytest.fixture(scope="module")
def model(sd_folder):
    return StableDiffusion(sd_folder, CPU)


def edit_scheduler(folder, **changes):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pipelines_images(folder, name, texts, **options):
    """By diffusers' pipeline, whose generators are those of seed 3, 4, ..."""
    model = options.pop("model")
    parts = {part: getattr(model, part) for part in ("unet", "vae", "text_encoder")}
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, feature_extractor=None, local_files_only=True, **parts
    )
    kind = getattr(diffusers, SAMPLERS[name])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(3 + n) for n in range(len(texts))]
    return pipeline(
        texts, negative_prompt=[NEGATIVE] * len(texts), guidance_scale=3.0, num_inference_steps=4,
        generator=generators, output_type="pt", **options,
    ).images  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("folder", ["sd_folder", "sd2_folder"])
def test_every_sampler_draws_the_pictures_of_diffusers_pipeline(folder, request, tmp_path):
    """Whose own noise, too: ddpm adds some at every step. And no two draw the same."""
    path = shutil.copytree(request.getfixturevalue(folder), tmp_path / "model")
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }  # fmt: skip
    (path / "model_index.json").write_text(json.dumps(index))
    model, texts, drawn = StableDiffusion(path, CPU), [PROMPT, "a green cube"], []
    for name in SAMPLERS:
        for rescale in (0.0, 0.7) if name == "euler" else (0.0,):
            wanted = pipelines_images(path, name, texts, model=model, guidance_rescale=rescale)
            sampler = make_sampler(path, name, 4, model)
            how = Sampling(3.0, rescale, 4, sampler)._asdict()
            ours = sample(model, texts, negative=NEGATIVE, seed=3, **how)
            torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0, msg=name)
            again = sample(model, texts, negative=NEGATIVE, seed=3, **how)  # nothing is left over
            assert torch.equal(again, ours)
            drawn.append(ours)
    drawn.append(sample(model, texts, negative=NEGATIVE, seed=3, scale=3.0, steps=4))
    for number, one in enumerate(drawn):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in drawn[:number])


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("pndm", {"prediction_type": "sample"}, "which predicts sample"),
        ("pndm", {"prediction_type": "v_prediction"}, "cannot have the noise schedule"),
        ("euler", {"prediction_type": "epsilon"}, "cannot start a picture from pure noise"),
    ],
)
def test_a_sampler_that_the_model_cannot_use_is_refused(
    sd_folder, tmp_path, capsys, name, changes, complaint
):
    path = shutil.copytree(sd_folder, tmp_path / "model")
    if changes["prediction_type"] != "sample":
        changes |= {"rescale_betas_zero_snr": True, "_class_name": "DDIMScheduler"}
    edit_scheduler(path, **changes)
    out = tmp_path / "x.png"
    flags = ["--prompt", PROMPT, "--sd_model", str(path), "--device", "cpu", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        script([*flags, "--scheduler", name])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in message and message.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "euler", "unipc"])
def test_samplers_start_a_zero_snr_model_from_pure_noise(sd2_folder, tmp_path, name):
    path = shutil.copytree(sd2_folder, tmp_path / "model")
    edit_scheduler(path, rescale_betas_zero_snr=True, _class_name="DDIMScheduler")
    model = StableDiffusion(path, CPU)
    images = sample(model, [PROMPT], steps=3, sampler=make_sampler(path, name, 3, model))
    assert images.isfinite().all() and images.std() > 0.01


# ------------------------------------------------------------------------------ prompt-to-prompt


def edits(model, target, cross, layout, **options):
    how = Sampling(3.0, 0.0, 5, options.pop("sampler", None))
    edit = PromptToPrompt(model, PROMPT, target, cross, layout)
    return sample_edits(model, edit, (PROMPT, target), 2, how, seed=3)


def test_without_maps_the_target_is_drawn_alone(model, sd_folder):
    """From the same noise, by our DDIM and by a sampler that adds noise."""
    for sampler in (None, make_sampler(sd_folder, "ddpm", 5, model)):
        first, second = edits(model, NEGATIVE, 0.0, 0.0, sampler=sampler)
        for found, text in ((first, PROMPT), (second, NEGATIVE)):
            alone = sample(model, [text] * 2, scale=3.0, steps=5, seed=3, sampler=sampler)
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_prompt_edited_by_itself_is_itself(model):
    for layout in (0.0, 1.0):
        first, second = edits(model, PROMPT, 1.0, layout)
        torch.testing.assert_close(second, first, atol=1e-4, rtol=0)


def test_maps_change_the_target_and_not_the_prompt(model):
    """More steps with the prompt's maps, another picture; the prompt's stays what it is."""
    drawn = [edits(model, NEGATIVE, *both) for both in ((0, 0), (0.4, 0), (1, 0), (1, 1))]
    for first, _ in drawn:
        torch.testing.assert_close(first, drawn[0][0], atol=1e-4, rtol=0)
    for number, (_, second) in enumerate(drawn):
        assert not any(torch.allclose(second, other, atol=1e-6) for _, other in drawn[:number])


def test_tokens_are_aligned_whatever_their_number():
    """0: start; 4 and 5: end and padding of the shorter prompt."""
    words = "a red cube".split()
    assert token_sources(words, "a green cube".split(), 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert token_sources(words, "a big red cube".split(), 7).tolist() == [0, 1, -1, 2, 3, 4, 5]
    assert token_sources("a big red cube".split(), words, 6).tolist() == [0, 1, 3, 4, 5, -1]
    assert token_sources(words, "one of two".split(), 5).tolist() == [0, 1, 2, 3, 4]


def test_the_samples_of_the_readme_do_not_overwrite_one_another():
    """Each command of it has a picture of its own, and pairs have two more."""
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    written = []
    for line in lines:
        if line.startswith("python -m guidance.sample "):
            args = parse(shlex.split(line, comments=True)[3:])
            written.append(args.out)
            if args.prompt_target:
                written += [
                    args.out.with_stem(f"{args.out.stem}_{n}") for n in ("prompt", "target")
                ]
    assert len(written) >= 4 and len(set(written)) == len(written)


def test_a_pair_is_written_side_by_side_and_alone(tmp_path, sd_folder, capsys):
    """By the command line: the target of three tokens more, and the pictures by hand."""
    flags = ["--prompt", PROMPT, "--prompt_target", "a red cube of a sphere", "--steps", "5"]
    flags += ["--sd_model", str(sd_folder), "--device", "cpu", "--number", "2", "--seed", "3"]
    script([*flags, "--guidance_scale", "3", "--out", str(tmp_path / "edit.png")])
    printed = capsys.readouterr().out
    assert "tokens with maps of their own: of a sphere" in printed
    names = [str(tmp_path / f"edit{name}.png") for name in ("", "_prompt", "_target")]
    assert printed.startswith(f"{', '.join(names)}: ")
    assert sorted(map(str, tmp_path.iterdir())) == sorted(names)
    both, prompt, target = (
        iio.imread(tmp_path / f"edit{name}.png") for name in ("", "_prompt", "_target")
    )
    model = StableDiffusion(sd_folder, CPU)
    wanted = edits(model, "a red cube of a sphere", 0.8, 0.0)
    for image, images in ((prompt, wanted[0]), (target, wanted[1])):
        assert abs(image.astype(int) - sheet(images, 2).astype(int)).max() <= 1
    size = prompt.shape[0]
    assert both.shape == (2 * size, 2 * size, 3)
    for row in range(2):
        cells = both[row * size : (row + 1) * size]
        assert (cells[:, :size] == prompt[:, row * size : (row + 1) * size]).all()
        assert (cells[:, size:] == target[:, row * size : (row + 1) * size]).all()
