"""The live viewer: a scene in the browser during and after training, served by viser.

Pictures are rendered in the training thread between steps. viser's own threads only record requests
(camera poses, pressed buttons), after ``viewer_guard`` has checked who asks and for what. Both
together take at most ``BUDGET`` of the time. Nothing here draws random numbers or changes what is
trained, and any error of a picture switches the viewer off.
"""

import io
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nerf.datasets.scene import Scene
from nerf.metrics import to_8bit
from nerf.outputs.camera_path import interpolate, write_path
from nerf.outputs.viewer_cameras import (
    add_training_cameras,
    address,
    camera_pose,
    camera_radius,
    picture_size,
)
from nerf.training.system import Interrupted

MODES = ("rgb", "depth", "normal", "opacity")  # an object's viewer also has "lit"
BUDGET = 0.05  # part of the time that pictures and messages may take during training
SAVED = 0.1  # seconds of it that are kept while nobody looks
INTERVAL = 0.1  # seconds between two readings of the clients' messages during training
MANY = 3  # connections from which on they are read half as often
SIDES = (96, 192, 384, 640)  # pixels of the longer side: first in motion, the others at rest
REST = 0.3  # seconds without motion before a picture is refined
REFRESH = 2.0  # seconds until a fully refined picture is rendered again during training
MAX_KEYS = 1000  # key frames of a path
SECONDS = (0.5, 600.0)  # shortest and longest path
MAX_TEXT = 2000  # characters of a text
MAX_TEXTS = 100  # changes of the text: each is kept in every checkpoint
CLICK_SECONDS = 0.2  # a button does nothing for so long after it was pressed

RenderView = Callable[
    [np.ndarray, float, tuple[int, int], str, np.ndarray | None, Callable[[], bool]], np.ndarray
]


class ShownView(NamedTuple):
    """What one client's picture shows."""

    request: tuple[Any, ...] | None  # pose, field of view, mode, crop box, aspect
    level: int  # index into SIDES
    moved_at: float  # time of the last change of the request


def check_server(host: str, port: int) -> None:
    """ValueError if viser is missing or the port is taken."""
    try:
        import viser  # noqa: F401
    except ImportError:
        raise ValueError("--viewer needs viser: pip install viser==1.1.1") from None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"--viewer_port {port} on {host}: {reason}; choose another --viewer_port"
            ) from None


class Viewer:
    """Serves one scene. Call ``tick`` after every step, or ``serve`` where nothing is trained.

    scene: its training cameras are shown; None: no cameras. folder: camera_path.json is saved in
    it. modes: kinds of picture to choose from. text: initial content of a text box, None: no box.
    may_pause: whether training waits while somebody has pressed the pause button; off for several
    processes, of which the others would wait in vain. Set ``view`` before the first ``tick``.
    """

    # (c2w, fov, size, mode, box, stopped) -> [H, W, 3] in [0, 1]; Interrupted if stopped()
    view: RenderView | None = None

    def __init__(
        self,
        scene: Scene | None,
        folder: Path,
        host: str,
        port: int,
        log: Callable[[str], None],
        *,
        modes: tuple[str, ...] = MODES,
        text: str | None = None,
        may_pause: bool = True,
    ) -> None:
        import viser

        from nerf.outputs.viewer_guard import Bucket, Guard

        self.scene, self.folder, self.log = scene, folder, log
        self.active, self.paused = True, False
        self.budget, self.cpu_seconds = Bucket(BUDGET, SAVED), 0.0
        self.training = False  # whether what is shown changes by itself
        self.keys: list[tuple[np.ndarray, float]] = []  # c2w, vertical field of view in degrees
        self._pending_text: str | None = None
        self.num_texts = 0
        # While a path is played: its start time, poses [F, 3, 4], fields of view [F] in degrees.
        self.playing: tuple[float, np.ndarray, np.ndarray] | None = None
        self.shown: dict[int, ShownView] = {}  # by client
        self.served_at: dict[int, float] = {}  # time of each client's last picture
        self.num_pictures = 0
        self.guard = Guard()
        with self.guard.installed_in_viser(), redirect_stdout(io.StringIO()):  # viser's banner
            self.server = viser.ViserServer(host=host, port=port, verbose=False)
        try:
            self._set_up(port, modes, text, may_pause)
        except Exception:
            self.close()
            raise
        log(f"viewer: {address(host, port)}/?token={self.guard.token}")

    def _set_up(self, port: int, modes: tuple[str, ...], text: str | None, may_pause: bool) -> None:
        if self.server.get_port() != port:
            raise ValueError(f"--viewer_port {port} is taken; choose another")
        self._add_controls(modes, text, may_pause)
        self.server.scene.set_up_direction("+z")
        self.server.initial_camera.position = (2.75, 0.0, 1.0)
        self.server.initial_camera.look_at = (0.0, 0.0, 0.0)
        if self.scene is not None:
            from nerf.outputs.viewer_guard import one_of

            add_training_cameras(self.server, self.scene)
            checkbox = self.server.gui.add_checkbox("training cameras", True)
            self._checked(checkbox, one_of((False, True)))
            node = self.server.scene.add_frame("/cameras", show_axes=False)
            checkbox.on_update(lambda event: setattr(node, "visible", checkbox.value))

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _add_controls(self, modes: tuple[str, ...], text: str | None, may_pause: bool) -> None:
        from nerf.outputs.viewer_guard import is_text, is_vector, number_between, one_of

        gui, switch = self.server.gui, one_of((False, True))
        radius = 1.0 if self.scene is None else camera_radius(self.scene)  # an object is at 0
        self.mode = self._checked(gui.add_dropdown("show", modes), one_of(modes))
        if text is not None:
            self.text = self._checked(gui.add_text("text", text), is_text)
            hint = "Train on this text from the next step on; the run's flags keep the old text."
            use = self._checked(gui.add_button("use this text", hint=hint), switch)
            use.on_click(self._guarded(self._use_text))
        self.crop = self._checked(gui.add_checkbox("crop", False), switch)
        low, high = (-radius, -radius, -radius), (radius, radius, radius)
        self.low = self._checked(gui.add_vector3("crop from", low, step=0.05), is_vector)
        self.high = self._checked(gui.add_vector3("crop to", high, step=0.05), is_vector)
        seconds = gui.add_number("path: seconds", 4.0, min=SECONDS[0], max=SECONDS[1])
        self.seconds = self._checked(seconds, number_between(*SECONDS))
        buttons = {"add key": self._add_key, "remove key": self._remove_key}
        buttons |= {"play": self._play, "save path": self._save}
        if may_pause:
            buttons = {"pause / resume training": self._pause} | buttons
        for label, action in buttons.items():
            self._checked(gui.add_button(label), switch).on_click(self._guarded(action))

    def _checked(self, handle: Any, check: Callable[[Any], bool]) -> Any:
        """``handle``; from now on browsers may send it the values that pass the check."""
        self.guard.controls[handle._impl.uuid] = check
        return handle

    def new_text(self) -> str | None:
        """The text entered since the last call, if any."""
        text, self._pending_text = self._pending_text, None
        return text or None

    def _guarded(self, action: Callable[[Any], None]) -> Callable[[Any], None]:
        """``action``, once in CLICK_SECONDS, with errors logged: viser calls it in its threads."""
        lock, pressed_at = threading.Lock(), -math.inf

        def run(event: Any) -> None:
            nonlocal pressed_at
            if time.monotonic() - pressed_at < CLICK_SECONDS or not lock.acquire(blocking=False):
                return
            try:
                pressed_at = time.monotonic()
                action(event)
            except Exception as error:
                self.log(f"viewer: {error}")
            finally:
                lock.release()

        return run

    def _pause(self, event: Any) -> None:
        self.paused = not self.paused

    def _use_text(self, event: Any) -> None:
        text = " ".join(self.text.value.split())
        if len(text) > MAX_TEXT or self.num_texts >= MAX_TEXTS:
            reason = f"At most {MAX_TEXT} characters and {MAX_TEXTS} changes."
            event.client.add_notification("This text was not used", reason)
            return
        self.num_texts += 1
        self._pending_text = text

    def _add_key(self, event: Any) -> None:
        if len(self.keys) >= MAX_KEYS:
            raise ValueError(f"a path has at most {MAX_KEYS} keys; remove some")
        camera = event.client.camera
        self.keys.append((camera_pose(camera), math.degrees(camera.fov)))

    def _remove_key(self, event: Any) -> None:
        if self.keys:
            self.keys.pop()

    def _save(self, event: Any) -> None:
        write_path(self.folder / "camera_path.json", self.keys, self.seconds.value)
        self.log(f"viewer: {len(self.keys)} key frames -> {self.folder / 'camera_path.json'}")

    def _play(self, event: Any) -> None:
        if len(self.keys) > 1:
            poses, fovs = (np.array(part) for part in zip(*self.keys, strict=True))
            frames = interpolate(poses, fovs, max(2, round(30 * self.seconds.value)))
            self.playing = (time.monotonic(), *frames)

    def tick(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Between two steps: render a picture if the budget allows it; wait while paused."""
        if not self.active:
            return
        self.training = True
        self.guard.interval = INTERVAL * (2 if len(self.guard.connections) >= MANY else 1)
        taken, self.cpu_seconds = self.guard.cpu_seconds - self.cpu_seconds, self.guard.cpu_seconds
        if self.budget.take(taken):
            start = time.monotonic()
            self._render_pending(stopped)
            self.budget.take(time.monotonic() - start)
        if self.paused:
            self.serve(lambda: stopped() or not self.paused)
            self.cpu_seconds = self.guard.cpu_seconds  # a pause is not training time

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Render pictures without a budget until ``stopped()``."""
        self.training, self.guard.interval = False, 0.0
        while self.active and not stopped():
            time.sleep(0.0 if self._render_pending(stopped) else 0.02)

    def _render_pending(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Render a picture for the client that has waited longest; whether any needed one."""
        try:
            clients = dict(self._clients())
            self.served_at = {number: self.served_at.get(number, 0.0) for number in clients}
            self.shown = {number: view for number, view in self.shown.items() if number in clients}
            waiting = sorted(clients, key=self.served_at.__getitem__)
            return any(self._render_for(number, clients[number], stopped) for number in waiting)
        except Interrupted:
            return False
        except Exception as error:  # no error in the viewer may stop training
            self.active = False
            self.log(f"the viewer stopped after an error: {type(error).__name__}: {error}")
            return False

    def _clients(self) -> list[tuple[int, Any]]:
        """The connected browsers: viser's number and handle of each."""
        return list(self.server.get_clients().items())

    def _render_for(self, number: int, client: Any, stopped: Callable[[], bool]) -> bool:
        """Render a client's next picture, coarse or refined; False if it needs none."""
        camera, now = client.camera, time.monotonic()
        if camera.update_timestamp == 0:  # the browser has not sent its camera yet
            return False
        pose, fov = self._current_camera(camera, now)
        box = np.array([self.low.value, self.high.value]) if self.crop.value else None
        request = (pose.round(4).tobytes(), round(fov, 4), self.mode.value, str(box), camera.aspect)
        last = self.shown.get(number, ShownView(None, -1, 0.0))
        level, moved_at = last.level, last.moved_at
        if request != last.request:
            level, moved_at = 0, now
        elif level + 1 < len(SIDES) and now - moved_at >= REST:
            level += 1
        elif level + 1 == len(SIDES) and self.training and now - moved_at > REFRESH:
            level, moved_at = 1, now  # training has gone on: render again
        else:
            return False
        assert self.view is not None, "set Viewer.view before the first tick"
        size = picture_size(SIDES[level], camera.aspect)
        picture = self.view(pose, fov, size, self.mode.value, box, stopped)
        client.scene.set_background_image(to_8bit(picture), format="jpeg")
        self.shown[number] = ShownView(request, level, moved_at)
        self.served_at[number] = time.monotonic()
        self.num_pictures += 1
        return True

    def _current_camera(self, camera: Any, now: float) -> tuple[np.ndarray, float]:
        """c2w [3, 4] and vertical field of view in radians: of the played path, or the client."""
        if self.playing is not None:
            start, poses, fovs = self.playing
            frame = int(30 * (now - start))
            if frame < len(poses):
                return poses[frame], math.radians(fovs[frame])
            self.playing = None
        return camera_pose(camera), camera.fov

    def close(self) -> None:
        """Stop serving and free the port."""
        self.active = False
        self.guard.close(self.server.get_event_loop())
        self.server.stop()


def open_viewer(
    scene: Scene | None,
    folder: Path,
    host: str,
    port: int,
    log: Callable[[str], None],
    **options: Any,
) -> Viewer | None:
    """A ``Viewer`` with its options; None, with the reason logged, if it cannot be opened."""
    try:
        return Viewer(scene, folder, host, port, log, **options)
    except Exception as error:  # whatever a viewer does, training goes on
        log(f"the viewer could not be opened: {type(error).__name__}: {error}")
        return None
