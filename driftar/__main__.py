"""``python -m driftar``."""

import sys

from driftar.cli import main

if __name__ == "__main__":
    sys.exit(main())
