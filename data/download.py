"""Fetch the public example scenes into data/, where the configs expect them.

    python data/download.py lego            # data/nerf_synthetic/lego
    python data/download.py fern            # data/nerf_llff_data/fern
    python data/download.py --list

An interrupted download is resumed. Every file of an archive is checked against the archive's
checksums, and the archive against --sha256, or against the SHA-256 that the server sends, if any.
A scene's folder is complete or does not exist. A file that was there before is never removed.
"""

import checkout  # noqa: F401  first: finds nerf/, says in a sentence what is missing

# isort: split
import fcntl
import hashlib
import lzma
import os
import re
import shutil
import stat
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from nerf.training import last_net
from nerf.training.arguments import ArgumentParser
from nerf.training.files import folders_above
from nerf.training.plain_text import one_line

EXAMPLE = "http://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/nerf_example_data.zip"
BLENDER = "https://huggingface.co/datasets/jkulhanek/nerfbaselines-data/resolve/main/blender/"
BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "materials", "mic", "ship")
LLFF_SCENES = ("flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
LLFF_MANUAL = "https://drive.google.com/drive/folders/128yBriW1IG_3NJ5Rp7APSTZsJqdJdfc1"

# scene -> (archive, folder of the scene under data/)
SCENES = {
    "lego": (EXAMPLE, "nerf_synthetic/lego"),
    "fern": (EXAMPLE, "nerf_llff_data/fern"),
    **{name: (f"{BLENDER}{name}.zip", f"nerf_synthetic/{name}") for name in BLENDER_SCENES},
}

# Limits for an archive: number of files, unpacked / packed bytes (pictures hardly compress), bytes
# of the download, and bytes that it leaves free on the disk.
MAX_MEMBERS, MAX_RATIO = 100_000, 20
MAX_BYTES, LEAVE_FREE = 50 << 30, 100 << 20
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)  # fmt: skip  what zipfile raises for damaged archives


class DownloadError(Exception):
    """A message of one line: what went wrong and what to do."""


def fetch(url: str, target: Path) -> str | None:
    """Download ``url`` to ``target``; returns the SHA-256 that the server sends, None without.

    Bytes are written to a hidden file beside it, which a later call with this url resumes.
    DownloadError if the server cannot be reached, answers with an error or sends too much.
    """
    part = target.with_name(f".{target.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
    with open(part, "ab") as file:
        _lock(file.fileno(), part)
        try:
            stated = _request(url, part, file.tell())
        except urllib.error.HTTPError as error:
            raise DownloadError(
                f"{url}: the server answers {error.code} {one_line(error.reason)}; try again "
                "later, or give a mirror with --url"
            ) from None
        except (OSError, ValueError, HTTPException) as error:
            reason = one_line(getattr(error, "reason", error) or type(error).__name__)
            raise DownloadError(
                f"{url}: not reachable ({reason}); run the same command again to resume"
            ) from None
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
    part.rename(target)
    match = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', stated)
    return match[1] if match else None


def _request(url: str, part: Path, have: int) -> str:
    """Get what follows the first ``have`` bytes into ``part``; the ETag that the server states."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            if not response.url.startswith(("http://", "https://")):
                raise ValueError(f"it leads to {response.url.partition(':')[0]}")
            sent_range = response.headers.get("Content-Range") or ""
            if response.status != 206:
                have = 0  # the server does not support resuming: start over
            elif not sent_range.startswith(f"bytes {have}-"):
                raise ValueError(f"the server sends {sent_range!r}, not from byte {have} on")
            _copy(response, part, have, url)
            return response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # 416, range not satisfiable: nothing is left to send, or the file is another by now.
        if error.headers.get("Content-Range") not in (None, f"bytes */{have}"):
            part.unlink()
            raise DownloadError(
                f"{url}: the file on the server has changed; run the same command again"
            ) from None
        return ""


def _copy(response: HTTPResponse, part: Path, have: int, url: str) -> None:
    """Append the response to ``part``. DownloadError if it ends too early or is too long."""
    from tqdm import tqdm

    total = None if response.length is None else have + response.length
    room = have + shutil.disk_usage(part.parent).free - LEAVE_FREE
    limit = min(MAX_BYTES, room)
    too_long = DownloadError(
        f"{url}: sends {'more than ' if total is None else ''}{total or limit} bytes; expected at "
        f"most {limit}, by the free space and by the size of scenes"
    )
    if total is not None and total > limit:
        raise too_long
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None)
    with bar, open(part, "ab" if have else "wb") as file:
        size = have
        while block := response.read(1 << 20):
            size += len(block)
            if size > limit:  # no length was stated
                file.truncate(0)
                raise too_long
            file.write(block)
            bar.update(len(block))
    if total is not None and size != total:
        raise DownloadError(
            f"{url}: interrupted at {size} of {total} bytes; run the same command again to resume"
        )


def _lock(descriptor: int, path: Path) -> None:
    """Hold the open file or folder until it is closed; DownloadError if another process does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DownloadError(f"{path}: another process is at work here; wait for it") from None
    except OSError:  # a file system without locks
        return


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_members(infos: list[zipfile.ZipInfo], archive: Path, folder: Path) -> None:
    """DownloadError unless all entries are plain files and folders inside ``folder`` and fit there.

    zipfile would silently rename entries that lead out of the folder; an archive with such entries
    is no scene. zipfile writes at most the size that an entry declares, so sizes can be trusted.
    """
    for info in infos:
        name = info.orig_filename.replace("\\", "/")  # zipfile cuts names at a zero byte
        kind = stat.S_IFMT(info.external_attr >> 16)
        if name.startswith("/") or ".." in name.split("/") or ":" in name or "\0" in name:
            raise DownloadError(f"{archive}: {name!r} leads out of its folder; nothing is unpacked")
        if one_line(name) != name:
            raise DownloadError(f"{archive}: {name!r} is no name for a file; nothing is unpacked")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{archive}: {name!r} is a link or device; nothing is unpacked")
        if info.flag_bits & 1 or info.compress_type not in METHODS:
            how = "encrypted" if info.flag_bits & 1 else f"packed by method {info.compress_type}"
            raise DownloadError(f"{archive}: {name!r} is {how}; unpack the archive by other means")
    total, packed = sum(info.file_size for info in infos), archive.stat().st_size
    if len(infos) > MAX_MEMBERS or total > max(MAX_RATIO * packed, 100 << 20):
        raise DownloadError(
            f"{archive}: {packed} bytes claim to hold {len(infos)} files of {total} bytes; "
            f"expected at most {MAX_MEMBERS} files and {MAX_RATIO} times the archive's size"
        )
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DownloadError(
            f"{folder.parent}: {free >> 20} MiB free, {total >> 20} MiB needed; free some space"
        )


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """An empty folder inside the block, gone after it; what a killed process left there, too."""
    path.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, path)
        try:
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def unpacking(target: Path) -> Path:
    """The hidden folder in which ``target`` is made."""
    return target.with_name(f".{target.name}.unpacking")


def remove_rest(target: Path) -> None:
    """Remove what a process that was killed after making ``target`` left beside it."""
    if unpacking(target).is_dir():
        with suppress(DownloadError, OSError), empty_folder(unpacking(target)):
            pass


def unpack(archive: Path, scene: str, target: Path, *, remove_damaged: bool = False) -> None:
    """Unpack the folder of ``scene`` from a zip archive to ``target``, checking all checksums.

    remove_damaged: whether a damaged archive is removed, as nobody but this program wrote it.
    DownloadError if the archive is damaged or has no such scene.
    """
    with empty_folder(unpacking(target)) as temporary:
        try:
            with zipfile.ZipFile(archive) as file:
                infos = [i for i in file.infolist() if not i.filename.startswith("__MACOSX")]
                check_members(infos, archive, temporary)
                members = [info.filename for info in infos]
                file.extractall(temporary, members)  # raises BadZipFile on a wrong CRC
        except DAMAGE as error:
            if remove_damaged:
                archive.unlink()
            what = "and removed; run" if remove_damaged else "; move it elsewhere and run"
            raise DownloadError(
                f"{archive}: damaged {what} the same command again ({one_line(error)})"
            ) from None
        found = [path.parent for path in temporary.rglob("transforms_train.json")]
        found += [path.parent for path in temporary.rglob("poses_bounds.npy")]
        named = [folder for folder in found if folder.name == scene] or found
        if len(named) != 1:
            raise DownloadError(
                f"{archive}: holds no scene called {scene}; move it elsewhere, or give another "
                "--url"
            )
        named[0].rename(target)


def archive_name(url: str, scene: str) -> str:
    """The file name NAME.zip of a downloaded archive, from its url's last part or the scene."""
    path = re.sub(r"^https?://[^/]*|[?#].*", "", url, flags=re.IGNORECASE)
    last = urllib.parse.unquote(path.rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._-]", "_", last).strip(".")[:100]
    return name if name.endswith(".zip") else f"{name or scene}.zip"


def download(scene: str, root: Path, url: str | None = None, sha256: str | None = None) -> Path:
    """The folder of ``scene`` under ``root``, downloaded unless it exists.

    url: of the archive, instead of that in SCENES. sha256: of the archive. DownloadError if a
    checksum differs or nothing can be downloaded.
    """
    source, folder = SCENES[scene]
    url, target = url or source, root / folder
    if not re.match(r"https?://[!-~]+$", url, re.IGNORECASE):
        raise DownloadError(f"--url {url!r}; expected http://... or https://..., without blanks")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DownloadError(f"--sha256 {sha256!r}; expected 64 hexadecimal digits")
    if target.is_dir():
        print(f"{target}: exists already")
        remove_rest(target)
        return target
    archive = root / archive_name(url, scene)
    for path in (target, archive):
        if path.exists() and not path.is_file() or path == target and path.is_file():
            raise DownloadError(f"{path}: is in the way; move it elsewhere")
    with folders_above(target):
        obtain(scene, url, archive, target, sha256)
    return target


def obtain(scene: str, url: str, archive: Path, target: Path, sha256: str | None) -> None:
    """Download ``archive`` unless it exists, and unpack ``target`` from it; see ``download``."""
    stated, own = None, not archive.exists()
    if own:
        print(f"downloading {url}")
        stated = fetch(url, archive)
    expected, actual = sha256 or stated, digest(archive)
    if expected and expected.lower() != actual:
        if own:
            archive.unlink()
        what = "removed, run" if own else "it was there before; move it elsewhere and run"
        raise DownloadError(
            f"{archive}: SHA-256 is {actual}, expected {expected}; {what} the same command again"
        )
    print(f"{archive}: SHA-256 {actual}" + (" as expected" if expected else ""))
    unpack(archive, scene, target, remove_damaged=own)
    print(f"{target}: ready; {archive} may be deleted")


def main() -> int:
    """Parse the command line and download; the process's exit code."""
    parser = ArgumentParser("download.py", __doc__)
    parser.add_argument("scene", nargs="?", help="name of a scene, see --list")
    parser.add_argument("--list", action="store_true", help="list the scenes and their sources")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent, help="data folder")
    parser.add_argument("--url", help="address of the archive, e.g. a mirror")
    parser.add_argument("--sha256", help="expected checksum of the archive")
    args = parser.parse_args()
    if args.list:
        for name, (url, folder) in SCENES.items():
            print(f"{name:10} {folder:26} {url}")
        return 0
    return last_net.exit_code(
        "download.py",
        lambda: download_scene(args.scene, args.root, args.url, args.sha256),
        mistakes=(DownloadError, OSError),
        after_stop="; the same command goes on from there",
    )


def download_scene(name: str | None, root: Path, url: str | None, sha256: str | None) -> None:
    """``download`` of a scene by its name; DownloadError for one that is not known."""
    if name in LLFF_SCENES and not url:
        raise DownloadError(
            f"{name}: has no direct link; download nerf_llff_data.zip in a browser from "
            f"{LLFF_MANUAL} and unpack it into {root}/nerf_llff_data"
        )
    if name in LLFF_SCENES and url:
        SCENES[name] = (url, f"nerf_llff_data/{name}")
    if name is None:
        raise DownloadError(f"give the name of a scene: {', '.join(SCENES)} (--list: from where)")
    if name not in SCENES:
        raise DownloadError(f"scene {name!r}; expected one of {', '.join(SCENES)}")
    download(name, root, url, sha256)


if __name__ == "__main__":
    sys.exit(main())
