"""The live viewer and its camera paths: geometry, files, faults, and that training is untouched."""

import json
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import DREAM_TINY, REPOSITORY, ball_renderer, free_port, run_script

from nerf.build import load_scene
from nerf.cameras import look_at
from nerf.flags import nerf as nerf_flags
from nerf.outputs import object as object_outputs
from nerf.outputs import render, viewer, viewer_cameras
from nerf.outputs import scene as scene_outputs
from nerf.outputs.camera_path import interpolate, read_path, write_path
from nerf.rays import Rays
from nerf.renderer import Rendered
from nerf.training import system
from nerf.training.distributed import World
from nerf.training.ema import EMA


def keys():
    return [(look_at((x, 4.0, 1.0), (0, 0, 0)), 40.0 + x) for x in (-2.0, 0.0, 3.0)]


def test_a_saved_path_passes_through_its_keys(tmp_path):
    path = tmp_path / "path.json"
    write_path(path, keys(), 61 / 30)
    poses, fovs = read_path(path)
    assert len(poses) == 61
    for at, (c2w, fov) in zip((0, 30, 60), keys(), strict=True):
        np.testing.assert_allclose(poses[at], c2w, atol=1e-6)
        assert abs(fovs[at] - fov) < 1e-6


def keyed(seconds, c2w, fov_deg, times: int) -> str:
    """A path file with the same key several times."""
    return json.dumps(
        {"seconds": seconds, "keys": [{"c2w": c2w.tolist(), "fov_deg": fov_deg}] * times}
    )


def test_between_keys_cameras_stay_rotations_and_move_smoothly():
    poses, fovs = zip(*keys(), strict=True)
    frames, _ = interpolate(np.array(poses), np.array(fovs), 301)
    turns = frames[:, :, :3]
    np.testing.assert_allclose(
        turns @ turns.transpose(0, 2, 1), np.eye(3)[None] + 0 * turns, atol=1e-9
    )
    bend = np.abs(np.diff(frames, n=2, axis=0)).max()
    assert bend < 1e-3  # a corner at a key would be of the size of one frame's motion, 0.02


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "is no camera path"),
        ("[1]", "is no camera path"),
        (keyed(1, np.eye(3, 4), 40, 1), "1 key frame"),
        (keyed(1, (2 * np.eye(3, 4)), 40, 2), "not a rotation"),
        (keyed(1, np.eye(3, 4), 0, 2), "fov_deg"),
        (keyed(1e9, np.eye(3, 4), 9, 2), "fps"),
    ],
)  # fmt: skip
def test_a_broken_path_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "path.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_path(path)
    assert "\n" not in str(caught.value)


def test_viser_cameras_and_ours_convert_back():
    c2w = look_at((1.0, -3.0, 2.0), (0.2, 0.1, 0))
    camera = SimpleNamespace(wxyz=viewer_cameras.quaternion(c2w), position=c2w[:, 3])
    np.testing.assert_allclose(viewer_cameras.camera_pose(camera), c2w, atol=1e-12)


def test_the_crop_box_keeps_what_lies_between_its_faces():
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    origins = torch.tensor([[0.0, 0, 5], [3, 0, 5], [0, 0, 0.5]])
    down = torch.tensor([[0.0, 0, -2]]).expand(3, 3)
    bounds = torch.full((3, 1), 0.1), torch.full((3, 1), 9.0)
    rays, inside = render.clip_rays(Rays(origins, down, down / 2, *bounds), box)
    assert inside.tolist() == [True, False, True]
    torch.testing.assert_close(rays.near[:, 0], torch.tensor([2.0, 0.1, 0.1]))
    torch.testing.assert_close(rays.far[[0, 2], 0], torch.tensor([3.0, 0.75]))


def test_normals_of_a_plane_face_the_camera():
    y, x = torch.meshgrid(-torch.arange(4.0), torch.arange(5.0), indexing="ij")
    normal = render.normals_from_points(
        torch.stack([x, y, -3 + 0 * x], dim=-1)
    )  # a camera at 0 looks along -z
    torch.testing.assert_close(normal, torch.tensor([0.0, 0, 1]).expand(4, 5, 3))


def fake_client(stamp=1.0):
    c2w = look_at((0.0, -3.0, 1.0), (0, 0, 0))
    camera = SimpleNamespace(
        wxyz=viewer_cameras.quaternion(c2w), position=c2w[:, 3], fov=0.7, aspect=1.5
    )
    camera.update_timestamp, sent = stamp, []
    scene = SimpleNamespace(set_background_image=lambda image, format: sent.append(image.shape))
    return SimpleNamespace(camera=camera, scene=scene), sent


def open_viewer(monkeypatch, tmp_path, view):
    pytest.importorskip("viser")
    said, (client, sent) = [], fake_client()
    shown = viewer.Viewer(None, tmp_path, "127.0.0.1", free_port(), said.append)
    shown.view = view
    monkeypatch.setattr(shown, "_clients", lambda: [(0, client)])
    return shown, client, sent, said


def test_pictures_are_coarse_in_motion_and_refined_at_rest(monkeypatch, tmp_path):
    shown, client, sent, _ = open_viewer(
        monkeypatch, tmp_path, lambda pose, fov, size, mode, box, stopped: np.zeros((*size, 3))
    )
    monkeypatch.setattr(viewer, "REST", 0.0)
    try:
        for _ in viewer.SIDES:
            shown._render_pending()
        client.camera.position = client.camera.position + 0.1
        shown._render_pending()
    finally:
        shown.close()
    assert [shape[1] for shape in sent] == [*viewer.SIDES, viewer.SIDES[0]]


def test_a_fault_switches_the_viewer_off_and_is_said_once(monkeypatch, tmp_path):
    def view(*wish):
        raise RuntimeError("broken")

    shown, _, _, said = open_viewer(monkeypatch, tmp_path, view)
    shown.tick()
    shown.tick()
    shown.server.stop()
    assert not shown.active and [s for s in said if "broken" in s] == said[1:]


class Clock:
    """A clock that stands until it is moved on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return 0.0


def seconds_of_pictures(monkeypatch, tmp_path, hours_before, message_seconds):
    """What pictures of 0.2 s each took of 100 s of training with steps of 0.1 s."""
    clock = Clock()
    monkeypatch.setattr(viewer, "time", clock)
    taken = []

    def view(pose, fov, size, mode, box, stopped):
        taken.append(0.2)
        clock.now += 0.2
        return np.zeros((*size, 3))

    shown, client, _, _ = open_viewer(monkeypatch, tmp_path, view)
    monkeypatch.setattr(shown.guard, "close", lambda loop: None)
    from nerf.outputs import viewer_guard

    monkeypatch.setattr(viewer_guard, "time", clock)
    shown.budget = viewer_guard.Bucket(viewer.BUDGET, viewer.SAVED)
    try:
        clock.now += 3600 * hours_before
        end = clock.now + 100
        while clock.now < end:
            clock.now += 0.1
            shown.guard.cpu_seconds += 0.1 * message_seconds
            client.camera.position = client.camera.position + 0.01
            shown.tick()
    finally:
        monkeypatch.setattr(viewer_guard, "time", time)
        monkeypatch.setattr(viewer, "time", time)
        shown.server.stop()
    return sum(taken)


def test_pictures_and_messages_together_stay_within_the_budget(monkeypatch, tmp_path):
    """Also after hours in which nobody looked: what was not used then is not made up for."""
    most = 100 * viewer.BUDGET + viewer.SAVED + 0.2
    alone = seconds_of_pictures(monkeypatch, tmp_path, 0, 0.0)
    later = seconds_of_pictures(monkeypatch, tmp_path, 3, 0.0)
    beside = seconds_of_pictures(monkeypatch, tmp_path, 0, 0.03)
    assert most - 1 < alone <= most and most - 1 < later <= most
    assert alone - 3.5 < beside < alone - 2.5  # messages took 3 s of it
    assert seconds_of_pictures(monkeypatch, tmp_path, 0, 0.2) < 1  # no picture after the first


def test_an_occupied_port_ends_before_training():
    pytest.importorskip("viser")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ["--viewer", "--viewer_port", taken.getsockname()[1], "--datadir", "nowhere"]
        done = run_script(flags)
    assert done.returncode == 2 and "choose another --viewer_port" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_training_is_bit_identical_while_someone_looks(monkeypatch, tmp_path):
    pytest.importorskip("viser")
    import run_nerf

    client, sent = fake_client()
    monkeypatch.setattr(viewer.Viewer, "_clients", lambda self: [(0, client)])
    monkeypatch.setattr(viewer, "BUDGET", 1.0)
    flags = ["--config", str(REPOSITORY / "configs/demo.txt"), "--datadir", str(tmp_path / "data")]
    flags += "--N_iters 12 --i_img 0 --i_video 0 --i_testset 0 --testskip 20 --basedir".split()
    weights = []
    for name in ("with", "without"):
        shown = ["--viewer", "--viewer_port", str(free_port())] if name == "with" else []
        assert run_nerf.main([*flags, str(tmp_path / name), *shown]) == 0
        path = next((tmp_path / name).glob("*/000012.tar"))
        weights.append(torch.load(path, weights_only=True)["network_fn_state_dict"])
    assert sent  # pictures were rendered in between
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def dream(*flags):

    import run_dreamfusion

    return run_dreamfusion.main([str(flag) for flag in (*DREAM_TINY, "--no_reload", *flags)])


def test_a_looker_changes_nothing_of_an_object(monkeypatch, tmp_path):
    """Bit for bit the same weights with and without somebody who looks, and he does see it."""
    pytest.importorskip("viser")
    client, sent = fake_client()
    monkeypatch.setattr(viewer.Viewer, "_clients", lambda self: [(0, client)])
    monkeypatch.setattr(viewer, "BUDGET", 1.0)
    flags = ["--N_iters", 6, "--basedir", tmp_path, "--video_frames", 1]
    assert dream(*flags, "--expname", "alone") == 0 and not sent
    assert dream(*flags, "--expname", "seen", "--viewer", "--viewer_port", free_port()) == 0
    assert sent
    alone, seen = (
        torch.load(tmp_path / name / "000006.tar", weights_only=True)["network_fn_state_dict"]
        for name in ("alone", "seen")
    )
    assert all(torch.equal(alone[key], seen[key]) for key in alone)


def test_an_object_fills_the_picture_where_it_is_and_the_box_cuts_it():
    module = ball_renderer()
    place = {"elevation_deg": 0.0, "radius": 3.0, "fov_deg": 40.0, "bound": 1.0}
    parts = (None, World(0, 1, torch.device("cpu")), module, EMA(module, 0.0), "off", 32, "white")
    shown = object_outputs.ObjectOutputs(*parts, **place)
    c2w = look_at((0.0, -3.0, 0.0), (0, 0, 0))
    for mode in object_outputs.MODES:
        picture = object_outputs.render_free_view(shown, c2w, 0.7, (16, 24), mode, None)
        assert picture.shape == (16, 24, 3) and 0 <= picture.min() <= picture.max() <= 1
    opacity = object_outputs.render_free_view(shown, c2w, 0.7, (16, 24), "opacity", None)[..., 0]
    assert opacity[8, 12] > 0.9 and opacity[0, 0] < 0.1
    left = [[-1, -1, -1], [0, 1, 1]]
    half = object_outputs.render_free_view(shown, c2w, 0.7, (16, 24), "opacity", left)[..., 0]
    assert half[8, 11] > 0.9 and (half[:, 13:] == 0).all()


def test_a_picture_is_given_up_between_two_blocks(demo_blender):
    """Of a scene and of an object, so that a program can stop while somebody looks."""
    flags = ["--datadir", str(demo_blender), "--dataset_type", "blender", "--testskip", "1"]
    scene, blocks = load_scene(nerf_flags.parse(flags), lambda line: None), []

    def render(rays):
        blocks.append(len(rays.origins))
        ray = torch.zeros(len(rays.origins))
        return Rendered(ray[:, None].expand(-1, 3), ray, ray)

    world = World(0, 1, torch.device("cpu"))
    outputs = scene_outputs.SceneOutputs(render, scene, 50, world)
    view = (look_at((0.0, -3.0, 1.0), (0, 0, 0)), 0.7, (16, 24), "rgb", None)
    assert scene_outputs.render_free_view(outputs, *view).shape == (16, 24, 3)
    assert len(blocks) == 8
    with pytest.raises(system.Interrupted):
        scene_outputs.render_free_view(outputs, *view, lambda: len(blocks) == 8 + 3)
    assert len(blocks) == 8 + 3
    module = ball_renderer()
    place = {"elevation_deg": 0.0, "radius": 3.0, "fov_deg": 40.0, "bound": 1.0}
    parts = (None, world, module, EMA(module, 0.0), "off", 32, "white")
    shown = object_outputs.ObjectOutputs(*parts, **place)
    with pytest.raises(system.Interrupted):
        object_outputs.render_free_view(shown, *view, lambda: True)


def test_a_new_text_is_handed_over_once(tmp_path):
    pytest.importorskip("viser")
    port, said = free_port(), []
    with viewer.Viewer(None, tmp_path, "127.0.0.1", port, said.append, text="a red cone") as window:
        window._pending_text = "a blue cube"
        assert (window.new_text(), window.new_text()) == ("a blue cube", None)
    viewer.check_server("127.0.0.1", port)  # closing has freed the port


def test_an_object_is_rendered_along_a_saved_path(tmp_path):
    path = tmp_path / "path.json"
    write_path(path, keys(), 0.1)  # three frames
    flags = [*("--basedir", tmp_path, "--expname", "ball")]
    assert dream(*flags, "--N_iters", 2) == 0

    import run_dreamfusion

    flags += ["--render_only", "--camera_path", path]
    assert run_dreamfusion.main([str(flag) for flag in (*DREAM_TINY, *flags)]) == 0
    frames = sorted((tmp_path / "ball" / "render_path_000002_path").glob("*.png"))
    assert [frame.name for frame in frames] == ["000.png", "001.png", "002.png"]


def test_a_text_typed_into_the_viewer_is_followed_from_then_on(monkeypatch, tmp_path):
    """The log and metrics.json keep it; one that cannot be embedded changes nothing."""
    pytest.importorskip("viser")
    import run_dreamfusion
    from guidance import build as guidance_build

    monkeypatch.setattr(viewer.Viewer, "_clients", lambda self: [])
    texts = iter(["a blue cube", None, "broken"])
    monkeypatch.setattr(viewer.Viewer, "new_text", lambda self: next(texts, None))
    made = guidance_build.make_conditions

    def make(args, prior, log):
        if args.prompt == "broken":
            raise RuntimeError("no memory")
        return made(args, prior, log)

    monkeypatch.setattr(guidance_build, "make_conditions", make)
    flags = "--config configs/dream_tiny.txt --N_iters 4 --video_frames 1 --no-mesh --eval_res 16"
    flags += " --batch_views 1 --march_steps 16 --device cpu --expname typed --prompt"
    flags = [*flags.split(), "a red cone", "--basedir", tmp_path, "--viewer"]
    monkeypatch.chdir(REPOSITORY)
    words = [str(flag) for flag in (*flags, "--viewer_port", free_port())]
    assert run_dreamfusion.main(words) == 0
    metrics = json.loads((tmp_path / "typed" / "metrics.json").read_text())
    assert metrics["prompts_by_viewer"] == {"1": "a blue cube"}
    log = (tmp_path / "typed" / "log.txt").read_text()
    assert (
        "the viewer set the prompt to 'a blue cube'" in log
        and "'broken' is not used: no memory" in log
    )


@pytest.fixture
def browser():
    """Headless Chromium, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    places = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in places:
        pytest.skip("no chromium with chromedriver in PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    flags = "headless no-sandbox use-angle=swiftshader enable-unsafe-swiftshader no-first-run"
    flags += " disable-background-networking disable-component-update window-size=900,600"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    service = webdriver.chrome.service.Service(places[1])
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.mark.slow
def test_a_browser_shows_the_object_and_its_buttons_work(browser, tmp_path):
    """Chromium sees a ball on white, pauses training, and saves a path."""
    from selenium.webdriver.common.by import By

    port = free_port()
    flags = [
        *DREAM_TINY,
        "--basedir",
        tmp_path,
        "--N_iters",
        100_000,
        "--viewer",
        "--viewer_port",
        port,
    ]
    command = [sys.executable, "run_dreamfusion.py", *map(str, flags), "--lrate", "3e-2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: can_connect(port), 120)
        browser.get(f"http://127.0.0.1:{port}")

        def shown():
            shot = iio.imread(browser.get_screenshot_as_png())[..., :3] / 255.0
            return shot[:, : shot.shape[1] * 2 // 3]

        # Orange where the ball is (guidance.gaussian), in the middle third.
        wait_for(lambda: is_orange(shown()).mean() > 0.005, 120)
        buttons = {b.text.strip(): b for b in browser.find_elements(By.TAG_NAME, "button")}
        buttons["pause / resume training"].click()
        log = tmp_path / "ball" / "metrics.csv"
        time.sleep(2.0)
        before = log.read_text()
        time.sleep(2.0)
        assert log.read_text() == before
        buttons["add key"].click()
        buttons["save path"].click()
        wait_for(lambda: (tmp_path / "ball" / "camera_path.json").exists(), 20)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_browser_elsewhere_needs_the_token_and_its_page_keeps_it(browser, monkeypatch, tmp_path):
    """The cookie of the page reaches the websocket; another origin's page gets nothing."""
    from nerf.outputs import viewer_guard

    monkeypatch.setattr(viewer_guard, "_peer", lambda connection: "10.0.0.7")
    said = []
    with viewer.Viewer(None, tmp_path, "127.0.0.1", free_port(), said.append) as window:
        printed = said[0].removeprefix("viewer: ")
        place = printed.partition("/?")[0]
        browser.get(place)
        assert "with its token" in browser.page_source
        browser.get(printed)
        wait_for(window._clients, 30)
        browser.get(place)  # later visits need no token
        wait_for(lambda: any(number > 0 for number, _ in window._clients()), 30)
        browser.get("data:text/html,<title>elsewhere</title>")
        wait_for(lambda: not window._clients(), 30)
        protocol = f"viser-v{pytest.importorskip('viser').__version__}"
        socket_of = f"new WebSocket('{place.replace('http', 'ws')}', ['{protocol}'])"
        browser.execute_script(f"window.s = {socket_of}; s.onclose = () => document.title = 'no'")
        wait_for(lambda: browser.title == "no", 30)
        assert not window._clients()


def is_orange(picture):
    red, green, blue = np.moveaxis(picture, -1, 0)
    return (red > 0.6) & (red - blue > 0.3) & (green < red)


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(happened, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.5)
