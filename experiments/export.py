"""Exports the model of a run: ``python experiments/export.py RUN_DIRECTORY [--checkpoint PATH] [--output FOLDER]``."""

import sys


def main() -> int:
    """Imports late, so that this file can be read without loading torch."""
    from lightning_base.export import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
