"""What ``guidance.finetune`` teaches the embedded model, judged before and after.

    python benchmarks/finetune.py --work logs/finetune     # minutes on a CPU

Two things that the model does not know: a torus in a new color under two new words ("a magenta
donut"), with and without prior preservation, and a flat logo ("acme"). Samples are scored by
``benchmarks/judge.py``, colors and the logo by their distance. Prints a table, writes a picture.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import judge as judging
from guidance import finetune
from guidance.sample import sample, sheet
from guidance.stable_diffusion import StableDiffusion
from guidance.tiny import pictures
from guidance.tiny.shapes import DETAIL_RGB, SHAPES, orbit_cameras, view_shape
from nerf.media import write_png

SIZE, COUNT, SAMPLES = 32, 16, 32
MAGENTA = (0.9, 0.05, 0.55)
LORA = "--rank 8 --lrate 2e-3 --batch 8 --steps 300 --sample_every 0 --device cpu".split()
CASES = {  # name -> the pictures, further flags
    "donut": ("donut", ["--prompt", "a magenta donut"]),
    "donut, prior": ("donut", ["--prompt", "a magenta donut", "--class_prompt", "a torus"]),
    "logo": ("logo", ["--prompt", "the acme logo"]),
}


def donuts(count: int = COUNT, seed: int = 7) -> Tensor:
    """Renders [count, 3, SIZE, SIZE] in [0, 1] of the torus in MAGENTA, seen from above."""
    generator = torch.Generator().manual_seed(seed)
    _, camera = pictures.draw_facts(generator, count)
    colors = torch.tensor([MAGENTA, MAGENTA, DETAIL_RGB]).expand(count, 3, 3)
    background = pictures.draw_background(generator, colors)
    elevation = 30 + 40 * torch.rand(count, generator=generator)
    c2w = orbit_cameras(camera["azimuth_deg"], elevation, camera["radius"])
    light, ambient = pictures.draw_light(generator, c2w)
    view = view_shape(SHAPES["torus"], c2w, camera["fov_deg"], 2 * SIZE, camera["scale"])
    rgb = pictures.shade(view, colors, light, ambient, background)
    return F.avg_pool2d(rgb.permute(0, 3, 1, 2), 2)


def logo_disc() -> Tensor:
    """Where the logo is: [SIZE, SIZE], bool."""
    y, x = _grid()
    return (x**2 + y**2).sqrt() < 0.75


def logo(background: Tensor) -> Tensor:
    """The logo on backgrounds [N, 3]: an orange and a blue half, a white bar across."""
    y, x = _grid()
    left = torch.tensor([1.0, 0.55, 0.1]).view(3, 1, 1)
    right = torch.tensor([0.1, 0.25, 0.8]).view(3, 1, 1)
    disc = torch.where((x + y).abs() < 0.22, 1.0, torch.where(x + y < 0, left, right))
    return torch.where(logo_disc(), disc, background[:, :, None, None])


def _grid() -> tuple[Tensor, Tensor]:
    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    return line[:, None].expand(SIZE, SIZE), line.expand(SIZE, SIZE)


def write_pictures(folder: Path) -> None:
    """The training pictures, as PNG files in folder/donut and folder/logo."""
    backgrounds = torch.rand(COUNT, 3, generator=torch.Generator().manual_seed(8))
    for name, images in (("donut", donuts()), ("logo", logo(backgrounds))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            write_png(folder / name / f"{number:02d}.png", image.permute(1, 2, 0).numpy())


def drawn(lora: Path | None, prompt: str, seed: int = 100) -> Tensor:
    """SAMPLES pictures of the embedded model, of a seed that training does not use."""
    merged = None if lora is None else (lora, 1.0)
    model = StableDiffusion(finetune.TINY, torch.device("cpu"), lora=merged, warn=lambda text: None)
    return sample(model, [prompt] * SAMPLES, scale=5.0, steps=15, seed=seed)


def judged(judge: judging.Judge, images: Tensor, name: str, color: str | None = None) -> float:
    """Part of the pictures in which the judge sees this object, in this color if one is given."""
    with torch.no_grad():
        verdict = judge(images)
    right = verdict.objects.argmax(-1) == judging.OBJECTS.index(name)
    if color is not None:
        right &= verdict.colors.argmax(-1) == judging.COLORS.index(color)
    return right.float().mean().item()


def magenta(images: Tensor) -> float:
    """Part of the pictures with at least 4 % of their pixels in MAGENTA's hue, bright or shaded."""
    hue = F.normalize(torch.tensor(MAGENTA), dim=0).view(1, 3, 1, 1)
    near = (F.normalize(images, dim=1) * hue).sum(1) > 0.97
    lit = images.amax(1) > 0.25
    return ((near & lit).float().mean((1, 2)) > 0.04).float().mean().item()


def logo_psnr(images: Tensor) -> float:
    """PSNR of the pictures to the logo, inside its disc; the mean."""
    error = (images - logo(torch.zeros(1, 3))) ** 2
    return (-10 * error[:, :, logo_disc()].mean((1, 2)).log10()).mean().item()


def figures(judge: judging.Judge, case: str, lora: Path | None) -> tuple[str, Tensor]:
    """A row of the table, and 8 of the pictures."""
    if case == "logo":
        images = drawn(lora, "the acme logo")
        what = f"{logo_psnr(images):.1f} dB to the logo"
    else:
        images = drawn(lora, "a magenta donut")
        torus = judged(judge, images, "torus")
        what = f"torus {torus:.0%}, magenta {magenta(images):.0%}"
    kept = judged(judge, drawn(lora, "a red cone"), "cone", "red")
    other = judged(judge, drawn(lora, "a blue torus"), "torus", "blue")
    return f"{what}; a red cone {kept:.0%}, a blue torus {other:.0%}", images[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("logs/finetune"))
    parser.add_argument("--judge", type=Path, default=Path("logs/judge.pt"))
    args = parser.parse_args()
    judge = judging.load(args.judge)
    write_pictures(args.work)
    rows = []
    for case in ("donut", "logo"):
        text, images = figures(judge, case, None)
        print(f"{case}, before: {text}", flush=True)
        rows.append(images)
    for case, (folder, flags) in CASES.items():
        out = args.work / f"{case.replace(', ', '_')}.safetensors"
        words = ["--pictures", str(args.work / folder), "--out", str(out), *LORA, *flags]
        if finetune.main(words):
            raise SystemExit(1)
        text, images = figures(judge, case, out)
        print(f"{case}, after: {text}", flush=True)
        rows.append(images)
    write_png(args.work / "samples.png", sheet(torch.cat(rows), columns=8, side=64))


if __name__ == "__main__":
    main()
