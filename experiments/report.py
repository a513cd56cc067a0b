"""Writes the report of an experiment: ``python experiments/report.py NAME_OR_DIRECTORY [...]``."""

import sys

from lightning_base.report.write import main

if __name__ == "__main__":
    sys.exit(main())
