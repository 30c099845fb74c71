"""The live viewer: a scene in the browser during and after training, served by viser.

Pictures are rendered in the training thread between steps, for at most ``BUDGET`` of the wall time.
viser's own threads only record requests (camera poses, pressed buttons). Nothing here draws random
numbers or changes what is trained, and any error switches the viewer off.
"""

import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nerf.datasets.scene import Scene
from nerf.metrics import to_8bit
from nerf.outputs.camera_path import interpolate, write_path

MODES = ("rgb", "depth", "normal", "opacity")  # an object's viewer also has "lit"
# Part of the wall time spent on pictures during training. The whole cost stays below a tenth: a
# picture evicts data from the caches, which slows down the next steps by nearly as much again.
BUDGET = 0.05
SIDES = (96, 192, 384, 640)  # pixels of the longer side: first in motion, the others at rest
REST = 0.3  # seconds without motion before a picture is refined
REFRESH = 2.0  # seconds until a fully refined picture is rendered again during training
THUMBNAIL = 64  # pixels of a training picture's longer side
MAX_FRUSTA = 100  # training cameras shown at most

RenderView = Callable[[np.ndarray, float, tuple[int, int], str, np.ndarray | None], np.ndarray]


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


def quaternion(c2w: np.ndarray) -> np.ndarray:
    """Quaternion wxyz in viser's camera axes (y down, z forward) for c2w in those of nerf.rays."""
    from scipy.spatial.transform import Rotation

    return np.roll(Rotation.from_matrix(c2w[:, :3] * [1, -1, -1]).as_quat(), 1)


def camera_pose(camera: Any) -> np.ndarray:
    """c2w [3, 4] of a viser camera, in the axes of ``nerf.rays``."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_quat(np.roll(camera.wxyz, -1)).as_matrix() * [1, -1, -1]
    return np.concatenate([turn, np.asarray(camera.position)[:, None]], axis=1)


class Viewer:
    """Serves one scene. Call ``tick`` after every step, or ``serve`` where nothing is trained.

    scene: its training cameras are shown; None: no cameras. folder: camera_path.json is saved in
    it. modes: kinds of picture to choose from. text: initial content of a text box, None: no box.
    may_pause: whether training waits while somebody has pressed the pause button; off for several
    processes, of which the others would wait in vain. Set ``view`` before the first ``tick``.
    """

    view: RenderView | None = None  # (c2w, fov, size, mode, box) -> [H, W, 3] in [0, 1]

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

        self.scene, self.folder, self.log = scene, folder, log
        self.active, self.paused = True, False
        self.render_seconds, self.budget_start = 0.0, time.monotonic()
        self.keys: list[tuple[np.ndarray, float]] = []  # c2w, vertical field of view in degrees
        self._pending_text: str | None = None
        # While a path is played: its start time, poses [F, 3, 4], fields of view [F] in degrees.
        self.playing: tuple[float, np.ndarray, np.ndarray] | None = None
        self.shown: dict[int, ShownView] = {}  # by client
        self.num_pictures = 0
        self.server = viser.ViserServer(host=host, port=port, verbose=False)
        try:
            self._set_up(port, modes, text, may_pause)
        except Exception:
            self.server.stop()
            raise
        log(f"viewer: http://{host}:{port}")

    def _set_up(self, port: int, modes: tuple[str, ...], text: str | None, may_pause: bool) -> None:
        if self.server.get_port() != port:
            raise ValueError(f"--viewer_port {port} is taken; choose another")
        self._add_controls(modes, text, may_pause)
        self.server.scene.set_up_direction("+z")
        self.server.initial_camera.position = (2.75, 0.0, 1.0)
        self.server.initial_camera.look_at = (0.0, 0.0, 0.0)
        if self.scene is not None:
            self._add_training_cameras(self.scene)
            checkbox = self.server.gui.add_checkbox("training cameras", True)
            node = self.server.scene.add_frame("/cameras", show_axes=False)
            checkbox.on_update(lambda event: setattr(node, "visible", checkbox.value))

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _add_controls(self, modes: tuple[str, ...], text: str | None, may_pause: bool) -> None:
        gui = self.server.gui
        self.mode = gui.add_dropdown("show", modes)
        if text is not None:
            box = gui.add_text("text", text)
            hint = "Train on this text from the next step on; the run's flags keep the old text."
            use = gui.add_button("use this text", hint=hint)
            use.on_click(lambda event: setattr(self, "_pending_text", box.value.strip()))
        self.crop = gui.add_checkbox("crop", False)
        radius = self._radius()
        self.low = gui.add_vector3("crop from", (-radius, -radius, -radius), step=0.05)
        self.high = gui.add_vector3("crop to", (radius, radius, radius), step=0.05)
        self.seconds = gui.add_number("path: seconds", 4.0, min=0.5, max=600.0)
        buttons = {"add key": self._add_key, "remove key": self._remove_key}
        buttons |= {"play": self._play, "save path": self._save}
        if may_pause:
            pause = gui.add_button("pause / resume training")
            pause.on_click(lambda event: setattr(self, "paused", not self.paused))
        for label, action in buttons.items():
            gui.add_button(label).on_click(self._guarded(action))

    def new_text(self) -> str | None:
        """The text entered since the last call, if any."""
        text, self._pending_text = self._pending_text, None
        return text or None

    def _guarded(self, action: Callable[[Any], None]) -> Callable[[Any], None]:
        """``action``, with errors logged: they occur in viser's threads."""

        def run(event: Any) -> None:
            try:
                action(event)
            except Exception as error:
                self.log(f"viewer: {error}")

        return run

    def _radius(self) -> float:
        """The largest coordinate of a camera; 1 for an object, which is at the origin."""
        if self.scene is None:
            return 1.0
        return float(self.scene.c2w[:, :, 3].abs().max())

    def _add_key(self, event: Any) -> None:
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

    def _add_training_cameras(self, scene: Scene) -> None:
        """Show the training cameras with their pictures, and start at the first one."""
        views = scene.splits["train"][:MAX_FRUSTA]
        up = scene.c2w[:, :, 1].sum(0).cpu().numpy()
        self.server.scene.set_up_direction(tuple(up / np.linalg.norm(up)))
        scale = 0.04 * self._radius()
        for view in views:
            height, width = scene.view_size(view)
            pose, focal = scene.c2w[view].cpu().numpy(), float(scene.intrinsics[view, 1])
            step = max(1, max(height, width) // THUMBNAIL)
            picture = to_8bit(scene.picture(view)[::step, ::step].cpu().numpy())
            self.server.scene.add_camera_frustum(
                f"/cameras/{scene.names[view]}", 2 * math.atan(0.5 * height / focal),
                width / height, scale=scale, image=picture, wxyz=quaternion(pose),
                position=pose[:, 3], thickness=0.02 * scale,
            )  # fmt: skip
        first = scene.c2w[views[0]].cpu().numpy()
        self.server.initial_camera.position = tuple(
            first[:, 3] - 0.2 * self._radius() * first[:, 2]
        )
        self.server.initial_camera.look_at = tuple(first[:, 3] - self._radius() * first[:, 2])

    def tick(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Between two steps: render a picture if the budget allows it; wait while paused."""
        if not self.active:
            return
        if self.render_seconds <= BUDGET * (time.monotonic() - self.budget_start):
            self._render_pending()
        while self.active and self.paused and not stopped():
            time.sleep(0.0 if self._render_pending() else 0.02)
            # A pause is not training time: the budget starts again after it.
            self.render_seconds, self.budget_start = 0.0, time.monotonic()

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Render pictures without a budget until ``stopped()``."""
        while self.active and not stopped():
            time.sleep(0.0 if self._render_pending() else 0.02)

    def _render_pending(self) -> bool:
        """Render the next picture of every client that needs one; whether there was any."""
        start = time.monotonic()
        try:
            return any([self._render_for(number, c) for number, c in self._clients()])
        except Exception as error:  # no error in the viewer may stop training
            self.active = False
            self.log(f"viewer switched off: {type(error).__name__}: {error}")
            return False
        finally:
            self.render_seconds += time.monotonic() - start

    def _clients(self) -> list[tuple[int, Any]]:
        """The connected browsers: viser's number and handle of each."""
        return list(self.server.get_clients().items())

    def _render_for(self, number: int, client: Any) -> bool:
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
        elif level + 1 == len(SIDES) and self.render_seconds > 0 and now - moved_at > REFRESH:
            level, moved_at = 1, now  # training has gone on: render again
        else:
            return False
        longer, aspect = SIDES[level], camera.aspect
        width = longer if aspect >= 1 else max(2, round(longer * aspect))
        height = max(2, round(width / aspect))
        assert self.view is not None, "set Viewer.view before the first tick"
        picture = self.view(pose, fov, (height, width), self.mode.value, box)
        client.scene.set_background_image(to_8bit(picture), format="jpeg")
        self.shown[number] = ShownView(request, level, moved_at)
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
        log(f"no viewer: {type(error).__name__}: {error}")
        return None
