"""The checkpoints of a run folder: which are the best, which are kept, which one is opened.

The best are chosen by validation (``Ranking``). The ranking is in every checkpoint; best.json names
the best one for people and for ``--ckpt best``. It is written after that checkpoint and before
older ones are removed, so that the file which it names is always there.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from nerf.training import checkpoint
from nerf.training.checkpoint import (
    CheckpointError,
    NewerFormatError,
    SavedState,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    refuse_newer,
)
from nerf.training.distributed import World
from nerf.training.run_folder import RunFolder

Log = Callable[[str], None]

BEST = "best.json"
# What a run's pictures, numbers and meshes are called in its folder, besides its checkpoints.
RESULTS = (
    "metrics.json", "metrics.csv", "val.csv", "test.csv", "val_strip.png", "report.html",
    "render_test_*", "render_path_*", "render_val_*", "previews", "attentions", "guidances",
    "mesh*.glb", "lora.safetensors", BEST,
)  # fmt: skip


class Scored(NamedTuple):
    """A checkpoint's step, and its score where it was measured."""

    step: int
    score: float


@dataclass(frozen=True)
class Ranking:
    """The best checkpoints of a run, best first; ``recorded`` and the like return a changed one.

    monitor: what the scores are, "psnr", "ssim", or "NAME:min" or "NAME:max" of a column of
    metrics.csv; None: nothing is scored. split: the views that were measured; None: unknown, or no
    views. top: at most ``size`` checkpoints that exist, and while a validation's own checkpoint is
    not written yet, that one too.
    """

    monitor: str | None = "psnr"
    size: int = 1
    split: str | None = None
    top: tuple[Scored, ...] = ()

    @property
    def best(self) -> Scored | None:
        """The best checkpoint; None if nothing was measured."""
        return self.top[0] if self.top else None

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints to keep."""
        return [entry.step for entry in self.top]

    def recorded(self, step: int, score: float, split: str | None) -> Self:
        """With the score of ``step``, if it is among the best. Not finite: without it."""
        if self.monitor is None or not math.isfinite(score):
            return self
        entries = [*(entry for entry in self.top if entry.step != step), Scored(step, score)]
        # Of equal scores the earlier one stays: sorted() keeps their order.
        smallest = (self.monitor or "").endswith(":min")
        entries.sort(key=lambda entry: entry.score, reverse=not smallest)
        if Scored(step, score) not in entries[: self.size]:
            return self
        return replace(self, split=split, top=tuple(entries))

    def written(self) -> Self:
        """Cut to ``size``: the newest of ``top`` is on the disk."""
        return replace(self, top=self.top[: self.size])

    def existing(self, folder: Path) -> Self:
        """Without checkpoints that are not in ``folder``."""
        found = (entry for entry in self.top if checkpoint_path(folder, entry.step).exists())
        return replace(self, top=tuple(found))

    def checkpoint_state(self) -> dict[str, Any]:
        """The entries of a checkpoint: "best" as earlier versions read it, and the ranking."""
        best = self.best
        psnr = best.score if best and self.monitor == "psnr" else -math.inf
        top = {str(entry.step): entry.score for entry in self.top}
        return {
            "best": {"step": best.step if best else None, "psnr": psnr},
            "ranking": {"monitor": self.monitor, "split": self.split, "top": top},
        }

    def restored(self, state: dict[str, Any], where: str) -> Self:
        """``checkpoint_state`` of a checkpoint, ranked by this run's monitor.

        Scores of another monitor are left out. CheckpointError if the entries are none.
        """
        saved, best = state.get("ranking"), state.get("best") or {}
        if not saved:  # from before there were rankings
            known = best.get("step") is not None and math.isfinite(best["psnr"])
            top = {str(best["step"]): best["psnr"]} if known else {}
            saved = {"monitor": "psnr", "split": None, "top": top}
        try:
            scores = [Scored(int(step), float(score)) for step, score in saved["top"].items()]
            monitor, split = saved["monitor"], saved["split"]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(
                f"{where}: not a NeRF checkpoint (ranking is not a table of steps and scores)"
            ) from None
        if monitor != self.monitor:
            return self
        return replace(self, split=split, top=tuple(scores[: self.size]))

    def as_json(self) -> dict[str, Any]:
        """The content of best.json."""
        best = self.best
        assert best is not None
        content = {"file": checkpoint_path(Path(), best.step).name, "step": best.step}
        return {**content, "score": best.score, "monitor": self.monitor, "split": self.split}


def describe_best(content: dict[str, Any]) -> str:
    """best.json in words; "" if ``content`` is not that of one."""
    kinds = {"file": str, "score": int | float, "monitor": str, "split": str | None}
    if not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return ""
    views = f" of the {content['split']} views" if content.get("split") else ""
    named = {"psnr": "PSNR", "ssim": "SSIM"}.get(content["monitor"])
    what = f"{named}{views}" if named else f"{content['monitor']}, not a measure of quality"
    return f"{content['file']}, {content['score']:.4g} ({what})"


def write_best(run: RunFolder, ranking: Ranking) -> None:
    """Make best.json say what ``ranking`` does; remove it where there is no best checkpoint."""
    if not run.is_main:
        return
    path = run.folder / BEST
    with run.guard(BEST):
        if ranking.best is None:
            path.unlink(missing_ok=True)
        elif run.read_json(BEST) != ranking.as_json():
            run.write_json(BEST, ranking.as_json())
        run.mark_recovered(BEST)


# ---------------------------------------------------------------------------- saving, and removing


def save_run(
    run: RunFolder, step: int, content: dict[str, Any], *, keep: int, ranking: Ranking
) -> Ranking | None:
    """Write the checkpoint of ``step``; then remove all but the newest ``keep`` and the best.

    ranking: may have ``step`` in it. Returns the ranking of what is on the disk; None after a
    failed write, which is tried once more, then logged: earlier checkpoints then stay.
    """
    path = checkpoint_path(run.folder, step)
    run.recreate()
    found = ranking.written()  # without files that somebody has removed
    top = (e for e in found.top if e.step == step or checkpoint_path(run.folder, e.step).exists())
    ranking = replace(found, top=tuple(top))
    for last_try in (False, True):
        try:
            checkpoint.save_checkpoint(path, {**content, **ranking.checkpoint_state()})
        except (OSError, RuntimeError, CheckpointError) as error:  # torch wraps what write raises
            if last_try:
                run.mark_failed("checkpoint", f"{path.name} (step {step})", error)
        else:
            run.mark_recovered("checkpoint")
            write_best(run, ranking)
            with run.guard("removal of old checkpoints"):
                prune_checkpoints(run.folder, keep, ranking.steps)
            return ranking
    return None


def prune_checkpoints(folder: Path, keep: int, best_steps: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep`` checkpoints and those of ``best_steps``; keep 0: none."""
    for path in folder.glob(".*.tar.tmp"):  # unfinished files of saves that were killed
        path.unlink(missing_ok=True)
    if keep == 0:
        return
    best = [checkpoint_path(folder, step) for step in best_steps]
    for path in list_checkpoints(folder)[keep:]:
        if path not in best:
            path.unlink(missing_ok=True)


def archive_checkpoints(folder: Path, log: Log) -> None:
    """Move checkpoints and results of ``folder`` to before_1/ (2, ...) in it, for --no_reload.

    If they stayed, the new run's checkpoints, of lower steps, would be taken for old and removed,
    and the old run's pictures for those of the new one.
    """
    paths = list_checkpoints(folder)
    if not paths:
        return
    number = 1
    while (archive := folder / f"before_{number}").exists():
        number += 1
    archive.mkdir()
    for path in [*paths, *(path for name in RESULTS for path in folder.glob(name))]:
        path.rename(archive / path.name)
    log(f"starting from scratch; {len(paths)} earlier checkpoints are in {archive}")


# ------------------------------------------------------------------------------------------ opening


def newest_checkpoint(folder: Path, warn: Log) -> SavedState | None:
    """The newest checkpoint that can be loaded; ``warn`` gets a line for every bad one.

    None if there is no checkpoint. CheckpointError if there are some and all are bad, or if one
    before the first good one is of a newer version.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            warn(f"skipping a bad checkpoint: {error}")
    if paths:
        raise CheckpointError(
            f"{folder}: none of its {len(paths)} checkpoints can be read; to start from scratch, "
            "move them away or use another --expname"
        )
    return None


def best_step(run: RunFolder, warn: Log) -> int | None:
    """The step of the best checkpoint that is there; None if nothing was measured.

    From best.json; where that is missing or names a file that is not there, from the newest
    checkpoint.
    """
    step = run.read_json(BEST).get("step")
    if type(step) is int and checkpoint_path(run.folder, step).exists():
        return step
    path, state = newest_checkpoint(run.folder, warn) or (run.folder, {})
    monitor = (state.get("ranking") or {}).get("monitor", "psnr")
    best = Ranking(monitor, size=10**6).restored(state, str(path)).existing(run.folder).best
    return best.step if best else None


def chosen_checkpoint(run: RunFolder, choice: str, log: Log) -> SavedState | None:
    """The checkpoint of ``--ckpt``: newest, best, or a step; None if the folder has none.

    ValueError that names those that are there, if there is no such one.
    """
    if choice == "newest":
        return newest_checkpoint(run.folder, log)
    paths = list_checkpoints(run.folder)
    if not paths:
        return None
    best = best_step(run, log)
    step = best if choice == "best" else int(choice)
    if step is not None and (path := checkpoint_path(run.folder, step)).exists():
        return path, load_checkpoint(path)
    names = [f"{int(path.stem)}{' (best)' * (int(path.stem) == best)}" for path in reversed(paths)]
    what = "of this step" if choice != "best" else (
        "chosen by a score (a scene is validated every --i_img updates, text to 3D needs --monitor)"
    )  # fmt: skip
    raise ValueError(
        f"--ckpt {choice}: {run.folder} has no checkpoint {what}; it has {', '.join(names)}"
    )


def find_checkpoint(
    run: RunFolder,
    given: str | None,
    world: World,
    *,
    reload: bool = True,
    prefer_given: bool = False,
    choice: str = "newest",
) -> SavedState | None:
    """The checkpoint to start from, or None. Rank 0 chooses, and all ranks read the same file.

    It is the ``choice`` (see ``chosen_checkpoint``) of the run's folder, unless ``reload`` is off
    or there is none; then the file ``given`` (--ft_path). prefer_given: the other way round.
    """
    found: SavedState | None = None
    if reload and world.is_main:
        if not prefer_given:  # the run will train here, and remove old checkpoints
            refuse_newer(list_checkpoints(run.folder))
        if not (given and prefer_given):
            found = chosen_checkpoint(run, choice, run.log)
        if given and found is None:
            found = (Path(given), load_checkpoint(Path(given)))
    path = world.gather(found and found[0])[0]
    if path is None:
        return None
    return path, found[1] if found else load_checkpoint(path)
