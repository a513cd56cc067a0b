"""Trains one arm, or a sweep of arms: ``python experiments/train.py [-m] [experiment=NAME] [key=value ...]``."""

import os


def main() -> None:
    """Imports late: OpenMP reads its settings when torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_base.program import main

    main()


if __name__ == "__main__":
    main()
