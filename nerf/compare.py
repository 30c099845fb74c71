"""``python -m nerf.compare logs/a logs/b``: see ``nerf.outputs.compare``."""

import nerf.training.installed  # noqa: F401  first: says in a sentence what is missing

# isort: split
import sys

from nerf.outputs.compare import main

if __name__ == "__main__":
    sys.exit(main())
