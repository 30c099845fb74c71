"""guidance/lora and guidance/vsd: adapters that start at zero, a frozen U-Net, training."""

import csv
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import CPU, run_main
from safetensors.torch import load_file, save_file
from tiny_models import SIDE, draw

import run_dreamfusion
from guidance import sample, sds, stable_diffusion
from guidance.lora import LoRA, attention_layers, load_lora, lora_and_scale, save_lora
from guidance.stable_diffusion import StableDiffusion
from guidance.vsd import LoRAScoreNetwork, flat_cameras, unet_class_embedding
from nerf.training.distributed import World

WORLD = World(0, 1, CPU)


@pytest.fixture
def model(sd_folder):
    return StableDiffusion(sd_folder, CPU)


def make_lora_score(model, **changes):
    settings = {"rank": 4, "lrate": 1e-2, "camera_dropout": 0.1} | changes
    torch.manual_seed(0)
    return LoRAScoreNetwork(model, model.embed(["a red cube"]), **settings)


def noisy(count: int = 2):
    return draw(count, 4, SIDE, SIDE), torch.tensor([7, 500][:count])


def cameras(count: int = 2):
    return draw(count, 3, 4, seed=3)


def train(network, steps: int = 3):
    latents = draw(2, 4, SIDE, SIDE, seed=5)
    for step in range(steps):
        noise = sds.draw_noise(2, (4, SIDE, SIDE), torch.Generator().manual_seed(step))
        network.train_step(latents, cameras(), noise, WORLD)


def test_a_new_adapter_changes_nothing_bit_for_bit(model):
    x, t = noisy()
    text = model.embed(["a red cube"] * 2)
    before = model.predict(x, t, text)
    lora = LoRA(model.unet, 4)
    with lora.switched():
        assert torch.equal(model.predict(x, t, text), before)
    with torch.no_grad():
        for adapter in lora.adapters:
            adapter.b.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.predict(x, t, text), before)  # off outside the block
    with lora.switched():
        changed = model.predict(x, t, text)
    with lora.switched(0.5):
        halfway = model.predict(x, t, text)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert not torch.equal(halfway, changed) and not torch.equal(halfway, before)
    lora.remove()
    with lora.switched():
        assert torch.equal(model.predict(x, t, text), before)


def test_an_adapter_adds_b_a_x(model):
    """Against the merged weight W + s B A, layer by layer."""
    lora = LoRA(model.unet, 3)
    name, layer = next(iter(attention_layers(model.unet).items()))
    adapter = lora.adapters[lora.names.index(name)]
    with torch.no_grad():
        adapter.b.normal_(generator=torch.Generator().manual_seed(1))
    x = draw(5, layer.in_features)
    with lora.switched(0.7), torch.no_grad():
        found = layer(x)
    merged = layer.weight + 0.7 * adapter.b @ adapter.a
    wanted = torch.nn.functional.linear(x, merged, layer.bias)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_every_attention_layer_is_adapted_and_sizes_come_from_the_layers(model):
    lora = LoRA(model.unet, 2)
    count = len([n for n in model.unet.attn_processors])
    assert len(lora.adapters) == 4 * count
    for name, adapter in zip(lora.names, lora.adapters, strict=True):
        layer = model.unet.get_submodule(name)
        assert adapter.a.shape == (2, layer.in_features)
        assert adapter.b.shape == (layer.out_features, 2)


def test_rank_0_is_refused(model):
    with pytest.raises(ValueError, match="--lora_rank 0"):
        LoRA(model.unet, 0)


def test_switching_survives_an_exception(model):
    lora = LoRA(model.unet, 2)
    with pytest.raises(RuntimeError), lora.switched():
        raise RuntimeError
    assert lora.lora_scale == 0.0


def test_the_training_mode_sets_requires_grad(model):
    lora = LoRA(model.unet, 2)
    assert all(p.requires_grad for p in lora.parameters())
    lora.eval()
    assert not any(p.requires_grad for p in lora.parameters())
    lora.train()
    assert all(p.requires_grad for p in lora.parameters())
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_the_class_embedding_is_restored_after_an_exception(model):
    own, other = torch.nn.Identity(), torch.nn.Identity()
    model.unet.class_embedding = own
    with pytest.raises(RuntimeError), unet_class_embedding(model.unet, other):
        assert model.unet.class_embedding is other
        raise RuntimeError
    assert model.unet.class_embedding is own
    with unet_class_embedding(model.unet, None) as unet:
        assert unet is model.unet and unet.class_embedding is None
    assert model.unet.class_embedding is own


# ------------------------------------------------------------------------- the LoRA score network


def test_the_lora_score_network_starts_as_the_model_and_does_not_change_it(model):
    x, t = noisy()
    plain = model.predict(x, t, model.embed(["a red cube"] * 2))
    weights = {name: value.clone() for name, value in model.unet.state_dict().items()}
    network = make_lora_score(model)
    assert torch.equal(network.epsilon(x, t, cameras()), plain)  # epsilon model: the output itself
    train(network)
    assert not torch.allclose(network.epsilon(x, t, cameras()), plain, atol=1e-4)
    assert torch.equal(model.predict(x, t, model.embed(["a red cube"] * 2)), plain)
    for name, value in model.unet.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(p.grad is None for p in model.unet.parameters())
    assert network.steps == 3


def test_the_prediction_depends_on_the_camera_after_training(model):
    x, t = noisy()
    network = make_lora_score(model, camera_dropout=0.0)
    assert torch.equal(network.epsilon(x, t, cameras()), network.epsilon(x, t, -cameras()))
    train(network)
    assert not torch.equal(network.epsilon(x, t, cameras()), network.epsilon(x, t, -cameras()))


def test_training_uses_the_first_views_alone(model):
    noise = sds.draw_noise(2, (4, SIDE, SIDE), torch.Generator().manual_seed(0))
    latents, trained = draw(2, 4, SIDE, SIDE), []
    for views, second in ((1, 0.0), (1, 9.0), (0, 0.0), (0, 9.0)):
        network = make_lora_score(model, views=views)
        changed = latents.clone()
        changed[1] += second
        network.train_step(changed, cameras(), noise, WORLD)
        trained.append([p.clone() for p in network.parameters()])
    assert all(map(torch.equal, trained[0], trained[1]))  # the second view is not used
    assert not all(map(torch.equal, trained[2], trained[3]))


def test_dropped_cameras_are_zeros(model):
    """With every camera dropped, training does not depend on the cameras."""
    both = []
    for sign in (1.0, -1.0):
        network = make_lora_score(model, camera_dropout=1.0)
        noise = sds.draw_noise(2, (4, SIDE, SIDE), torch.Generator().manual_seed(0))
        network.train_step(draw(2, 4, SIDE, SIDE), sign * cameras(), noise, WORLD)
        both.append([p.clone() for p in network.parameters()])
    assert all(map(torch.equal, *both))


@pytest.mark.parametrize("folder", ["sd_folder", "sd2_folder"])
def test_training_denoises_the_renders(folder, request):
    """The loss on fixed latents falls, for epsilon prediction and for v-prediction."""
    model = StableDiffusion(request.getfixturevalue(folder), CPU)
    network = make_lora_score(model, camera_dropout=0.0)
    latents, losses = draw(2, 4, SIDE, SIDE, seed=5), []
    noise = sds.draw_noise(2, (4, SIDE, SIDE), torch.Generator().manual_seed(0))
    for _ in range(30):
        losses.append(network.train_step(latents, cameras(), noise, WORLD))
    assert losses[-1] < 0.9 * losses[0]


def test_vsd_starts_as_csd(model):
    """Before training, eps_guided - eps_phi is (s - 1)(c - u) for one prompt."""
    network, images = make_lora_score(model), draw(2, 3, 8 * SIDE, 8 * SIDE).sigmoid()
    text, none = model.embed(["a red cube"] * 2), model.embed([""] * 2)
    noise = sds.draw_noise(2, (4, SIDE, SIDE), torch.Generator().manual_seed(0))
    found = {}
    for kind, scale in (("vsd", 7.5), ("csd", 6.5)):
        recipe = sds.Recipe(kind=kind, scale=scale)
        conditions = sds.Conditions(none, text)
        found[kind] = sds.distill(
            model, images, conditions, noise, recipe, network.epsilon_at(cameras())
        )
    torch.testing.assert_close(found["vsd"].gradient, found["csd"].gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("folder", ["sd_folder", "sd2_folder"])
def test_the_prediction_is_guided_away_from_the_one_without_a_camera(folder, request):
    """u + s (c - u) of epsilons, each predicted alone; s = 1 is the prediction itself, bit for bit.

    For epsilon prediction and for v-prediction.
    """
    model = StableDiffusion(request.getfixturevalue(folder), CPU)
    (x, t), c2w = noisy(), cameras()
    plain, guided = make_lora_score(model), make_lora_score(model, cfg=2.5)
    train(plain)
    guided.load_state_dict(plain.state_dict())
    with torch.no_grad():
        conditional, unconditional = (
            sds.to_epsilon(
                plain._output(x, t, camera), x, model.alphas_cumprod[t], model.prediction_type
            )
            for camera in (flat_cameras(c2w), torch.zeros(2, 16))
        )
    assert torch.equal(plain.epsilon(x, t, c2w), conditional)
    assert not torch.allclose(conditional, unconditional, atol=1e-5)
    wanted = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guided.epsilon(x, t, c2w), wanted, atol=1e-5, rtol=1e-4)


def test_the_script_guides_the_lora_score_network(sd_folder, tiny_dream, tmp_path):
    """By --lora_cfg; of a step's gradient it changes nothing before the network was trained."""
    flags = [*tiny_dream, "--guidance", "vsd", "--sd_model", sd_folder, "--prompt", "a red cube"]
    flags += ["--space", "2d", "--lrate_lora", "0.1", "--N_iters", "2", "--i_print", "1"]
    loss = {}
    for cfg in ("none", "1", "3"):
        more = [] if cfg == "none" else ["--lora_cfg", cfg]
        done = run_main(run_dreamfusion.main, *flags, "--expname", cfg, *more)
        assert done.returncode == 0, done.stderr
        table = csv.DictReader((tmp_path / cfg / "metrics.csv").open())
        loss[cfg] = [float(row["sds"]) for row in table]
    assert loss["none"] == loss["1"]
    assert max(loss["1"][0], loss["3"][0]) < 1e-9 < abs(loss["1"][1] - loss["3"][1])
    done = run_main(run_dreamfusion.main, *flags, "--lora_cfg", "3", "--camera_dropout", "0")
    assert done.returncode == 2 and "--camera_dropout above 0" in done.stderr


def test_the_base_may_be_another_model(model, sd2_folder):
    other = StableDiffusion(sd2_folder, CPU)
    network = make_lora_score(other)
    x, t = noisy()
    wanted = sds.to_epsilon(
        other.predict(x, t, other.embed(["a red cube"] * 2)), x, other.alphas_cumprod[t],
        "v_prediction",
    )  # fmt: skip
    torch.testing.assert_close(network.epsilon(x, t, cameras()), wanted)


def test_adapters_are_float32_on_a_half_precision_base(sd_folder, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "_cpu_has_bfloat16", lambda: True)
    model = StableDiffusion(sd_folder, CPU, dtype="bf16")
    network = make_lora_score(model, lrate=1e-4)
    before = [p.clone() for p in network.parameters()]
    train(network, 1)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


def test_resumed_training_is_bit_exact(model):
    whole = make_lora_score(model)
    train(whole, 2)
    state = whole.state()
    state = {"weights": {k: v.clone() for k, v in state["weights"].items()}} | {
        name: torch.load(_through_a_file(state[name])) for name in ("optimizer", "scaler")
    }
    train(whole, 2)
    resumed = make_lora_score(model)
    resumed.restore(state, "file")
    train(resumed, 2)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert resumed.steps == 4
    with pytest.raises(ValueError, match="file: its LoRA score network"):
        make_lora_score(model, rank=2).restore(state, "file")
    with pytest.raises(ValueError, match="keep --guidance"):
        make_lora_score(model).restore(None, "file")


def _through_a_file(value):
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_gradients_that_are_not_finite_are_skipped(model):
    network = make_lora_score(model)
    noise = sds.draw_noise(2, (4, SIDE, SIDE), torch.Generator().manual_seed(0))
    before = [p.clone() for p in network.parameters()]
    network.train_step(torch.full((2, 4, SIDE, SIDE), float("inf")), cameras(), noise, WORLD)
    assert all(map(torch.equal, network.parameters(), before)) and network.steps == 0


def test_flat_cameras_are_rows_of_a_4_by_4_matrix():
    c2w = draw(1, 3, 4)
    whole = flat_cameras(c2w).view(4, 4)
    assert torch.equal(whole[:3], c2w[0]) and whole[3].tolist() == [0, 0, 0, 1]


# ------------------------------------------------------------------------------------------- files


@contextmanager
def no_change(lora):
    before = [p.clone() for p in lora.parameters()]
    yield
    assert all(map(torch.equal, lora.parameters(), before))


def test_save_and_load_the_adapters(model, tmp_path):
    network, path = make_lora_score(model), tmp_path / "lora.safetensors"
    train(network, 1)
    save_lora(path, network.lora)
    kept = load_file(path)
    assert kept.keys() == network.lora.tensors().keys()
    assert all(name.startswith("unet.") for name in kept)
    other = make_lora_score(model)
    load_lora(path, other.lora)
    assert all(map(torch.equal, other.lora.parameters(), network.lora.parameters()))


def test_files_that_do_not_fit_are_refused_and_change_nothing(model, tmp_path):
    path, lora = tmp_path / "lora.safetensors", LoRA(model.unet, 4)
    save_lora(path, LoRA(model.unet, 2))
    with no_change(lora):
        with pytest.raises(ValueError, match="expected .*--lora_rank"):
            load_lora(path, lora)
        save_file({"unet.other.lora_A.weight": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="a LoRA of another model"):
            load_lora(path, lora)
        path.write_bytes(b"no safetensors")
        with pytest.raises(ValueError, match="cannot read it as safetensors"):
            load_lora(path, lora)
        with pytest.raises(ValueError, match="cannot read it"):
            load_lora(tmp_path / "missing", lora)


def test_peft_reads_the_file(model, tmp_path):
    pytest.importorskip("peft")
    network, path = make_lora_score(model, camera_dropout=0.0), tmp_path / "lora.safetensors"
    train(network)
    save_lora(path, network.lora)
    x, t = noisy()
    text = model.embed(["a red cube"] * 2)
    with network.lora.switched():
        wanted = model.predict(x, t, text)
    network.lora.remove()
    tensors = {name.removeprefix("unet."): value for name, value in load_file(path).items()}
    model.unet.load_lora_adapter(tensors, prefix=None)
    torch.testing.assert_close(model.predict(x, t, text), wanted, atol=1e-5, rtol=1e-4)


def normal_adapters(lora):
    """Give every adapter a B, so that it changes something."""
    with torch.no_grad():
        for number, adapter in enumerate(lora.adapters):
            adapter.b.copy_(draw(*adapter.b.shape, seed=number))


def peft_spelling(name):
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def diffusers_spelling(name):
    return f"{name}.lora.down.weight", f"{name}.lora.up.weight"


def processor_spelling(name):
    block, _, layer = name.removesuffix(".0").rpartition(".")
    return tuple(f"{block}.processor.{layer}_lora.{way}.weight" for way in ("down", "up"))


def kohya_spelling(name):
    name = "lora_unet_" + name.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def with_unet(spelling):
    return lambda name: tuple(f"unet.{each}" for each in spelling(name))


SPELLINGS = {
    "peft": peft_spelling, "peft unet": with_unet(peft_spelling),
    "diffusers": diffusers_spelling, "diffusers unet": with_unet(diffusers_spelling),
    "processor": processor_spelling, "processor unet": with_unet(processor_spelling),
    "kohya": kohya_spelling,
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(model, tmp_path, spelling, alpha):
    path, source, lora = tmp_path / "other.safetensors", LoRA(model.unet, 4), LoRA(model.unet, 4)
    normal_adapters(source)
    tensors = {}
    for name, adapter in zip(source.names, source.adapters, strict=True):
        down, up = SPELLINGS[spelling](name)
        tensors |= {down: adapter.a.detach().half(), up: adapter.b.detach().half()}
        if alpha is not None:
            place = down.split(".lora")[0] if "_lora." not in down else down.split("_lora.")[0]
            tensors[f"{place}.alpha"] = torch.tensor(alpha)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    load_lora(path, lora)
    scale = 1.0 if alpha is None else alpha / 4
    for mine, other in zip(lora.adapters, source.adapters, strict=True):
        assert torch.equal(mine.a, other.a.half().float())
        assert torch.equal(mine.b, scale * other.b.half().float())


def test_the_file_of_diffusers_own_pipeline_is_read(model, tmp_path):
    """As its training scripts write it, with an alpha that is not the rank."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    model.unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, target_modules=layers)
    )
    x, t = noisy()
    text = model.embed(["a red cube"] * 2)
    wanted = model.predict(x, t, text)
    tensors = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model.unet))
    config = model.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=tensors, unet_lora_adapter_metadata=config
    )
    model.unet.unload_lora()
    lora = LoRA(model.unet, 4)
    load_lora(tmp_path / "pytorch_lora_weights.safetensors", lora)
    with lora.switched():
        torch.testing.assert_close(model.predict(x, t, text), wanted, atol=1e-5, rtol=1e-4)


def test_layers_that_the_file_lacks_change_nothing(model, tmp_path):
    path, lora = tmp_path / "some.safetensors", LoRA(model.unet, 4)
    normal_adapters(lora)
    names = [name for name in lora.names if "attn2.to_v" in name]
    whole = lora.tensors()
    kept = {f"unet.{name}.lora_{each}.weight" for name in names for each in "AB"}
    save_file({name: whole[name].detach().clone() for name in kept}, path)
    load_lora(path, lora)
    for name, adapter in zip(lora.names, lora.adapters, strict=True):
        assert (adapter.b.abs().max() > 0) == (name in names)


OTHER_FILES = {
    "text encoder": (
        ["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
        "also changes the text encoder",
    ),
    "feed-forward": (
        ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2.lora_up.weight"],
        "also changes layers outside attention .1, such as lora_unet_down.*_ff_net_2",
    ),
    "sdxl": (["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "Diffusion XL"),
    "sdxl blocks": (
        ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight"],
        "Diffusion XL .kohya's",
    ),
    "flux": (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "such as FLUX"),
    "flux kohya": (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "such as FLUX"),
    "loha": (["lora_unet_mid_block_proj_in.hada_w1_a"], "a LyCORIS file, not a LoRA"),
    "dora": (["unet.mid_block.attn.to_q.lora_magnitude_vector"], "a DoRA"),
    "word": (["emb_params"], "a textual inversion"),
    "checkpoint": (["model.diffusion_model.input_blocks.0.0.weight"], "a whole model, not a LoRA"),
    "other": (["unet.other.lora_A.weight"], "a LoRA of another model .1 of its layers"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_files_are_named_and_change_nothing(model, tmp_path, case):
    names, message = OTHER_FILES[case]
    path, lora = tmp_path / "other.safetensors", LoRA(model.unet, 4)
    tensors = {name: value.detach().clone() for name, value in lora.tensors().items()}
    save_file(tensors | {name: torch.zeros(4, 4) for name in names}, path)
    with no_change(lora), pytest.raises(ValueError, match=message) as caught:
        load_lora(path, lora)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_of_wider_layers_is_of_another_model(model, tmp_path):
    path, lora = tmp_path / "other.safetensors", LoRA(model.unet, 4)
    tensors = {name: torch.zeros(4, 4) for name in lora.tensors()}
    save_file(tensors, path)
    with no_change(lora), pytest.raises(ValueError, match="of another model: .*expected"):
        load_lora(path, lora)


def test_the_rank_to_use_is_named(model, tmp_path):
    path = tmp_path / "other.safetensors"
    save_lora(path, LoRA(model.unet, 2))
    with pytest.raises(ValueError, match="has rank 2, expected 4; use --lora_rank 2"):
        load_lora(path, LoRA(model.unet, 4))
    one = next(iter(attention_layers(model.unet)))
    extra = {n: v.detach().clone() for n, v in LoRA(model.unet, 4).tensors().items() if one in n}
    save_file(load_file(path) | extra, path)
    with pytest.raises(ValueError, match=r"its layers have ranks \[2, 4\]"):
        load_lora(path, LoRA(model.unet, 4))


def test_a_pickle_is_named(model, tmp_path):
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save({"unet.a.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="a .bin is a pickle"):
        load_lora(path, LoRA(model.unet, 4))


# ------------------------------------------------------------- a LoRA merged into the frozen model


def test_a_merged_file_predicts_as_its_adapters_do(model, sd_folder, tmp_path):
    lora = LoRA(model.unet, 3)
    normal_adapters(lora)
    save_lora(tmp_path / "own.safetensors", lora)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), model.embed(["a cone"] * 2)
    plain = model.predict(x, t, text)
    for scale in (0.5, 1.0):
        merged = StableDiffusion(sd_folder, CPU, lora=(tmp_path / "own.safetensors", scale))
        with lora.switched(scale):
            expected = model.predict(x, t, text)
        # Adapters as large as the weights: rounding is relative to the largest output.
        error = (merged.predict(x, t, text) - expected).abs().max()
        assert error < 1e-3 * expected.abs().max()
        assert not torch.allclose(expected, plain, atol=1e-4)
        assert merged.fingerprint.startswith(model.fingerprint + "+")
        assert merged.fingerprint.endswith(f"x{scale:g}")


def test_a_file_that_does_not_fit_is_not_merged(model, sd_folder, tmp_path):
    name = next(iter(attention_layers(model.unet)))
    tensors = {f"unet.{name}.lora_A.weight": torch.ones(2, 3),
               f"unet.{name}.lora_B.weight": torch.ones(3, 2)}  # fmt: skip
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="a LoRA of another model"):
        StableDiffusion(sd_folder, CPU, lora=(tmp_path / "other.safetensors", 1.0))


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [("a.safetensors", "a.safetensors", 1.0), ("a:0.8", "a", 0.8), ("c:/x/a", "c:/x/a", 1.0)],
)
def test_a_file_may_have_a_scale(text, file, scale):
    assert lora_and_scale(text) == (Path(file), scale)


def test_samples_show_what_a_lora_has_learned(model, sd_folder, tmp_path):
    lora = LoRA(model.unet, 2)
    normal_adapters(lora)
    save_lora(tmp_path / "own.safetensors", lora)
    words = ["--prompt", "a cone", "--sd_model", str(sd_folder), "--steps", "2", "--number", "1"]
    words += ["--device", "cpu", "--guidance_dtype", "fp32"]
    words += ["--lora", str(tmp_path / "own.safetensors")]
    found = {}
    for scale in ("0", "1"):
        sample.main([*words, "--lora_scale", scale, "--out", str(tmp_path / f"{scale}.png")])
        found[scale] = (tmp_path / f"{scale}.png").read_bytes()
    sample.main([*words[:-2], "--out", str(tmp_path / "plain.png")])
    assert found["0"] == (tmp_path / "plain.png").read_bytes() != found["1"]
