"""``python -m nerf.report logs/demo``: see ``nerf.outputs.report``."""

import nerf.training.installed  # noqa: F401  first: says in a sentence what is missing

# isort: split
import sys

from nerf.outputs.report import main

if __name__ == "__main__":
    sys.exit(main())
