"""The report: run directories in, tables and figures out.

Reads what runs have written and nothing else: no training code is imported, so a report can be made where the runs
were only copied to.
"""

from lightning_base.report.write import write_report
from lightning_base.results.read import ReportError

__all__ = ["ReportError", "write_report"]
