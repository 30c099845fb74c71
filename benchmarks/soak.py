"""Does a killed run lose anything? Real runs, killed where they write and started again.

    python benchmarks/soak.py --kills 100                       # run_nerf.py
    python benchmarks/soak.py --kills 100 --script download     # or another of COMMANDS
    python benchmarks/soak.py --kills 20 --ranks 2              # one rank at a time, under torchrun

A tiny run, which renders, films, exports, reports and saves all the time, is killed with SIGKILL or
SIGTERM at a random file that it opens, renames or removes, or up to 30 ms later, and started again
by the same command until it finishes; half of the kills choose the kind of file first, so that
rare ones (reports, meshes, videos) get their share. Further runs follow until --kills kills are
done. After each kill the newest checkpoint must verify and be at most the saving cadence behind the
last logged step, what is complete or absent must be so, and no process may go on
(``soak_checks``). At the end everything that the run left must be what an unbroken one left
(``soak_compare``). With --ranks, one of torchrun's processes is killed at a random moment; torchrun
ends the others and restarts all. Exits with 1 if anything was lost.
"""

import argparse
import collections
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: runs are forks of this process

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import make_demo  # noqa: E402

import run_dreamfusion  # noqa: E402, F401  so that forks have imported what both need
import run_nerf  # noqa: E402, F401
from benchmarks import soak_checks, soak_compare, soak_inputs  # noqa: E402

CADENCE, STEPS, MOST_KILLS = 4, 16, 10  # MOST_KILLS: of one run
COMMON = (
    f"--device cpu --i_weights {CADENCE} --i_print 1 --ckpt_secs 0 --keep_ckpts 2 --netdepth 2 "
    f"--netwidth 16 --ema_decay 0.9 --expname run --basedir {{home}} --N_iters {STEPS}"
)
SCENE = (
    f"run_nerf.py {COMMON} --datadir {{home}}/data --multires 4 --N_samples 8 --N_rand 64 "
    "--dead_restarts 0 --amp off --i_img 4 --i_testset 4 --i_video 8"
)
BLENDER = f"{SCENE} --dataset_type blender --testskip 1 --use_viewdirs --white_bkgd"
VANILLA = "--N_importance 8 --netdepth_fine 2 --netwidth_fine 16"
QUICK = "--N_iters 1 --i_img 0 --i_testset 0 --i_video 0"
COMMANDS = {
    "nerf": f"{BLENDER} {VANILLA}",
    "fast": f"{BLENDER} --fast --target_samples 512 --occ_res 16 --grid_res 16",
    "dreamfusion": f"run_dreamfusion.py {COMMON} --guidance gaussian --prompt ball --train_res 12 "
    "--batch_views 2 --march_steps 24 --occ_res 16 --eval_res 16 --video_frames 6 --mesh_res 24 "
    "--multires 2 --i_img 4 --i_video 4 --save_raw --lrate 1e-2 --guidance_scale 1",
    "demo": "data/make_demo.py --out {home}/demo --size 12 --train 4 --val 2 --test 3",
    "llff": f"{SCENE} {VANILLA} {QUICK} --dataset_type llff --factor 2 --llffhold 4",
    "store": f"{BLENDER} {VANILLA} {QUICK} --data_store mmap",
    "tiny": "guidance/tiny/train.py --work {home}/work --out {home}/model --size 16 "
    "--pictures 512 --held_out 32 --batch 4 --vae_steps 5 --unet_steps 6 --device cpu "
    "--ema_decay 0.9 --save_seconds 0 --amp off",
    "download": "data/download.py lego --root {home}/root --url {url}",
    "photos": "data/from_photos.py {given} --out {home}/scene --camera_model SIMPLE_RADIAL "
    "--threads 1",
    "finetune": "guidance/finetune.py --pictures {given} --out {home}/own.safetensors "
    "--prompt ball --class_prompt cube --num_class_pictures 4 --rank 2 --batch 2 --size 16 "
    "--steps 6 --save_every 2 --sample_every 2 --print_every 1 --device cpu",
}
FORMATS = {"nerf": "blender", "fast": "blender", "store": "blender", "llff": "llff"}
VIEWS = {"train": 5, "val": 2, "test": 3}
TRAINED = ("nerf", "fast", "dreamfusion")
LONGEST = {"download": 0.3, "photos": 8.0, "finetune": 0.3}  # seconds after an event; others 0.03
STUCK = 300  # seconds without a step after which a run of several ranks hangs
SLOW_IMPORTS = {"tiny": "guidance.tiny.train", "finetune": "guidance.finetune"}  # 20 s: diffusers
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


class Strike(NamedTuple):
    """A kill: at the ``count``-th event of a ``kind`` ("": of any), ``delay`` seconds later."""

    kind: str
    count: int
    delay: float
    signal: int


def kind_of(event: str, given: tuple, home: str) -> str | None:
    """What an audit event writes inside ``home``: a suffix, "rename", "encode", ...; None."""
    if event == "subprocess.Popen":
        return "encode"
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") or not given:
        return None
    path = given[1] if event == "os.rename" else given[0]
    if not isinstance(path, str | bytes | os.PathLike) or home not in os.fsdecode(path):
        return None
    if event != "open":
        return event.partition(".")[2]
    writes = given[2] & (os.O_WRONLY | os.O_RDWR) if isinstance(given[2], int) else 0
    if not writes and not set(given[1] or "") & set("wax+"):
        return None
    return Path(os.fsdecode(path)).name.removesuffix(".tmp").rpartition(".")[2]


def watch(home: Path, strike: Strike | None, seen: Path) -> None:
    """Count this process's writes inside ``home``, note their kinds in ``seen``, and strike."""
    counts: collections.Counter[str] = collections.Counter()
    notes = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, given: tuple) -> None:
        if (kind := kind_of(event, given, str(home))) is None:
            return
        os.write(notes, f"{kind}\n".encode())
        counts.update([kind, ""])
        if strike is None or kind not in (strike.kind, kind if not strike.kind else None):
            return
        if counts[strike.kind] == strike.count:
            if not strike.delay:
                os.kill(os.getpid(), strike.signal)
            else:
                timer = threading.Timer(strike.delay, os.kill, (os.getpid(), strike.signal))
                timer.daemon = True
                timer.start()

    sys.addaudithook(hook)


def run_forked(words: list[str], home: Path, strike: Strike | None) -> int:
    """Run a script in a fork of this process, which has imported all; the exit code."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        text = os.open(home.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(text, 1)
        os.dup2(text, 2)
        os.chdir(ROOT)
        tqdm.set_lock(threading.RLock())  # its own is shared with forks, and killed ones keep it
        sys.argv, sys.path[:0] = words, [str((ROOT / words[0]).parent)]
        watch(home, strike, home.with_suffix(".seen"))
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def after_kill(script: str, home: Path) -> list[str]:
    """What a killed run has lost, and what it left half done: a line for each."""
    found = soak_checks.half_written(script, home.with_name("unbroken"), home)
    if script in TRAINED:
        found.append(soak_checks.progress_lost(home / "run", CADENCE)[1])
    if script == "finetune":
        found.append(soak_checks.fine_tuning_lost(home, cadence=2))
    return [line for line in found if line]


def prepare(args, folder: Path, name: str) -> tuple[list[str], Path]:
    """A folder of its own for a run, with a copy of its data, and its command."""
    home = folder / name
    home.mkdir()
    if args.script in FORMATS:
        shutil.copytree(args.data or folder / "data", home / "data")
    return COMMANDS[args.script].format(home=home, **args.given).split(), home


def draw_strike(draw: random.Random, kinds: collections.Counter[str], longest: float) -> Strike:
    """A random kill of a run that writes ``kinds`` of files so often, ``longest`` s later."""
    kind = draw.choice(sorted(kinds)) if draw.random() < 0.5 else ""
    most = kinds[kind] if kind else kinds.total()
    count = 1 + int(most * draw.random() ** 2)  # early ones more often: a run is killed repeatedly
    delay = 0.0 if draw.random() < 0.34 else draw.uniform(0.0, longest)
    number = signal.SIGTERM if draw.random() < 0.34 else signal.SIGKILL
    return Strike(kind, count, delay, number)


def one_run(args, folder: Path, name: str, kills: int, draw: random.Random, kinds) -> dict:
    """Kill and restart a run up to ``kills`` times, then let it finish; counts and losses."""
    words, home = prepare(args, folder, name)
    result: dict[str, Any] = {"kills": 0, "terms": 0, "kinds": collections.Counter(), "lost": []}
    longest = LONGEST.get(args.script, 0.03)
    while True:
        strike = draw_strike(draw, kinds, longest) if result["kills"] < kills else None
        others = soak_checks.children(os.getpid())
        code = run_forked(words, home, strike)
        if why := soak_checks.left_running(others):
            result["lost"].append(f"{name}, {strike}: {why}")
        # A program that was killed after its last rename has nothing left to do.
        if code == 0 or (code == 2 and "exists already" in _tail(home).rpartition("\n")[2]):
            return result
        ended = (-signal.SIGKILL,) if strike and strike.signal == signal.SIGKILL else STOPPED
        if strike is None or code not in ended:
            result["lost"].append(f"{name}: exit code {code}, see its text: {_tail(home)}")
            return result
        result["kills"] += 1
        result["terms"] += strike.signal == signal.SIGTERM
        result["kinds"][strike.kind or "any"] += 1
        result["lost"] += [f"{name}, {strike}: {line}" for line in after_kill(args.script, home)]


def _tail(home: Path) -> str:
    return home.with_suffix(".out").read_text(errors="replace")[-1500:].strip()


# ------------------------------------------------------------------------------- several processes


def one_run_of_ranks(args, folder: Path, name: str, kills: int, draw: random.Random, _) -> dict:
    """``one_run`` under torchrun, of which one rank at a time is killed at a random moment."""
    words, home = prepare(args, folder, name)
    result: dict[str, Any] = {"kills": 0, "terms": 0, "kinds": collections.Counter(), "lost": []}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=100000"]
    launcher += [f"--nproc_per_node={args.ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(home.with_suffix(".out"), "a") as text:
        process = subprocess.Popen(
            [sys.executable, *launcher, *words], cwd=ROOT, env=environment, stdout=text, stderr=text
        )
    while process.poll() is None:
        stamp, deadline = _changed(home / "run" / "metrics.csv"), time.monotonic() + STUCK
        while process.poll() is None and _changed(home / "run" / "metrics.csv") == stamp:
            if time.monotonic() > deadline:
                process.terminate()
                process.wait()
                result["lost"].append(f"{name}: no step in {STUCK} s after {result['kills']} kills")
                return result
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, args.longest))
        ranks = soak_checks.children(process.pid)
        if result["kills"] < kills and len(ranks) == args.ranks:
            os.kill(draw.choice(sorted(ranks)), signal.SIGKILL)
            result["kills"] += 1
            deadline = time.monotonic() + 120
            while ranks & soak_checks.children(process.pid):  # until torchrun has ended the others
                if time.monotonic() > deadline:
                    raise SystemExit("the other ranks hang after one was killed")
                time.sleep(0.02)
            lost = after_kill(args.script, home)
            result["lost"] += [f"{name}, kill {result['kills']}: {line}" for line in lost]
    if process.returncode:
        result["lost"].append(f"{name}: exit code {process.returncode}: {_tail(home)}")
    return result


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=list(COMMANDS), default="nerf")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run, under torchrun")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after it")
    parser.add_argument(
        "--longest", type=float, default=1.0, help="with --ranks: most seconds before a kill"
    )
    parser.add_argument("--data", type=Path, help="the scene; otherwise a small demo scene is made")
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    args = parser.parse_args()
    if args.script in SLOW_IMPORTS:
        importlib.import_module(SLOW_IMPORTS[args.script])
    draw, began = random.Random(args.seed), time.monotonic()
    total: dict[str, Any] = {"kills": 0, "terms": 0, "kinds": collections.Counter(), "lost": []}
    total["runs"], run = 0, one_run if args.ranks == 1 else one_run_of_ranks
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    try:
        if args.script in FORMATS and args.data is None:
            make_demo.make(folder / "data", FORMATS[args.script], 16, VIEWS)
        args.given = soak_inputs.give(args.script, folder / "given", VIEWS)
        if args.ranks == 1:
            soak_checks.adopt_orphans()
        first = run(args, folder, "unbroken", 0, draw, kinds := collections.Counter())
        if first["lost"]:
            sys.exit("\n".join(first["lost"]))
        if args.ranks == 1:
            kinds.update((folder / "unbroken.seen").read_text().split())
        while total["kills"] < args.kills and time.monotonic() - began < 60 * args.minutes:
            name, most = f"killed_{total['runs']}", min(MOST_KILLS, args.kills - total["kills"])
            result = run(args, folder, name, most, draw, kinds)
            apart = soak_compare.differences(folder / "unbroken", folder / name)
            result["lost"] += [f"{name}: {line}" for line in apart]
            for key, value in result.items():
                total[key] += value
            total["runs"] += 1
            if result["lost"]:
                print("\n".join(result["lost"]), flush=True)
            else:
                shutil.rmtree(folder / name)
            shown = {key: value for key, value in total.items() if key != "lost"}
            print(f"{args.script}: {shown}, 'lost': {len(total['lost'])}", flush=True)
    finally:
        if not total["lost"]:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps({"script": args.script, **total}, indent=1) + "\n")
    return 1 if total["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
