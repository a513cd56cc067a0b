"""Exports the model of a run: ``python experiments/export.py RUN_DIRECTORY [--checkpoint PATH] [--output FOLDER]``."""

import sys

from lightning_base.program.entry import run

if __name__ == "__main__":
    sys.exit(run("export"))
