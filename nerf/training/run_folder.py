"""The run folder: what was run, what happened, and nothing that a second process could spoil."""

import fcntl
import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from nerf import __version__
from nerf.media import write_png

LIBRARIES = (
    "torch numpy ConfigArgParse imageio pillow scikit-image tensorboard "
    "diffusers transformers trimesh"
).split()


class RunFolder:
    """``basedir/expname``: one writer at a time. On ranks other than 0 every method is a no-op.

    ValueError if another process is training in the same folder.
    """

    def __init__(self, folder: Path, *, is_main: bool, lock: bool):
        self.folder, self.is_main = folder, is_main
        self._lock = self._writer = self._csv = self._val = self._wandb = None
        self._locked, self._logged = lock, set()
        self.failed: dict[str, str] = {}  # kind of file that could not be written -> reason
        if not is_main:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be made ({error.strerror})") from None
        if lock:
            self._take_lock()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, traceback_) -> None:
        """Close everything; the traceback of a mistake goes to log.txt, never to the terminal."""
        if isinstance(error, ValueError | OSError):
            self.log_file_only("".join(traceback.format_exception(error)))
        self.close()

    def _take_lock(self) -> None:
        try:
            self._lock = open(self.folder / ".lock", "a")
        except OSError as error:
            raise ValueError(
                f"{self.folder}: cannot be written to ({error.strerror}); choose another --basedir"
            ) from None
        try:
            # Held by the open file, not by its existence: a killed process never leaves it behind.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.folder}: another process is training here; wait for it, "
                "or choose another --expname"
            ) from None

    def log(self, message: str) -> None:
        """One line to the terminal and to log.txt."""
        if not self.is_main:
            return
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)
        self.log_file_only(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")

    def log_once(self, step: int, complaint: str | None) -> None:
        """Log a complaint about the run at ``step``, unless the same was logged before."""
        if complaint is not None and complaint not in self._logged:
            self._logged.add(complaint)
            self.log(f"step {step}: {complaint}")

    def log_file_only(self, text: str) -> None:
        """``text`` to log.txt alone, if that can be written."""
        if not self.is_main:
            return
        try:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self.failed["log.txt"] = error.strerror or str(error)

    # ---------------------------------------------------------- a disk that is full, or gone

    @contextmanager
    def guard(self, what: str):
        """Inside the block a file that cannot be written is said and remembered, not fatal."""
        try:
            yield
        except OSError as error:
            self.mark_failed(what, what, error)
        except ValueError as error:
            if not isinstance(error.__context__, OSError):  # one that was put into our words
                raise
            self.mark_failed(what, what, error.__context__)

    def mark_failed(self, kind: str, what: str, error: Exception) -> None:
        """Say that ``what`` is not written, and go on; ``exit_code`` tells it at the end."""
        reason = getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0]
        self.failed[kind] = reason
        self.log(f"warning: {what} is not written ({reason}); training goes on")

    def mark_recovered(self, kind: str) -> None:
        """A later file of this ``kind`` makes up for the ones that were lost."""
        self.failed.pop(kind, None)

    def exit_code(self, code: int = 0) -> int:
        """``code``, or 3, with a line that says so, if something could not be written."""
        if not self.failed:
            return code
        lost = ", ".join(f"{what} ({reason})" for what, reason in self.failed.items())
        self.log(f"not everything is on the disk: {lost}")
        return 3

    def recreate(self) -> None:
        """Make the run folder again if it was removed; tables then start anew."""
        if not self.is_main or self.folder.is_dir():
            return
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            self.mark_failed("run folder", f"{self.folder}, which was removed,", error)
            return
        self.close_tables()
        if self._locked:
            self._lock.close()
            self._take_lock()
        self.log(f"warning: {self.folder} was removed during the run; it is made again")

    def record(self, flags: dict, as_config: str) -> None:
        """args.json, args.txt, config.txt and cmd.txt of this start."""
        if not self.is_main:
            return
        self.write_json("args.json", flags)
        (self.folder / "args.txt").write_text(as_config, encoding="utf-8")
        if flags.get("config"):
            shutil.copyfile(flags["config"], self.folder / "config.txt")
        with open(self.folder / "cmd.txt", "a", encoding="utf-8") as file:
            file.write(_provenance())

    def write_json(self, name: str, content) -> None:
        """``content`` to a JSON file, replaced as a whole; null where a number is not finite."""
        if not self.is_main:
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        text = json.dumps(_finite(content), indent=1, allow_nan=False)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    def start_wandb(self, flags: dict) -> None:
        """Log to Weights & Biases as well, from now on; a run that is resumed goes on there.

        ValueError without the package, or where it cannot start.
        """
        if not self.is_main:
            return
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs one more package: pip install wandb") from None
        id_file = self.folder / "wandb_id.txt"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        try:
            self._wandb = wandb.init(
                project="nerf", name=self.folder.name, dir=str(self.folder), config=flags,
                id=known, resume="allow",
            )  # fmt: skip
        except Exception as error:  # no key, no network, and whatever else it may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"--wandb: it does not start ({reason}); `wandb login`, or set WANDB_MODE=offline"
            ) from None
        id_file.write_text(self._wandb.id, encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One row of metrics.csv and its TensorBoard points. Keys must be the same every time."""
        if not self.is_main:
            return
        self.recreate()
        with self._table("metrics.csv"):
            if self._csv is None:
                self._csv = _open_table(self.folder / "metrics.csv", step, ["step", *values])
            row = [str(step)] + [f"{value:.7g}" for value in values.values()]
            self._csv.write(",".join(row) + "\n")
            self._csv.flush()
            for name, value in values.items():
                self.tensorboard(step).add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def validation(self, step: int, score: float, strip: np.ndarray) -> None:
        """Validation PSNR and picture: TensorBoard, and val_strip.png (the latest)."""
        if not self.is_main:
            return
        self.recreate()
        with self._table("val.csv"):
            write_png(self.folder / "val_strip.png", strip)
            self.tensorboard(step).add_scalar("val_psnr", score, step)
            self.tensorboard(step).add_image("validation", strip, step, dataformats="HWC")
            if self._val is None:
                self._val = _open_table(self.folder / "val.csv", step, ["step", "val_psnr"])
            self._val.write(f"{step},{score:.6g}\n")
            self._val.flush()
        if self._wandb is not None:
            self._wandb.log({"val_psnr": score}, step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """uint8 [H, W, 3] to <name>s/STEP.png and TensorBoard."""
        if not self.is_main:
            return
        self.recreate()
        with self._table(f"{name}s"):
            write_png(self.folder / f"{name}s" / f"{step:06d}.png", picture)
            self.tensorboard(step).add_image(name, picture, step, dataformats="HWC")

    @contextmanager
    def _table(self, what: str):
        """``guard``, after which everything is opened again: half a row may be in a buffer."""
        try:
            with self.guard(what):
                yield
        finally:
            if what in self.failed:
                self.close_tables()

    def tensorboard(self, step: int):
        """The TensorBoard writer; points that a crashed run left behind ``step`` are dropped."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _without_disk_errors
            self._writer = SummaryWriter(str(self.folder / "tb"), purge_step=step)
        return self._writer

    def close_tables(self) -> None:
        """Close tables and TensorBoard; the next row reopens them and drops what it overtakes."""
        resources = (self._csv, self._val, self._writer)
        self._csv = self._val = self._writer = None
        for resource in resources:
            if resource is not None:
                try:
                    resource.close()
                except (OSError, ValueError) as error:  # what it still held has no room
                    self.failed["tables"] = str(error).splitlines()[0]

    def close(self) -> None:
        """Flush and release everything; safe to call twice."""
        self.close_tables()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _without_disk_errors(caught) -> None:
    """A thread's traceback, unless it is of a disk: TensorBoard's raises that in ours as well."""
    if not isinstance(caught.exc_value, OSError):
        threading.__excepthook__(caught)


def _finite(content):
    """``content`` with None for every number that JSON cannot hold."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _open_table(path: Path, step: int, header: list[str]):
    """A CSV file to append to, without the rows from ``step`` on that a broken-off run left."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    kept = [",".join(header) + "\n"] + [
        line
        for line in lines[1:]
        if line.endswith("\n") and line.split(",")[0].isdigit() and int(line.split(",")[0]) < step
    ]
    if kept != lines:
        path.write_text("".join(kept), encoding="utf-8")
    return open(path, "a", encoding="utf-8")


def _provenance() -> str:
    """Command, versions, commit and local changes of this start, for cmd.txt."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent
        try:
            result = subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    def version(library: str) -> str:
        try:
            return f"{library} {metadata.version(library)}"
        except metadata.PackageNotFoundError:
            return f"{library} absent"

    parts = [
        f"# {datetime.now():%Y-%m-%d %H:%M:%S}, version {__version__}",
        shlex.join([Path(sys.executable).name, *sys.argv]),
        f"# python {platform.python_version()}, " + ", ".join(version(name) for name in LIBRARIES),
        f"# commit {git('rev-parse', 'HEAD') or 'unknown'}",
    ]
    difference = git("diff", "HEAD")
    if difference:
        parts.append("# local changes:\n" + difference)
    return "\n".join(parts) + "\n\n"


def newest_run(basedir: Path, config: str | None, needs: str) -> str | None:
    """Name of the run below ``basedir`` that was started last; None if there is none.

    Only runs of the same ``config`` file count (None: of any), whose flags include ``needs``.
    """
    runs = []
    for path in basedir.glob("*/args.json"):
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if needs in saved and config in (None, saved.get("config")):
            runs.append((path.stat().st_mtime, path.parent.name))
    return max(runs)[1] if runs else None
