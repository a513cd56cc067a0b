"""``python -m lightning_base PROGRAM ...``, where the command ``lightning-base`` is not on the PATH."""

import sys

from lightning_base.program.entry import main

if __name__ == "__main__":
    sys.exit(main())
