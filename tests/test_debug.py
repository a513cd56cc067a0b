"""``debug=overfit`` and ``debug=profile``, in the real program."""

import gzip
import json
import math
import re
from pathlib import Path

import program
import pytest
import torch
from omegaconf import OmegaConf

from lightning_base.callbacks.learnt_by_heart import unigram_entropy
from lightning_base.data.order import GlobalBatchSampler
from lightning_base.module import IGNORED
from lightning_base.results.fairness import compare
from lightning_base.results.read import Run, read_job


def in_debug(mode: str, small_corpus: list[str]) -> list[str]:
    """The overrides of the small corpus without those that belong to ``debug=fast``."""
    return [f"debug={mode}", *(o for o in small_corpus if not o.startswith(("debug=", "data.global_batch=")))]


@pytest.fixture(scope="module")
def overfit(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run that has seen one batch, and what it printed."""
    folder = tmp_path_factory.mktemp("overfit")
    done = program.train(*in_debug("overfit", small_corpus), "router=top_k", f"runs_dir={folder}")
    assert done.returncode == 0, done.stderr
    return program.only_job(folder, "overfit"), done.stdout


def test_the_loss_on_one_batch_goes_far_under_the_entropy_of_its_tokens(overfit: tuple[Path, str]) -> None:
    directory, printed = overfit
    found = re.search(r"training loss ([\d.]+) after 150 steps over the same batch; token .* give ([\d.]+)\n", printed)
    assert found, printed
    loss, entropy = map(float, found.groups())
    assert loss < entropy / 4
    assert loss == pytest.approx(program.series(directory, "train/loss")[-1][1], abs=5e-4)
    assert 3 < entropy < math.log(8 * 32), "some of 256 tokens are equal"


def test_every_step_of_an_overfitting_run_has_the_same_sequences() -> None:
    every = {"global_batch": 4, "seed": 3, "num_steps": 7}
    plain, repeated = GlobalBatchSampler(10, **every), GlobalBatchSampler(10, **every, distinct_batches=3)
    # The first three batches of the plain order in turns; the third crosses the end of the first epoch.
    expected = [plain.global_batch_at(step % 3).tolist() for step in range(7)]
    assert [repeated.global_batch_at(step).tolist() for step in range(7)] == expected
    assert list(repeated) == expected
    assert list(plain) != expected


def test_unigram_entropy_counts_what_is_a_target() -> None:
    targets = torch.tensor([7, 7, 1, 2, IGNORED, IGNORED])
    assert unigram_entropy(targets) == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))


def test_the_report_does_not_put_an_overfitting_run_beside_another(
    overfit: tuple[Path, str], small_sweep: Path
) -> None:
    directory, _ = overfit
    assert program.read(directory / "manifest.json")["config"]["data"]["distinct_batches"] == 1
    read = [read_job(path, path.name) for path in (directory, *program.jobs(small_sweep.parent).values())]
    runs = [run for run in read if isinstance(run, Run)]
    assert len(runs) == 3
    for comparison in compare(runs):
        paths = {run.path for arm in comparison.arms for run in arm.runs}
        assert paths == {directory} or directory not in paths


@pytest.fixture(scope="module")
def profiled(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a profiled run, and what it printed."""
    folder = tmp_path_factory.mktemp("profiled")
    done = program.train(*in_debug("profile", small_corpus), "model=tiny", "router=base", f"runs_dir={folder}")
    assert done.returncode == 0, done.stderr
    return program.only_job(folder, "profile"), done.stdout


def test_the_trace_holds_the_steps_that_were_asked_for_with_their_modules(profiled: tuple[Path, str]) -> None:
    (trace,) = (profiled[0] / "profile").glob("rank_0.*.pt.trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]  # the format that Perfetto and TensorBoard's profiler read
    names = {event["name"] for event in events if event.get("ph") == "X"}
    # Three steps warm up; the counter begins with 0.
    assert {name for name in names if name.startswith("ProfilerStep")} == {f"ProfilerStep#{i}" for i in (3, 4, 5)}
    assert "aten::mm" in names
    assert any("balanced" in name.lower() for name in names), "the router's module"


def test_the_top_operators_are_printed_by_their_own_time(profiled: tuple[Path, str]) -> None:
    directory, printed = profiled
    lines = printed[printed.index("operators by their own time, means over 3 steps") :].splitlines()
    rows = [line.split() for line in lines[2:14]]
    times = [float(row[0]) for row in rows]
    assert times == sorted(times, reverse=True)
    assert 0.3 < sum(float(row[1].rstrip("%")) for row in rows) / 100 <= 1.0
    assert all("::" in row[3] or row[3][0].isalpha() for row in rows)
    assert f"trace: {directory}/profile" in printed


def test_profiling_stands_in_the_certificate(profiled: tuple[Path, str]) -> None:
    manifest = program.read(profiled[0] / "manifest.json")
    assert manifest["config"]["trainer"]["profile_steps"] == 3
    config = OmegaConf.load(profiled[0] / ".hydra" / "config.yaml")
    assert config.trainer.profile_steps == 3
