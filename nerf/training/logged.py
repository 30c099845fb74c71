"""What a run logs about its updates: numbers over all ranks, and where they go.

Numbers come from the device on logged steps only, all of them in one read. They go to CSV tables
whose columns keep their places, to TensorBoard, and to Weights & Biases.
"""

import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor

from nerf.training.distributed import World
from nerf.training.files import open_append, replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def read_means(world: World, values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """``values`` [] as numbers, each its mean over all ranks: one device read. Collective.

    Of one process they are what they were, to the bit. A sum over ranks is the mean of what is
    passed times ``world.size``.
    """
    on_device = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers: dict[str, float] = {
        name: value for name, value in values.items() if not isinstance(value, Tensor)
    }
    if on_device:
        parts = [value.detach().float().to(world.device) for value in on_device.values()]
        numbers |= dict(zip(on_device, torch.stack(parts).tolist(), strict=True))
    means = world.all_reduce_mean(*(numbers[name] for name in values))
    return dict(zip(values, means, strict=True))


def added(sums: Mapping[str, Tensor], terms: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """The sums of named loss terms with those of one more micro-batch, without their gradients."""
    found = {name: torch.as_tensor(term).detach() for name, term in terms.items()}
    return {name: sums[name] + term if name in sums else term for name, term in found.items()}


def by_group(
    optimizer: torch.optim.Optimizer, names: Sequence[str], total: float, limit: float
) -> dict[str, Tensor | float]:
    """Learning rates "lr_NAME" of all parameter groups but the first, whose is "lr", and the norms
    [] of the gradients of each, "grad_norm_NAME". Of a single group there is nothing to add.

    The gradients are unscaled, and clipped so that all together have at most the norm ``limit``
    (0: not clipped); ``total`` was their norm before that. The result is of before, too.
    """
    groups = optimizer.param_groups
    if len(groups) < 2:
        return {}
    clipped = min(1.0, limit / (total + 1e-6)) if limit else 1.0  # as clip_grad_norm_ does
    values: dict[str, Tensor | float] = {
        f"lr_{name}": group["lr"] for name, group in zip(names[1:], groups[1:], strict=True)
    }
    for name, group in zip(names, groups, strict=True):
        gradients = [p.grad.float() for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / clipped if gradients else 0.0
        values[f"grad_norm_{name}"] = norm
    return values


class Table:
    """A CSV file with a column "step" and one for each name, which only ever gains columns.

    An existing file keeps its columns in their places, and new names come after them; rows from
    ``step`` on, which a crashed run left, are dropped. A row without a value has an empty cell;
    rows written before a column was there end early. Rows that nobody wrote so are dropped too, and
    told in ``damaged``. OSError if the file cannot be written.
    """

    def __init__(self, path: Path, step: int, names: Iterable[str]) -> None:
        self.path = path
        self.damaged: list[str] = []  # "row N: why", as of the newest opening
        self._open(step, names)

    def _open(self, step: int, names: Iterable[str]) -> None:
        path = self.path
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        rows = text.removeprefix("\ufeff").split("\n")
        header = rows[0].rstrip("\r").split(",") if text else ["step"]
        self.damaged = []
        if problem := header_problem(header):
            self.damaged = [f"row 1: {problem}, so that no row can be read"]
            header, rows = ["step"], []
        self.names = header[1:] + [name for name in names if name not in header]
        kept = [",".join(["step", *self.names])]
        for number, row in enumerate(rows[1:-1], 2):  # a last one without its end is unfinished
            if problem := row_problem(row.rstrip("\r"), header):
                self.damaged.append(f"row {number}: {problem}")
            elif int(row.split(",")[0]) < step:
                kept.append(row.rstrip("\r"))
        content = "".join(f"{row}\n" for row in kept)
        if content != text or path.is_symlink():
            replace_file(path, content.encode("utf-8"))  # a kill in it must not cost rows
        self._file: TextIO = open_append(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of ``step``; names that are new get columns at the end."""
        if not set(values) <= set(self.names):
            self._file.close()
            self._open(step, values)
        cells = [f"{values[name]:.7g}" if name in values else "" for name in self.names]
        self._file.write(",".join([str(step), *cells]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write what is left in the buffer. OSError if there is no space for it."""
        self._file.close()


def header_problem(names: Sequence[str]) -> str:
    """What is wrong with the names of a table's columns; "" for nothing."""
    if names[0] != "step":
        return f"the first column is {names[0][:20]!r}, not step"
    odd = [name for name in names if not re.fullmatch(r"[\w.:/-]+", name, re.ASCII)]
    if odd or len(set(names)) < len(names):
        return f"{(odd or ['a column'])[0][:20]!r} is no name, or there twice"
    return ""


def row_problem(row: str, names: Sequence[str]) -> str:
    """What is wrong with a row of a table with these columns; "" for nothing."""
    cells = row.split(",")
    if not re.fullmatch(r"[0-9]{1,15}", cells[0]):
        return f"{cells[0][:20]!r} is not a step"
    if len(cells) > len(names):
        return f"{len(cells)} cells for {len(names)} columns"
    for name, cell in zip(names, cells, strict=False):
        if not is_number(cell) and cell:
            return f"{cell[:20]!r} is not a number ({name})"
    return ""


def is_number(cell: str) -> bool:
    """Whether a cell of a table is a number as they are written here; NaN and infinity are too."""
    return bool(re.fullmatch(r"-?([0-9.]{1,30}(e[+-]?[0-9]{1,4})?|inf|nan)", cell)) and _floats(
        cell
    )


def _floats(cell: str) -> bool:
    with suppress(ValueError):
        float(cell)
        return True
    return False


def start_tensorboard(folder: Path, step: int, flags: dict[str, Any]) -> "SummaryWriter":
    """The writer of tb/, which drops a crashed run's points from ``step`` on."""
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _skip_disk_errors
    writer = SummaryWriter(str(folder / "tb"), purge_step=step)
    if flags:
        writer.add_text("flags", markdown(flags), step)
    return writer


def _skip_disk_errors(caught: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, unless TensorBoard's thread raises it in the main thread too."""
    if not isinstance(caught.exc_value, OSError):
        threading.__excepthook__(caught)


def start_wandb(folder: Path, flags: dict[str, Any]) -> Any:
    """A run of Weights & Biases for this run folder, the same one after a resume.

    ValueError if the package is missing or cannot start.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs one more package: pip install wandb") from None
    id_file = folder / "wandb_id.txt"
    known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
    try:
        session = wandb.init(
            project="nerf", name=folder.name, dir=str(folder), config=flags, id=known,
            resume="allow",
        )  # fmt: skip
    except Exception as error:  # no key, no network, and whatever else it may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--wandb: it does not start ({reason}); `wandb login`, or set WANDB_MODE=offline"
        ) from None
    id_file.write_text(session.id, encoding="utf-8")
    return session


def wandb_picture(picture: np.ndarray) -> Any:
    """A picture, uint8 [H, W, 3], as Weights & Biases takes it."""
    import wandb

    return wandb.Image(picture)


def markdown(flags: Mapping[str, Any]) -> str:
    """Flags as a table of TensorBoard's text page."""
    rows = [f"| {name} | `{value}` |" for name, value in sorted(flags.items())]
    return "\n".join(["| flag | value |", "|---|---|", *rows])


def finite(content: Any) -> Any:
    """``content`` with None for every number that JSON cannot hold: NaN and infinity."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
