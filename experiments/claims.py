"""Judges the paper's claims by what has run and fills docs/claims.md: ``python experiments/claims.py [RUNS]``."""

import sys

from lightning_base.claims.command import main

if __name__ == "__main__":
    sys.exit(main())
