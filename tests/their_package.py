"""A package of somebody else's, as source and as an installation."""

from pathlib import Path

from lightning_base.program import plugins

SOURCE = '''
from dataclasses import replace

import torch
from pytorch_lightning import Callback
from lightning_base import Router, RoutingPlan
from lightning_base.routing.plan import count_by_group


class MyRouter(Router):
    """The expert is the token's number, moved by an offset."""

    def __init__(self, *, num_experts: int, offset: int = 1) -> None:
        super().__init__(num_experts=num_experts)
        self.offset = offset

    def forward(self, tokens, token_ids, groups):
        token_index = torch.arange(len(tokens))
        expert_index = (token_ids + self.offset) % self.num_experts
        demand = count_by_group(groups, self.num_experts, token_index, expert_index)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=tokens.new_ones(len(tokens)),
            group_demand=demand,
            groups=groups,
        )


class NoRouter:
    pass


class Outer:
    class Inner(MyRouter):
        pass


class NoForward(Router):
    def __init__(self, *, num_experts: int) -> None:
        super().__init__(num_experts=num_experts)


class Pair(NoForward):
    def forward(self, tokens, token_ids, groups):
        return tokens, token_ids


class Beyond(MyRouter):
    def forward(self, tokens, token_ids, groups):
        return replace(super().forward(tokens, token_ids, groups), expert_index=token_ids * 0 + 99)


class Picky(MyRouter):
    def __init__(self, *, num_experts: int) -> None:
        assert num_experts == 4
        super().__init__(num_experts=num_experts)


class BadCallback(Callback):
    def __init__(self):
        raise RuntimeError("no\\nluck")


class MyCallback(Callback):
    def __init__(self, path, clock, word="steps"):
        self.path, self.clock, self.word = path, clock, word

    def on_train_end(self, trainer, module):
        self.path.write_text(f"{trainer.global_step} {self.word}, {self.clock.seconds > 0}")

    @property
    def results(self):
        return {"final/mine": 7.0}
'''


def install(folder: Path, package: str, name: str | None = None) -> None:
    """A package with a router in ``folder``; with ``name``, as installed with an entry point of that name."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(SOURCE)
    if name is not None:
        information = folder / f"{package}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (information / "top_level.txt").write_text(f"{package}\n")
        (information / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {package}:MyRouter\n")
