"""``python -m nerf.compare logs/a logs/b``: see ``nerf.outputs.compare``."""

import sys

from nerf.outputs.compare import main

if __name__ == "__main__":
    sys.exit(main())
