"""``python -m drkd`` is ``drkd``."""

import sys

from drkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
