"""Stages of ``gpu.py`` on text to 3D: the embedded model's steps/s, a full-size guidance step."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import run_dreamfusion
from benchmarks.gpu_child import ROOT, Report
from benchmarks.gpu_measure import BlockTimer, alternate, spread, start_memory, train_blocks
from nerf.training.system import peak_memory_mb

STEPS, VIEWS = 600, 1


def text3d_flags(settings: dict[str, Any], name: str) -> list[str]:
    """configs/dream_tiny.txt, without pictures."""
    quick = "--train_res 16 --batch_views 1 --march_steps 24 --grid_res 16 --occ_res 16".split()
    return [
        *("--config", "configs/dream_tiny.txt", "--prompt", "a green cone", "--expname", name),
        *("--basedir", str(Path(settings["work"]) / "text3d"), "--device", settings["device"]),
        *("--i_img", "0", "--i_video", "0", "--i_weights", "0", "--ckpt_secs", "0"),
        # A little more than its 600: the run is stopped there, before it makes its outputs.
        *("--N_iters", "660"),
        *(quick if settings["quick"] else []),
    ]


def text3d(settings: dict[str, Any], report: Report) -> None:
    """Steps/s of configs/dream_tiny.txt, and the training seconds of its 600 steps."""
    device, quick = torch.device(settings["device"]), settings["quick"]
    warm_up, updates, steps = (4, 2, 14) if quick else (20, 100, STEPS)
    timer = BlockTimer(device, blocks=5, warm_up=warm_up, updates=updates)
    clock: dict[str, float] = {}

    def at_the_end(state: Any) -> bool:
        clock["seconds"], clock["steps"] = state.clock.seconds, state.step
        return state.step >= steps

    peak = train_blocks(
        run_dreamfusion.main, text3d_flags(settings, "speed"), timer, settings["log"], at_the_end
    )
    results = {"steps/s": spread([1 / time for time in timer.times])}
    results[f"s for {clock['steps']} steps"] = clock["seconds"]
    report.add("dream_tiny.txt", results, peak)


def guidance(settings: dict[str, Any], report: Report) -> None:
    """A guidance step, ours and by stable-dreamfusion's formula, in turn; the same weights."""
    from benchmarks import full_size  # needs diffusers and transformers, text3d's own import too
    from guidance import sds
    from guidance.stable_diffusion import StableDiffusion
    from nerf.training.graph import WARM_UP, FunctionGraphs, StepGraphs

    device, quick = torch.device(settings["device"]), settings["quick"]
    folder = Path(settings["work"]) / "full_size"
    if quick:
        folder = ROOT / "guidance" / "tiny" / "model"
    elif not folder.exists():
        full_size.write_model(folder)
    prior = StableDiffusion(str(folder), device, dtype="fp32" if quick else "fp16")
    plain_encode, plain_predict = prior.encode, prior.predict

    def peer_unet(noisy: Any, t: Any, embeddings: Any) -> Any:
        return prior.unet(noisy, t, encoder_hidden_states=embeddings).sample

    def peer_encode(images: Any) -> Any:
        return prior.vae.encode(images).latent_dist

    programs = {
        "ours": (full_size.ours, plain_encode, plain_predict),
        "ours, without CUDA graphs": (full_size.ours, plain_encode, plain_predict),
        "stable-dreamfusion's formula": (full_size.peer, peer_encode, peer_unet),
    }
    on_gpu, eager = device.type == "cuda", (prior.run_unet, prior.run_encoder)
    unet = StepGraphs(torch.nn.Module(), report.note, enabled=on_gpu)
    graphs = (unet.run, FunctionGraphs(report.note, enabled=on_gpu).run)  # as in training
    conditions = sds.Conditions(prior.embed([""]), prior.embed(["a dslr photo of a hamburger"]))
    size = 16 if quick else 64

    def one_step(name: str) -> Callable[[], None]:
        step, encode, predict = programs[name]
        generator = torch.Generator(device).manual_seed(0)

        def call() -> None:
            prior.run_unet, prior.run_encoder = graphs if name == "ours" else eager
            images = torch.rand(VIEWS, 3, size, size, generator=generator, device=device)
            step(prior, images.requires_grad_(), conditions, generator, encode, predict)

        return call

    sides = {name: one_step(name) for name in programs}
    peaks = {}
    for name, side in sides.items():
        start_memory(device)
        for _ in range(WARM_UP + 2):  # until graphs are recorded
            side()
        peaks[name] = peak_memory_mb(device)
    times = alternate(sides, device, blocks=7, seconds=0.05 if quick else 0.7)
    formula = statistics.median(times["stable-dreamfusion's formula"])
    ratio = statistics.median(times["ours"]) / formula
    what = "embedded model, fp32" if quick else "SD 1.5's sizes, fp16"
    for name, seconds in times.items():
        results = {"ms": spread([1e3 * time for time in seconds])}
        if name == "ours":
            results["x the formula's time"] = ratio
        report.add(f"{what}, {VIEWS} view from {size}x{size}, {name}", results, peaks[name])
