"""Experiments: grids over the fields of a spec, expanded into cells, and what their results say.

`grid` describes an experiment and expands it, `results` makes tables with confidence intervals over seeds,
`figures` draws them. Running the cells is `jobs.experiment`.
"""

from engine.experiment.grid import Cell, FineTune, Grid, Sample, expand
from engine.experiment.results import results_table, summarise, to_markdown

__all__ = ["Cell", "FineTune", "Grid", "Sample", "expand", "results_table", "summarise", "to_markdown"]
