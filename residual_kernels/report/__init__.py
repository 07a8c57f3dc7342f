"""What do the heads know, on one page? A report of a fitted adapter, with pictures and tables beside it."""

from residual_kernels.report.facts import Facts, gather
from residual_kernels.report.page import write_report

__all__ = ["Facts", "gather", "write_report"]
