"""Trains one arm, or a sweep of arms: ``python experiments/train.py [-m] [experiment=NAME] [key=value ...]``."""

from lightning_base.jobs import main

if __name__ == "__main__":
    main()
