"""Bad numbers, too little memory, bad files and bad disks: what is lost, and what is said."""

import random

import pytest
import torch
from helpers import (
    CPU,
    FAST_TINY,
    NERF_TINY,
    assert_same_training,
    newest,
    rays_through,
    small_state,
    write_checkpoint,
)

import run_nerf
from nerf import build
from nerf.flags import nerf as nerf_flags
from nerf.renderer import NeRFRenderer, Rendered
from nerf.training import dead_start, monitor, recovery, rng
from nerf.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nerf.training.distributed import World
from nerf.training.recovery import Attempt
from nerf.training.run_folder import RunFolder


def out_of_memory_above(limit):
    """A fake: job(size) that has no room for more than ``limit`` rays."""
    asked = []

    def job(size):
        asked.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return size

    return job, asked


def test_size_is_halved_until_it_fits_and_one_ray_is_the_end():
    job, asked = out_of_memory_above(100)
    assert recovery.halve_until_it_fits(job, 1000, lambda text: None) == (62, 62)
    assert asked == [1000, 500, 250, 125, 62]
    with pytest.raises(ValueError, match="out of memory with 1 rays"):
        recovery.halve_until_it_fits(out_of_memory_above(0)[0], 8, lambda text: None)
    with pytest.raises(ZeroDivisionError):  # no other error is taken for it
        recovery.halve_until_it_fits(lambda size: size / 0, 8)


def test_training_in_smaller_pieces_gives_the_same_weights(tiny, tmp_path, monkeypatch):
    assert run_nerf.main([*tiny, "--expname", "roomy", "--N_iters", "3"]) == 0
    forward = NeRFRenderer.forward

    def tight(renderer, rays, noise=None):
        if len(rays.origins) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(renderer, rays, noise)

    monkeypatch.setattr(NeRFRenderer, "forward", tight)
    assert run_nerf.main([*tiny, "--expname", "tight", "--N_iters", "3"]) == 0
    assert "going on with 16 rays at a time" in (tmp_path / "tight" / "log.txt").read_text()
    roomy, tight = (newest(tmp_path / name)["network_fn_state_dict"] for name in ("roomy", "tight"))
    for name, value in roomy.items():  # the order of summing alone differs
        torch.testing.assert_close(value, tight[name], atol=1e-5, rtol=1e-3)


def poison(monkeypatch, where: str, steps) -> None:
    """NaN or infinity in one place of the given steps, counted from this start."""
    calls = []

    def now() -> bool:
        calls.append(1)
        return len(calls) in steps

    scene_of, accumulate = run_nerf.load_scene, run_nerf.accumulate_gradients

    def load_scene(args, log):
        scene = scene_of(args, log)
        draw = scene.sample_rays

        def sample_rays(*given, **named):
            rays, target = draw(*given, **named)
            if now():
                spoiled = {
                    "pixel": target,
                    "infinite pixel": target,
                    "ray": rays.directions,
                }[where.replace("pose", "ray")]
                value = float("inf") if "infinite" in where else float("nan")
                spoiled[5, 1] = value
                if where == "pose":
                    rays = rays._replace(origins=torch.full_like(rays.origins, value))
            return rays, target

        object.__setattr__(scene, "sample_rays", sample_rays)
        object.__setattr__(scene, "to", lambda device: scene)
        return scene

    def spoiled(args, world, model, state, *given):
        stats = accumulate(args, world, model, state, *given)
        if now():
            if where == "loss":
                return stats._replace(loss=torch.tensor(float("nan")))
            next(state.renderer.parameters()).grad.view(-1)[0] = float("inf")
        return stats

    if where in ("loss", "gradient"):
        monkeypatch.setattr(run_nerf, "accumulate_gradients", spoiled)
    else:
        monkeypatch.setattr(run_nerf, "load_scene", load_scene)


PLACES = ["pixel", "infinite pixel", "ray", "pose", "loss", "gradient"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("path", ["vanilla", "fast"])
def test_bad_numbers_are_left_out_counted_and_never_reach_weights(
    tiny,
    tmp_path,
    monkeypatch,
    where,
    path,
):
    poison(monkeypatch, where, (3, 4))
    flags = [*(FAST_TINY if path == "fast" else []), *tiny, "--N_iters", "10"]
    assert run_nerf.main(flags) == 0
    table = (tmp_path / "tiny" / "metrics.csv").read_text().splitlines()
    place = table[0].split(",").index("skipped")
    if path == "vanilla" or where not in ("ray", "pose"):  # there, rays with NaN meet nothing
        assert table[-1].split(",")[place] == "2"
    state = newest(tmp_path / "tiny")  # refuses NaN anywhere
    steps = {int(entry["step"]) for entry in state["optimizer_state_dict"]["state"].values()}
    assert steps == {10 - int(table[-1].split(",")[place])}


def test_a_full_disk_is_said_every_time_and_the_exit_code_tells(tiny, tmp_path, monkeypatch):
    assert run_nerf.main([*tiny, "--N_iters", "5"]) == 0
    save = torch.save

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert run_nerf.main([*tiny, "--N_iters", "15", "--i_weights", "5"]) == 3
    log = (tmp_path / "tiny" / "log.txt").read_text()
    full = f"is not written (the disk of {tmp_path / 'tiny'} "
    assert log.count(full) == 2 and log.count("; training goes on") >= 2
    assert newest(tmp_path / "tiny")["global_step"] == 5
    monkeypatch.setattr(torch, "save", save)
    assert run_nerf.main([*tiny, "--N_iters", "15"]) == 0
    assert run_nerf.main([*tiny, "--expname", "whole", "--N_iters", "15"]) == 0
    assert_same_training(newest(tmp_path / "whole"), newest(tmp_path / "tiny"))


def test_one_flipped_bit_is_refused_or_harmless(tmp_path):
    """At 200 places: either the file is refused, or what it held comes out to the bit."""
    path = write_checkpoint(tmp_path, 7)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        place = draw.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            assert "000007.tar" in str(error)
            refused += 1
            continue
        assert loaded["global_step"] == 7
        for name, value in small_state(7)["network_fn_state_dict"].items():
            assert torch.equal(loaded["network_fn_state_dict"][name], value)
    assert refused > 50


def test_a_number_repeated_to_a_terabyte_is_refused_before_it_is_made(tmp_path):
    huge = small_state(3)
    huge["network_fn_state_dict"]["layer.bias"] = torch.zeros(1).expand(1 << 38)
    torch.save(huge, tmp_path / "a.tar")
    with pytest.raises(CheckpointError, match="claims more numbers than the file has"):
        load_checkpoint(tmp_path / "a.tar")


@pytest.mark.parametrize("part", ["global_step", "network_fn_state_dict", "args", "ema_state_dict"])
def test_a_part_of_another_kind_is_refused(tmp_path, part):
    torch.save({**small_state(3), part: "seven"}, tmp_path / "a.tar")
    with pytest.raises(CheckpointError, match=part):
        load_checkpoint(tmp_path / "a.tar")


def test_no_reload_keeps_what_was_there_out_of_the_way(tiny, tmp_path):
    assert run_nerf.main([*tiny, "--N_iters", "9"]) == 0
    assert run_nerf.main([*tiny, "--N_iters", "4", "--no_reload"]) == 0
    assert newest(tmp_path / "tiny")["global_step"] == 4
    assert newest(tmp_path / "tiny" / "before_1")["global_step"] == 9


# ------------------------------------------------------------------------- the seeds of attempts


def test_no_attempt_repeats_one_of_another_seed():
    seeds = [
        getattr(Attempt(seed, None, dead, rollbacks), kind)
        for seed in [*range(40), 10**6, 1_000_003]
        for dead in range(5)
        for rollbacks in range(4)
        for kind in ("weights_seed", "rng_seed")
        if kind == "rng_seed" or (rollbacks == 0 and dead > 0)
    ]
    # The weights' seed of an attempt without rollbacks is also that of its steps, as it ever was.
    distinct = 42 * 5 * 4
    assert len(set(seeds)) == distinct
    assert len({seed % 2**32 for seed in seeds}) == distinct  # all that the CPU's generator takes
    for seed in (0, 1, 7, 123456789):
        assert Attempt(seed).weights_seed == Attempt(seed).rng_seed == seed
        assert Attempt(seed, None, 2, 3).weights_seed == Attempt(seed, None, 2).rng_seed
    steps = {rng.step_generator(3, step, "cpu").initial_seed() for step in range(5000)}
    assert not steps & {Attempt(3, None, n, m).rng_seed for n in range(9) for m in range(9)}


def through_a_file(attempt: Attempt, folder) -> Attempt:
    """The attempt that a run of the same seed resumes from the checkpoint of ``attempt``."""
    state = small_state(7) | attempt.checkpoint_state()
    save_checkpoint(folder / "000007.tar", state)
    path = folder / "000007.tar"
    return Attempt.from_checkpoint(attempt.seed, (path, load_checkpoint(path)))


@pytest.mark.parametrize("dead", [0, 1, 3])
@pytest.mark.parametrize("rollbacks", [0, 2])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_resumed_run_keeps_its_random_numbers_also_of_an_earlier_version(
    tmp_path, dead, rollbacks, mixed
):
    attempt = Attempt(5, None, dead, rollbacks, mixed_seeds=mixed)
    for _ in range(2):  # a checkpoint of a resumed run says the same
        again = through_a_file(attempt, tmp_path)
        assert again.weights_seed == attempt.weights_seed and again.rng_seed == attempt.rng_seed
        attempt = again
    old = small_state(7) | {"attempt": dead, "draws": rollbacks}  # as they were written before
    save_checkpoint(tmp_path / "000008.tar", old)
    path = tmp_path / "000008.tar"
    resumed = Attempt.from_checkpoint(5, (path, load_checkpoint(path)))
    assert resumed.weights_seed == 5 + dead
    assert resumed.rng_seed == 5 + dead + rollbacks * 1_000_003


def test_a_dead_start_of_an_earlier_version_goes_on_with_mixed_seeds(tmp_path):
    run = RunFolder(tmp_path / "run", is_main=True, lock=False)
    world = World(0, 1, torch.device("cpu"))
    with run:
        old = Attempt(5, None, 1, mixed_seeds=False)
        dead = recovery.DeadStart(200, "every ray is all background")
        new = recovery.next_attempt(old, dead, run, world, lambda: None)
        broken = recovery.NonFinite(300, "the loss (NaN)", None)
        rolled = recovery.next_attempt(old, broken, run, world, lambda: None)
    assert new == Attempt(5, None, 2) and new.weights_seed == Attempt(5, None, 2).weights_seed
    assert rolled.weights_seed == old.weights_seed and rolled.rng_seed != old.rng_seed


def test_tests_and_videos_of_steps_that_were_taken_back_are_owed_again(tmp_path):
    """Else a kill after the new step's save would leave pictures of the old weights."""
    run = RunFolder(tmp_path / "run", is_main=True, lock=False)
    names = [
        f"render_{kind}_{step:06d}{end}"
        for step in (4, 8)
        for kind, end in (("test", "/metrics.json"), ("path", "/rgb.mp4"), ("path_1", "/lit.gif"))
    ]
    with run:
        for name in names:
            (run.folder / name).parent.mkdir()
            (run.folder / name).write_text("old")
        saved = (run.folder / "000004.tar", small_state(4))
        broken = recovery.NonFinite(9, "the loss (NaN)", None)
        recovery.next_attempt(Attempt(5), broken, run, World(0, 1, CPU), lambda: saved)
    assert [name for name in names if (run.folder / name).exists()] == names[:3]


# --------------------------------------------------------------------------------- dead starts


def level(rgb, opacity) -> Rendered:
    rgb, opacity = torch.as_tensor(rgb), torch.as_tensor(opacity)
    return Rendered(rgb.expand(len(opacity), 3), opacity, opacity)


def test_one_color_is_dead_unless_there_is_no_other():
    torch.manual_seed(0)
    varied, hit = torch.rand(300, 3), (torch.arange(300) < 200).float()
    white, blank = torch.ones(3), torch.ones(300, 3)

    def flat(rendered: Rendered, target) -> bool:
        found = dead_start.flat_levels((level(target, hit), rendered), target)
        assert not found[0]  # what renders its target has learned it
        return bool(found[1])

    assert flat(level(white, torch.zeros(300)), varied)  # all background
    assert flat(level(white, torch.ones(300)), varied)  # a wall
    assert not flat(level(white, torch.ones(300)), blank)
    assert not flat(level(varied, torch.ones(300)), varied)
    assert not flat(level(varied.mean(1, keepdim=True) * 0.01, torch.ones(300)), varied)  # faint
    # Rays that miss the scene's space show the background, here black.
    box = level(hit[:, None] * white, hit)
    assert flat(box, torch.where(hit[:, None] > 0, varied, white))
    assert flat(box, torch.where(hit[:, None] > 0, white, varied))
    assert not flat(box, hit[:, None] * white)  # the scene is a white silhouette on black
    nothing_known = level(torch.full((300, 3), torch.nan), hit)
    assert not flat(nothing_known, varied)  # another alarm's case
    # A single ray has no spread.
    assert not dead_start.flat_levels((level(white, torch.ones(1)),), torch.rand(1, 3)).any()


def test_the_probe_sees_an_object_of_a_thousandth_of_the_pictures():
    def sample_rays(count, generator):
        place = torch.rand(count, 3, generator=generator)
        on_object = place[:, :1] < 1e-3
        target = torch.where(on_object, torch.tensor([0.2, 0.0, 0.0]), torch.ones(3))
        return rays_through(place, place), target

    renderer = build.build_renderer(nerf_flags.parse([*NERF_TINY, "--raw_noise_std", "1"]))
    for seed in range(10):
        probe = dead_start.Probe.draw(sample_rays, renderer, seed, CPU)
        assert len(probe.target) == dead_start.PROBE_RAYS and probe.target.std(0).max() > 0.05
        again = dead_start.Probe.draw(sample_rays, renderer, seed, CPU)
        whole, pieces = probe.render(10**6), again.render(100)  # deterministic, noise included
        torch.testing.assert_close(pieces[-1].rgb, whole[-1].rgb, atol=1e-5, rtol=0)
        assert len(whole) == 2 and not probe.is_flat(512)  # the noise keeps it alive
    for field in renderer.fields:
        torch.nn.init.constant_(field.alpha_linear.bias, -100.0)
    assert probe.is_flat(512) and probe.diagnosis() == "every ray is all background"
    torch.nn.init.constant_(renderer.coarse.alpha_linear.bias, 100.0)
    assert (
        probe.is_flat(512) and probe.diagnosis() == "every ray of the fine level is all background"
    )


@pytest.mark.parametrize("path", [[], FAST_TINY])
def test_watching_does_not_change_training(tiny, tmp_path, monkeypatch, path):
    flags = [*path, *tiny, "--N_iters", "45", "--i_print", "9"]
    assert run_nerf.main([*flags, "--expname", "watched"]) == 0
    monkeypatch.setattr(dead_start.Probe, "watch", lambda probe, step, most: None)
    assert run_nerf.main([*flags, "--expname", "alone"]) == 0
    assert_same_training(newest(tmp_path / "watched"), newest(tmp_path / "alone"))
    rows = [(tmp_path / name / "metrics.csv").read_text() for name in ("watched", "alone")]
    place = [row.splitlines()[0].split(",").index("loss") for row in rows]
    losses = [[r.split(",")[p] for r in t.splitlines()] for t, p in zip(rows, place, strict=True)]
    assert losses[0] == losses[1]


def test_the_last_restart_may_die_too_and_is_named(tiny, tmp_path, monkeypatch):
    build_renderer, seeds = build.build_renderer, []

    def dead(*given):
        renderer = build_renderer(*given)
        seeds.append(torch.initial_seed())
        torch.nn.init.constant_(renderer.coarse.alpha_linear.bias, -100.0)
        return renderer

    monkeypatch.setattr(build, "build_renderer", dead)
    monkeypatch.setattr(monitor, "DEAD_STEPS", 20)
    assert run_nerf.main([*tiny, "--N_iters", "60", "--dead_restarts", "2"]) == 4
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert seeds == [Attempt(0, None, n).weights_seed for n in range(3)]
    assert "restart 1" in log and "restart 2" in log and "restart 3" not in log
    assert log.count("every ray of the coarse level is all background; no restart is left") == 1
    assert "the run is dead: every ray of the coarse level is all background; try" in log
    # A start that is resumed later and watched no more is judged at its end too.
    monkeypatch.setattr(run_nerf, "WATCHED_STEPS", 61)
    assert run_nerf.main([*tiny, "--N_iters", "62", "--dead_restarts", "2"]) == 4


def test_weights_are_drawn_again_until_a_network_has_density(tiny, tmp_path, monkeypatch):
    def born(args, *rest):  # without density, the first time
        renderer = built(args, *rest)
        torch.nn.init.constant_(renderer.coarse.alpha_linear.bias, -100.0)
        return renderer

    built = build.build_renderer
    monkeypatch.setattr(build, "build_renderer", born)
    runs = {}
    for name in ("one", "again", "plain"):
        words = [*tiny, "--N_iters", "2", "--expname", name, "--ema_decay", "0.9"]
        words += [] if name == "plain" else ["--alive_start"]
        assert run_nerf.main(words) == 0, name
        runs[name] = newest(tmp_path / name)
        log = (tmp_path / name / "log.txt").read_text()
        assert ("weights were drawn again" in log) == (name != "plain")
    for state in ("network_fn_state_dict", "network_fine_state_dict"):
        for key, value in runs["one"][state].items():
            assert torch.equal(value, runs["again"][state][key])  # a function of the seed
    assert runs["one"]["network_fn_state_dict"]["alpha_linear.bias"].abs() < 1
    assert all(shadow.abs().max() < 2 for shadow in runs["one"]["ema_state_dict"]["shadow"])
    words = [*tiny, "--N_iters", "3", "--expname", "one", "--ema_decay", "0.9", "--alive_start"]
    assert run_nerf.main(words) == 0
    log = (tmp_path / "one" / "log.txt").read_text()
    assert log.count("weights were drawn again") == 1 and "resumed from" in log


def test_a_network_that_is_born_alive_stays_as_it_is(tiny, tmp_path, monkeypatch):
    def born(args, *rest):
        renderer = built(args, *rest)
        for field in renderer.fields:
            torch.nn.init.constant_(field.alpha_linear.bias, 1.0)
        return renderer

    built = build.build_renderer
    monkeypatch.setattr(build, "build_renderer", born)
    for name, words in (("plain", []), ("alive", ["--alive_start"])):
        assert run_nerf.main([*tiny, "--N_iters", "1", "--expname", name, *words]) == 0
    weights = [newest(tmp_path / name)["network_fn_state_dict"] for name in ("plain", "alive")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert "drawn" not in (tmp_path / "alive" / "log.txt").read_text()


def test_a_start_as_fog_has_density_everywhere_in_the_color_of_the_background():
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 4 - 2
    views = torch.nn.functional.normalize(points, dim=-1)
    born_dead = 0
    for seed in range(12):
        for words in (["--white_bkgd"], ["--no-white_bkgd"], ["--no-use_viewdirs"]):
            flags = [*NERF_TINY, "--netdepth_fine", 4, "--netwidth_fine", 128, *words]
            args = nerf_flags.parse([*map(str, flags), "--fog_start"])
            rng.seed_everything(seed)
            fog = build.build_renderer(args)
            args.fog_start = False
            rng.seed_everything(seed)
            plain = build.build_renderer(args)
            for one, other in zip(plain.parameters(), fog.parameters(), strict=True):
                assert torch.equal(one, other) or one.dim() == 1  # biases alone differ
            born_dead += int((plain.density(points) > 0).sum() == 0)
            assert (fog.density(points) > 0.2).all()
            shown = fog.color(points, views)
            assert ((shown - float(args.white_bkgd)).abs() < 0.15).all()
    assert born_dead > 3  # nerf-pytorch's start, by which the alarm is needed
