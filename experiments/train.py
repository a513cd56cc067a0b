"""Trains one arm, or a sweep of arms: ``python experiments/train.py [-m] [experiment=NAME] [key=value ...]``."""

import sys

from lightning_base.program.entry import run

if __name__ == "__main__":
    sys.exit(run("train"))
