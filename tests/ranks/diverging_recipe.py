"""The comparison of tests/diverging.py as a script, so that it can run on several ranks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from gidef.main import main
from gidef.report import pictures
from tests.diverging import RECIPE

pictures._DPI = 10
main(RECIPE)
