"""Analyses the experts of a finished run: ``python experiments/analysis.py RUN_DIRECTORY [--sequences N]``."""

import sys

from lightning_base.program.entry import run

if __name__ == "__main__":
    sys.exit(run("analysis"))
