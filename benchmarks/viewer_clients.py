"""Browsers of the live viewer, as far as its server can tell: they turn and take every picture.

    python benchmarks/viewer_clients.py --port 8080 --clients 10 --rate 50

Each client opens the page's websocket and turns its camera, with --rate cameras per second (the
page sends at most 50), until the server closes. With --stay, each closes after so many seconds and
comes again. Prints a JSON line of what all of them sent and received.
"""

import argparse
import asyncio
import json
import math
import struct
import sys
import time

import msgspec
import viser
import zstandard
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

TURN_SECONDS = 10.0
FIRST_CAMERA_SECONDS = 60.0  # until the server answers


def camera(angle: float) -> bytes:
    """viser's message of a camera at this angle, in radians, that looks at the origin."""
    position = (3 * math.cos(angle), 3 * math.sin(angle), 1.0)
    content = {
        "type": "ViewerCameraMessage", "wxyz": (math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)),
        "position": position, "fov": 0.8, "near": 0.01, "far": 1000.0, "image_height": 400,
        "image_width": 600, "look_at": (0.0, 0.0, 0.0), "up_direction": (0.0, 0.0, 1.0),
    }  # fmt: skip
    return msgspec.msgpack.encode(content)


async def receive(tab: ClientConnection, count: dict[str, int]) -> None:
    """Take what the server sends, and count its pictures and bytes."""
    unpacker = zstandard.ZstdDecompressor()
    async for message in tab:  # sizes of the content, full and compressed; the content; pictures
        size, compressed = struct.unpack_from("<QQ", message)
        content = unpacker.decompress(message[16 : 16 + compressed], max_output_size=size)
        count["bytes"] += len(message)
        count["pictures"] += content.count(b"BackgroundImageMessage")


async def turn(tab: ClientConnection, rate: float, stay: float, count: dict[str, int]) -> None:
    """Send ``rate`` cameras per second for ``stay`` seconds."""
    began = time.monotonic()
    while (now := time.monotonic()) < began + stay:
        await tab.send(camera(2 * math.pi * now / TURN_SECONDS))
        count["cameras"] += 1
        await asyncio.sleep(1 / rate)


async def browse(args: argparse.Namespace, count: dict[str, int]) -> None:
    """Be one client until the server is gone; before it is there, wait for it."""
    uri, protocol = f"ws://127.0.0.1:{args.port}", f"viser-v{viser.__version__}"
    last_seen = time.monotonic()
    while time.monotonic() < last_seen + (FIRST_CAMERA_SECONDS if not count["visits"] else 2):
        try:
            async with connect(uri, subprotocols=[protocol], max_size=None) as tab:
                count["visits"] += 1
                taking = asyncio.create_task(receive(tab, count))
                try:
                    await turn(tab, args.rate, args.stay, count)
                finally:
                    taking.cancel()
                    last_seen = time.monotonic()
        except (OSError, WebSocketException):
            await asyncio.sleep(0.2)


async def browse_all(args: argparse.Namespace) -> dict[str, int]:
    count = {"visits": 0, "cameras": 0, "pictures": 0, "bytes": 0}
    await asyncio.gather(*(browse(args, count) for _ in range(args.clients)))
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--rate", type=float, default=50.0, help="cameras per second and client")
    parser.add_argument("--stay", type=float, default=math.inf, help="seconds of one visit")
    print(json.dumps(asyncio.run(browse_all(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
