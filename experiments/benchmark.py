"""Measure what is promised: `python experiments/benchmark.py assignment [--quick] [--figure PATH]`."""

import argparse
from pathlib import Path

from lightning_base.assignment import benchmark as assignment


def main() -> None:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    solver = subjects.add_parser("assignment", help="the exact balanced assignment against its peers")
    solver.add_argument("--quick", action="store_true", help="the smaller sizes only, about half a minute")
    solver.add_argument("--figure", type=Path, help="draw the figure of docs/assignment.md here, and measure nothing")
    arguments = parser.parse_args()
    if arguments.figure is not None:
        from lightning_base.assignment.figure import draw

        draw(arguments.figure)
    else:
        assignment.run(quick=arguments.quick)


if __name__ == "__main__":
    main()
