"""data/download.py against a local server: whole, resumed, damaged, absent."""

import functools
import hashlib
import http.server
import io
import threading
import zipfile

import download
import pytest


def archive(name: str = "nerf_synthetic/lego") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{name}/transforms_train.json", "{}" * 4000)
        file.writestr(f"{name}/train/r_0.png", bytes(range(256)) * 40)
        file.writestr("__MACOSX/junk", "x")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``content``; ``cut`` breaks the first answer off after so many bytes."""

    def __init__(self, served, *args):
        self.served = served
        super().__init__(*args)

    def do_GET(self):
        content, start = self.served["content"], 0
        if content is None:
            return self.send_error(404)
        asked = self.headers.get("Range")
        self.served["ranges"].append(asked)
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{self.served["etag"]}"')
        self.end_headers()
        cut = self.served.pop("cut", None)
        self.wfile.write(content[start : cut and start + cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def served():
    content = archive()
    state = {"content": content, "etag": hashlib.sha256(content).hexdigest(), "ranges": []}
    handler = functools.partial(Handler, state)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}/example.zip"
    yield state
    server.shutdown()
    server.server_close()


def test_a_scene_arrives_whole_where_the_config_expects_it(served, tmp_path):
    folder = download.download("lego", tmp_path, served["url"])
    assert folder == tmp_path / "nerf_synthetic" / "lego"
    assert (folder / "train" / "r_0.png").read_bytes() == bytes(range(256)) * 40
    assert [path.name for path in folder.parent.iterdir()] == ["lego"]
    download.download("lego", tmp_path, served["url"])
    assert len(served["ranges"]) == 1  # the second call fetched nothing


def test_a_broken_off_download_goes_on_where_it_stopped(served, tmp_path):
    served["cut"] = 500
    with pytest.raises(download.DownloadError, match="run .* again"):
        download.download("lego", tmp_path, served["url"])
    assert not (tmp_path / "nerf_synthetic" / "lego").exists()
    assert (tmp_path / "example.zip.part").stat().st_size == 500
    download.download("lego", tmp_path, served["url"])
    assert served["ranges"] == [None, "bytes=500-"]
    assert (tmp_path / "nerf_synthetic" / "lego" / "transforms_train.json").exists()


def test_wrong_checksums_are_refused(served, tmp_path):
    with pytest.raises(download.DownloadError, match="SHA-256"):
        download.download("lego", tmp_path, served["url"], sha256="0" * 64)
    served["etag"] = "1" * 64
    with pytest.raises(download.DownloadError, match="SHA-256"):
        download.download("lego", tmp_path, served["url"])
    damaged = bytearray(served["content"])
    damaged[200] ^= 4
    served.update(content=bytes(damaged), etag="none")
    with pytest.raises(download.DownloadError, match="damaged"):
        download.download("lego", tmp_path, served["url"])
    assert not (tmp_path / "nerf_synthetic" / "lego").exists()


def test_no_server_and_no_file_are_one_clear_line(served, tmp_path, monkeypatch, capsys):
    served["content"] = None
    with pytest.raises(download.DownloadError, match="404"):
        download.download("lego", tmp_path, served["url"])
    arguments = [
        "download.py",
        "lego",
        "--root",
        str(tmp_path),
        "--url",
        "http://127.0.0.1:9/x.zip",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert download.main() == 2
    error = capsys.readouterr().err
    assert "not reachable" in error and error.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["download.py", "castle"])
    assert download.main() == 2
    assert "castle" in capsys.readouterr().err
