"""Fetch the public example scenes into data/, where the configs expect them.

    python data/download.py lego            # data/nerf_synthetic/lego
    python data/download.py fern            # data/nerf_llff_data/fern
    python data/download.py --list

An interrupted download is resumed. Every file of an archive is checked against the archive's
checksums, and the archive against --sha256, or against the SHA-256 that the server sends, if any.
A scene's folder is complete or does not exist.
"""

import checkout  # noqa: F401  first: finds nerf/, says in a sentence what is missing

# isort: split
import argparse
import hashlib
import re
import shutil
import stat
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPResponse
from pathlib import Path

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

# Limits for an archive: number of files, unpacked / packed bytes (pictures hardly compress).
MAX_MEMBERS, MAX_RATIO = 100_000, 20


class DownloadError(Exception):
    """A message of one line: what went wrong and what to do."""


def fetch(url: str, target: Path) -> str | None:
    """Download ``url`` to ``target``; returns the SHA-256 that the server sends, None without.

    Bytes are written to ``target``.part, which a later call resumes. DownloadError if the server
    cannot be reached or answers with an error.
    """
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            if have and response.status != 206:
                have = 0  # the server does not support resuming: start over
            stated = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            _copy(response, part, have, total, url)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416 (range not satisfiable): the .part file is complete
            raise DownloadError(
                f"{url}: the server answers {error.code} {error.reason}; try again later, or give "
                "a mirror with --url"
            ) from None
        stated = ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"{url}: not reachable ({reason}); run the same command again to resume"
        ) from None
    part.replace(target)
    match = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', stated)
    return match[1] if match else None


def _copy(response: HTTPResponse, part: Path, have: int, total: int | None, url: str) -> None:
    """Append the response to ``part``. DownloadError if it ends before ``total`` bytes."""
    from tqdm import tqdm

    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None)
    with bar, open(part, "ab" if have else "wb") as file:
        while block := response.read(1 << 20):
            file.write(block)
            bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise DownloadError(
            f"{url}: interrupted at {part.stat().st_size} of {total} bytes; run the same command "
            "again to resume"
        )


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
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{archive}: {name!r} is a link or device; nothing is unpacked")
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


def unpack(archive: Path, scene: str, target: Path) -> None:
    """Unpack the folder of ``scene`` from a zip archive to ``target``, checking all checksums.

    DownloadError if the archive is damaged (it is then removed) or has no such scene.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with zipfile.ZipFile(archive) as file:
            infos = [info for info in file.infolist() if not info.filename.startswith("__MACOSX")]
            check_members(infos, archive, temporary)
            members = [info.filename for info in infos]
            file.extractall(temporary, members)  # raises BadZipFile on a wrong CRC
        found = [path.parent for path in temporary.rglob("transforms_train.json")]
        found += [path.parent for path in temporary.rglob("poses_bounds.npy")]
        named = [folder for folder in found if folder.name == scene] or found
        if len(named) != 1:
            raise DownloadError(
                f"{archive}: holds no scene called {scene}; remove it, or give another --url"
            )
        named[0].rename(target)
    except (zipfile.BadZipFile, EOFError) as error:
        archive.unlink()
        raise DownloadError(
            f"{archive}: damaged and removed ({error}); run the same command again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def download(scene: str, root: Path, url: str | None = None, sha256: str | None = None) -> Path:
    """The folder of ``scene`` under ``root``, downloaded unless it exists.

    url: of the archive, instead of that in SCENES. sha256: of the archive. DownloadError if a
    checksum differs or nothing can be downloaded.
    """
    source, folder = SCENES[scene]
    url, target = url or source, root / folder
    if target.exists():
        print(f"{target}: exists already")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = root / (Path(url).name or f"{scene}.zip")
    stated = None
    if not archive.exists():
        print(f"downloading {url}")
        stated = fetch(url, archive)
    expected, actual = sha256 or stated, digest(archive)
    if expected and expected.lower() != actual:
        archive.unlink()
        raise DownloadError(
            f"{archive}: SHA-256 is {actual}, expected {expected}; removed, run the command again"
        )
    print(f"{archive}: SHA-256 {actual}" + (" as expected" if expected else ""))
    unpack(archive, scene, target)
    print(f"{target}: ready; {archive} may be deleted")
    return target


def main() -> int:
    """Parse the command line and download; the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    try:
        if args.scene in LLFF_SCENES and not args.url:
            raise DownloadError(
                f"{args.scene}: has no direct link; download nerf_llff_data.zip in a browser from "
                f"{LLFF_MANUAL} and unpack it into {args.root}/nerf_llff_data"
            )
        if args.scene in LLFF_SCENES:
            SCENES[args.scene] = (args.url, f"nerf_llff_data/{args.scene}")
        if args.scene not in SCENES:
            raise DownloadError(f"scene {args.scene!r}; expected one of {', '.join(SCENES)}")
        download(args.scene, args.root, args.url, args.sha256)
    except (DownloadError, OSError) as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
