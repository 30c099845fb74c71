"""nerf.training (EMA, random numbers, system), nerf.media and nerf.metrics."""

import math
import os
import platform
import signal
import subprocess
import sys
import warnings

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from nerf.media import colorize, nearness, write_png, write_video
from nerf.metrics import psnr, psnr_from_mse, ssim, to_8bit
from nerf.training import system
from nerf.training.distributed import World, choose_device
from nerf.training.ema import EMA
from nerf.training.rng import seed_everything, step_generator
from nerf.training.system import StopSignal


class Weight(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor([float(value)]))

    def set(self, value):
        with torch.no_grad():
            self.value.fill_(value)


# ------------------------------------------------------------------------------------------ EMA


def test_ema_of_a_constant_weight_has_a_closed_form():
    module = Weight(1.0)
    ema = EMA(module, 0.999)
    module.set(3.0)
    for n in range(1, 30):
        ema.update()
        # product over k < n of (1 + k) / (10 + k); its cap 0.999 is far from reached
        left = math.factorial(n) * math.factorial(9) / math.factorial(n + 9)
        assert ema.shadow[0].item() == pytest.approx(3 - 2 * left, abs=1e-5)


def test_ema_decay_is_capped():
    module = Weight(1.0)
    ema = EMA(module, 0.5)
    module.set(0.0)
    expected = 1.0
    for n in range(40):
        ema.update()
        expected *= min(0.5, (1 + n) / (10 + n))
        assert ema.shadow[0].item() == pytest.approx(expected, rel=1e-4)


def test_ema_swap_holds_the_average_and_restores_also_after_an_error():
    module = Weight(1.0)
    ema = EMA(module, 0.9)
    module.set(2.0)
    ema.update()
    average = ema.shadow[0].item()
    assert average != 2.0
    with ema.swap():
        assert module.value.item() == average
    assert module.value.item() == 2.0
    with pytest.raises(RuntimeError), ema.swap():
        assert module.value.item() == average
        raise RuntimeError
    assert module.value.item() == 2.0
    assert ema.shadow[0].item() == average and ema.kind == "ema"


def test_ema_decay_0_does_nothing():
    module = Weight(1.0)
    ema = EMA(module, 0.0)
    module.set(2.0)
    ema.update()
    with ema.swap():
        assert module.value.item() == 2.0
    assert (ema.kind, ema.enabled, ema.state_dict()["shadow"]) == ("raw", False, [])


def test_ema_goes_on_from_its_state_as_if_never_stopped():
    module = Weight(1.0)
    whole, first = EMA(module, 0.99), EMA(module, 0.99)
    for step in range(20):
        module.set(step)
        whole.update()
        if step < 10:
            first.update()
        if step == 9:
            second = EMA(Weight(100.0), 0.99)
            second.load_state_dict(first.state_dict())
            second.parameters = first.parameters
        if step > 9:
            second.update()
    assert torch.equal(whole.shadow[0], second.shadow[0])
    assert whole.num_updates == second.num_updates == 20


def test_ema_state_of_another_network_is_refused():
    state = EMA(Weight(1.0), 0.9).state_dict()
    with pytest.raises(ValueError, match="ema_decay"):
        EMA(Weight(1.0), 0.0).load_state_dict(state)


# ------------------------------------------------------------------------------------- generators


def first_draws(seeds, steps, count=1):
    numbers = [
        torch.rand(count, generator=step_generator(seed, step, "cpu"))
        for seed in seeds
        for step in steps
    ]
    return torch.stack(numbers).double().numpy()


def test_generator_is_a_function_of_seed_and_step():
    torch.manual_seed(0)
    once = first_draws([3], [7], 100)
    torch.manual_seed(1)
    assert np.array_equal(once, first_draws([3], [7], 100))


def test_other_seeds_and_steps_draw_other_numbers():
    numbers = first_draws(range(20), range(100)).ravel()
    # 2000 draws of 24-bit numbers: a handful of equal pairs would be chance, 20 not.
    assert len(np.unique(numbers)) > 1980


def kolmogorov_distance(numbers):
    """Largest gap between the numbers' distribution and the uniform one."""
    numbers = np.sort(numbers)
    grid = np.arange(len(numbers))
    return max((numbers - grid / len(numbers)).max(), ((grid + 1) / len(numbers) - numbers).max())


@pytest.mark.parametrize(
    ("seeds", "steps"), [([0], range(2000)), (range(2000), [0])], ids=["by step", "by seed"]
)
def test_consecutive_generators_look_independent(seeds, steps):
    numbers = first_draws(seeds, steps, 3)
    for column in numbers.T:
        assert kolmogorov_distance(column) < 1.95 / math.sqrt(2000)  # p = 0.001
        for lag in (1, 2, 7):
            correlation = np.corrcoef(column[:-lag], column[lag:])[0, 1]
            assert abs(correlation) < 4 / math.sqrt(2000)


def test_seed_everything_decides_the_global_draws():
    def draws():
        return torch.rand(3).tolist() + np.random.rand(3).tolist()

    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    seed_everything(6)
    assert draws() != first
    seed_everything(2**40)  # numpy alone would refuse so large a seed


# ----------------------------------------------------------------------------------- the process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_is_noted_and_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        assert stop.number == 0
        assert signal.getsignal(number) not in before
        os.kill(os.getpid(), number)
        assert stop.number == number
        # A second one must end the process.
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_stop_signal_restores_handlers_without_a_signal_and_after_an_error():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), StopSignal():
        raise RuntimeError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_world_of_one():
    world = World(0, 1, torch.device("cpu"))
    assert world.is_main
    assert world.shard(7) == slice(0, 7)
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert world.all_reduce_max(2, 0.5) == [2, 0.5]
    assert world.barrier() is None


def test_shares_of_all_ranks_are_everything_once():
    shares = [World(rank, 4, torch.device("cpu")).shard(12) for rank in range(4)]
    assert [i for share in shares for i in range(12)[share]] == list(range(12))
    assert not World(3, 4, torch.device("cpu")).is_main


def test_devices_that_are_not_there_are_refused_by_name():
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "meta", "xpu"):
        with pytest.raises(ValueError, match=f"--device {name}"):
            choose_device(name)


# ------------------------------------------------------------------------------- scalars in color


def test_colorize_is_finite_in_range_and_ever_lighter():
    ramp = colorize(np.linspace(-0.5, 1.5, 401)[None])[0]
    assert ramp.shape == (401, 3) and ramp.min() >= 0 and ramp.max() <= 1
    lightness = ramp @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= -1e-12).all() and lightness[-1] - lightness[0] > 0.8


@pytest.mark.parametrize(
    ("near", "far", "ndc"), [(2.0, 6.0, False), (0.0, 1.0, True), (0.0, 3.0, False)]
)
def test_nearness_is_1_at_near_falls_to_0_at_far_and_0_for_nothing(near, far, ndc):
    depth = np.linspace(max(near, 1e-6), far, 50)[None]
    found = nearness(depth, near, far, ndc)[0]
    assert found[0] == pytest.approx(1, abs=1e-5) and found[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(found) < 0).all()
    strange = np.array([[0.0, 1e-30, near, far, 10 * far, np.inf, np.nan]])
    found = nearness(strange, near, far, ndc)
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
    assert found[0, 0] == 0
    empty = np.zeros((4, 5))
    assert (nearness(empty, near, far, ndc) == 0).all()
    assert np.isfinite(colorize(nearness(empty, near, far, ndc))).all()


def test_nearness_is_even_in_inverse_depth():
    inverse = np.linspace(1 / 2, 1 / 6, 9)[None]
    found = nearness(1 / inverse, 2.0, 6.0, False)
    np.testing.assert_allclose(found[0], np.linspace(1, 0, 9), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------- pictures, videos


def test_png_keeps_8_bits_and_makes_its_folder(tmp_path):
    picture = np.random.default_rng(0).random((5, 7, 3)) * 1.2 - 0.1
    write_png(tmp_path / "a" / "b.png", picture)
    found = iio.imread(tmp_path / "a" / "b.png")
    assert np.abs(found / 255 - np.clip(picture, 0, 1)).max() <= 0.5 / 255 + 1e-9
    write_png(tmp_path / "c.png", found)
    np.testing.assert_array_equal(iio.imread(tmp_path / "c.png"), found)


COLORS = [(220, 40, 30), (30, 160, 60), (40, 60, 200), (128, 128, 128)]


def frames(folder, height, width):
    for number, color in enumerate(COLORS):
        path = folder / f"{number:03d}.png"
        write_png(path, np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy())
        yield path


@pytest.mark.parametrize("size", [(48, 64), (33, 47), (3, 5)])
def test_video_of_any_size_can_be_read_back(tmp_path, size):
    path = tmp_path / "out.mp4"
    assert write_video(path, frames(tmp_path, *size), warn=pytest.fail) == path
    video = iio.imread(tmp_path / "out.mp4", plugin="FFMPEG")
    assert video.shape == (len(COLORS), size[0] & ~1, size[1] & ~1, 3)
    # H.264 keeps flat colors to a few levels.
    np.testing.assert_allclose(video.mean((1, 2)), COLORS, rtol=0, atol=12)


SIGNALED = """
import os, signal, sys, threading, time
from pathlib import Path
from nerf.media import write_video

came, over = [], threading.Event()
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))

def send():
    while not over.wait(0.02):
        os.killpg(0, signal.SIGTERM)

thread = threading.Thread(target=send)
thread.start()
folder = Path(sys.argv[1])
made = write_video(folder / "signaled.mp4", sorted(folder.glob("*.png")))
over.set()
thread.join()
assert len(came) > 2 and made.name == "signaled.mp4", (len(came), made)
"""


def test_signals_to_all_processes_of_a_run_do_not_change_its_video(tmp_path):
    """As torchrun and a terminal's Ctrl-C send them; they ended ffmpeg's test of an encoder."""
    write_video(tmp_path / "quiet.mp4", frames(tmp_path, 48, 64), warn=pytest.fail)
    done = subprocess.run(
        [sys.executable, "-c", SIGNALED, str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "signaled.mp4").read_bytes() == (tmp_path / "quiet.mp4").read_bytes()


def test_without_ffmpeg_a_video_is_a_gif(tmp_path, monkeypatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
    warnings = []
    made = write_video(tmp_path / "out.mp4", frames(tmp_path, 8, 10), warn=warnings.append)
    assert made == tmp_path / "out.gif" and not (tmp_path / "out.mp4").exists()
    assert len(warnings) == 1 and "imageio-ffmpeg" in warnings[0]
    shown = iio.imread(made)
    assert shown.shape == (len(COLORS), 8, 10, 3)
    np.testing.assert_allclose(shown.mean((1, 2)), COLORS, rtol=0, atol=2)
    assert write_video(tmp_path / "none.mp4", [], warn=warnings.append) is None
    missing = [tmp_path / "000.png", tmp_path / "absent.png"]
    assert write_video(tmp_path / "cut.mp4", missing, warn=warnings.append) is None
    assert "cut.gif is not written" in warnings[-1] and not list(tmp_path.glob("*cut*"))


@pytest.mark.parametrize("pictures", ["one pixel", "missing", "none"])
def test_a_video_that_cannot_be_is_a_warning(tmp_path, pictures):
    files = {
        "one pixel": frames(tmp_path, 1, 1),
        "missing": [tmp_path / "absent.png"],
        "none": [],
    }[pictures]
    warnings = []
    assert write_video(tmp_path / "out.mp4", files, warn=warnings.append) is None
    assert len(warnings) == 1 and "out.mp4" in warnings[0]
    assert not (tmp_path / "out.mp4").exists()


# ------------------------------------------------------------------------------------------ metrics


def test_psnr_of_known_errors():
    picture = np.full((4, 4, 3), 0.5, np.float32)
    assert psnr(picture, picture + 0.1) == pytest.approx(20, abs=1e-5)
    assert psnr(picture, picture) == 100  # finite, so that JSON can hold it
    assert psnr_from_mse(0.0) == 100 and psnr_from_mse(1.0) == 0


def test_ssim_of_limits():
    picture = np.random.default_rng(0).random((16, 20, 3))
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert ssim(picture, 1 - picture) < 0
    flat = ssim(np.full((16, 16, 3), 0.2), np.full((16, 16, 3), 0.6))
    c1 = 0.01**2  # of two constants only the luminance term is left
    assert flat == pytest.approx((2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1), abs=1e-9)
    assert ssim(picture[:10], picture[:10]) is None


def test_8_bits_are_rounded_and_clipped():
    values = np.array([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 0.5, 1.0, 2.0])
    assert to_8bit(values).tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_peak_memory_is_this_process_own_not_its_parents():
    """A run started by a large program must not report that program's memory as its own."""
    held = bytearray(b"x" * (600 * 2**20))  # so that this process is much larger than a new one
    code = (
        "import torch; from nerf.training.system import peak_memory_mb as p; "
        "print(p(torch.device('cpu')))"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    own = system.peak_memory_mb(torch.device("cpu"))
    assert 50 < float(done.stdout) < own - 200 and len(held) > 0


@pytest.mark.parametrize(
    ("amp", "device", "native", "used"),
    [
        ("bf16", "cpu", False, "off"),
        ("bf16", "cpu", True, "bf16"),
        ("bf16", "cuda", False, "bf16"),
        ("off", "cpu", False, "off"),
    ],
)
def test_bf16_is_used_where_it_is_not_slower(monkeypatch, amp, device, native, used):
    monkeypatch.setattr(system, "cpu_has_bfloat16", lambda: native)
    lines = []
    assert system.usable_amp(amp, torch.device(device), lines.append) == used
    assert len(lines) == (used != amp)


@pytest.mark.parametrize(("size", "ended"), [("1", True), ("2", False)])
def test_one_of_several_processes_leaves_without_the_interpreters_end(size, ended):
    """What was printed is there, the code is told; teardown, where threads abort, is left out."""
    code = (
        "import atexit; from nerf.training import entry\n"
        "atexit.register(print, 'torn down'); print('done'); entry.exit_process(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "WORLD_SIZE": size, "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.split("\n")[:-1] == ["done", "torn down"][: 1 + ended]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc_trim")
def test_freed_memory_between_blocks_in_use_goes_back_to_the_system():
    """In a process of its own: blocks in use at every 4 MB keep a heap from shrinking by itself."""
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from nerf.training.system import release_memory\n"
        "def resident():\n"
        "    fields = Path('/proc/self/status').read_text().split('VmRSS:')[1].split()\n"
        "    return int(fields[0]) / 1024\n"
        "kept, freed = [], []\n"
        "for n in range(25000):\n"
        "    (freed if n % 1000 else kept).append(torch.ones(1000))\n"
        "del freed; before = resident(); release_memory(); print(before - resident())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 50  # of the 100 MB


def test_a_driver_that_is_too_old_is_one_line(monkeypatch):
    def too_old():
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version "
            "11040). Please update your GPU driver. More text\nand lines",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    said = []
    assert choose_device("auto", said.append).type in ("cpu", "mps")
    assert said == [
        "the GPU is not used: CUDA initialization: The NVIDIA driver on your system is too old "
        "(found version 11040)"
    ]
    with pytest.raises(ValueError, match=r"--device cuda: not available here \(CUDA init.*11040\)"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # no GPU at all: nothing to say
    assert choose_device("auto", said.append).type in ("cpu", "mps") and len(said) == 1
