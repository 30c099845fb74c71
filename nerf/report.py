"""``python -m nerf.report logs/demo``: see ``nerf.outputs.report``."""

import sys

from nerf.outputs.report import main

if __name__ == "__main__":
    sys.exit(main())
