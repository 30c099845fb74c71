"""data/download.py against a local server: whole, resumed, damaged, absent, hostile."""

import contextlib
import fcntl
import functools
import hashlib
import http.server
import io
import shutil
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
    """Serves ``content``; ``cut`` breaks the first answer off after so many bytes.

    ``answer``, a function of this handler, takes the place of all that.
    """

    def __init__(self, served, *args):
        self.served = served
        super().__init__(*args)

    def do_GET(self):
        content, start = self.served["content"], 0
        if "answer" in self.served:
            return self.served["answer"](self)
        if content is None:
            return self.send_error(404)
        asked = self.headers.get("Range")
        self.served["ranges"].append(asked)
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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
    [part] = tmp_path.glob(".example.zip.*.part")
    assert part.stat().st_size == 500
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


# ---------------------------------------------------------------- servers that break the rules


def head(handler, status, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def endless(handler):
    head(handler, 200)  # no length
    with contextlib.suppress(OSError):
        for _ in range(200):
            handler.wfile.write(bytes(1 << 20))


def raw(text: bytes):
    return lambda handler: handler.wfile.write(text)


ANSWERS = {
    "endless": (endless, "more than 3145728 bytes; expected at most 3145728"),
    "too long": (lambda h: head(h, 200, Content_Length=str(1 << 60)), f"sends {1 << 60} bytes"),
    "416, nothing there yet": (lambda h: head(h, 416), "answers 416"),
    "no HTTP": (raw(b"\xff\x00\n\n"), "not reachable"),
    "nothing": (raw(b""), "not reachable"),
    "a line without end": (raw(b"HTTP/1.1 200 " + b"x" * 100_000), "not reachable"),
    "half a chunk": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"), "not reachable",
    ),
    "a chunk of no size": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "not reachable",
    ),
    "an endless redirect": (lambda h: head(h, 302, Location=h.path), "answers 302"),
    "a redirect to a file": (lambda h: head(h, 302, Location="file:///etc/passwd"), "answers 302"),
    "a redirect to ftp": (lambda h: head(h, 302, Location="ftp://127.0.0.1:9/x"), "not reachable"),
    "a redirect nowhere": (lambda h: head(h, 302, Location="http://[/"), "not reachable"),
    "a reason with colours": (raw(b"HTTP/1.1 500 \x1b[31mred\x9b\r\n\r\n"), r"500 \x1b[31mred\x9b"),
    "another part": (
        lambda h: head(h, 206, Content_Range="bytes 7-9/10", Content_Length="3"), "not from byte 0",
    ),
}  # fmt: skip


def run(monkeypatch, capsys, root, *flags) -> tuple[int, str]:
    """Exit code and standard error of download.py, which is at most one line."""
    words = ["download.py", "lego", "--root", str(root), *flags]
    monkeypatch.setattr("sys.argv", words)
    code = download.main()
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "B/s]" not in line and "?B" not in line]
    assert len([line for line in lines if line]) <= 1, error
    return code, error


def test_whatever_a_server_answers_is_one_line_and_leaves_nothing(
    served, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(download, "MAX_BYTES", 3 << 20)
    for what, (answer, expected) in ANSWERS.items():
        served["answer"] = answer
        code, error = run(monkeypatch, capsys, tmp_path, "--url", served["url"])
        assert code == 2 and expected in error, (what, error)
        for part in tmp_path.glob(".*.part"):
            assert part.stat().st_size <= 3, what  # half a chunk: it can be resumed
            part.unlink()
        assert not list(tmp_path.rglob("*")), what


def test_a_failed_download_leaves_no_empty_folder(served, tmp_path):
    """Neither the scenes' folder, nor that of --root; what was there before stays."""
    served["content"] = None
    (tmp_path / "data").mkdir()
    for root in (tmp_path / "data", tmp_path / "new" / "data"):
        with pytest.raises(download.DownloadError, match="answers 404"):
            download.download("lego", root, served["url"])
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]
    served |= {"content": archive()[:-30], "etag": "none"}  # damaged
    with pytest.raises(download.DownloadError, match="damaged and removed"):
        download.download("lego", tmp_path / "new", served["url"])
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


def test_a_resumed_download_trusts_no_other_part_than_its_own(served, tmp_path):
    """416: whole if the server's size is that of the part, else the file has changed."""
    served["cut"] = 500
    with pytest.raises(download.DownloadError, match="run .* again"):
        download.download("lego", tmp_path, served["url"])
    served["answer"] = lambda h: head(h, 416, Content_Range="bytes */400")
    with pytest.raises(download.DownloadError, match="changed"):
        download.download("lego", tmp_path, served["url"])
    assert not list(tmp_path.glob(".*.part"))
    del served["answer"]
    served["cut"] = 500
    with pytest.raises(download.DownloadError, match="run .* again"):
        download.download("lego", tmp_path, served["url"])
    [part] = tmp_path.glob(".*.part")
    part.write_bytes(served["content"])
    served["answer"] = lambda h: head(h, 416, Content_Range=f"bytes */{len(served['content'])}")
    assert download.download("lego", tmp_path, served["url"]).is_dir()


def test_two_downloads_of_one_file_do_not_meet(served, tmp_path):
    (tmp_path / "nerf_synthetic").mkdir()
    served["cut"] = 500
    with pytest.raises(download.DownloadError):
        download.download("lego", tmp_path, served["url"])
    [part] = tmp_path.glob(".*.part")
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(download.DownloadError, match="another process"):
            download.download("lego", tmp_path, served["url"])
    assert part.stat().st_size == 500


@pytest.mark.parametrize(
    "url",
    ["x", "lego.zip", "/etc/passwd", "file:///etc/passwd", "ftp://h/x", "data:,x", "http://",
     "http://a b/x.zip", "http://127.0.0.1:x/", "http://127.0.0.1:99999/x", "http://[::1/x",
     "http://\n/x", "http://\x1b[31m/x", "http://caf\u00e9/x", "http://../x"],
)  # fmt: skip
def test_bad_addresses_are_one_line(tmp_path, monkeypatch, capsys, url):
    code, error = run(monkeypatch, capsys, tmp_path, "--url", url)
    assert code == 2 and error.count("\n") == 1 and error[:-1].isprintable()
    assert not list(tmp_path.rglob("*.zip"))


def test_files_that_were_there_are_kept(served, tmp_path, monkeypatch, capsys):
    """A file of the archive's name, whatever is wrong with it; so is one of the scene's name."""
    mine, flags = tmp_path / "example.zip", ("--url", served["url"])
    for content, expected in ((b"my notes", "move it elsewhere"), (archive("x/y"), "")):
        mine.write_bytes(content)
        code, error = run(monkeypatch, capsys, tmp_path, *flags, "--sha256", "0" * 64)
        assert code == 2 and "it was there before" in error
        code, error = run(monkeypatch, capsys, tmp_path, *flags)
        assert (code, expected in error) == (0 if not expected else 2, True)
        assert mine.read_bytes() == content and not served["ranges"]
    for url, name in (("/..", "lego.zip"), ("/a/", "lego.zip"), ("/demo.py", "demo.py.zip"),
                      ("/%2e%2e%2fa%1b.zip?x=/b", "_a_.zip"), ("/" + "x" * 300, "x" * 100 + ".zip"),
                      ("/.bashrc", "bashrc.zip"), ("/a.zip?token=b", "a.zip")):  # fmt: skip
        assert download.archive_name("http://host" + url, "lego") == name
    shutil.rmtree(tmp_path / "nerf_synthetic" / "lego")
    (tmp_path / "nerf_synthetic" / "lego").write_text("mine")
    code, error = run(monkeypatch, capsys, tmp_path, *flags)
    assert code == 2 and "in the way" in error
    code, error = run(monkeypatch, capsys, tmp_path, *flags, "--sha256", "abc")
    assert code == 2 and "64 hexadecimal digits" in error


def changed(content: bytes, *, flags: int = 0, method: int | None = None) -> bytes:
    """A zip archive with other flags or another method in all of its headers."""
    data = bytearray(content)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            data[start + at] |= flags
            if method is not None:
                data[start + at + 2] = method
    return bytes(data)


def strange_name(name: str) -> bytes:
    buffer = io.BytesIO(archive())
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr(f"nerf_synthetic/lego/{name}", "x")
    return buffer.getvalue()


ARCHIVES = {
    "encrypted": (changed(archive(), flags=1), "is encrypted"),
    "deflate64": (changed(archive(), method=9), "method 9"),
    "method 99": (changed(archive(), method=99), "method 99"),
    "not what it says": (changed(archive(), method=8), "damaged"),
    "lzma that is none": (changed(archive(), method=14), "damaged"),
    "bzip2 that is none": (changed(archive(), method=12), "download.py"),
    "patched": (changed(archive(), flags=0x20), "damaged"),
    "half": (archive()[:900], "damaged"),
    "empty": (b"PK\x05\x06" + bytes(18), "holds no scene"),
    "text": (b"<html>", "damaged"),
    "colours": (strange_name("\x1b[31m.png"), "no name for a file"),
    "two lines": (strange_name("a\nb.png"), "no name for a file"),
    "right to left": (strange_name("a\u202egnp.b"), "no name for a file"),
    "a file as a folder": (strange_name("transforms_train.json/x"), "download.py"),
    "a long name": (strange_name("x" * 300), "download.py"),
}


def test_archives_that_cannot_be_unpacked_are_one_line(served, tmp_path, monkeypatch, capsys):
    for what, (content, expected) in ARCHIVES.items():
        served |= {"content": content, "etag": "none"}
        code, error = run(monkeypatch, capsys, tmp_path, "--url", served["url"])
        assert code == 2 and expected in error and error.isascii(), (what, error)
        (tmp_path / "example.zip").unlink(missing_ok=True)
        assert not list(tmp_path.rglob("*")), what


def test_what_a_kill_after_the_last_rename_left_is_cleared(served, tmp_path):
    """The scene is there, and so is the rest of the archive in a hidden folder."""
    folder = download.download("lego", tmp_path, served["url"])
    rest = folder.parent / ".lego.unpacking"
    (rest / "nerf_llff_data" / "fern").mkdir(parents=True)
    with download.empty_folder(rest):  # while another process is at work
        download.download("lego", tmp_path, served["url"])
        assert rest.is_dir()
        rest.joinpath("fern").mkdir()
        rest.rename(tmp_path / "kept")
    (tmp_path / "kept").rename(rest)
    download.download("lego", tmp_path, served["url"])
    assert [path.name for path in folder.parent.iterdir()] == ["lego"]
    assert len(served["ranges"]) == 1


def test_what_a_killed_process_left_is_cleared(served, tmp_path):
    left = tmp_path / "nerf_synthetic" / ".lego.unpacking" / "nerf_synthetic" / "lego" / "train"
    left.mkdir(parents=True)
    (left / "of_another_scene.png").write_bytes(b"x")
    folder = download.download("lego", tmp_path, served["url"])
    assert [path.name for path in (folder / "train").iterdir()] == ["r_0.png"]
    assert [path.name for path in folder.parent.iterdir()] == ["lego"]
