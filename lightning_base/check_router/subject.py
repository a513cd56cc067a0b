"""The router that is checked, and what it is given to route.

Shapes: T tokens, D width.
"""

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_base.instantiation import instantiate, resolve, trust
from lightning_base.model import initialize
from lightning_base.program.plugins import NUM_EXPERTS
from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.router import Router

WIDTH, VOCABULARY = 16, 100
TRAINING = "training"


@dataclass(frozen=True)
class Subject:
    """A router with its options, built anew as often as it is wanted.

    Args:
        target: ``package.module.Class``.
        options: of its ``__init__``.
        seconds: after which processes that do not answer are ended.
    """

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 30.0

    @cached_property
    def kind(self) -> type[Router]:
        """The class. Raises ConfigError if it is no router."""
        trust(self.target)
        found: type[Router] = resolve(self.target, "router", Router)
        return found

    @property
    def file(self) -> str | None:
        """Where the class is written."""
        return getattr(sys.modules.get(self.kind.__module__), "__file__", None)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.kind).parameters

    @cached_property
    def router(self) -> Router:
        """One of them, to be looked at."""
        return self.build()

    @cached_property
    def scale(self) -> int:
        """How many times more tokens than usual there are: with many experts, a group has more."""
        return -(-self.router.num_experts // 8)

    def make(self, **options: Any) -> Router:
        """The router as its ``__init__`` leaves it, with ``options`` on top.

        Raises:
            ConfigError: an option that it does not take, or refuses.
        """
        trust(self.target)
        node = {"_target_": self.target, **self.options, **options}
        number = self.parameters.get("num_experts")
        if number is not None and number.default is inspect.Parameter.empty:
            node.setdefault("num_experts", NUM_EXPERTS)
        # Some routers start from orthogonal vectors, of which there are no more than dimensions.
        asked = self.options.get("num_experts")
        width = width_for(asked) if isinstance(asked, int) else WIDTH
        with torch.random.fork_rng(devices=[]):
            made = instantiate(node, "router", Router, width=width, vocab_size=VOCABULARY)
        assert isinstance(made, Router)
        return made

    def build(self, *, seed: int = 0, way: str = TRAINING, **options: Any) -> Router:
        """The router with its parameters drawn from a seed, ready to route in one of its ``ways``."""
        router = self.make(**options)
        initialize(router, seed)
        router.prepare(torch.arange(1, VOCABULARY + 1))
        return set_way(router, way)

    def ways(self) -> Iterator[tuple[str, Router]]:
        """The router in training and in each of its evaluation modes."""
        for way in (TRAINING, *self.router.evaluation_modes):
            yield way, self.build(way=way)

    def tokens(self, count: int, seed: int = 0) -> tuple[Float[Tensor, "T D"], Int64[Tensor, " T"]]:
        """Token vectors, large enough that routers are decided about them, and their ids."""
        return random_tokens(count, seed, width_for(self.router.num_experts))

    def __reduce__(self) -> tuple[Any, ...]:
        # What was built is not sent to another process.
        return type(self), (self.target, dict(self.options), self.seconds)


def width_for(num_experts: int) -> int:
    """D: as many dimensions as experts at least, and a multiple of 8, as experts want it."""
    return max(WIDTH, -(-num_experts // 8) * 8)


def set_way(router: Router, way: str) -> Router:
    """The same router, set to route as in training or in an evaluation mode."""
    router.train(way == TRAINING)
    router.evaluation_mode = router.default_evaluation_mode if way == TRAINING else way
    return router


def random_tokens(count: int, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Token vectors [count, width], large enough that routers are decided about them, and ids [count]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 3 * torch.randn(count, width, generator=generator)
    return tokens, torch.randint(0, VOCABULARY, (count,), generator=generator)


def groups_of(*sizes: int) -> RoutingGroups:
    return RoutingGroups(tuple(sizes))


def route(router: Router, tokens: Tensor, ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
    """On a copy and from one seed, so that neither state nor noise carries over from another call."""
    with seeded():
        plan: RoutingPlan = copy.deepcopy(router)(tokens, ids, groups)
    return plan


@contextmanager
def seeded() -> Iterator[None]:
    """Inside, torch's global generator starts anew, so that a router that draws from it is told so by one check and not
    by all; outside, it goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def decisions(plan: RoutingPlan) -> list[list[tuple[int, float]]]:
    """For every token its experts with their gates, in the order of the experts."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(plan.num_tokens)]
    triples = zip(plan.token_index.tolist(), plan.expert_index.tolist(), plan.weight.tolist(), strict=True)
    for token, expert, weight in triples:
        found[token].append((expert, round(weight, 5)))
    return [sorted(experts) for experts in found]


def told(decision: list[tuple[int, float]]) -> str:
    """A token's experts in words."""
    if not decision:
        return "no expert"
    return ", ".join(f"expert {expert} with gate {weight:.4g}" for expert, weight in decision)


def first_difference(one: list[list[tuple[int, float]]], other: list[list[tuple[int, float]]]) -> int | None:
    """The first token that is treated differently."""
    return next((t for t, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
