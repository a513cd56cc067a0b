"""A sweep on a real Slurm of one node, which pre-empts one of its jobs for a more urgent one and queues it again."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import program
import pytest

pytestmark = pytest.mark.slurm

CONFIGURATION = """
ClusterName=one
SlurmctldHost=localhost
SlurmctldPort={control}
SlurmdPort={node}
AuthType=auth/munge
# A job that is queued again has to wait until its credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName=localhost CPUs=4 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES State=UP PriorityTier=1 GraceTime=90
PartitionName=high Nodes=localhost State=UP PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which commands find the Slurm that runs meanwhile."""
    if os.geteuid() != 0 or shutil.which("slurmctld") is None:
        pytest.skip("needs root and Debian's slurmctld, slurmd, slurm-client and munge")
    # Short: the path of a socket has a limit.
    folder = Path("/tmp") / f"slurm_{os.getpid()}"
    for name in ("spool", "state"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    written = CONFIGURATION.format(folder=folder, control=free_port(), node=free_port())
    (folder / "slurm.conf").write_text(written)
    environment = {**program.environment(), "SLURM_CONF": str(folder / "slurm.conf")}
    files = {name: folder / name for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")}
    files.update({"key-file": folder / "munge.key", "socket": folder / "munge.socket"})
    commands = [
        ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.log", "w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(2)
        wait_for(lambda: "idle" in ask(environment, "sinfo", "-h", "-o", "%T"), 60)
        yield environment
        ask(environment, "scancel", "--user=root", "--signal=KILL", "--full")
        ask(environment, "scancel", "--user=root")
        time.sleep(2)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def steps_of(runs: Path) -> list[int]:
    """How far each job is."""
    return [len(program.series(path.parent, "train/loss")) for path in runs.glob("*/*/metrics.csv")]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_job_that_slurm_pre_empts_saves_is_queued_again_and_goes_on(
    slurm: dict[str, str], small_corpus: list[str], tmp_path: Path
) -> None:
    steps = ("trainer.max_steps=150", "trainer.validate_every_n_steps=75", "trainer.checkpoint_every_n_steps=1000")
    cluster = ("hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.cpus_per_task=2")
    ranks = ("strategy=ddp", "trainer.devices=2", "seed=1,2", f"runs_dir={tmp_path}")
    command = program.command("-m", *small_corpus, *steps, *cluster, *ranks)
    with open(tmp_path / "said", "w") as said:
        sweep = subprocess.Popen(
            [sys.executable, *command], env=slurm, cwd=program.REPOSITORY, stdout=said, stderr=said
        )
    try:
        wait_for(lambda: len(steps_of(tmp_path)) == 2 and min(steps_of(tmp_path)) >= 13, 240)
        urgent = ["sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap", "sleep 1"]
        subprocess.run(urgent, env=slurm, check=True, timeout=60)
        assert sweep.wait(timeout=500) == 0, (tmp_path / "said").read_text()
    finally:
        sweep.kill()
    assert "2 of 2 jobs done" in (tmp_path / "said").read_text()
    errors = [path.read_text() for path in tmp_path.glob("*/.submitit/*/*_log.err")]
    (pre_empted,) = (text for text in errors if "preempted " in text)
    assert "DUE TO JOB REQUEUE" in pre_empted
    assert "is saved, and the same command goes on" in pre_empted
    for name, path in program.jobs(tmp_path).items():
        if not name.startswith("."):
            assert program.read(path / "status.json")["state"] == "done"
            assert [step for step, _ in program.series(path, "train/loss")] == list(range(1, 151))
