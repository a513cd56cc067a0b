"""Writes the report of an experiment: ``python experiments/report.py NAME_OR_DIRECTORY [...]``."""

import sys

from lightning_base.program.entry import run

if __name__ == "__main__":
    sys.exit(run("report"))
