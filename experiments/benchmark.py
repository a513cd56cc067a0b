"""Measures what is promised: ``python experiments/benchmark.py all|layer|step|harness|start|data [--quick]``."""

import sys

from lightning_base.program.entry import run

if __name__ == "__main__":
    sys.exit(run("benchmark"))
