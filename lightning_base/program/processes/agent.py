"""``torch.distributed.run`` that leaves, in a file, which rank ended how: ``python -m ...agent RECORD ARGUMENTS``.

It prints its account of a failure for people; whoever launched it needs exit codes, and is not the ranks' parent.
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(record: Path, arguments: list[str]) -> int:
    """Runs the ranks to their end; gives the exit code."""
    options = parse_args(arguments)
    if options.max_restarts:
        # Ranks that start anew would find in torchrun's store the addresses of those before them.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        run(options)
    except ChildFailedError as error:
        # In the order in which it noticed; those it ended itself come last.
        ends = [{"rank": rank, "pid": end.pid, "code": end.exitcode} for rank, end in error.failures.items()]
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"ends": ends}))
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
