"""Trains one arm, or a sweep of arms: ``python experiments/train.py [-m] [experiment=NAME] [key=value ...]``."""

import os
import sys


def main() -> None:
    """Imports late: OpenMP reads its settings when torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_base.distributed.forked import trains_elsewhere, warm_up

    if trains_elsewhere(sys.argv[1:]):
        # It imports the training code while this process imports Hydra and checks what it was given.
        warm_up("lightning_base.train")
    from lightning_base.program import main

    main()


if __name__ == "__main__":
    main()
