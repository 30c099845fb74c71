"""The viewer as a server: hostile web pages, clients and messages over real sockets."""

import math
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from helpers import DREAM_TINY, REPOSITORY, free_port

pytest.importorskip("viser")

import msgspec  # noqa: E402  comes with viser
import viser  # noqa: E402
from websockets.exceptions import (  # noqa: E402
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
)
from websockets.sync.client import connect  # noqa: E402

from nerf.outputs import viewer, viewer_guard  # noqa: E402
from nerf.training.system import Interrupted  # noqa: E402

PROTOCOL = f"viser-v{viser.__version__}"
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: {PROTOCOL}\r\n"
)
CAMERA = {
    "type": "ViewerCameraMessage", "wxyz": (1.0, 0, 0, 0), "position": (0.0, -3, 1), "fov": 0.8,
    "near": 0.01, "far": 1000.0, "image_height": 300, "image_width": 400, "look_at": (0, 0, 0),
    "up_direction": (0, 0, 1),
}  # fmt: skip


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """An open viewer of black pictures."""
    # Clients of all tests would come from one place within seconds.
    monkeypatch.setattr(viewer_guard, "CONNECTION_RATE", (1e3, 1e3))
    said: list[str] = []
    with viewer.Viewer(
        None, tmp_path, "127.0.0.1", free_port(), said.append, text="a cone"
    ) as window:
        window.view = lambda pose, fov, size, mode, box, stopped: np.zeros((*size, 3))
        window.said = said
        yield window


def open_page(window, **options):
    """A browser's websocket of the viewer's page."""
    uri = f"ws://127.0.0.1:{window.server.get_port()}"
    return connect(uri, subprotocols=[PROTOCOL], max_size=None, **options)


def sent(tab, content) -> None:
    tab.send(msgspec.msgpack.encode(content))


def wait_for(happened, seconds=5.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def assert_others_see_pictures(window) -> None:
    """A client that comes now gets a picture of its own, and the viewer is as it was."""
    made = window.num_pictures
    with open_page(window) as tab:
        sent(tab, CAMERA)
        wait_for(lambda: window._render_pending() and window.num_pictures > made)
    assert window.active and not window.paused and not window.keys
    assert window.mode.value == "rgb" and window.text.value == "a cone" and not window.new_text()
    assert len(window.said) == 1  # the address


# --------------------------------------------------------------------------------- who may connect

LOCAL, BEYOND, HERE = "127.0.0.1", "10.0.0.7", "127.0.0.1:PORT"
HUB = "X-Forwarded-Host: hub\r\n"
COOKIE = "Cookie: a=b; viewer_PORT=TOKEN\r\n"


def page(host: str = HERE, more: str = "") -> str:
    """The header lines of a request for the page."""
    return f"Host: {host}\r\n{more}"


def websocket(host: str = HERE, origin: str | None = None, more: str = "") -> str:
    """The header lines of a websocket that a page opens; origin None: it is its own."""
    origin = f"http://{host}" if origin is None else origin
    return f"Host: {host}\r\nOrigin: {origin}\r\n{more}{UPGRADE}"


REQUESTS = {
    # what: (peer's address, path, header lines, expected status)
    "own page": (LOCAL, "/", page(), 200),
    "own socket": (LOCAL, "/", websocket(), 101),
    "through ssh -L": (LOCAL, "/", websocket("localhost:9"), 101),
    "IPv6": ("::1", "/", websocket("[::1]:PORT"), 101),
    "no browser": (LOCAL, "/", page(more=UPGRADE), 101),
    "foreign origin": (LOCAL, "/", websocket(origin="http://evil.example"), 403),
    "other port": (LOCAL, "/", websocket(origin="http://127.0.0.1:9"), 403),
    "sandboxed page": (LOCAL, "/", websocket(origin="null"), 403),
    "foreign, token": (LOCAL, "/?token=TOKEN", websocket(origin="http://evil.example"), 403),
    "DNS rebinding": (LOCAL, "/", websocket("evil.example:PORT"), 403),
    "DNS rebinding, page": (LOCAL, "/", page("evil.example:PORT"), 403),
    "looks like loopback": (LOCAL, "/", page("127.0.0.1.evil.example"), 403),
    "through a proxy": (LOCAL, "/", page(more="X-Forwarded-For: 8.8.8.8"), 403),
    "proxy, token": (LOCAL, "/", websocket(origin="https://hub", more=f"{HUB}{COOKIE}"), 101),
    "proxy, no token": (LOCAL, "/", websocket(origin="https://hub", more=HUB), 403),
    "proxy, other page": (LOCAL, "/", websocket(origin="https://x", more=f"{HUB}{COOKIE}"), 403),
    "many fields": (LOCAL, "/?" + "a=b&" * 30, page(), 400),
    "no host": (LOCAL, "/", "X: 1", 400),
    "two hosts": (LOCAL, "/", page(more="Host: evil.example"), 400),
    "two origins": (LOCAL, "/", websocket(more="Origin: a\r\n"), 400),
    "broken host": (LOCAL, "/", page("[::1"), 400),
    "another viser": (LOCAL, "/", websocket().replace("viser-v", "viser-v0"), 400),
    "beyond, no token": (BEYOND, "/", page(), 403),
    "beyond, socket": (BEYOND, "/", websocket("box:PORT"), 403),
    "beyond, wrong token": (BEYOND, "/?token=TOKE", page("box:PORT"), 403),
    "beyond, empty token": (BEYOND, "/?token=", page("box:PORT", "Cookie: viewer_PORT="), 403),
    "beyond, odd token": (BEYOND, "/?token=%ff%00é", page("box:PORT"), 403),
    "beyond, token": (BEYOND, "/?token=TOKEN", page("box:PORT"), 200),
    "beyond, cookie": (BEYOND, "/", websocket("box:PORT", more=COOKIE), 101),
    "other port's cookie": (BEYOND, "/", page("box:PORT", "Cookie: viewer_9=TOKEN"), 403),
    "beyond, origin": (BEYOND, "/", websocket("box:PORT", "http://evil", COOKIE), 403),
}


def answer(window, path: str, lines: str) -> str:
    """The head of the answer to a GET request; "" if the connection just ends."""
    port = str(window.server.get_port())
    text = f"GET {path} HTTP/1.1\r\n{lines.strip()}\r\n\r\n"
    text = text.replace("PORT", port).replace("TOKEN", window.guard.token)
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as link:
        link.sendall(text.encode())
        head = b""
        with suppress(ConnectionResetError):
            while b"\r\n\r\n" not in head and (more := link.recv(4096)):
                head += more
    return head.decode("latin-1").partition("\r\n\r\n")[0]


def test_only_the_viewers_own_page_gets_in_and_beyond_this_machine_only_with_the_token(
    shown, monkeypatch
):
    wrong = {}
    for what, (peer, path, lines, status) in REQUESTS.items():
        monkeypatch.setattr(viewer_guard, "_peer", lambda connection, peer=peer: peer)
        head = answer(shown, path, lines)
        found = int(head.split()[1]) if head else 400  # what is no HTTP has no answer
        if found != status:
            wrong[what] = (found, status)
        assert ("Set-Cookie" in head) == (what == "beyond, token"), what
        if found == 200:
            assert "frame-ancestors 'self'" in head and "no-referrer" in head
    assert not wrong
    monkeypatch.undo()
    assert_others_see_pictures(shown)


def test_the_printed_address_holds_the_token_and_each_viewer_has_its_own(shown):
    assert shown.said == [
        f"viewer: http://127.0.0.1:{shown.server.get_port()}/?token={shown.guard.token}"
    ]
    tokens = {viewer_guard.Guard().token for _ in range(10)} | {shown.guard.token}
    assert len(tokens) == 11 and all(len(token) >= 20 for token in tokens)


# ---------------------------------------------------------------------------- what they may send


def update(control: str, value, prop: str = "value"):
    """A message that sets a control of the page, made when its uuid is known."""
    return lambda window: {
        "type": "GuiUpdateMessage",
        "uuid": getattr(window, control)._impl.uuid,
        "updates": {prop: value},
    }


NOTHING = (None, "", [], {}, True, math.nan, math.inf, b"\0", "x", [1, 2], 2**63)
MESSAGES = {
    **{f"fov {v!r}": {**CAMERA, "fov": v} for v in (0, 0.0, -1, 4.0, 1e300, *NOTHING)},
    **{f"height {v!r}": {**CAMERA, "image_height": v} for v in (0, -1, 10**7, -(2**62), *NOTHING)},
    **{f"width {v!r}": {**CAMERA, "image_width": v} for v in (0, -1, 10**7, -(2**62), *NOTHING)},
    **{f"position {v!r}": {**CAMERA, "position": (v, 0, 0)} for v in (1e300, *NOTHING)},
    **{f"wxyz {v!r}": {**CAMERA, "wxyz": (v, 0, 0, 0)} for v in (0, 1e-9, 9.0, *NOTHING)},
    "short quaternion": {**CAMERA, "wxyz": (1.0,)},
    "more fields": {**CAMERA, "__class__": 1},
    "no fields": {"type": "ViewerCameraMessage"},
    "no type": {"fov": 1},
    "a long text": update("text", "x" * 4_000_000),
    **{f"mode {v!r}": update("mode", v) for v in ("lit?", *NOTHING)},
    **{f"seconds {v!r}": update("seconds", v) for v in (0, 0.4, 601, 1e12, *NOTHING)},
    **{f"crop {v!r}": update("crop", v) for v in (0, 1, "x", None, math.nan)},
    **{f"corner {v!r}": update("low", (v, 0, 0)) for v in (1e300, *NOTHING)},
    "short corner": update("low", (1.0,)),
    "long corner": update("low", (1.0,) * 4),
    **{f"text {v!r}": update("text", v) for v in (None, 3, ["x"], {"a": 1}, b"x", math.nan)},
    **{  # viser would set them
        f"the attribute {prop}": update("mode", True, prop)
        for prop in ("removed", "is_button", "update_cb", "sync_cb", "__class__", "options")
    },
    "two values": lambda w: {**update("mode", "depth")(w), "updates": {"value": "depth", "x": 1}},
    "unknown control": {"type": "GuiUpdateMessage", "uuid": "x", "updates": {"value": 1}},
    "long uuid": {"type": "GuiUpdateMessage", "uuid": "x" * 9999, "updates": {"value": 1}},
    "a tunnel to the internet": {"type": "ShareUrlRequest"},
    "an upload": {
        "type": "FileTransferStartUpload", "source_component_uuid": "x", "transfer_uuid": "x",
        "filename": "../../x", "mime_type": "x", "part_count": 1, "size_bytes": 2**40,
    },
    "a part of it": {
        "type": "FileTransferPart", "source_component_uuid": None, "transfer_uuid": "x",
        "part_index": 0, "content": b"x",
    },
    "a server's message": {"type": "ResetGuiMessage"},
}  # fmt: skip
RAW = {
    "a text frame": "hello",
    "garbage": b"\xff" * 100,
    "nothing": b"",
    "nested arrays": b"\x91" * 15_000 + b"\x00",
    "nested maps": b"\x81\xa1a" * 5000 + b"\x00",
    "announced gigabytes": b"\xdf\xff\xff\xff\xff",
    "announced text": b"\xdb\xff\xff\xff\xff",
    "4 MB": b"\0" * 4_000_000,
    "4 MB in pieces": [b"\0" * 1000] * 4000,
}


def test_no_message_harms_anybody_but_its_sender(shown):
    """Every message of the tables, on one connection after another as each is dropped."""
    tab = open_page(shown)
    for what, message in {**MESSAGES, **RAW}.items():
        if callable(message):
            message = message(shown)
        data = msgspec.msgpack.encode(message) if isinstance(message, dict) else message
        try:
            tab.send(data)
        except ConnectionClosed:  # the message before was one too many
            tab = open_page(shown)
            with suppress(ConnectionClosed):
                tab.send(data)
        shown._render_pending()
        assert shown.active, what
    tab.close()
    assert_others_see_pictures(shown)
    assert shown.num_pictures < 3  # no camera of the table was one
    assert shown.low.value == (-1.0, -1.0, -1.0) and shown.seconds.value == 4.0
    assert shown.server._share_tunnel is None


def test_the_page_itself_can_do_all_that_it_shows(shown, monkeypatch, tmp_path):
    monkeypatch.setattr(viewer, "CLICK_SECONDS", 0.0)
    buttons = {
        handle.label: handle._impl.uuid
        for handle in shown.server.gui._gui_input_handle_from_uuid.values()
        if isinstance(handle, viser.GuiButtonHandle)
    }

    def click(tab, label):
        sent(
            tab,
            {"type": "GuiUpdateMessage", "uuid": buttons[label], "updates": {"value": True}},
        )

    with open_page(shown) as tab:
        sent(tab, CAMERA)
        wait_for(shown._clients)
        for control, value in {
            "mode": "depth", "crop": True, "low": (-0.5, 0, 1), "high": (1, 2, 3), "seconds": 0.5,
            "text": " a\nblue  cube ",
        }.items():  # fmt: skip
            sent(tab, update(control, value)(shown))
            expected = tuple(value) if isinstance(value, tuple) else value
            wait_for(lambda c=control, e=expected: getattr(shown, c).value == e)
        click(tab, "use this text")
        wait_for(lambda: shown._pending_text)
        assert shown.new_text() == "a blue cube"
        for number in (1, 2):
            click(tab, "add key")
            wait_for(lambda n=number: len(shown.keys) == n)
        click(tab, "save path")
        wait_for((tmp_path / "camera_path.json").exists)
        click(tab, "play")
        wait_for(lambda: shown.playing)
        click(tab, "remove key")
        wait_for(lambda: len(shown.keys) == 1)
        click(tab, "pause / resume training")
        wait_for(lambda: shown.paused)
        # What is allowed has an end, too.
        monkeypatch.setattr(viewer, "MAX_KEYS", 1)
        click(tab, "add key")
        wait_for(lambda: "at most 1 keys" in shown.said[-1])
        sent(tab, update("text", "y" * (viewer.MAX_TEXT + 1))(shown))
        click(tab, "use this text")
        time.sleep(0.2)
        assert len(shown.keys) == 1 and shown.new_text() is None


def test_while_training_only_the_last_of_many_cameras_is_passed_on(shown, monkeypatch):
    """Clients are read a few times per second; a button still meets the camera before it."""
    monkeypatch.setattr(viewer, "CLICK_SECONDS", 0.0)
    passed, allows = [], shown.guard.allows
    monkeypatch.setattr(shown.guard, "allows", lambda message: passed.append(1) or allows(message))
    seen, add_key = [], next(
        handle
        for handle in shown.server.gui._gui_input_handle_from_uuid.values()
        if getattr(handle, "label", "") == "add key"
    )  # fmt: skip
    with open_page(shown) as tab:
        sent(tab, CAMERA)
        wait_for(shown._clients)
        client = shown._clients()[0][1]
        client.camera.on_update(lambda camera: seen.append(float(camera.position[0])))
        shown.guard.interval = 0.4
        sent(tab, CAMERA)  # after it nobody reads for a while
        wait_for(lambda: seen)
        for number in range(1, 40):
            sent(tab, {**CAMERA, "position": (float(number), -3, 1)})
        click = {"type": "GuiUpdateMessage", "uuid": add_key._impl.uuid, "updates": {"value": True}}
        sent(tab, click)
        for number in range(40, 60):
            sent(tab, {**CAMERA, "position": (float(number), -3, 1)})
        wait_for(lambda: seen[-1] == 59 and shown.keys)
    assert len(passed) == 62  # every message was looked at
    assert len(seen) <= 8 and seen == sorted(seen)
    assert 39 <= shown.keys[0][0][0, 3] <= 59


# -------------------------------------------------------------------- how much they may ask for


def test_floods_end_the_flooders_connection_only(shown):
    """Messages, pings and bytes beyond what a page sends."""
    camera, port = msgspec.msgpack.encode(CAMERA), shown.server.get_port()
    with open_page(shown) as tab, pytest.raises(ConnectionClosed):
        for _ in range(5000):
            tab.send(camera)
    masked_ping = b"\x89\x80\0\0\0\0"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        link.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{UPGRADE}\r\n".encode())
        with pytest.raises(OSError):  # noqa: PT012
            for _ in range(5000):
                link.sendall(masked_ping * 2000)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        with suppress(OSError):  # an endless header
            link.sendall(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1_000_000)
    assert_others_see_pictures(shown)


def test_the_number_of_clients_is_bounded_and_a_place_becomes_free(shown):
    tabs = [open_page(shown) for _ in range(viewer_guard.MAX_CLIENTS)]
    with pytest.raises(InvalidStatus, match="503"):
        open_page(shown)
    tabs.pop().close()
    wait_for(lambda: len(shown.guard.connections) < viewer_guard.MAX_CLIENTS)
    assert_others_see_pictures(shown)
    for tab in tabs:
        tab.close()


def test_each_picture_goes_to_the_client_that_waited_longest(shown, monkeypatch):
    """Several clients share the time of one: training waits for one picture at a time."""
    monkeypatch.setattr(viewer, "REST", 0.0)
    with open_page(shown) as one, open_page(shown) as two:
        for tab in (one, two):
            sent(tab, CAMERA)
        wait_for(lambda: len(shown._clients()) == 2)
        for made in range(1, 7):
            assert shown._render_pending() and shown.num_pictures == made
        assert [view.level for view in shown.shown.values()] == [2, 2]


def test_half_open_handshakes_run_out_and_closing_waits_for_nobody(shown, monkeypatch):
    port = shown.server.get_port()
    links = [
        socket.create_connection(("127.0.0.1", port)) for _ in range(viewer_guard.MAX_CONNECTIONS)
    ]
    wait_for(lambda: len(shown.guard.connections) == viewer_guard.MAX_CONNECTIONS)
    with pytest.raises((OSError, EOFError, ConnectionClosed, InvalidHandshake)):  # full
        open_page(shown, open_timeout=1)
    links[0].close()
    wait_for(lambda: len(shown.guard.connections) < viewer_guard.MAX_CONNECTIONS)
    assert_others_see_pictures(shown)
    start = time.monotonic()
    shown.close()
    assert time.monotonic() - start < 10.0  # a fraction of a second on an idle machine
    for link in links:
        link.close()


def test_a_handshake_has_a_time_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(viewer_guard, "HANDSHAKE_SECONDS", 0.2)
    with viewer.Viewer(None, tmp_path, "127.0.0.1", free_port(), print) as window:
        link = socket.create_connection(("127.0.0.1", window.server.get_port()), timeout=5)
        link.sendall(b"GET / HTTP/1.1\r\nHost: ")
        with suppress(ConnectionResetError):
            assert link.recv(1) == b""  # ended by the server
        link.close()


def test_a_client_that_never_reads_costs_one_picture(shown):
    """Pictures wait for a slow reader; a newer one takes the place of the one before."""
    shown.view = lambda pose, fov, size, mode, box, stopped: np.random.rand(*size, 3)
    link = socket.create_connection(("127.0.0.1", shown.server.get_port()))
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{UPGRADE}\r\n".encode())
    data = msgspec.msgpack.encode(CAMERA)
    link.sendall(bytes([0x82, 0x80 | 126, *len(data).to_bytes(2, "big"), 0, 0, 0, 0]) + data)
    wait_for(lambda: shown._clients())
    [(number, client)] = shown._clients()
    for _ in range(60):
        client.scene.set_background_image(np.random.randint(0, 255, (400, 640, 3), np.uint8))
        time.sleep(0.005)
    state = shown.server._websock_server._client_state_from_id[number]
    assert len(state.message_buffer.message_from_id) < 5
    assert_others_see_pictures(shown)
    link.close()


# ------------------------------------------------------------------------------- the end of a run


def test_a_picture_is_given_up_when_the_program_stops(shown):
    asked = []

    def endless(pose, fov, size, mode, box, stopped):
        while not stopped():
            asked.append(size)
        raise Interrupted

    shown.view = endless
    with open_page(shown) as tab:
        sent(tab, CAMERA)
        wait_for(shown._clients)
        shown.tick(lambda: len(asked) > 10)
    assert len(asked) == 11 and shown.active and shown.num_pictures == 0


def test_sigterm_ends_a_run_with_hostile_clients_soon(tmp_path):
    port = free_port()
    flags = [*DREAM_TINY, "--basedir", tmp_path, "--N_iters", 100_000, "--viewer"]
    command = [sys.executable, "run_dreamfusion.py", *map(str, flags), "--viewer_port", str(port)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=said, stderr=said)
    log, table = tmp_path / "ball" / "log.txt", tmp_path / "ball" / "metrics.csv"
    try:
        wait_for(lambda: table.exists() and len(table.read_text().splitlines()) > 1, 60)
        assert f"viewer: http://127.0.0.1:{port}/?token=" in log.read_text()
        uri = f"ws://127.0.0.1:{port}"
        links = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        tab = connect(uri, subprotocols=[PROTOCOL], max_size=None)
        with pytest.raises(ConnectionClosed):  # a text of 4 MB
            tab.send(b"\0" * 4_000_000)
            tab.recv(timeout=5)
            while True:
                tab.recv(timeout=5)
        with pytest.raises(InvalidStatus, match="403"):
            connect(uri, subprotocols=[PROTOCOL], origin="http://evil.example")
        before = len(table.read_text().splitlines())
        wait_for(lambda: len(table.read_text().splitlines()) > before + 1, 20)  # it trains on
        tabs = [connect(uri, subprotocols=[PROTOCOL], max_size=None) for _ in range(4)]
        for number, tab in enumerate(tabs):
            sent(tab, {**CAMERA, "image_width": 2**15 if number else 1})
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=20)  # 2 seconds on an idle machine
        assert code == 128 + signal.SIGTERM
        assert "Traceback" not in (tmp_path / "said").read_text()
        assert list((tmp_path / "ball").glob("[0-9]*.tar"))  # the step is saved
        for link in links:
            link.close()
    finally:
        process.kill()
        process.wait()
