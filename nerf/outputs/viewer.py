"""The live viewer: a scene in the browser while it trains and after, served by viser.

Pictures are rendered in the training thread between steps, at most ``BUDGET`` of the wall time.
viser's own threads only leave wishes here (where the camera is, which button was pressed). Nothing
draws random numbers or touches what is trained; any fault switches the viewer off.
"""

import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nerf.metrics import to_8bit
from nerf.outputs.camera_path import interpolate, write_path

MODES = ("rgb", "depth", "normal", "opacity")  # "lit" as well where there is light
# Of the wall time, for pictures, while training. The promise is a tenth in all: what a picture
# pushes out of the caches costs the steps after it nearly as much again.
BUDGET = 0.05
SIDES = (96, 192, 384, 640)  # longer side of a picture: first while moving, then refined at rest
REST = 0.3  # seconds without motion before a picture is refined
THUMBNAIL = 64  # pixels of a training picture's longer side
FRUSTA = 100  # cameras shown at most


def check_server(host: str, port: int) -> None:
    """ValueError if the viewer cannot be served: viser missing or the port taken."""
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
    """wxyz of a camera in viser's axes (y down, z forward), of c2w in ours."""
    from scipy.spatial.transform import Rotation

    return np.roll(Rotation.from_matrix(c2w[:, :3] * [1, -1, -1]).as_quat(), 1)


def camera_pose(camera) -> np.ndarray:
    """c2w [3, 4] in our axes of a viser camera."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_quat(np.roll(camera.wxyz, -1)).as_matrix() * [1, -1, -1]
    return np.concatenate([turn, np.asarray(camera.position)[:, None]], axis=1)


class Viewer:
    """Serves one scene. ``tick`` after every step, ``serve`` to go on without training.

    view(c2w, fov, size, mode, box) -> [H, W, 3], to be set; scene: whose cameras are shown, or
    None. text: what a text box starts with, None: no box. may_pause: whether training waits while
    somebody has pressed the button; among several processes the others would not wait for ever.
    """

    view: Callable | None = None

    def __init__(self, scene, folder: Path, host: str, port: int, log, *,
                 modes=MODES, text: str | None = None, may_pause=True) -> None:  # fmt: skip
        import viser

        self.scene, self.folder, self.log = scene, folder, log
        self.on, self.paused, self.spent, self.began = True, False, 0.0, time.monotonic()
        self.keys: list[tuple[np.ndarray, float]] = []
        self._asked: str | None = None
        self.playing: tuple | None = None
        self.shown: dict[int, tuple] = {}  # client -> what its picture shows, and how finely
        self.frames = 0
        self.server = viser.ViserServer(host=host, port=port, verbose=False)
        try:
            self._set_up(port, modes, text, may_pause)
        except Exception:
            self.server.stop()
            raise
        log(f"viewer: http://{host}:{port}")

    def _set_up(self, port: int, modes, text: str | None, may_pause: bool) -> None:
        if self.server.get_port() != port:
            raise ValueError(f"--viewer_port {port} is taken; choose another")
        self._controls(modes, text, may_pause)
        self.server.scene.set_up_direction("+z")
        self.server.initial_camera.position = (2.75, 0.0, 1.0)
        self.server.initial_camera.look_at = (0.0, 0.0, 0.0)
        if self.scene is not None:
            self._cameras()
            cameras = self.server.gui.add_checkbox("training cameras", True)
            node = self.server.scene.add_frame("/cameras", show_axes=False)
            cameras.on_update(lambda event: setattr(node, "visible", cameras.value))

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _controls(self, modes, text: str | None, may_pause: bool) -> None:
        gui = self.server.gui
        self.mode = gui.add_dropdown("show", modes)
        if text is not None:
            box = gui.add_text("text", text)
            note = "From then on the object follows the new text: its flags no longer describe it."
            use = gui.add_button("use this text", hint=note)
            use.on_click(lambda event: setattr(self, "_asked", box.value.strip()))
        self.crop = gui.add_checkbox("crop", False)
        reach = self._reach()
        self.low = gui.add_vector3("crop from", (-reach,) * 3, step=0.05)
        self.high = gui.add_vector3("crop to", (reach,) * 3, step=0.05)
        self.seconds = gui.add_number("path: seconds", 4.0, min=0.5, max=600.0)
        buttons = {"add key": self._add_key, "remove key": self._remove_key}
        buttons |= {"play": self._play, "save path": self._save}
        if may_pause:
            pause = gui.add_button("pause / resume training")
            pause.on_click(lambda event: setattr(self, "paused", not self.paused))
        for label, action in buttons.items():
            gui.add_button(label).on_click(self._guarded(action))

    def new_text(self) -> str | None:
        """The text that somebody has asked for since the last call, if any."""
        text, self._asked = self._asked, None
        return text or None

    def _guarded(self, action):
        def run(event) -> None:
            try:
                action(event)
            except Exception as error:  # in viser's thread: must never reach training
                self.log(f"viewer: {error}")

        return run

    def _reach(self) -> float:
        if self.scene is None:  # an object in the middle
            return 1.0
        return float(self.scene.c2w[:, :, 3].abs().max())

    def _add_key(self, event) -> None:
        camera = event.client.camera
        self.keys.append((camera_pose(camera), math.degrees(camera.fov)))

    def _remove_key(self, event) -> None:
        if self.keys:
            self.keys.pop()

    def _save(self, event) -> None:
        write_path(self.folder / "camera_path.json", self.keys, self.seconds.value)
        self.log(f"viewer: {len(self.keys)} keys -> {self.folder / 'camera_path.json'}")

    def _play(self, event) -> None:
        if len(self.keys) > 1:
            poses, fovs = (np.array(part) for part in zip(*self.keys, strict=True))
            frames = interpolate(poses, fovs, max(2, round(30 * self.seconds.value)))
            self.playing = (time.monotonic(), *frames)

    def _cameras(self) -> None:
        scene, views = self.scene, self.scene.splits["train"][:FRUSTA]
        up = scene.c2w[:, :, 1].sum(0).cpu().numpy()
        self.server.scene.set_up_direction(tuple(up / np.linalg.norm(up)))
        scale = 0.04 * self._reach()
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
        self.server.initial_camera.position = tuple(first[:, 3] - 0.2 * self._reach() * first[:, 2])
        self.server.initial_camera.look_at = tuple(first[:, 3] - self._reach() * first[:, 2])

    def tick(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Between two steps: a picture if one is due within the budget; waits while paused."""
        if not self.on:
            return
        if self.spent <= BUDGET * (time.monotonic() - self.began):
            self._work()
        while self.on and self.paused and not stopped():
            time.sleep(0.0 if self._work() else 0.02)
            # The time of a pause is not training's: it neither earns nor costs budget.
            self.spent, self.began = 0.0, time.monotonic()

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Pictures until ``stopped``, all the time."""
        while self.on and not stopped():
            time.sleep(0.0 if self._work() else 0.02)

    def _work(self) -> bool:
        """Render one picture if somebody is owed one; whether that was so."""
        start = time.monotonic()
        try:
            return any([self._client(number, c) for number, c in self._clients()])
        except Exception as error:  # no viewer fault may stop training
            self.on = False
            self.log(f"viewer switched off: {type(error).__name__}: {error}")
            return False
        finally:
            self.spent += time.monotonic() - start

    def _clients(self):
        return list(self.server.get_clients().items())

    def _client(self, number: int, client) -> bool:
        camera, now = client.camera, time.monotonic()
        if camera.update_timestamp == 0:  # it has not said yet where it looks from
            return False
        pose, fov = camera_pose(camera), camera.fov
        if self.playing is not None:
            began, poses, fovs = self.playing
            at = int(30 * (now - began))
            if at < len(poses):
                pose, fov = poses[at], math.radians(fovs[at])
            else:
                self.playing = None
        box = np.array([self.low.value, self.high.value]) if self.crop.value else None
        wish = (pose.round(4).tobytes(), round(fov, 4), self.mode.value, str(box), camera.aspect)
        last, level, moved = self.shown.get(number, (None, -1, 0.0))
        if wish != last:
            level, moved = 0, now
        elif level + 1 < len(SIDES) and now - moved >= REST:
            level += 1
        elif level + 1 == len(SIDES) and self.spent > 0 and now - moved > 2.0:
            level, moved = 1, now  # training goes on: look again
        else:
            return False
        longer, aspect = SIDES[level], camera.aspect
        width = longer if aspect >= 1 else max(2, round(longer * aspect))
        height = max(2, round(width / aspect))
        picture = self.view(pose, fov, (height, width), self.mode.value, box)
        client.scene.set_background_image(to_8bit(picture), format="jpeg")
        self.shown[number], self.frames = (wish, level, moved), self.frames + 1
        return True

    def close(self) -> None:
        """Free the port."""
        self.on = False
        self.server.stop()
