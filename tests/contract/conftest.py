"""Let the tests beside this file import the engine's toys and their own helpers."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "engine"), str(Path(__file__).parent)]
