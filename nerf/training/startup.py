"""Imported by the training scripts before torch: CPU threads, how they wait, and freed memory.

OpenMP reads its variables once, when torch loads it. A thread that waits for the others normally
spins, which is fastest where every thread has a core to itself. Where another process needs one of
the cores, each step waits until the last thread has had its turn, and the others spin meanwhile:
then they had better sleep. What the user has set in the environment is never changed.
"""

import ctypes
import hashlib
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

# One of these decides how OpenMP's threads wait: the standard's, GNU's and Intel's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Share of a core above which threads spin. Where the worst served got 0.9 of a core, 150 steps of
# the demo took 5.4 s spinning and 7.0 s asleep; where it got a half, 22 s and 8.4 s (RESULTS.md).
ALONE = 0.85
LOOK_SECONDS = 0.035  # twice, because anything may wake up for a moment
BUFFER = bytes(1 << 18)  # hashing one takes less than a millisecond, without Python's lock
CGROUPS = Path("/sys/fs/cgroup")

# glibc's malloc: blocks up to KEPT_BLOCK bytes come from the heap, whose top goes back to the
# system only when more than KEPT_TOP bytes of it are free. By default each tensor of a few MB is
# mapped and unmapped anew, and the kernel has to clear all of its pages. ``release_memory`` of
# ``nerf.training.system`` gives the heap's free memory back after pictures.
KEPT_BLOCK, KEPT_TOP = 32 << 20, 128 << 20  # 32 MiB is the most that glibc accepts
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's names, from malloc.h
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs that this process' control groups (a container, a job) may use; infinity: no limit.

    cgroups: where they are mounted, of either version. own: the file that names the process' own.
    """
    limits = [math.inf]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in ("0::/", "1:cpu:/", *lines):  # a container often sees its own group as the root
        _, kinds, path = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        folder = cgroups / "cpu" if kinds else cgroups
        group = folder / path.strip("/")
        places = (group, *group.parents)[: len(group.relative_to(folder).parts) + 1]
        limits += [_limit(place) for place in places]
    return min(limits)


def _limit(group: Path) -> float:
    """The quota of one control group; infinity without one."""
    try:
        if (group / "cpu.max").exists():  # version 2
            most, period = (group / "cpu.max").read_text().split()
        else:
            most, period = (
                (group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return int(most) / int(period) if int(most) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max": no limit
        return math.inf


def usable_cpus() -> int:
    """Logical CPUs that this process may run on (affinity, cpuset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def smallest_share(threads: int, seconds: float = LOOK_SECONDS) -> float:
    """How much of a core the worst served of ``threads`` busy threads gets now, in [0, 1].

    Measured with threads that are busy for ``seconds``, so priorities and limits of any kind count.
    """
    shares = []

    def work() -> None:
        start, used = time.perf_counter(), time.thread_time()
        while time.perf_counter() - start < seconds:
            hashlib.sha256(BUFFER).digest()
        used = time.thread_time() - used
        shares.append(min(1.0, used / (time.perf_counter() - start)))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return min(shares)


def thread_variables(environment: Mapping[str, str], cpus: int, limit: float) -> dict[str, str]:
    """OMP_NUM_THREADS where a quota allows fewer than the ``cpus`` that torch would count.

    limit: CPUs' worth of time per second (``quota``). With a thread per CPU seen, all of them are
    stopped together for a part of each tenth of a second.
    """
    if "OMP_NUM_THREADS" in environment or limit >= cpus:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, int(limit)))}


def waiting_variables(environment: Mapping[str, str], share: float) -> dict[str, str]:
    """OMP_WAIT_POLICY of threads that sleep where the worst served gets less than ALONE."""
    if any(name in environment for name in WAITING) or share >= ALONE:
        return {}
    return {"OMP_WAIT_POLICY": "passive"}


def prepare(environment: MutableMapping[str, str]) -> str:
    """Set the variables in ``environment``, which OpenMP is about to read; a line for the log."""
    cpus = usable_cpus()
    environment.update(thread_variables(environment, cpus, quota()))
    first = environment.get("OMP_NUM_THREADS", str(cpus)).split(",")[0]
    threads = int(first) if first.strip().isdigit() else cpus
    counted = f"{threads} CPU thread{'s' if threads > 1 else ''}"
    own = next((name for name in WAITING if name in environment), None)
    if own:
        return f"{counted}, which wait as {own}={environment[own]} says"
    if threads < 2:
        return counted
    share = max(smallest_share(threads) for _ in range(2))
    chosen = waiting_variables(environment, share)
    environment.update(chosen)
    if not chosen:
        return f"{counted}, each with a core of its own, so they spin while they wait"
    return (
        f"{counted}; other processes leave one of them only {share:.0%} of a core, so they sleep "
        "while they wait (OMP_WAIT_POLICY=passive)"
    )


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let malloc keep freed blocks for the next tensor; whether it does (glibc only)."""
    if platform.libc_ver()[0] != "glibc" or any(n in environment for n in MALLOC_VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK) and mallopt(M_TRIM_THRESHOLD, KEPT_TOP))


def log_threads(device_type: str, log: Callable[[str], None]) -> None:
    """Log what was chosen, if the run computes on a CPU."""
    if threads_line and device_type == "cpu":
        log(threads_line)


threads_line = ""  # empty where torch was imported before: then nothing was chosen
if "torch" not in sys.modules:
    threads_line = prepare(os.environ)
    keep_freed_memory(os.environ)
