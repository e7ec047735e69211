"""From the files of a run to tables, figures and one HTML page; nothing here computes on a model."""

from drkd.reports.comparison import write_comparison_report
from drkd.reports.gap import PairedDifference, Spread, compare_paired, share_recovered, summarise
from drkd.reports.page import write_demo_report, write_run_report
from drkd.reports.tables import Table, compare_models

__all__ = [
    "PairedDifference",
    "Spread",
    "Table",
    "compare_models",
    "compare_paired",
    "share_recovered",
    "summarise",
    "write_comparison_report",
    "write_demo_report",
    "write_run_report",
]
