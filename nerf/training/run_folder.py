"""The run folder: what was run and what happened, written by one process at a time."""

import fcntl
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np

from nerf.media import write_png
from nerf.training import last_net, logged
from nerf.training.files import describe_lost, open_append, why_not_written, writing_to
from nerf.training.plain_text import indented, one_line
from nerf.training.run_records import RECORDS, Records, refuse_links

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
LEVELS = ("debug", "info", "warning")  # of messages, from the least to the most important


class RunFolder:
    """The folder ``basedir/expname`` of a run. On ranks other than 0 its methods do nothing.

    is_main: whether this is rank 0. lock: of a run that trains; ValueError if another process is
    training in the same folder. level: of what the terminal shows (--log_level), one of LEVELS;
    log.txt has all.
    """

    level = "info"

    def __init__(self, folder: Path, *, is_main: bool, lock: bool) -> None:
        self.folder, self.is_main = folder, is_main
        self.failed: dict[str, str] = {}  # kind of file that could not be written -> reason
        self._locked, self._logged = lock, set[str]()
        self._lock: TextIO | None = None
        self._tables: dict[str, logged.Table] = {}  # by file name: metrics.csv, val.csv, test.csv
        self._writer: SummaryWriter | None = None
        self._records, self._recreating = Records(folder), False
        self._wandb: Any = None  # wandb.Run
        self._created = is_main and not folder.exists()
        if not is_main:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be made ({error.strerror}); choose another --basedir"
            ) from None
        refuse_links(folder)
        if lock:
            try:
                self._take_lock()
            except OSError as error:
                raise ValueError(
                    f"{folder}: cannot be written to ({error.strerror}); choose another --basedir"
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback_: TracebackType | None,
    ) -> None:
        """Close everything; the traceback of a user's mistake goes to log.txt only.

        A folder that this command created, and in which nothing was made, is removed again.
        """
        if isinstance(error, Exception):
            self.debug("".join(traceback.format_exception(error)))
            last_net.written_to(error, None if self.failed else self.folder / "log.txt")
        self.close()
        unexpected = isinstance(error, Exception) and not isinstance(error, ValueError | OSError)
        if error is not None and not unexpected and self._created and self.folder.is_dir():
            files = {path.name for path in self.folder.iterdir()}
            if files <= {".lock", "log.txt", *(RECORDS if isinstance(error, ValueError) else [])}:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _take_lock(self) -> None:
        """OSError if it cannot be written, ValueError if another process has it."""
        lock = self._lock = open_append(self.folder / ".lock")
        try:
            # The system releases the lock when its process ends, even if that is killed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.folder}: another process is training here; wait for it, "
                "or choose another --expname"
            ) from None

    def log(self, message: str, level: str = "info") -> None:
        """Write one line to log.txt, and to the terminal if ``self.level`` shows its level."""
        if not self.is_main:
            return
        message = one_line(message)
        self.show(message, level)
        self._append(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")

    def warn(self, message: str) -> None:
        """Log a line that also a terminal shows on which --log_level leaves warnings alone."""
        self.log(message, "warning")

    def show(self, message: str, level: str) -> None:
        """Write to the terminal what is of this level (one of LEVELS), or above."""
        level = "warning" if message.startswith("warning") else level
        if LEVELS.index(level) >= LEVELS.index(self.level):
            from tqdm import tqdm

            tqdm.write(message, file=sys.stderr)

    def log_once(self, step: int, warning: str | None) -> None:
        """Log a warning about the run at ``step``, unless the same was logged before."""
        if warning is not None and warning not in self._logged:
            self._logged.add(warning)
            self.warn(f"step {step}: {warning}")

    def debug(self, text: str) -> None:
        """Append ``text``, of several lines, to log.txt; shown at --log_level debug."""
        if self.is_main:
            text = indented(text)
            self.show(text.rstrip(), "debug")
            self._append(text)

    def _append(self, text: str) -> None:
        self.recreate()
        try:
            with open_append(self.folder / "log.txt") as file:
                file.write(text)
        except OSError as error:
            self.failed["log.txt"] = why_not_written(error, self.folder)

    # ------------------------------------------------------------ a disk that is full or missing

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Inside the block, a file that cannot be written is logged and remembered, not fatal."""
        try:
            yield
        except OSError as error:
            self.mark_failed(what, what, error)
        except ValueError as error:
            if not isinstance(error.__context__, OSError):  # not caused by a failed write
                raise
            self.mark_failed(what, what, error.__context__)

    def mark_failed(self, kind: str, what: str, error: Exception) -> None:
        """Log that ``what`` is not written; unless ``mark_recovered``, ``exit_code`` will be 3."""
        reason = self.failed[kind] = why_not_written(error, self.folder)
        self.log(f"warning: {what} is not written ({reason}); training goes on")

    def mark_recovered(self, kind: str) -> None:
        """Forget the failures of this ``kind``: a later file of it replaces those not written."""
        self.failed.pop(kind, None)

    def exit_code(self, code: int = 0) -> int:
        """``code``; but 3, with a line in the log, if something could not be written."""
        self.recreate()
        if not self.failed:
            return code
        self.warn(describe_lost(self.failed, has_checkpoint=self.has_checkpoint()))
        return 3

    def has_checkpoint(self) -> bool:
        """Whether a mode that reads the run would find one."""
        return any(self.folder.glob("[0-9]*.tar"))

    def recreate(self) -> None:
        """Make the run folder and its records again if they were removed.

        Its tables then start empty; without a later checkpoint ``exit_code`` will be 3.
        """
        whole = not self.is_main or (self._has_lock() and not self._records.removed())
        if whole or self._recreating:
            return
        self._recreating = True  # what follows logs, and what is logged would come here again
        try:
            gone = not self._has_lock()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.close_tables()
            self.mark_recovered("tables")  # their files are gone
            if self._locked and not self.has_checkpoint():
                self.failed["checkpoint"] = "removed with the run folder"
            if self._locked and gone:
                self._take_lock()
            what = self.folder if gone else ", ".join(self._records.removed())
            self._records.write_again()
            self.mark_recovered("run folder")
            self.mark_recovered("log.txt")
            self.log(f"warning: {what} was removed during the run; it is made again")
        except OSError as error:
            if "run folder" not in self.failed:  # tried at each line of the log
                self.mark_failed("run folder", f"{self.folder}, which was removed,", error)
        finally:
            self._recreating = False

    def _has_lock(self) -> bool:
        """Whether the folder is there and, of a run that trains, the lock is that it has taken."""
        if self._lock is None:  # not of a run that trains, or at the start or the end
            return self.folder.is_dir()
        try:
            return os.path.samestat(
                os.fstat(self._lock.fileno()), os.stat(self.folder / ".lock", follow_symlinks=False)
            )
        except OSError:
            return False

    def record(self, flags: dict[str, Any], as_config: str) -> None:
        """Write args.json, args.txt, config.txt, this start's entry in cmd.txt, and code/.

        as_config: the flags as a config file.
        """
        if self.is_main:
            with writing_to(self.folder):
                self._records.write(flags, as_config, self.guard)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; {} if there is none, or on ranks other than 0."""
        if not self.is_main:
            return {}
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_json(self, name: str, content: Any) -> None:
        """Write ``content`` to a JSON file, replaced as a whole; numbers not finite become null."""
        if self.is_main:
            self.recreate()
            self._records.write_json(name, content)

    def start_wandb(self, flags: dict[str, Any]) -> None:
        """From now on log to Weights & Biases too; a resumed run continues its run on that service.

        ValueError if the package is missing or cannot start.
        """
        if self.is_main:
            self._wandb = logged.start_wandb(self.folder, flags)

    def scalars(self, step: int, values: dict[str, float], table: str = "metrics.csv") -> None:
        """Write a row of a table, TensorBoard's points and, if it is on, Weights & Biases'."""
        if not self.is_main:
            return
        self.recreate()
        with self._table(table):
            if table not in self._tables:
                opened = self._tables[table] = logged.Table(self.folder / table, step, values)
                for damage in opened.damaged:
                    self.warn(f"warning: {table}: {damage}; left out")
            self._tables[table].write(step, values)
            self.show(", ".join(f"{name} {v:.7g}" for name, v in values.items()), "debug")
            for name, value in values.items():
                self.tensorboard(step).add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def validation(self, step: int, score: float, strip: np.ndarray) -> None:
        """Write validation PSNR and picture, uint8 [H, W, 3], to val.csv and val_strip.png."""
        if not self.is_main:
            return
        with self._table("val_strip.png"):
            write_png(self.folder / "val_strip.png", strip)
        # Last, so that a validation with a row is complete: see Evaluation.owes_validation.
        self.scalars(step, {"val_psnr": float(f"{score:.6g}")}, "val.csv")
        self._show(step, "validation", strip)

    def test_scores(self, step: int, metrics: dict[str, Any]) -> None:
        """Log PSNR, SSIM and, where measured, LPIPS of a training run's test; a row of test.csv."""
        if not self._locked:  # a mode that only reads the run
            return
        names = [name for name in ("psnr", "ssim", "lpips") if metrics.get(name) is not None]
        self.scalars(step, {f"test_{name}": metrics[name] for name in names}, "test.csv")

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3], to NAMEs/STEP.png, TensorBoard and W&B."""
        if not self.is_main:
            return
        self.recreate()
        with self._table(f"{name}s"):
            write_png(self.folder / f"{name}s" / f"{step:06d}.png", picture)
        self._show(step, name, picture)

    def _show(self, step: int, name: str, picture: np.ndarray) -> None:
        with self._table("TensorBoard"):
            self.tensorboard(step).add_image(name, picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: logged.wandb_picture(picture)}, step=step)

    @contextmanager
    def _table(self, what: str) -> Iterator[None]:
        """``guard``; after a failure all tables are reopened, as a buffer may hold half a row."""
        try:
            with self.guard(what):
                yield
        finally:
            if what in self.failed:
                self.close_tables()

    def tensorboard(self, step: int) -> "SummaryWriter":
        """The TensorBoard writer; a new one drops a crashed run's points from ``step`` on."""
        if self._writer is None:
            self._writer = logged.start_tensorboard(self.folder, step, self._records.flags)
        return self._writer

    def close_tables(self) -> None:
        """Close tables and TensorBoard; the next row reopens them and drops rows of later steps."""
        resources: list[Any] = [*self._tables.values(), *([self._writer] if self._writer else [])]
        self._tables, self._writer = {}, None
        for resource in resources:
            try:
                resource.close()
            except (OSError, ValueError) as error:  # no space for what its buffer still held
                self.failed["tables"] = why_not_written(error, self.folder)

    def close(self) -> None:
        """Flush and release everything; safe to call twice."""
        self.close_tables()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def newest_run(basedir: Path, config: str | None, needs: str) -> str | None:
    """The name of the run in ``basedir`` that was started last and has a checkpoint, or None.

    config: only runs of this config file count; None: of any. needs: a flag that they must have.
    """
    runs = []
    for path in basedir.glob("*/args.json"):
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        trained = any(path.parent.glob("[0-9]*.tar"))
        if trained and needs in saved and config in (None, saved.get("config")):
            runs.append((path.stat().st_mtime, path.parent.name))
    return max(runs)[1] if runs else None
