"""Measures what is promised: ``python experiments/benchmark.py all|layer|step|harness|start|data [--quick]``."""

import os
import sys


def main() -> int:
    """Imports late: OpenMP reads its settings when torch is loaded, and they are those of a training run."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_base.benchmark.command import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
