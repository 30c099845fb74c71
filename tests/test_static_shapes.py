"""Static shapes, steps without host reads, and CUDA graphs: the same training, never waited for."""

from collections import Counter

import pytest
import torch
from helpers import DREAM_TINY, FAST_TINY, NERF_TINY, ball_renderer, random_rays, run_main
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import run_dreamfusion
import run_nerf
from nerf import occupancy_renderer
from nerf.encodings import TriPlane
from nerf.field import FeatureField
from nerf.occupancy import Box, Contraction, OccupancyGrid, first_true, rows_in_use
from nerf.occupancy_renderer import RAY_COUNTS, OccupancyRenderer
from nerf.text3d.shading import Lighting
from nerf.training import graph, rng, system
from nerf.training.monitor import READ_EVERY, Monitor

BOX = Box(torch.full((3,), -1.0), torch.full((3,), 1.0), 60)


def grid_with(density: float, size: int = 12) -> OccupancyGrid:
    grid = OccupancyGrid(size)
    chosen = torch.rand(size**3, generator=torch.Generator().manual_seed(3)) < density
    grid.carve(chosen)
    return grid


@pytest.mark.parametrize("space", [BOX, Contraction(0.1, 20.0, 40, 0.05)], ids=["box", "contract"])
def test_a_list_of_constant_length_holds_the_same_samples(space):
    grid, rays = grid_with(0.2), random_rays(150)
    u = torch.rand(150, 1, generator=torch.Generator().manual_seed(1))
    plain = grid.march(rays, space, u)
    count = len(plain.ray_indices)
    static = grid.march(rays, space, u, count + 700)
    assert 100 < count and len(static.ray_indices) == count + 700
    assert static.found == count
    for own, expected in zip(static[:4], plain[:4], strict=True):
        torch.testing.assert_close(own[:count], expected, rtol=0, atol=0)
    assert not static.lengths[count:].any() and (static.ray_indices.diff() >= 0).all()


def test_rays_that_do_not_fit_have_no_samples_and_the_others_all_of_theirs():
    grid, rays = grid_with(0.2), random_rays(150)
    plain = grid.march(rays, BOX, None)
    capacity = len(plain.ray_indices) * 2 // 3
    static = grid.march(rays, BOX, None, capacity)
    cut = plain.ray_indices[capacity - 1]
    kept = plain.ray_indices < cut
    assert (static.lengths > 0).sum() == kept.sum() > 0
    torch.testing.assert_close(static.t[: kept.sum()], plain.t[kept], rtol=0, atol=0)
    chosen = torch.arange(len(plain.ray_indices)) % 3 == 0
    half = plain.select(chosen, 150, int(chosen.sum()) + 9)
    torch.testing.assert_close(half.t[:-9], plain.t[chosen], rtol=0, atol=0)
    assert not half.lengths[-9:].any()


def test_the_first_true_are_found_without_counting_on_the_host():
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 1]).bool()
    index, total = first_true(mask, 3)
    assert index.tolist() == [1, 3, 4] and total == 4
    index, total = first_true(mask, 6)
    assert index.tolist() == [1, 3, 4, 6, 6, 6] and total == 4
    rows, used = rows_in_use(torch.tensor([0, 0, 1, 2, 2]), torch.tensor(7), 4)
    assert rows.tolist() == [0, 0, 1, 2, 2] and used.tolist() == [True, True, True, False, False]
    rows, used = rows_in_use(torch.tensor([0, 0, 1, 9, 9]), torch.tensor(3), 4)
    assert rows.tolist() == [0, 0, 1, 3, 3] and used.tolist() == [True] * 3 + [False] * 2


def make(static: bool, **options) -> OccupancyRenderer:
    torch.manual_seed(0)
    field = FeatureField(TriPlane(16))
    options = {"target_samples": 4000, "first_rays": 150, "background": 1.0} | options
    return OccupancyRenderer(field, grid_with(0.2), BOX, static_shapes=static, **options)


@pytest.mark.parametrize("early_stop", [0.0, 1e-2])
def test_colors_and_gradients_are_those_of_dynamic_shapes(early_stop):
    rays, found = random_rays(150), []
    for static in (False, True):
        renderer = make(static, early_stop=early_stop, near_scaling=2.0)
        renderer.rays_per_step(150, 1)
        (rendered,) = renderer(rays)
        (rendered.rgb - 0.3).square().mean().backward()
        found.append((rendered, [p.grad for p in renderer.parameters()], renderer.batch_samples))
    (plain, slopes, count), (own, own_slopes, room) = found
    assert 0 < count < 4500 and room >= count
    for a, b in zip((*own, *own_slopes), (*plain, *slopes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_resampling_gives_the_same_with_constant_shapes():
    rays, found = random_rays(150), []
    for static in (False, True):
        renderer = make(static, resample=8, target_samples=20_000)
        renderer.rays_per_step(150, 1)
        (rendered,) = renderer(rays)
        (rendered.rgb - 0.3).square().mean().backward()
        found.append((*rendered, *[p.grad for p in renderer.parameters()]))
        assert float(renderer.batch_samples) >= 8 * 100
    for own, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert renderer.capacity is None  # pictures have the samples that they need


def test_the_number_of_rays_is_one_of_a_few():
    renderer = make(True, target_samples=200_000)
    for wanted in (10, 1024, 5000, 1 << 15):
        renderer.num_rays = wanted
        assert renderer.rays_per_step(0, 1) in RAY_COUNTS
        assert renderer.rays_per_step(0, 1) <= max(wanted, RAY_COUNTS[0])
        assert renderer.rays_per_step(0, 3) % 3 == 0
    assert renderer.capacity % 1024 == 0 and renderer.capacity * 3 >= 200_000
    renderer.eval()
    assert renderer.capacity is None  # rendering takes as many as it finds


def test_occupied_cells_are_drawn_evenly():
    grid = grid_with(0.1)
    generator = torch.Generator().manual_seed(0)
    drawn = grid._draw_occupied(60_000, generator)
    occupied = grid.occupied.nonzero()[:, 0]
    counts = torch.bincount(drawn, minlength=len(grid.occupied))
    assert counts[~grid.occupied].sum() == 0
    expected = 60_000 / len(occupied)
    assert (counts[occupied] - expected).abs().max() < 6 * expected**0.5


# ------------------------------------------------------------------------- reads of the device

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, by training step."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.step, self.reads = -1, {}
        step_generator, tolist = rng.step_generator, torch.Tensor.tolist

        def starts(seed, step, device):
            self.step = step
            return step_generator(seed, step, device)

        def read(tensor):
            self.reads.setdefault(self.step, Counter())["tolist"] += 1
            return tolist(tensor)

        monkeypatch.setattr(rng, "step_generator", starts)
        monkeypatch.setattr(torch.Tensor, "tolist", read)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in READS:
            self.reads.setdefault(self.step, Counter())[name] += 1
        return func(*args, **(kwargs or {}))


CASES = {
    "vanilla": ["--raw_noise_std", "1", "--perturb", "1"],
    "one picture": ["--no_batching"],
    "fast": [*FAST_TINY, "--lambda_tv", "0.01", "--ema_decay", "0.9"],
    "unbounded": [*FAST_TINY, "--contract", "--hull_init", "off", "--near_scaling", "1"],
    "resampled": [*FAST_TINY, "--contract", "--hull_init", "off", "--resample", 8],
    "fp16": [*FAST_TINY, "--amp", "fp16"],
    "coarse to fine": [
        *(*FAST_TINY, "--grid_steps", 20, "--grid_start", 16, "--grid_res", 32),
        *("--loss", "huber", "--lambda_l1", 0.01, "--plane_lookup", "rows"),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_the_device_at_most_once_and_15_of_16_not_at_all(
    data, tmp_path, case, monkeypatch
):
    counter = CountReads(monkeypatch)
    monkeypatch.setattr(occupancy_renderer, "RESAMPLE_AFTER", 2)
    flags = [*CASES[case], *NERF_TINY, "--datadir", data, "--basedir", tmp_path]
    flags += ["--static_shapes", "on", "--i_print", 1000, "--N_iters", 2 * READ_EVERY + 4]
    with counter:
        assert run_main(run_nerf.main, *flags).returncode == 0
    waits = {step: count for step, count in counter.reads.items() if READ_EVERY < step}
    quiet = {step: dict(count) for step, count in waits.items() if step % READ_EVERY}
    last = 2 * READ_EVERY + 3
    assert not {step: count for step, count in quiet.items() if step != last}, quiet
    assert sum(waits[2 * READ_EVERY].values()) == 1, waits[2 * READ_EVERY]


@pytest.mark.slow
def test_static_shapes_train_as_well_as_dynamic_ones(data, tmp_path):
    psnr = {}
    for name in ("off", "on"):
        flags = [*FAST_TINY, *NERF_TINY, "--datadir", data, "--basedir", tmp_path]
        flags += ["--target_samples", 16384, "--static_shapes", name, "--expname", name]
        assert run_main(run_nerf.main, *flags, "--N_iters", 80, "--i_print", 80).returncode == 0
        rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        row = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
        psnr[name] = float(row["psnr"])
    assert psnr["on"] > psnr["off"] - 1.5 and psnr["on"] > 14, psnr


# ---------------------------------------------------------------------- the update on the device


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_that_is_not_finite_changes_nothing(fused):
    weights = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([weights], lr=0.1, fused=fused)
    weights.grad = torch.ones(4)
    system.update_if_finite(optimizer, torch.tensor(True))
    after, state = weights.detach().clone(), optimizer.state[weights]
    moments = state["exp_avg"].clone(), state["step"].clone()
    assert after.tolist() == pytest.approx([0.9] * 4)
    weights.grad = torch.full((4,), torch.nan)
    system.update_if_finite(optimizer, torch.tensor(False))
    assert torch.equal(weights, after) and torch.equal(state["exp_avg"], moments[0])
    assert state["step"] == moments[1] == 1


class NoStop:
    number = 0


def test_between_reads_the_device_counts_and_the_host_learns_of_it_at_the_next(monkeypatch):
    world = run_nerf.distributed.World(0, 1, torch.device("cpu"))
    monitor = Monitor(world, NoStop(), run_nerf.TrainState.__dataclass_fields__["clock"]
                      .default_factory(), 0, READ_EVERY)  # fmt: skip
    for step in range(READ_EVERY + 1):
        loss = torch.tensor(torch.nan if step in (3, 4, 9) else 1.0)
        verdict = monitor.check(step, loss, torch.tensor(2.0), samples=torch.tensor(7.0))
        assert verdict.read == (step % READ_EVERY == 0)
        assert bool(verdict.finite) == (step not in (3, 4, 9))
    assert monitor.skipped == 3 and verdict.loss == 1 and verdict.samples == 7
    assert monitor.check(READ_EVERY + 1, loss, loss, read=True).grad_norm == 1


# ------------------------------------------------------------------------------------ CUDA graphs


class FakeGraph:
    """A CUDA graph as far as a CPU can play it: recorded, called again on the recorded tensors."""

    def pool(self):
        return "pool"


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's graphs and streams, played on the CPU; recorded[...] counts captures."""
    recorded = Counter()

    class Capture:
        def __init__(self, graph, pool=None, stream=None):
            recorded["captures"] += 1
            recorded["pools"] += pool is not None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return recorded


def test_a_graph_is_recorded_after_warm_up_for_each_kind_of_inputs(fake_cuda, monkeypatch):
    layer, calls = nn.Linear(2, 1), Counter()
    graphs = graph.StepGraphs(layer, print, enabled=True)

    def step(inputs):
        calls["python"] += 1
        layer.zero_grad(set_to_none=True)
        loss = layer(inputs[0]).square().sum()
        loss.backward()
        return loss.detach()

    def replay(self):  # what a GPU would do: the same kernels on the same tensors
        with torch.enable_grad():
            result = layer(self.inputs[0]).square().sum()
            slopes = torch.autograd.grad(result, self.parameters)
        for own, new in zip((self.result, *self.gradients), (result, *slopes), strict=True):
            own.copy_(new.detach())

    real = graph._Recorded.replay

    def played(self, tensors):
        self.graph.replay = lambda: replay(self)
        return real(self, tensors)

    monkeypatch.setattr(graph._Recorded, "replay", played)
    generator = torch.Generator().manual_seed(0)
    for count in (3, 5):
        for call in range(10):
            x = torch.rand(count, 2, generator=generator)
            loss = graphs.run(step, (x,), kind=None)
            slopes = [p.grad.clone() for p in layer.parameters()]
            expected = layer(x).square().sum()
            torch.testing.assert_close(loss, expected.detach())
            for own, other in zip(
                slopes, torch.autograd.grad(expected, list(layer.parameters())), strict=True
            ):
                torch.testing.assert_close(own, other)
            assert calls["python"] <= (graph.WARM_UP + 1) * (1 if count == 3 else 2), call
    assert fake_cuda["captures"] == 2 and fake_cuda["pools"] == 1  # the second shares the memory
    graphs.run(step, (torch.rand(3, 2),), kind="other")
    assert calls["python"] == 2 * (graph.WARM_UP + 1) + 1


def test_a_capture_that_fails_is_said_once_and_training_goes_on(fake_cuda, monkeypatch):
    layer, said = nn.Linear(2, 1), []
    graphs = graph.StepGraphs(layer, said.append, enabled=True)

    def step(inputs):
        return layer(inputs[0]).sum().detach()

    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    x = torch.ones(3, 2)
    for _ in range(2 * graph.WARM_UP):
        torch.testing.assert_close(graphs.run(step, (x,)), step((x,)))
    assert len(said) == 1 and "operation not permitted when stream is capturing)" in said[0]
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: (_ for _ in ()).throw(
        torch.OutOfMemoryError("too little")))  # fmt: skip
    again = graph.StepGraphs(layer, said.append, enabled=True)
    for _ in range(graph.WARM_UP):
        again.run(step, (x,))
    with pytest.raises(torch.OutOfMemoryError):  # the caller halves its micro-batches
        again.run(step, (x,))


@pytest.fixture
def graphed(monkeypatch):
    """torch.cuda.make_graphed_callables, played on the CPU: one memory for all calls' tensors."""
    recorded = Counter()

    def make(function, sample):
        recorded["captures"] += 1
        held = [tensor.detach().clone() for tensor in function(*sample)]

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                recorded["replays"] += 1
                sample[0].data.copy_(x)
                for own, new in zip(held, function(sample[0]), strict=True):
                    own.copy_(new.detach())
                return tuple(tensor.detach() for tensor in held)

            @staticmethod
            def backward(ctx, *gradients):
                with torch.enable_grad():
                    outputs = function(sample[0])  # of the latest call, whichever is meant
                return torch.autograd.grad(outputs, sample[0], gradients)[0]

        return Graphed.apply

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return recorded


def test_a_recorded_function_has_the_same_results_and_gradients(graphed):
    said: list[str] = []
    graphs = graph.FunctionGraphs(said.append, enabled=True)

    def function(x):
        return x.square() * 0.5, x.sin()

    generator = torch.Generator().manual_seed(0)
    for count in (3, 5):
        for _ in range(graph.WARM_UP + 3):
            x = torch.rand(count, 2, generator=generator).requires_grad_()
            first, second = graphs.run(function, x)
            torch.testing.assert_close((first, second), function(x))
            (first.sum() + 2 * second.sum()).backward()
            torch.testing.assert_close(x.grad, x.detach() + 2 * x.detach().cos())
    assert graphed == {"captures": 2, "replays": 6} and not said
    with torch.no_grad():
        graphs.run(function, x)
    graphs.run(function, x.detach())
    assert graphed["replays"] == 6  # nothing to differentiate: eager


def test_a_function_that_cannot_be_recorded_is_said_once(monkeypatch):
    said: list[str] = []

    def fail(function, sample):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    graphs = graph.FunctionGraphs(said.append, enabled=True)
    x = torch.ones(3, requires_grad=True)
    for _ in range(2 * graph.WARM_UP):
        torch.testing.assert_close(graphs.run(torch.sin, x), x.sin())
    assert len(said) == 1 and "operation not permitted when stream is capturing)" in said[0]


# ------------------------------------------------------------------------------------ text to 3D


def test_an_object_trains_the_same_with_a_recorded_encoder(
    tmp_path, monkeypatch, graphed, sd_folder
):
    def graphs(args, world, log):
        unet = graph.StepGraphs(nn.Module(), log, enabled=False)
        return unet, graph.FunctionGraphs(log, enabled=recording)

    monkeypatch.setattr(run_dreamfusion.build_run, "guidance_graphs", graphs)
    finals = []
    for recording in (False, True):
        words = [*DREAM_TINY, "--guidance", "sds", "--sd_model", sd_folder, "--no-mesh"]
        words += ["--basedir", tmp_path, "--expname", recording, "--N_iters", graph.WARM_UP + 3]
        done = run_main(run_dreamfusion.main, *words)
        assert done.returncode == 0, done.stderr
        path = next((tmp_path / str(recording)).glob("*.tar"))
        finals.append(torch.load(path, weights_only=True))
    assert graphed["captures"] == 1 and graphed["replays"] >= 3
    for name, value in finals[0]["network_fn_state_dict"].items():
        torch.testing.assert_close(finals[1]["network_fn_state_dict"][name], value, msg=name)


OBJECTS = {
    "ball": [],
    "lit": ["--albedo_steps", 0, "--field", "triplane", "--grid_res", 16, "--lambda_orient", 1],
    "mlp": ["--field", "mlp", "--background", "learned"],
    "particles": ["--n_particles", 2],
    "falling": ["--t_anneal", "falling"],
}


@pytest.mark.parametrize("case", OBJECTS)
def test_text_to_3d_reads_the_device_once_in_16_steps(tmp_path, case, monkeypatch):
    counter = CountReads(monkeypatch)
    flags = [*DREAM_TINY, *OBJECTS[case], "--basedir", tmp_path, "--static_shapes", "on"]
    flags += ["--i_print", 1000, "--N_iters", 2 * READ_EVERY + 4]
    host = Counter()

    def drawn_on_the_host(function):  # what is drawn on the CPU may be read there
        def inner(*args, **kwargs):
            before = counter.reads.get(counter.step, Counter()).total()
            result = function(*args, **kwargs)
            host[counter.step] += counter.reads.get(counter.step, Counter()).total() - before
            return result

        return inner

    for name in ("random_orbit_cameras", "draw_lighting"):
        monkeypatch.setattr(
            run_dreamfusion, name, drawn_on_the_host(getattr(run_dreamfusion, name))
        )
    monkeypatch.setattr(Lighting, "is_lit", property(drawn_on_the_host(Lighting.is_lit.fget)))
    with counter:
        assert run_main(run_dreamfusion.main, *flags).returncode == 0
    reads = {step: count.total() - host[step] for step, count in counter.reads.items()}
    particles = case == "particles"  # one read of the host's generator: which member is trained
    quiet = {step: n - particles for step, n in reads.items() if 4 < step < 2 * READ_EVERY + 3}
    loud = quiet.pop(READ_EVERY), quiet.pop(2 * READ_EVERY)
    assert set(quiet.values()) <= {0} and loud == (1, 1), (quiet, loud, counter.reads)


def test_an_object_looks_the_same_with_constant_shapes():
    rays = random_rays(400)
    lighting = Lighting(
        light=torch.ones(400, 3), ambient=torch.full((400, 1), 0.5),
        textureless=torch.zeros(400, 1), background=torch.rand(400, 3),
        use_background_net=torch.zeros(400, 1),
    )  # fmt: skip
    plain, static = ball_renderer(), ball_renderer(static_shapes=True)
    static.load_state_dict(plain.state_dict())
    expected = plain(rays, lighting, lit=True)
    static(rays, lighting, lit=True)  # its room is not known yet
    static.end_step(static.room_used.tolist())
    assert 0 < static.room_used[1] <= static.room_used[0]
    found = static(rays, lighting, lit=True)
    assert static.batch_samples % 8192 == 0 and plain.batch_samples % 8192
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        static(rays, lighting, lit=True)
    assert static.batch_samples % 8192  # pictures have the samples that they need
