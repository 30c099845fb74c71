"""guidance/tiny: training a micro model, its folder in diffusers, and the committed model."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from helpers import REPOSITORY, run_script
from safetensors.torch import load_file

from guidance.tiny import build, pictures, train

MODEL = REPOSITORY / "guidance" / "tiny" / "model"
MICRO = ["--size", "16", "--pictures", "512", "--held_out", "32", "--batch", "4"]
MICRO += ["--vae_steps", "5", "--unet_steps", "6", "--device", "cpu", "--ema_decay", "0.9"]


def run(folder, *more):
    """The command line in a process of its own."""
    words = ["--work", folder / "work", "--out", folder / "model", *MICRO, *more]
    return run_script(words, script="guidance/tiny/train.py")


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A folder trained without interruption, and its printed output."""
    folder = tmp_path_factory.mktemp("micro")
    result = run(folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def weights_of(folder):
    files = sorted((folder / "model").rglob("*.safetensors"))
    assert len(files) == 3
    return {file.parent.name: load_file(file) for file in files}


def test_interrupted_training_ends_with_the_same_bits(micro, tmp_path):
    whole = weights_of(micro[0])
    command = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "model"), *MICRO]
    for _ in range(6):  # 5 + 6 updates, three at most at a time
        assert not (tmp_path / "model").exists()
        train.main([*command, "--stop_after", "3"])
        if (tmp_path / "model").exists():
            break
    for part, weights in weights_of(tmp_path).items():
        assert weights.keys() == whole[part].keys()
        for name, value in weights.items():
            assert torch.equal(value, whole[part][name]), f"{part} {name}"


def test_a_signal_is_no_success_and_a_kill_leaves_the_same_files(micro, tmp_path, monkeypatch):
    """SIGTERM saves the step; with only the writing left, the tokenizer's file is the same, too."""
    command = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "model"), *MICRO]
    loss, calls = train.vae_loss, []

    def signaled(*given):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*given)

    monkeypatch.setattr(train, "vae_loss", signaled)
    with pytest.raises(SystemExit) as end:
        train.main(command)
    assert end.value.code == 143
    assert torch.load(tmp_path / "work" / "vae.pt", weights_only=True)["step"] == 2
    train.main(command)
    shutil.rmtree(tmp_path / "model")  # as a kill leaves it that came after the last update
    (tmp_path / ".model.abcdefgh.unfinished").mkdir()
    train.main(command)
    files = {path.relative_to(micro[0]) for path in (micro[0] / "model").rglob("*.*")}
    assert len(files) > 8 and len(list(tmp_path.iterdir())) == 2
    for name in files:
        assert (tmp_path / name).read_bytes() == (micro[0] / name).read_bytes(), name
    # Started again: a kill while it writes leaves the files that are there whole.
    write = build.write_folder

    def killed(folder, *parts):
        write(folder, *parts)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(command)
    monkeypatch.setattr(build, "write_folder", write)
    assert all((tmp_path / name).read_bytes() != b"half" for name in files)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    train.main(command)
    for name in files:
        assert (tmp_path / name).read_bytes() == (micro[0] / name).read_bytes(), name


def test_the_folder_opens_with_the_sizes_asked_for(micro):
    pipeline = StableDiffusionPipeline.from_pretrained(micro[0] / "model", local_files_only=True)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    sizes = build.SIZES[16]
    assert tuple(pipeline.unet.config.block_out_channels) == sizes.unet
    assert tuple(pipeline.vae.config.block_out_channels) == sizes.vae
    assert pipeline.unet.config.sample_size == 8 and pipeline.vae_scale_factor == 2
    assert pipeline.text_encoder.config.hidden_size == sizes.text
    assert pipeline.tokenizer.model_max_length == build.MAX_TOKENS
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    codes = torch.load(micro[0] / "work" / "latents.pt", weights_only=True)["codes"].float()
    mean, log_variance = codes.chunk(2, dim=1)
    drawn = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    assert (drawn * pipeline.vae.config.scaling_factor).std() == pytest.approx(1, abs=0.02)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red cube", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 16) and image.isfinite().all()


def test_written_weights_are_the_averaged_ones(micro):
    state = torch.load(micro[0] / "work" / "vae.pt", weights_only=True)
    names = [name for name, _ in build.make_vae(build.SIZES[16], 16).named_parameters()]
    averaged = dict(zip(names, state["ema"]["shadow"], strict=True))
    written = weights_of(micro[0])["vae"]
    assert all(torch.equal(written[name], averaged[name].half()) for name in names)
    assert any(not torch.equal(written[n], state["module"][n].half()) for n in names)


def test_words_are_single_tokens_and_the_rest_is_spelled(tmp_path):
    words = pictures.vocabulary()["words"]
    tokenizer = build.make_tokenizer(words, tmp_path)
    for word in words:
        pieces = tokenizer.tokenize(word)
        assert len(pieces) == len(re.findall(r"[a-z]+|\d", word)), pieces
    text = "a zebra in a café, 日本"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert tokenizer("A RED Cube").input_ids == tokenizer("a red cube").input_ids
    padded = tokenizer("a red cube", padding="max_length", truncation=True).input_ids
    assert len(padded) == build.MAX_TOKENS


def test_every_caption_fits_the_text_encoder(tmp_path):
    tokenizer = build.make_tokenizer(pictures.vocabulary()["words"], tmp_path)
    longest = max(
        len(tokenizer(pictures.caption((shape, 1, second, 1, 9), (phrase, 0.0, 1.0))).input_ids)
        for shape in range(len(pictures.NAMES))
        for second in ((-1, 5) if pictures.SHAPES[pictures.NAMES[shape]].second else (-1,))
        for phrase in torch.linspace(0, 0.999, 64).tolist()
    )
    assert longest == 19 <= build.MAX_TOKENS


def test_learning_rate_is_flat_until_the_last_third():
    rates = [train.learning_rate(step, 2000, 1.0) for step in range(2000)]
    assert rates[0] == 1 / 200 and set(rates[200:1400]) == {1.0}
    assert all(a > b for a, b in zip(rates[1401:], rates[1402:], strict=False))
    assert rates[-1] == pytest.approx(0.02, abs=1e-4)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--pictures", "100"], "multiple of 512"),
        (["--held_out", "512"], "above --held_out 512"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--device", "abacus"], "--device abacus: expected"),
        (["--seed", "1"], "made with other settings (--seed 0 -> 1)"),
    ],
)
def test_bad_input_is_one_clear_line(micro, capsys, more, message):
    folder = micro[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        train.main(["--work", f"{folder}/work", "--out", f"{folder}/other", *MICRO, *more])
    assert not (folder / "other").exists()


def test_the_script_reports_a_mistake_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train.script(["--work", f"{tmp_path}/w", "--out", f"{tmp_path}/o", "--pictures", "100"])
    line = "guidance.tiny.train: --pictures 100: expected a multiple of 512 above --held_out 512"
    assert end.value.code == 2 and capsys.readouterr().err == f"{line}\n"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the committed model


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(
        MODEL, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_committed_words_are_those_of_the_pictures():
    known = json.loads((MODEL / "vocabulary.json").read_text(encoding="utf-8"))
    assert known == pictures.vocabulary()


def test_committed_weights_are_small_and_cannot_run_code():
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 30e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_committed_model_draws_the_color_asked_for(pipeline):
    """The middle of the picture is nearest to the color named, three times of three."""
    colors = ("red", "green", "blue")
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    images = pipeline(
        [f"a {color} sphere, front view" for color in colors],
        guidance_scale=5.0,
        num_inference_steps=12,
        generator=generators,
        output_type="pt",
    ).images
    middle = images[:, :, 12:20, 12:20].mean((2, 3))
    palette = torch.tensor(list(pictures.COLORS.values()))
    # Shading makes colors darker, not of another hue: compare directions.
    hue = torch.nn.functional.normalize(middle, dim=-1)
    nearest = (hue @ torch.nn.functional.normalize(palette, dim=-1).T).argmax(-1)
    assert [pictures.COLOR_NAMES[n] for n in nearest] == list(colors)


def test_committed_vae_keeps_pictures(pipeline):
    fresh, _ = pictures.draw_pictures(torch.Generator().manual_seed(99), 64, 32)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert train.vae_psnr(pipeline.vae, fresh, torch.device("cpu")) > 27
