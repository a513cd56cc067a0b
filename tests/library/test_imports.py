"""What importing the package costs, and what its public names bring along. Each in a process of its own."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_base
import lightning_base.data
from lightning_base import routing

LAYERS = sorted(set(lightning_base.__all__) - {"ExpertLoadLogger"})
IMPORT = """
import sys
before = set(sys.modules)
import lightning_base
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
USE = """
import sys
import torch
import lightning_base
from lightning_base import *
from lightning_base import BASE, RoutingPlan, Switch
experts = Experts(num_experts=4, width=16, hidden_width=32)
layer = DropIn(SparseLayer(BASE(num_experts=4, width=16), experts, routing_group=2))
layer(torch.randn(4, 8, 16)).sum().backward()
end_step(layer)
metric = ExpertLoad(["layer"], 4)
metric.update({"layer": layer.plan})
assert metric.compute()["group/max_vio/load/layer"] == 0
assert balanced_assignment(torch.eye(4)).expert.tolist() == [0, 1, 2, 3]
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def modules_after(code: str, folder: Path) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_else(tmp_path: Path) -> None:
    loaded = modules_after(IMPORT, tmp_path)
    assert "lightning_base" in loaded
    assert loaded - set(sys.stdlib_module_names) == {"lightning_base"}


def test_the_layers_work_without_lightning_and_hydra(tmp_path: Path) -> None:
    # All public names but the callback, which is Lightning's own kind of thing.
    loaded = modules_after(USE.replace("import *", f"import {', '.join(LAYERS)}"), tmp_path)
    assert {"torch", "lightning_base"} <= loaded
    assert not {"hydra", "omegaconf", "pytorch_lightning", "lightning_fabric", "tensorboard"} & loaded


@pytest.mark.parametrize("name", sorted({*lightning_base.__all__, *routing.__all__}))
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(lightning_base, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(lightning_base)


@pytest.mark.parametrize("name", ["Nonsense", "nonsense", "ClassVar", "__wrapped__"])
def test_other_names_are_not(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'lightning_base' has no attribute '{name}'"):
        getattr(lightning_base, name)


@pytest.mark.parametrize("package", [lightning_base, lightning_base.data])
def test_names_that_load_late_have_types_all_the_same(package: ModuleType) -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports = [statement for statement in block.body if isinstance(statement, ast.ImportFrom)]
    seen = {alias.name for statement in imports for alias in statement.names}
    assert set(package.__all__) - seen == set()
