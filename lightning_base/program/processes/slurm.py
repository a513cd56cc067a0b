"""What Slurm tells a job: where its nodes meet, and whether it is being pre-empted."""

import os
import re
import subprocess
from collections.abc import Mapping

MEETING_POINT = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
# Above the ports of services and below those that systems give out by themselves.
FIRST_PORT, PORTS = 20_000, 10_000


def meeting_point(environment: Mapping[str, str], num_nodes: int) -> dict[str, str]:
    """NODE_RANK, MASTER_ADDR and MASTER_PORT from the variables that srun gives each task; {} where it has not.

    Args:
        environment: of this process.
        num_nodes: of the job.

    Raises:
        ValueError: srun has started another number of tasks than one for each node.
    """
    nodes = environment.get("SLURM_STEP_NODELIST")
    if nodes is None or all(name in environment for name in MEETING_POINT):
        return {}
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if tasks != num_nodes or int(environment["SLURM_STEP_NUM_NODES"]) != num_nodes:
        raise ValueError(
            f"trainer.num_nodes={num_nodes} needs one task on each node, and srun has started {tasks} on "
            f"{environment['SLURM_STEP_NUM_NODES']}: srun --nodes={num_nodes} --ntasks-per-node=1"
        )
    from pytorch_lightning.plugins.environments import SLURMEnvironment  # takes seconds, and is seldom needed

    # Jobs of one user may share nodes; a job meets several times, once a step.
    port = FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"])) % PORTS
    address = SLURMEnvironment.resolve_root_node_address(nodes)
    return dict(zip(MEETING_POINT, (environment["SLURM_NODEID"], address, str(port)), strict=True))


def is_preempting() -> bool:
    """Whether the SIGTERM of a job came because Slurm wants its place for another one, and not to cancel it."""
    try:
        said = subprocess.run(
            ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, timeout=30
        ).stdout
    except (KeyError, OSError, subprocess.TimeoutExpired):
        return False
    found = re.search(r"PreemptTime=(\S+)", said)
    return found is not None and found.group(1) != "None"
