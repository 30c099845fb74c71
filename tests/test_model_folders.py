"""guidance.model_kinds and model_files: every kind of model folder is opened, or named.

No weights can be read in the folders that are refused: their kind comes from the configs alone.
"""

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import CPU
from safetensors.torch import load_file, save_file
from tiny_models import SIDE, draw

from guidance.stable_diffusion import StableDiffusion

UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def model(sd_folder):
    return StableDiffusion(sd_folder, CPU)


@pytest.fixture
def copy(sd_folder, tmp_path):
    return shutil.copytree(sd_folder, tmp_path / "model")


def edit(file, **changes):
    file.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | changes))


def edit_unet(**changes):
    return lambda folder: edit(folder / "unet" / "config.json", **changes)


def pipeline_of(name):
    return lambda folder: edit(folder / "model_index.json", _class_name=name)


def replace_unet_by(name):
    def change(folder):
        shutil.rmtree(folder / "unet")
        edit(folder / "transformer" / "config.json", _class_name=name)

    return change


def part(name, **config):
    return lambda folder: edit(folder / name / "config.json", **config)


def without(name):
    return lambda folder: shutil.rmtree(folder / name)


SDXL = [edit_unet(addition_embed_type="text_time", cross_attention_dim=2048)]
PROJECTION = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}
KINDS = {
    "sdxl": ([*SDXL, part("text_encoder_2")], "Stable Diffusion XL: .*a second text encoder"),
    "sdxl refiner": ([*SDXL, part("text_encoder_2"), without("text_encoder")], "XL, a refiner"),
    "sd3": ([replace_unet_by("SD3Transformer2DModel")], "Stable Diffusion 3: a transformer"),
    "flux": ([replace_unet_by("FluxTransformer2DModel")], "FLUX: a transformer .* the U-Net"),
    "flux without vae": (
        [replace_unet_by("FluxTransformer2DModel"), without("vae"), without("scheduler")],
        "FLUX: a transformer",
    ),
    "other transformer": (
        [replace_unet_by("SanaTransformer2DModel"), pipeline_of("SanaPipeline")],
        r"Sana: a transformer \(SanaTransformer2DModel\)",
    ),
    "unclip": (
        [edit_unet(**PROJECTION), part("image_noising_scheduler")],
        "an unCLIP model: .*picture",
    ),
    "unclip by name": (
        [edit_unet(**PROJECTION), pipeline_of("StableUnCLIPImg2ImgPipeline")],
        "an unCLIP model",
    ),
    "karlo": ([without("unet"), part("prior"), part("decoder")], "unCLIP: .*another network"),
    "kandinsky": (
        [edit_unet(addition_embed_type="text_image"), part("movq"), without("vae")],
        "embedding of a picture",
    ),
    "if": ([edit_unet(addition_embed_type="text"), without("vae")], "DeepFloyd IF: .*pixels"),
    "inpainting": ([edit_unet(in_channels=9)], "9 input .*: an inpainting model.* mask"),
    "edit": ([edit_unet(in_channels=8)], "8 input .*: an editing model such as InstructPix2Pix"),
    "depth": ([edit_unet(in_channels=5)], "5 input .*: a depth model"),
    "upscaler": ([edit_unet(in_channels=7, num_class_embeds=1000)], "7 input .*: an upscaling"),
    "flux vae": ([part("vae", latent_channels=16)], "the VAE has 16: not a plain text-to-image"),
    "lcm": ([edit_unet(time_cond_proj_dim=256)], r"a latent consistency model \(LCM"),
    "video": ([edit_unet(_class_name="UNet3DConditionModel")], "its unet is a UNet3DCond"),
    "quantized": (
        [edit_unet(quantization_config={"quant_method": "bitsandbytes"})],
        r"its unet is quantized \(bitsandbytes\)",
    ),
    "other text encoder": (
        [part("text_encoder", architectures=["T5EncoderModel"])],
        "its text_encoder is a T5EncoderModel; expected CLIPTextModel",
    ),
    "other width": ([edit_unet(cross_attention_dim=24)], "16 channels, the U-Net expects 24"),
    "classes": ([edit_unet(class_embed_type="timestep")], "more than a text .class_embed_type"),
}  # fmt: skip


def refusal(path, **options):
    with pytest.raises(ValueError) as caught:
        StableDiffusion(str(path), CPU, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("weights", ["unreadable", "missing"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_other_kind_is_named_before_weights_are_read(copy, kind, weights):
    changes, message = KINDS[kind]
    for file in copy.rglob("*.safetensors"):
        file.write_bytes(b"")
        if weights == "missing":
            file.unlink()
    for change in changes:
        change(copy)
    found = refusal(copy)
    assert found.startswith(f"--sd_model {copy}: ") and re.search(message, found), found


def test_the_kind_of_a_hub_model_comes_before_its_weights(copy, monkeypatch, tmp_path):
    edit(copy / "unet" / "config.json", addition_embed_type="text_time")
    asked = []

    def snapshot_download(name, *, allow_patterns, local_files_only):
        asked.extend(allow_patterns)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "Stable Diffusion XL" in refusal("somebody/some-model")
    assert asked and not [name for name in asked if "safetensors" in name or "bin" in name]


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_lora_weights.safetensors"], "a LoRA, not a model; .*--lora_file"),
        (["v1-5-pruned.ckpt"], r"single-file checkpoint \(v1-5-pruned.ckpt\).*from_single_file"),
        (["config.json", "diffusion_pytorch_model.safetensors"], "a ControlNetModel alone"),
        (["README.md"], "not a model folder; expected the folders tokenizer"),
    ],
)
def test_a_folder_without_parts_is_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text(json.dumps({"_class_name": "ControlNetModel"}))
    assert re.search(message, refusal(tmp_path))


def test_weights_of_another_library_are_named(copy):
    (copy / f"{UNET}.safetensors").rename(copy / "unet" / "model.onnx")
    assert re.search(f"missing {UNET}.safetensors .*only weights for ONNX", refusal(copy))


# ------------------------------------------------------------------------------ what can be opened


def outputs(model):
    noisy, t = draw(1, 4, SIDE, SIDE), torch.tensor([500])
    return model.predict(noisy, t, model.embed(["a red cube"])), model.encode(
        draw(1, 3, 8 * SIDE, 8 * SIDE).sigmoid(), None
    )


def shard(folder, part, stem, variant=None):
    """Split a part's weights in two files with an index, as diffusers and transformers save it."""
    file = folder / part / f"{stem}.safetensors"
    weights, dot = load_file(file), f".{variant}" if variant else ""
    names = sorted(weights)
    shards = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        name = f"{stem}{dot}-{number:05d}-of-00002.safetensors"
        save_file({n: weights[n] for n in some}, file.with_name(name), {"format": "pt"})
        shards |= dict.fromkeys(some, name)
    index = {"metadata": {"total_size": file.stat().st_size}, "weight_map": shards}
    file.with_name(f"{stem}.safetensors.index{dot}.json").write_text(json.dumps(index))
    file.unlink()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_open(copy, model, variant):
    shard(copy, "unet", "diffusion_pytorch_model", variant)
    shard(copy, "vae", "diffusion_pytorch_model", variant)
    shard(copy, "text_encoder", "model", variant)
    opened = StableDiffusion(copy, CPU)
    for mine, whole in zip(outputs(opened), outputs(model), strict=True):
        torch.testing.assert_close(mine, whole)
    dot = f".{variant}" if variant else ""
    second = copy / f"{UNET}{dot}-00002-of-00002.safetensors"
    weights = {name: value * 1.01 for name, value in load_file(second).items()}
    save_file(weights, second, {"format": "pt"})
    assert StableDiffusion(copy, CPU).fingerprint != opened.fingerprint


def test_shards_as_diffusers_saves_them_open(copy, model):
    unet = UNet2DConditionModel.from_pretrained(copy, subfolder="unet")
    (copy / f"{UNET}.safetensors").unlink()
    unet.save_pretrained(copy / "unet", max_shard_size="100KB")
    assert len(list((copy / "unet").glob("*-of-*.safetensors"))) > 1
    torch.testing.assert_close(outputs(StableDiffusion(copy, CPU))[0], outputs(model)[0])


def test_a_missing_shard_is_named(copy):
    shard(copy, "unet", "diffusion_pytorch_model")
    (copy / f"{UNET}-00002-of-00002.safetensors").unlink()
    assert f"missing {UNET}-00002-of-00002.safetensors, a shard in" in refusal(copy)


def test_an_index_that_leads_out_of_the_folder_is_refused(copy):
    shard(copy, "unet", "diffusion_pytorch_model")
    index = copy / f"{UNET}.safetensors.index.json"
    edit(index, weight_map={"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"})
    assert "names files outside its folder" in refusal(copy)


def test_non_ema_weights_open_where_there_are_no_others(copy, model):
    other = copy / f"{UNET}.non_ema.safetensors"
    weights = load_file(copy / f"{UNET}.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, other, {"format": "pt"})
    messages = []
    both = StableDiffusion(copy, CPU, warn=messages.append)
    torch.testing.assert_close(outputs(both)[0], outputs(model)[0])
    assert not messages
    (copy / f"{UNET}.safetensors").rename(other)
    alone = StableDiffusion(copy, CPU, warn=messages.append)
    torch.testing.assert_close(outputs(alone)[0], outputs(model)[0])
    assert len(messages) == 1 and "unet has only non_ema weights" in messages[0]


def test_shards_of_a_hub_model_are_downloaded(copy, model, monkeypatch, tmp_path):
    import fnmatch

    shard(copy, "unet", "diffusion_pytorch_model", "fp16")
    cache = tmp_path / "cache"

    def snapshot_download(name, *, allow_patterns, local_files_only):
        for file in copy.rglob("*"):
            place = file.relative_to(copy).as_posix()
            if any(fnmatch.fnmatch(place, pattern) for pattern in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, cache / place)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    opened = StableDiffusion("somebody/some-model", CPU)
    torch.testing.assert_close(outputs(opened)[0], outputs(model)[0])


# ------------------------------------------------------- sizes that nothing sane has, and code


def nested(depth):
    return lambda folder: (folder / "unet" / "config.json").write_text(
        '{"a": ' + "[" * depth + "]" * depth + "}"
    )


HOSTILE = {
    "endless layers": (
        part("text_encoder", num_hidden_layers=10**9),
        "num_hidden_layers 1000000000",
    ),
    "no layers": (part("text_encoder", num_hidden_layers=0), "num_hidden_layers 0"),
    "layers in words": (part("text_encoder", num_hidden_layers="many"), "num_hidden_layers many"),
    "a wide level": (edit_unet(block_out_channels=[32, 10**7]), "block_out_channels 10000000"),
    "many levels": (edit_unet(block_out_channels=[8] * 500), "has 500 entries"),
    "a deep block": (edit_unet(layers_per_block=10**6), "layers_per_block 1000000"),
    "a huge picture": (edit_unet(sample_size=10**6), "sample_size 1000000"),
    "a vocabulary": (part("text_encoder", vocab_size=10**10), "vocab_size 10000000000"),
    "true": (part("vae", layers_per_block=True), "layers_per_block True"),
    "timesteps": (
        lambda folder: edit(folder / "scheduler/scheduler_config.json", num_train_timesteps=10**9),
        "num_train_timesteps 1000000000",
    ),
    "code": (part("text_encoder", auto_map={"AutoModel": "evil--x.Y"}), "auto_map names code"),
    "kernels": (part("text_encoder", use_kernels=True), "use_kernels names code"),
    "a kernel": (
        part("text_encoder", _attn_implementation="kernels-community/flash-attn"),
        "_attn_implementation 'kernels-community/flash-attn' would fetch code",
    ),
    "inside": (
        part("text_encoder", text_config={"attn_implementation": "a/b", "hidden_size": 32}),
        "attn_implementation 'a/b' would fetch code",
    ),
    "the tokenizer": (
        lambda folder: edit(folder / "tokenizer/tokenizer_config.json", auto_map={"a": "b"}),
        "tokenizer_config.json: auto_map names code",
    ),
    "no room for tokens": (
        lambda folder: edit(folder / "tokenizer/tokenizer_config.json", model_max_length=0),
        "model_max_length 0; expected more than 2",
    ),
    "negative room": (
        lambda folder: edit(folder / "tokenizer/tokenizer_config.json", model_max_length=-1),
        "model_max_length -1; expected more than 2",
    ),
    "nested JSON": (nested(100_000), "cannot read it as JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_folder_that_asks_for_the_absurd_is_one_line_and_builds_nothing(copy, case):
    change, problem = HOSTILE[case]
    change(copy)
    with pytest.raises(ValueError) as caught:
        StableDiffusion(copy, CPU)
    message = str(caught.value)
    assert problem in message and "\n" not in message and len(message) < 600


def test_texts_of_any_length_are_embedded_in_bounded_work(sd_folder):
    said = []
    model = StableDiffusion(sd_folder, CPU, warn=said.append)
    calls = []
    tokenizer = model.tokenizer

    class Counted:
        def __call__(self, text, **options):
            calls.append(len(text))
            return tokenizer(text, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    model.tokenizer = Counted()
    long = "cone " * 300_000
    assert torch.equal(model.embed([long]), model.embed(["cone " * 200]))
    assert torch.equal(model.embed(["x" * 10**6]), model.embed(["x" * 10**5]))
    assert max(calls) < 10_000 and len(calls) < 60  # not one call for each of the words
    assert said and max(map(len, said)) < 2000
