"""Imports what the stages of ``gpu.py`` need, once, in the server that they are forks of.

A package that is missing or broken must not stop the others: the stage that needs it says so.
"""

import contextlib
import importlib

for name in ("torch", "run_nerf", "run_dreamfusion", "benchmarks.full_size"):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
