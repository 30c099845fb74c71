"""Does a run on two machines end with the same weights after the network or a machine fails?

    python benchmarks/two_machines.py --cut 5 60        # Linux, as root
    python benchmarks/two_machines.py --crash 5         # the second machine is lost instead

The machines are two network namespaces joined by a virtual cable, each with its own torchrun; a
c10d rendezvous at the first one's address joins them. In the middle of the run the cable is down
for --cut seconds, or all processes of the second machine are killed and its torchrun is started
again --crash seconds later. A torchrun that gives up is started again, as a cluster's job manager
would. Both must finish, with weights, optimizer state and averaged weights equal bit for bit to
those of the same two ranks on one machine. Exits with 1 if not.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.soak import COMMANDS, COMMON, differences, logged_step

ROOT = Path(__file__).resolve().parents[1]

STEPS = 400
FLAGS = f"{COMMON} --N_iters {STEPS} --i_weights 20".split()  # the last --N_iters counts
MACHINES = {"nerf_a": ("va", "10.9.0.1", "true"), "nerf_b": ("vb", "10.9.0.2", "false")}


def ip(*words: str) -> None:
    """Run Linux's ``ip`` command."""
    subprocess.run(["ip", *words], check=True)


def connect() -> None:
    """Create both namespaces and the cable."""
    for name in MACHINES:
        ip("netns", "add", name)
    ip(*"link add va netns nerf_a type veth peer name vb netns nerf_b".split())
    for name, (card, address, _) in MACHINES.items():
        ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", card, "up")


def disconnect() -> None:
    """Delete both namespaces, and with them the cable."""
    for name in MACHINES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def training(args, folder: Path, name: str, launcher: list[str], log: Path, **environment):
    """Start a torchrun of the tiny run."""
    words = COMMANDS["nerf"].format(data=args.data).split()
    command = [*launcher, *words, *FLAGS, "--basedir", str(folder), "--expname", name]
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **environment}
        )


def machine(args, folder: Path, name: str, which: str):
    """Start one machine's torchrun. The first hosts the rendezvous, which ``is_host`` states:
    inside a namespace torchrun does not recognize the address as its own."""
    card, address, hosts = MACHINES[which]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--max-restarts=100", "--rdzv-backend=c10d", "--rdzv-id=lego"]
    torchrun += ["--rdzv-endpoint=10.9.0.1:29500", f"--rdzv-conf=is_host={hosts}"]
    torchrun += [f"--local-addr={address}"]
    launcher = ["ip", "netns", "exec", which, *torchrun]
    log = folder / f"{name}_{which}.out"
    return training(args, folder, name, launcher, log, GLOO_SOCKET_IFNAME=card)


def fail(crash: bool) -> None:
    """Take the cable down, or kill all processes of the second machine."""
    if not crash:
        ip("-n", "nerf_a", "link", "set", "va", "down")
        return
    found = subprocess.run(["ip", "netns", "pids", "nerf_b"], capture_output=True, text=True)
    for number in found.stdout.split():
        os.kill(int(number), signal.SIGKILL)


def one_run(args, folder: Path, name: str, cut: float, crash: bool) -> dict:
    """Train on both machines with a failure of ``cut`` seconds; counts, steps and exit codes."""
    result = {"trouble": "crash" if crash else "cut", "seconds": cut}
    result |= {"started_again": 0, "exit_codes": {}}
    running = {which: machine(args, folder, name, which) for which in MACHINES}
    cut_at = back_at = None
    began = time.monotonic()
    while running:
        now = time.monotonic()
        if now - began > args.limit:
            for process in running.values():
                process.kill()
            result["exit_codes"] |= dict.fromkeys(running, "still running at the limit")
            break
        if cut_at is None and logged_step(folder / name) >= STEPS // 4:
            fail(crash)
            cut_at, result["cut_at_step"] = now, logged_step(folder / name)
        if cut_at is not None and back_at is None and now - cut_at >= cut:
            if not crash:
                ip("-n", "nerf_a", "link", "set", "va", "up")
            back_at, result["back_at_step"] = now, logged_step(folder / name)
        for which, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            if code:
                if crash and back_at is None:  # the machine is still down
                    continue
                result["started_again"] += 1
                time.sleep(2)
                running[which] = machine(args, folder, name, which)
            else:
                del running[which]
                result["exit_codes"][which] = code
        time.sleep(0.2)
    result["seconds_after_back"] = round(time.monotonic() - (back_at or began), 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cut", type=float, nargs="*", default=[], help="seconds without the cable"
    )
    parser.add_argument(
        "--crash", type=float, nargs="*", default=[], help="seconds without the second machine"
    )
    parser.add_argument("--limit", type=float, default=400, help="longest time of one run, seconds")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "demo")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder, failed = Path(tempfile.mkdtemp(prefix="machines_")), False
    try:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node=2"]
        if training(args, folder, "one", launcher, folder / "one.out").wait():
            sys.exit((folder / "one.out").read_text())
        end = f"{STEPS:06d}.tar"
        troubles = [(cut, False) for cut in args.cut] + [(crash, True) for crash in args.crash]
        for seconds, crash in troubles or [(5, False), (60, False), (5, True)]:
            disconnect()
            connect()
            name = f"{'crash' if crash else 'cut'}_{seconds:g}"
            result = one_run(args, folder, name, seconds, crash)
            ended = (folder / name / end).exists()
            apart = differences(folder / "one" / end, folder / name / end) if ended else ["no end"]
            result["differ"] = apart
            failed |= bool(apart) or any(result["exit_codes"].values())
            print(result, flush=True)
    finally:
        disconnect()
        if failed:
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
