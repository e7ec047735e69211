"""Data sets: files to records, records to batches.

``dataset`` finds and loads splits, ``module`` makes batches of them, ``digits`` builds the embedded data set, ``check``
looks a folder over. Import from those: only names that cost nothing to load are repeated here.
"""

from drkd.data.problem import DataProblem
from drkd.data.split import DatasetSplit

__all__ = ["DataProblem", "DatasetSplit"]
