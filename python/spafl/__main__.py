"""``python -m spafl``: the ``spafl`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
