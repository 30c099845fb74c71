"""guidance.finetune: what it learns, its loss, exact resume, captions, the file it writes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from helpers import CPU, REPOSITORY
from PIL import Image
from safetensors.torch import load_file
from tiny_models import SIDE, draw

from guidance import finetune, lora_training
from guidance.captioned import read_captioned, read_picture
from guidance.finetune_flags import SETTINGS
from guidance.lora import LoRA, load_lora
from guidance.stable_diffusion import StableDiffusion

PROMPT = "a red cube"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of several sizes; two with captions of their own."""
    folder = tmp_path_factory.mktemp("own")
    pixels = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 64, 3)), ("b.jpg", (64, 48, 3)), ("c.png", (30, 30, 4))):
        Image.fromarray(pixels.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "b.txt").write_text("a green\n sphere\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "a photo of a cube"}\n')
    return folder


def command(pictures, sd_folder, out, *more):
    words = ["--pictures", pictures, "--sd_model", sd_folder, "--out", out, "--prompt", PROMPT]
    words += ["--device", "cpu", "--batch", 2, "--rank", 2, "--lrate", 1e-2, "--print_every", 2]
    return [str(word) for word in [*words, "--save_every", 2, "--sample_every", 0, *more]]


def run(capsys, *arguments):
    """The exit code, and what was printed."""
    code = finetune.main(command(*arguments))
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def whole(pictures, sd_folder, tmp_path_factory):
    """The LoRA of 12 updates without a break."""
    out = tmp_path_factory.mktemp("whole") / "own.safetensors"
    assert finetune.main(command(pictures, sd_folder, out, "--steps", 12)) == 0
    return out


def assert_same(one, other):
    """Two LoRA files hold the same bits; the order of their metadata is that of a hash table."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture
def quick_samples(monkeypatch):
    """Two steps of DDIM for samples and class pictures."""
    monkeypatch.setattr(finetune, "sample", partial(finetune.sample, steps=2))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(pictures, sd_folder, whole, tmp_path, capsys):
    """The real command, killed without warning after its second save at the earliest."""
    out = tmp_path / "own.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "guidance.finetune",
         *command(pictures, sd_folder, out, "--steps", 12)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 4/12"):
            assert " loss " in line and line.strip().endswith("left")
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert torch.load(tmp_path / "own_run" / "state.pt", weights_only=True)["step"] >= 2
    code, printed = run(capsys, pictures, sd_folder, out, "--steps", 12)
    assert code == 0 and "going on from step" in printed.out
    assert_same(out, whole)
    out.unlink()
    assert run(capsys, pictures, sd_folder, out, "--steps", 12)[0] == 0  # nothing is left to do
    assert_same(out, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.safetensors", "own_run"]


def test_a_signal_saves_its_step_and_samples_change_nothing(
    pictures, sd_folder, whole, tmp_path, capsys, monkeypatch, quick_samples
):
    """Stopped at step 5, which --save_every 2 does not save; from there on with samples."""
    out, loss, count = tmp_path / "own.safetensors", lora_training.training_loss, []

    def signalled(*arguments):
        count.append(1)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(finetune, "training_loss", signalled)
    code, printed = run(capsys, pictures, sd_folder, out, "--steps", 12)
    assert code == 143 and "stopped at step 5" in printed.out
    state = torch.load(tmp_path / "own_run" / "state.pt", weights_only=True)
    assert state["step"] == 5 and load_file(out)
    more = ["--steps", 12, "--sample_every", 6, "--negative", "a sphere"]
    assert run(capsys, pictures, sd_folder, out, *more)[0] == 0
    assert_same(out, whole)
    sheets = sorted((tmp_path / "own_run" / "samples").iterdir())
    assert [path.name for path in sheets] == ["000006.png", "000012.png"]
    assert Image.open(sheets[0]).size[0] == 4 * Image.open(sheets[0]).size[1]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()


def test_a_kill_while_it_saves_or_draws_is_made_up_for(
    pictures, sd_folder, whole, tmp_path, capsys, monkeypatch, quick_samples
):
    """Killed while it draws the samples of a saved step, and between the last save's two files."""
    out, draw, written = tmp_path / "own.safetensors", finetune.draw_samples, []
    flags = (pictures, sd_folder, out, "--steps", 12, "--sample_every", 6)

    def killed(args, model, run, text, size):
        if run.step == 6:
            raise KeyboardInterrupt
        draw(args, model, run, text, size)

    def dying(write, *given):
        written.append(write)
        if len(written) == 6:  # saves of steps 8, 10 and 12, two files each
            raise KeyboardInterrupt
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "draw_samples", killed)
        assert run(capsys, *flags)[0] == 130
    samples = tmp_path / "own_run" / "samples"
    assert [path.name for path in samples.iterdir()] == ["000000.png"]
    save_lora, replace_file = finetune.save_lora, finetune.replace_file
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_lora", partial(dying, save_lora))
        patch.setattr(
            finetune,
            "replace_file",
            lambda path, content: (
                dying(replace_file, path, content)
                if path.name == "state.pt"
                else replace_file(path, content)
            ),
        )
        assert run(capsys, *flags)[0] == 130
    assert len(written) == 6
    assert run(capsys, *flags)[0] == 0
    assert_same(out, whole)
    names = ["000000.png", "000006.png", "000012.png"]
    assert sorted(path.name for path in samples.iterdir()) == names


def test_other_settings_are_refused_and_more_steps_are_not(pictures, sd_folder, tmp_path, capsys):
    out, folder = tmp_path / "own.safetensors", tmp_path / "own_run"
    assert run(capsys, pictures, sd_folder, out, "--steps", 2)[0] == 0
    state, written = (folder / "state.pt").read_bytes(), out.read_bytes()
    model, kept = StableDiffusion(sd_folder, CPU), torch.load(folder / "state.pt")["settings"]
    assert kept.keys() == {*SETTINGS, "pictures", "model"}
    for name, value in {"rank": 3, "lrate": 1e-3, "batch": 1, "seed": 1, "size": 32}.items():
        with pytest.raises(ValueError, match=f"made with other settings .{name} {kept[name]} -> "):
            finetune.Run(folder, model, kept | {name: value}, CPU)
    with finetune.run_folder(out), pytest.raises(ValueError, match="another process is training"):
        with finetune.run_folder(out):
            pass
    other = shutil.copytree(pictures, tmp_path / "other")
    (other / "b.txt").write_text("a cube")
    for flags in (["--prompt", "a cube"], ["--pictures", other]):
        code, printed = run(capsys, pictures, sd_folder, out, "--steps", 3, *flags)
        assert code == 2 and "made with other settings" in printed.err
        assert "other --pictures or captions" in printed.err
        assert kept["pictures"] not in printed.err and kept["model"] not in printed.err
        assert printed.err.count("\n") == 1
    assert (folder / "state.pt").read_bytes() == state and out.read_bytes() == written
    assert finetune.Run(folder, model, kept, CPU).step == 2
    (folder / "state.pt").write_bytes(state[:1000])
    with pytest.raises(ValueError, match="state.pt: cannot read it"):
        finetune.Run(folder, model, kept, CPU)


# --------------------------------------------------------------------------------------- the loss


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def kinds_of_model(request, sd_folder, tmp_path):
    """Each with the schedule that its prediction type allows: zero terminal SNR but for epsilon."""
    path = shutil.copytree(sd_folder, tmp_path / "model")
    file = path / "scheduler" / "scheduler_config.json"
    zero = request.param != "epsilon"
    changes = {"prediction_type": request.param, "rescale_betas_zero_snr": zero}
    config = json.loads(file.read_text()) | changes | {"_class_name": "DDPMScheduler"}
    file.write_text(json.dumps(config))
    return StableDiffusion(path, CPU), DDPMScheduler.from_config(config)


def test_the_loss_is_the_formula_of_diffusers(kinds_of_model):
    """Noise and target by diffusers' own scheduler, picture by picture."""
    model, scheduler = kinds_of_model
    clean, text = draw(4, 4, SIDE, SIDE), model.embed([PROMPT, "a cube", "", PROMPT])
    with torch.no_grad():
        found = lora_training.denoising_losses(model, clean, text, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    times = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    for n, t in enumerate(times):
        one = slice(n, n + 1)
        noisy = scheduler.add_noise(clean[one], noise[one], t[None])
        output = model.predict(noisy, t[None], text[one])
        wanted = {
            "epsilon": noise[one],
            "v_prediction": scheduler.get_velocity(clean[one], noise[one], t[None]),
            "sample": clean[one],
        }[model.prediction_type]
        torch.testing.assert_close(found[n], ((output - wanted) ** 2).mean(), atol=1e-4, rtol=1e-4)


def test_the_prior_is_a_second_loss_with_its_weight(sd_folder):
    """Linear in the weight; at 0 it is the loss of the own pictures, on the same draws."""
    model = StableDiffusion(sd_folder, CPU)
    own, others = (
        lora_training.encode(model, draw(3, 3, 64, 64, seed=seed).sigmoid(), [words] * 3)
        for seed, words in ((1, PROMPT), (2, "a cube"))
    )

    def loss(weight):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            return lora_training.training_loss(model, own, others, 2, weight, generator)

    zero, one, three = loss(0.0), loss(1.0), loss(3.0)
    torch.testing.assert_close(three - zero, 3 * (one - zero))
    assert one > zero > 0
    generator = torch.Generator().manual_seed(3)
    clean, text = own.draw(2, generator)
    more, more_text = others.draw(2, generator)
    with torch.no_grad():
        rows = lora_training.denoising_losses(
            model, torch.cat([clean, more]), torch.cat([text, more_text]), generator
        )
    torch.testing.assert_close(zero, rows[:2].mean())
    torch.testing.assert_close(one, rows.view(2, 2).mean(1).sum())


def test_latents_are_samples_of_the_vaes_posterior(sd_folder):
    model, images = StableDiffusion(sd_folder, CPU), draw(3, 3, 64, 64).sigmoid()
    examples = lora_training.encode(model, images, [PROMPT] * 3)
    noise = draw(3, 4, SIDE, SIDE, seed=4)
    wanted = model.encode(images, noise)
    torch.testing.assert_close(examples.mean + examples.std * noise, wanted, atol=1e-5, rtol=1e-4)
    clean, _ = examples.draw(2000, torch.Generator().manual_seed(0))
    rows = torch.randint(3, (2000,), generator=torch.Generator().manual_seed(0))
    for n in range(3):
        spread = clean[rows == n].std(0) / examples.std[n]
        assert 0.9 < spread.mean() < 1.1


# --------------------------------------------------------------------------- pictures and captions


def test_captions_come_from_the_folder_and_the_rest_from_the_prompt(pictures, tmp_path):
    found = read_captioned(pictures, 16, PROMPT)
    assert found.captions == [PROMPT, "a green sphere", "a photo of a cube"]
    assert found.images.shape == (3, 3, 16, 16)
    copy = shutil.copytree(pictures, tmp_path / "copy")
    assert read_captioned(copy, 16, PROMPT).digest == found.digest
    (copy / "b.txt").write_text("a cube")
    assert read_captioned(copy, 16, PROMPT).digest != found.digest
    assert read_captioned(copy, 16, "a cone").digest != found.digest


def test_pictures_are_cropped_to_the_middle_and_transparent_ones_are_white(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png", 10).min() == 1
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = read_picture(tmp_path / "clear.png", 8)
    assert found[:, :, 6:].min() == 1 and found[:, 4, 1].tolist() == [1, 0, 0]


def test_class_pictures_are_drawn_once_and_hold_the_model_back(
    pictures, sd_folder, tmp_path, capsys, quick_samples
):
    """Interrupted after the first batch of them, too: the rest is drawn, with the same pixels."""
    out = tmp_path / "own.safetensors"
    flags = ["--class_prompt", "a cube", "--num_class_pictures", 6, "--steps", 3]
    code, printed = run(capsys, pictures, sd_folder, out, *flags)
    assert code == 0 and "drawing class pictures 5 to 6 of 6" in printed.out
    (folder,) = (tmp_path / "own_run").glob("class_*")
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(set(drawn.values())) == 6
    first = out.rename(tmp_path / "first.safetensors")
    shutil.rmtree(tmp_path / "own_run")
    folder.mkdir(parents=True)
    for name in sorted(drawn)[:4]:
        (folder / name).write_bytes(drawn[name])
    code, printed = run(capsys, pictures, sd_folder, out, *flags)
    assert code == 0 and "drawing class pictures 1 to 4" not in printed.out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn
    assert_same(out, first)


# --------------------------------------------------------------------------------------- the file


def test_the_file_opens_in_diffusers_and_here_with_the_same_picture(whole, sd_folder, tmp_path):
    pytest.importorskip("peft")
    path = shutil.copytree(sd_folder, tmp_path / "model")
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }  # fmt: skip
    (path / "model_index.json").write_text(json.dumps(index))
    x, t = draw(2, 4, SIDE, SIDE), torch.tensor([7, 500])
    model, merged = StableDiffusion(path, CPU), StableDiffusion(path, CPU, lora=(whole, 1.0))
    text = model.embed([PROMPT] * 2)
    plain = model.predict(x, t, text)
    lora = LoRA(model.unet, 2)
    load_lora(whole, lora)  # as --lora_file
    with lora.switched():
        wanted = model.predict(x, t, text)
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged.predict(x, t, text), wanted, atol=1e-5, rtol=1e-4)
    pipeline = StableDiffusionPipeline.from_pretrained(
        path, safety_checker=None, feature_extractor=None, local_files_only=True
    )
    pipeline.load_lora_weights(whole.parent, weight_name=whole.name)
    with torch.no_grad():
        found = pipeline.unet(x, t, encoder_hidden_states=text).sample
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--pictures", "nowhere"], "--pictures nowhere: no such folder"),
        (["--pictures", "EMPTY"], "no pictures in it; expected files that end in .png"),
        (["--pictures", "BROKEN"], "broken.png: cannot read it as a picture"),
        (["--pictures", "CAPTIONS"], "metadata.jsonl: line 1: expected {"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "cube " * 40], "--prompt: 42 tokens with start and end"),
        (["--class_prompt", "cube " * 40], "--class_prompt: 42 tokens"),
        (["--out", "x.pt"], "expected a name that ends in .safetensors"),
        (["--out", "FILE/x.safetensors"], "cannot be written"),
        (["--rank", "9"], "--rank 9: the model's narrowest attention layer has 8 channels"),
        (["--rank", "0"], "--rank 0: expected 1 or more"),
        (["--rank", "many"], "argument --rank: invalid int value"),
        (["--lrate", "nan"], "--lrate nan"),
        (["--size", "33"], "use a height of 32 or 40"),
        (["--sd_model", "nowhere"], "--sd_model nowhere: no such folder"),
        (["--device", "abacus"], "--device abacus: expected"),
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--stpes", "3"], "unrecognized arguments: --stpes"),
    ],
)
def test_mistakes_are_one_line(pictures, sd_folder, tmp_path, capsys, flags, complaint):
    for name in ("EMPTY", "BROKEN", "CAPTIONS"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "broken.png").write_bytes(b"no picture")
    shutil.copy(pictures / "a.png", tmp_path / "CAPTIONS")
    (tmp_path / "CAPTIONS" / "metadata.jsonl").write_text("no json\n")
    (tmp_path / "FILE").write_text("a file, not a folder")
    places = ("EMPTY", "BROKEN", "CAPTIONS", "FILE")
    flags = [f"{tmp_path}/{flag}" if flag.split("/")[0] in places else flag for flag in flags]
    out = tmp_path / "own.safetensors"
    code, printed = run(capsys, pictures, sd_folder, out, "--steps", 1, *flags)
    assert code == 2 and complaint in printed.err and printed.err.count("\n") == 1
    assert not out.exists() and not list(tmp_path.glob("*_run"))


def test_a_loss_that_is_not_finite_trains_nothing(
    pictures, sd_folder, tmp_path, monkeypatch, capsys
):
    """Exit code 4: the run ended, but nothing was learned."""
    out, loss = tmp_path / "own.safetensors", lora_training.training_loss
    monkeypatch.setattr(finetune, "training_loss", lambda *given: loss(*given) * float("nan"))
    code, printed = run(capsys, pictures, sd_folder, out, "--steps", 4)
    assert code == 4 and "no update was possible, the loss is nan" in printed.out


def test_a_picture_without_any_caption_is_named(pictures, sd_folder, tmp_path, capsys):
    words = command(pictures, sd_folder, tmp_path / "own.safetensors")
    place = words.index("--prompt")
    code = finetune.main(words[:place] + words[place + 2 :])
    message = capsys.readouterr().err
    assert code == 2 and "a.png: has no caption; give all" in message and message.count("\n") == 1


# -------------------------------------------------------------------- learning, with a real model


@pytest.mark.slow
def test_the_embedded_model_learns_a_new_pair_of_words(tmp_path):
    """A torus in a color it does not know, under words it does not know; and it keeps its own."""
    from benchmarks import finetune as cases

    cases.write_pictures(tmp_path)
    out = tmp_path / "donut.safetensors"
    words = ["--pictures", str(tmp_path / "donut"), "--prompt", "a magenta donut"]
    words += [*cases.LORA, "--steps", "100", "--out", str(out)]
    assert cases.magenta(cases.drawn(None, "a magenta donut")) < 0.2
    assert finetune.main(words) == 0
    assert cases.magenta(cases.drawn(out, "a magenta donut")) > 0.9
    red = cases.drawn(out, "a red cone")[:, :, 12:24, 12:20].mean((2, 3))
    assert (red[:, 0] > 2 * red[:, 1:].amax(1)).float().mean() > 0.7
