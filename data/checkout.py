"""Imported first by the programs of this folder, which also work where nothing is installed.

The folder above, which holds nerf/, goes to the end of the path; ``nerf.training.installed`` then
says in a sentence what is missing.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import nerf.training.installed  # noqa: E402, F401
