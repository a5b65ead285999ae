"""The corpus: files or a Hub data set -> a plan of partitions with known global row ranges -> documents.

`sources` finds the files, `formats` and `hub` turn what is not Parquet into records, `convert` streams those
into Parquet in the run directory, `plan` decides which rows make a partition, `documents` reads them, and
`labelled` reads test files whole.
"""

from engine.corpus.documents import Documents, read_partition, read_rows
from engine.corpus.labelled import read_labelled
from engine.corpus.plan import Columns, Piece, Plan, load_plan, make_plan

__all__ = [
    "Columns",
    "Documents",
    "Piece",
    "Plan",
    "load_plan",
    "make_plan",
    "read_labelled",
    "read_partition",
    "read_rows",
]
