"""`few_cells.py` twice, as the rows of a sweep."""

from dataclasses import replace

from few_cells import RECIPE

from gidef.main import sweep

sweep({"first": RECIPE, "second": replace(RECIPE, seeds=(1,))})
