"""Who may talk to the live viewer, and what a message may hold: checked before viser sees it.

viser's own server asks nobody who they are, takes messages of 50 MB, and sets whatever attribute a
message names. ``Guard`` stands in front of it:

* A web page of another origin is refused, and so is a foreign ``Host`` header, with which a page
  reaches a server on this machine through a name of its own (DNS rebinding).
* Beyond this machine every request needs the token of the printed address. The page's cookie then
  carries it to the websocket.
* A client gets a limited number of connections, seconds, bytes and messages; one that wants more
  is disconnected. While something trains, all clients are read at the same moments, a few times
  per second, and of the cameras that came since then only the last is passed on.
* Messages other than a camera and the value of a control are dropped, and so are values that no
  control of the page could send.
"""

import asyncio
import hmac
import ipaddress
import logging
import math
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeGuard

import msgspec
import viser
import websockets.asyncio.server
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import MultipleValuesError
from websockets.http11 import Request, Response

MAX_CLIENTS = 16  # browsers at a time
MAX_CONNECTIONS = 64  # also those in the middle of a handshake, or that fetch the page
MAX_MESSAGE = 16 << 10  # bytes; a camera takes 300
HANDSHAKE_SECONDS = 5.0
# (per second, at once). The page sends at most 50 cameras per second, of 300 bytes.
CONNECTION_RATE = (10.0, 60.0)  # of all clients together
MESSAGE_RATE = (100.0, 400.0)
BYTE_RATE = (100e3, 400e3)
FAR = 1e6  # largest coordinate of a camera or box, scene units

Check = Callable[[Any], bool]  # whether a control may have this value


class Bucket:
    """A rate limit: ``per_second`` on average, ``at_once`` after a rest (a token bucket)."""

    def __init__(self, per_second: float, at_once: float) -> None:
        self.per_second, self.at_once = per_second, at_once
        self.left, self.checked_at = at_once, time.monotonic()

    def take(self, amount: float) -> bool:
        """Whether ``amount`` more is within the limit."""
        now = time.monotonic()
        self.left += (now - self.checked_at) * self.per_second
        self.left, self.checked_at = min(self.left, self.at_once) - amount, now
        return self.left >= 0


# ------------------------------------------------------------------------------------- messages

Coordinate = Annotated[float, msgspec.Meta(ge=-FAR, le=FAR)]  # NaN is outside of every range
Vector = tuple[Coordinate, Coordinate, Coordinate]
Unit = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Pixels = Annotated[float, msgspec.Meta(ge=1, le=1 << 15)]
Distance = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class _Camera(
    msgspec.Struct, tag="ViewerCameraMessage", tag_field="type", forbid_unknown_fields=True
):
    wxyz: tuple[Unit, Unit, Unit, Unit]
    position: Vector
    fov: Annotated[float, msgspec.Meta(ge=0.01, le=3.1)]  # vertical, radians
    near: Distance
    far: Distance
    image_height: Pixels
    image_width: Pixels
    look_at: Vector
    up_direction: Vector


class _Control(
    msgspec.Struct, tag="GuiUpdateMessage", tag_field="type", forbid_unknown_fields=True
):
    uuid: Annotated[str, msgspec.Meta(max_length=64)]
    updates: Annotated[dict[str, Any], msgspec.Meta(min_length=1, max_length=1)]


_decoder = msgspec.msgpack.Decoder(_Camera | _Control)


def one_of(choices: tuple[Any, ...]) -> Check:
    """A check for a control with these values."""
    return lambda value: any(value is c or (type(value) is type(c) and value == c) for c in choices)


def number_between(low: float, high: float) -> Check:
    """A check for a number; NaN is none."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def is_vector(value: Any) -> bool:
    """Whether the value is three coordinates within FAR."""
    coordinate = number_between(-FAR, FAR)
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(coordinate, value))


def is_text(value: Any) -> bool:
    """Whether the value is a text; MAX_MESSAGE bounds its length."""
    return isinstance(value, str)


# --------------------------------------------------------------------------------------- requests


def _is_loopback(name: str | None) -> bool:
    """Whether a host's name or address is this machine's own."""
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name or "")
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class Guard:
    """The rules of one viewer, and its connections.

    ``controls`` has a check for every control of the page: viser's uuid -> ``Check``.
    ``interval`` is the time in seconds between two readings of what the clients sent; 0: at once.
    ``cpu_seconds`` is the time that the server's thread has taken.
    """

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(16)
        self.controls: dict[str, Check] = {}
        self.connections: set[GuardedConnection] = set()
        self.connection_rate = Bucket(*CONNECTION_RATE)
        self.closing = False
        self.interval = self.cpu_seconds = 0.0

    def allows(self, message: bytes) -> bool:
        """Whether viser may see a message; ValueError if it is none at all."""
        try:
            decoded = _decoder.decode(message)
        except msgspec.ValidationError:
            return False
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError("not a message") from error
        if isinstance(decoded, _Camera):
            return 0.5 < math.hypot(*decoded.wxyz) < 2
        check = self.controls.get(decoded.uuid)
        return check is not None and "value" in decoded.updates and check(decoded.updates["value"])

    def refusal(self, connection: ServerConnection, request: Request) -> tuple[int, str] | None:
        """Status and text of the answer to a request that is refused, else None."""
        try:
            host = request.headers["Host"].lower()
            host_name = urllib.parse.urlsplit(f"//{host}").hostname
            origin = request.headers.get("Origin")
            origin_host = None if origin is None else urllib.parse.urlsplit(origin).netloc.lower()
            protocol = request.headers.get("Sec-WebSocket-Protocol", "")
            has_token = self._has_token(request, host)
        except (KeyError, MultipleValuesError, ValueError):
            return 400, "Bad request.\n"
        # What a proxy calls this machine; no page can send these headers by itself.
        outside = [name.lower() for name in request.headers.get_all("X-Forwarded-Host")]
        if origin_host is not None and origin_host not in (host, *outside):
            return 403, "The viewer answers its own page only, no page of another origin.\n"
        forwarded = bool(outside or request.headers.get_all("X-Forwarded-For"))
        here = not forwarded and _is_loopback(host_name) and _is_loopback(_peer(connection))
        if not here and not has_token:
            return 403, "Open the address that the run printed, with its token.\n"
        if "Upgrade" not in request.headers:
            return None
        if protocol != f"viser-v{viser.__version__}":  # viser prints one line for each
            return 400, f"The page of viser {viser.__version__} is needed.\n"
        num_open = sum(c.state is websockets.protocol.State.OPEN for c in self.connections)
        return (503, "Too many viewers.\n") if num_open >= MAX_CLIENTS else None

    def _has_token(self, request: Request, host: str) -> bool:
        """Whether the token is in the address or in the page's cookie."""
        query = urllib.parse.urlsplit(request.path).query
        given = urllib.parse.parse_qs(query, max_num_fields=20).get("token", [])
        for header in request.headers.get_all("Cookie"):
            pairs = (part.strip().partition("=") for part in header.split(";"))
            given += [value for name, _, value in pairs if name == _cookie_name(host)]
        token = self.token.encode()
        return any(hmac.compare_digest(text.encode("utf-8", "replace"), token) for text in given)

    def finish(self, connection: ServerConnection, request: Request, response: Response) -> None:
        """Add to a response that no page may frame it, and the cookie of who has the token."""
        response.headers["Content-Security-Policy"] = "frame-ancestors 'self'"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Referrer-Policy"] = "no-referrer"  # the address holds the token
        response.headers["X-Content-Type-Options"] = "nosniff"
        if response.status_code == 200 and "token=" in request.path:
            host = request.headers["Host"].lower()
            if self._has_token(request, host):
                name = _cookie_name(host)
                cookie = f"{name}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                response.headers["Set-Cookie"] = cookie

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drop every connection, whatever its client does, so that the server can stop at once."""

        def abort() -> None:
            self.closing = True
            for connection in list(self.connections):
                connection.transport.abort()

        try:
            loop.call_soon_threadsafe(abort)
        except RuntimeError:  # the loop has ended
            self.closing = True

    @contextmanager
    def installed_in_viser(self) -> Iterator[None]:
        """Inside the block, viser's server starts behind this guard; RuntimeError if it did not."""
        module: Any = websockets.asyncio.server
        original, installed = module.serve, False

        def serve(handler: Any, host: str, port: int, **options: Any) -> Any:
            nonlocal installed
            installed = True
            return original(handler, host, port, **options | self._options(**options))

        module.serve = serve
        try:
            yield
        finally:
            module.serve = original
        if not installed:
            raise RuntimeError(f"viser {viser.__version__} starts its server in an unknown way")

    def _options(self, process_request: Any, **others: Any) -> dict[str, Any]:
        """Options of ``websockets.serve``: this guard's rules before viser's process_request."""

        def check_request(connection: ServerConnection, request: Request) -> Response | None:
            refused = self.refusal(connection, request)
            return connection.respond(*refused) if refused else process_request(connection, request)

        def create_connection(*arguments: Any, **more: Any) -> GuardedConnection:
            return GuardedConnection(self, *arguments, **more)

        logger = logging.getLogger(__name__)
        logger.disabled = True  # a stranger's mistakes fill nobody's terminal
        return {
            "process_request": check_request, "process_response": self.finish,
            "create_connection": create_connection, "logger": logger, "server_header": None,
            "max_size": MAX_MESSAGE, "open_timeout": HANDSHAKE_SECONDS, "close_timeout": 1.0,
        }  # fmt: skip


class GuardedConnection(ServerConnection):
    """A connection that ends if its client wants too much, and passes on what ``Guard`` allows."""

    def __init__(self, guard: Guard, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.guard = guard
        self.message_rate, self.byte_rate = Bucket(*MESSAGE_RATE), Bucket(*BYTE_RATE)
        self.next_message: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake, unless there are too many connections."""
        super().connection_made(transport)
        guard = self.guard
        too_many = len(guard.connections) >= MAX_CONNECTIONS
        if guard.closing or too_many or not guard.connection_rate.take(1):
            self.transport.abort()
        else:
            guard.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.guard.connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of any kind (a request, messages, pings) up to BYTE_RATE."""
        if not self.byte_rate.take(len(data)):
            self.transport.abort()
            return
        super().data_received(data)
        interval = self.guard.interval
        if interval and self.state is websockets.protocol.State.OPEN:
            # All connections wait for the same moment, so that the thread wakes once for all.
            self.transport.pause_reading()
            moment = (self.loop.time() // interval + 1) * interval
            self.loop.call_at(moment, self.transport.resume_reading)
        self.guard.cpu_seconds = time.thread_time()

    async def recv(self, decode: bool | None = None) -> Any:
        """The next message that viser may see; of cameras that have come, the last."""
        if self.next_message is not None:
            waiting, self.next_message = self.next_message, None
            return waiting
        camera: bytes | None = None
        while True:
            try:
                async with asyncio.timeout(None if camera is None else 0):
                    message = await super().recv(decode)
            except TimeoutError:
                return camera  # nothing else has come
            if not self._allows(message):
                continue
            if b"ViewerCameraMessage" in message:
                camera = message
            elif camera is None:
                return message
            else:  # a button, pressed after the camera was there
                self.next_message = message
                return camera

    def _allows(self, message: str | bytes) -> TypeGuard[bytes]:
        """Whether viser may see a message; ends the connection if it is none, or one too many."""
        try:
            if not self.message_rate.take(1) or not isinstance(message, bytes):
                raise ValueError("too many messages, or a text")
            return self.guard.allows(message)
        except ValueError:
            self.transport.abort()
            return False


def _peer(connection: ServerConnection) -> str | None:
    address = connection.remote_address
    return address[0] if address else None


def _cookie_name(host: str) -> str:
    """The cookie of the viewer at this host: cookies do not know ports."""
    return f"viewer_{urllib.parse.urlsplit(f'//{host}').port or 80}"
