"""Two nodes, here two launchers on one machine: the same command on each, one run directory."""

from pathlib import Path

import forks
import program
import pytest
import torch.distributed as dist
from forks import Forked

from lightning_base.program.processes.slurm import meeting_point


def free_port() -> int:
    """A port nobody listens on: the store binds it and lets it go."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store.port


def node_environment(rank: str, port: str) -> dict[str, str]:
    return {**program.environment(), "NODE_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def task_environment(rank: str, job: str) -> dict[str, str]:
    """What srun gives each of two tasks on two nodes."""
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    job_of_it = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_NODEID": rank, "SLURM_PROCID": rank}
    return {**program.environment(), **step, **job_of_it, "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}


@pytest.mark.parametrize("start", ["torchrun", pytest.param("srun", marks=pytest.mark.exhaustive)])
def test_two_nodes_train_one_job_and_give_the_losses_of_one(
    start: str, small_corpus: list[str], tmp_path: Path
) -> None:
    arguments = [*small_corpus, f"runs_dir={tmp_path}/two", "strategy=ddp", "trainer.num_nodes=2"]
    port = str(free_port())
    environments = [
        node_environment(str(rank), port) if start == "torchrun" else task_environment(str(rank), port)
        for rank in (1, 0)
    ]
    nodes = [Forked(program.command(*arguments), environment=environment) for environment in environments]
    errors = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    two = program.only_job(tmp_path / "two")
    assert program.read(two / "status.json")["state"] == "done"
    assert program.read(two / "manifest.json")["world_size"] == 2

    done = program.train(*small_corpus, f"runs_dir={tmp_path}/one")
    assert done.returncode == 0, done.stderr
    one = program.only_job(tmp_path / "one")
    fingerprints = [program.read(path / "manifest.json")["batch_fingerprint"] for path in (one, two)]
    assert fingerprints[0] == fingerprints[1]
    losses = [[value for _, value in program.series(path, "train/loss")] for path in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_a_node_whose_first_node_never_comes_gives_up(small_corpus: list[str], tmp_path: Path) -> None:
    options = (f"runs_dir={tmp_path}", "strategy=ddp", "trainer.num_nodes=2", "strategy.timeout_seconds=3")
    done = forks.run(program.command(*small_corpus, *options), environment=node_environment("1", "1"), timeout=100)
    assert done.returncode == 2
    assert "the first node has not started this job" in done.stderr


def test_srun_says_where_nodes_meet() -> None:
    given = {
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_JOB_ID": "10001",
        "SLURM_STEP_ID": "3",
        "SLURM_NODEID": "1",
    }
    # 20,000 + (10,001 * 31 + 3) mod 10,000
    expected = {"NODE_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20034"}
    assert meeting_point(given, 2) == expected
    assert meeting_point({}, 2) == {}
    assert meeting_point({**given, **expected}, 2) == {}, "what somebody has set is not touched"
    with pytest.raises(ValueError, match="one task on each node, and srun has started 8 on 2"):
        meeting_point({**given, "SLURM_STEP_NUM_TASKS": "8"}, 2)
