"""Whether a layout gives the numbers of one device: cells, their comparison, and what was shown.

cells.py           what is compared: axes, ZeRO stage and a name of each family
fixture.py         the model, batch and parameters of a cell
exchange_drops.py  the model of one device, which drops what exchanges would
cell_errors.py     one cell against one device
results.py         results.json, what it says of a recipe
refused.py         refused.json, what is not offered and why
selfcheck.py       the first step of a real run, on its own devices
"""

from jaxmoe.parity.cell_errors import cell_errors, is_green
from jaxmoe.parity.cells import Cell, all_cells, cells_of, smoke_cells
from jaxmoe.parity.refused import refused
from jaxmoe.parity.results import REFUSED_PATH, Results, Row, check_proven, source_digest
from jaxmoe.parity.selfcheck import selfcheck

__all__ = [
  "REFUSED_PATH",
  "Cell",
  "Results",
  "Row",
  "all_cells",
  "cell_errors",
  "cells_of",
  "check_proven",
  "is_green",
  "refused",
  "selfcheck",
  "smoke_cells",
  "source_digest",
]
