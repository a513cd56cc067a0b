"""Adding a router is one file and one YAML: the tests that every router must pass find it by themselves."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import program
import pytest

ROUTER = '''
import torch
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision


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
            seen = full_precision(tokens)
            points = full_precision(self.points)
            # The square of a difference, without a tensor of tokens by points by width.
            products = seen.square().sum(-1, keepdim=True) - 2 * seen @ points.T + points.square().sum(-1)
            distance, expert_index = (products.clamp_min(0) / seen.shape[-1]).min(-1)
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
LOOKS_AHEAD = ROUTER.replace("seen = full_precision(tokens)", "seen = full_precision(tokens - tokens.mean(0))")


# Of the files with tests of every router.
SHORT = (
    "tests/moe/test_sparse_layer.py",
    "tests/routing/test_contradictions.py",
    "tests/routing/test_every_router.py",
    "tests/test_instantiation.py",
)
LONG = (
    "tests/callbacks/test_alarms.py",
    "tests/distributed/test_gradient_audit.py",
    "tests/library/test_drop_in.py",
    "tests/library/test_standalone_layer.py",
    "tests/metrics/test_causality.py",
    "tests/routing/test_replay.py",
    "tests/test_model.py",
)


def add(project: Path, name: str, source: str) -> None:
    """Adds a router to a project: one file and one YAML."""
    (project / "lightning_base" / "routing" / f"{name}.py").write_text(source)
    yaml = f"_target_: lightning_base.routing.{name}.Nearest\nnum_experts: 8\n"
    (project / "conf" / "router" / f"{name}.yaml").write_text(yaml)


def run_router_tests(folder: Path, *which: str) -> subprocess.CompletedProcess:
    """Runs the tests of every router in a copy of the project to which two were added."""
    ignore = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for name in ("lightning_base", "conf", "tests"):
        shutil.copytree(program.REPOSITORY / name, folder / name, symlinks=True, ignore=ignore)
    shutil.copy(program.REPOSITORY / "pyproject.toml", folder)
    add(folder, "nearest", ROUTER)
    add(folder, "looks_ahead", LOOKS_AHEAD)
    chosen = ["-v", "-k", "(nearest or looks_ahead) and not nearest_names"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *which, *chosen],
        cwd=folder,
        env={**program.environment(), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def passed(done: subprocess.CompletedProcess, router: str) -> Counter[str]:
    """How many tests of each file a router has passed."""
    lines = [line for line in done.stdout.splitlines() if " PASSED" in line and router in line]
    return Counter(line.split("::")[0] for line in lines)


def failures(done: subprocess.CompletedProcess) -> list[str]:
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]


@pytest.mark.parametrize("how", ["short", pytest.param("long", marks=pytest.mark.exhaustive)])
def test_one_file_and_one_yaml_are_tested_like_every_router(how: str, tmp_path: Path) -> None:
    # The long form of the parity table is every router in ten layouts; a router more there takes minutes.
    long = ["tests", "--deselect", "tests/distributed/test_parity.py"]
    done = run_router_tests(tmp_path, *(["-m", "not exhaustive", *SHORT] if how == "short" else long))
    # Every failure is of the router that does not keep its word, and the one that counts is among them.
    assert all("looks_ahead" in failure for failure in failures(done)), done.stdout
    lie = "tests/routing/test_every_router.py::test_a_router_keeps_its_promise[looks_ahead-causality]"
    assert lie in failures(done), done.stdout
    found = passed(done, "nearest")
    assert found["tests/routing/test_every_router.py"] >= 21
    # Its promises and its layer; and its model, as a library, its measurements, its replay, its losses on two ranks.
    assert found.keys() >= {*SHORT, *(LONG if how == "long" else ())}


def test_it_trains_in_a_sweep_beside_the_others(tmp_path: Path, small_corpus: list[str]) -> None:
    (tmp_path / "nearest.py").write_text(ROUTER)
    (tmp_path / "router").mkdir()
    yaml = "_target_: lightning_base.routing.nearest.Nearest\nnum_experts: 8\n"
    (tmp_path / "router" / "nearest.yaml").write_text(yaml)
    arms = ("-m", *small_corpus, "router=nearest,uniform", "trainer.max_steps=2")
    done = program.train(*arms, f"runs_dir={tmp_path}/runs", "name=mine", routers=tmp_path)
    assert done.returncode == 0, done.stderr
    states = {
        path.name: program.read(path / "status.json")["state"]
        for path in program.jobs(tmp_path / "runs", "mine").values()
    }
    assert len(states) == 2
    assert set(states.values()) == {"done"}
