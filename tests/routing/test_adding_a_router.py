"""Adding a router is one file and one YAML: the tests that every router must pass find it by themselves."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import program

ROUTER = '''
import torch
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router


class Nearest(Router):
    """Each token goes to the nearest of E points, with a gate that falls with the distance."""

    def __init__(self, *, num_experts: int, width: int) -> None:
        super().__init__(num_experts=num_experts)
        self.points = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.points)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            seen = tokens.float()
            distance, expert_index = (seen[:, None] - self.points.float()).square().mean(-1).min(-1)
        token_index = torch.arange(len(tokens), device=tokens.device)
        weight = torch.exp(-distance / 8)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=weight,
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
            aux={"gates": weight.detach()},
        )
'''
# The same, but a token's expert depends on the mean of its whole group, without saying so.
LOOKS_AHEAD = ROUTER.replace("seen = tokens.float()", "seen = tokens.float() - tokens.float().mean(0)")


def run_router_tests(folder: Path, source: str, *where: str) -> subprocess.CompletedProcess:
    """Runs the tests of every router that are found ``where``, in a copy of the project to which one was added."""
    ignore = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for name in ("lightning_base", "conf", "tests"):
        shutil.copytree(program.REPOSITORY / name, folder / name, ignore=ignore)
    shutil.copy(program.REPOSITORY / "pyproject.toml", folder)
    (folder / "lightning_base" / "routing" / "nearest.py").write_text(source)
    yaml = "_target_: lightning_base.routing.nearest.Nearest\nnum_experts: 8\n"
    (folder / "conf" / "router" / "nearest.yaml").write_text(yaml)
    which = [*where, "-v", "-k", "nearest and not nearest_names"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *which],
        cwd=folder,
        env={**program.environment(), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_one_file_and_one_yaml_are_tested_like_every_router(tmp_path: Path) -> None:
    done = run_router_tests(tmp_path, ROUTER, "tests")
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout
    passed = Counter(line.split("::")[0] for line in done.stdout.splitlines() if " PASSED" in line)
    assert passed["tests/routing/test_every_router.py"] >= 25
    # Its promises, its layer and model, its losses on two ranks, as a library, its measurements, and its replay.
    assert passed.keys() >= {
        "tests/callbacks/test_alarms.py",
        "tests/distributed/test_gradient_audit.py",
        "tests/library/test_drop_in.py",
        "tests/library/test_standalone_layer.py",
        "tests/metrics/test_causality.py",
        "tests/moe/test_sparse_layer.py",
        "tests/routing/test_contradictions.py",
        "tests/routing/test_replay.py",
        "tests/test_instantiation.py",
        "tests/test_model.py",
    }


def test_a_router_that_does_not_keep_its_word_is_found_out(tmp_path: Path) -> None:
    done = run_router_tests(tmp_path, LOOKS_AHEAD, "tests/routing/test_every_router.py")
    assert done.returncode == 1, done.stdout
    assert (
        "FAILED tests/routing/test_every_router.py::test_what_a_router_declares_about_causality_is_true" in done.stdout
    )


def test_it_trains_in_a_sweep_beside_the_others(tmp_path: Path, small_corpus: list[str]) -> None:
    for name in ("lightning_base", "conf", "experiments"):
        ignore = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
        shutil.copytree(program.REPOSITORY / name, tmp_path / name, ignore=ignore)
    (tmp_path / "lightning_base" / "routing" / "nearest.py").write_text(ROUTER)
    yaml = "_target_: lightning_base.routing.nearest.Nearest\nnum_experts: 8\n"
    (tmp_path / "conf" / "router" / "nearest.yaml").write_text(yaml)
    arguments = ["-m", *small_corpus, "router=nearest,uniform", "trainer.max_steps=2", "runs_dir=runs", "name=mine"]
    done = subprocess.run(
        [sys.executable, "experiments/train.py", *arguments],
        cwd=tmp_path,
        env={**program.environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    states = {
        path.name: program.read(path / "status.json")["state"]
        for path in program.jobs(tmp_path / "runs", "mine").values()
    }
    assert len(states) == 2
    assert set(states.values()) == {"done"}
