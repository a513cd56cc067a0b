"""Analyses the experts of a finished run: ``python experiments/analysis.py RUN_DIRECTORY [--sequences N]``."""

import os
import sys


def main() -> int:
    """Imports late: OpenMP reads its settings when torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_base.analysis.command import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
