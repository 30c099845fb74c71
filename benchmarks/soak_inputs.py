"""What the set-up programs of ``soak.py`` are given: an archive on a server, photos, pictures."""

import hashlib
import http.server
import io
import re
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import make_demo
import numpy as np
from PIL import Image

PIECE, PAUSE = 1 << 16, 0.004  # bytes that the server sends at once, and seconds between them


def give(script: str, folder: Path, counts: dict[str, int]) -> dict[str, str]:
    """Make what the command of ``script`` reads in ``folder``; the words that stand for it there.

    counts: views of a demo scene by split.
    """
    folder.mkdir()
    if script == "download":
        return {"url": serve(archive(folder, counts))}
    if script == "photos":  # not in this process: Pillow's and pycolmap's libraries quarrel
        subprocess.run([sys.executable, "-c", PHOTOS, str(folder)], check=True)
    if script == "finetune":
        draw = np.random.default_rng(0)
        for number in range(4):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return {"given": str(folder)}


PHOTOS = """
import sys
import pycolmap

pycolmap.set_random_seed(3)
dataset = pycolmap.SyntheticDatasetOptions()
dataset.num_rigs, dataset.num_frames_per_rig, dataset.num_points3D = 1, 5, 60
dataset.camera_width, dataset.camera_height = 640, 480
dataset.camera_params = [800.0, 320.0, 240.0, 0.02]
truth = pycolmap.synthesize_dataset(dataset)
pycolmap.synthesize_images(pycolmap.SyntheticImageOptions(), truth, sys.argv[1])
"""  # pictures that pycolmap draws of a cloud of points, and registers all


def archive(folder: Path, counts: dict[str, int]) -> bytes:
    """A zip of two demo scenes, as the example data are, with 3 MB that do not compress."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, kind in (("nerf_synthetic/lego", "blender"), ("nerf_llff_data/fern", "llff")):
            make_demo.make(folder / name, kind, 16, counts)
            for path in sorted((folder / name).rglob("*")):
                file.write(path, path.relative_to(folder))
            noise = np.random.default_rng(0).bytes(3 << 19)
            file.writestr(f"{name}/noise.bin", noise)
    return content.getvalue()


def serve(content: bytes) -> str:
    """The address of ``content`` on a server in a thread, which can send what follows a byte."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            if asked:
                last = f"{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", f"bytes {start}-{last}")
            self.end_headers()
            for at in range(start, len(content), PIECE):
                try:
                    self.wfile.write(content[at : at + PIECE])
                except OSError:  # the program was killed
                    return
                time.sleep(PAUSE)

        def log_message(self, *given: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/example.zip"
