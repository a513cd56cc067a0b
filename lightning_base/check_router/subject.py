"""The router that is checked, and what it is given to route.

Shapes: T tokens, D width.
"""

import copy
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_base.instantiation import ConfigError, check_node, construct, resolve, trust
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
            given = {"width": width, "vocab_size": VOCABULARY}
            try:
                made = construct(*check_node(node, "router", Router, hidden=set(given)), given)
            except ValueError as error:  # in its own words, which a check looks at; and nothing else that it may raise
                raise ConfigError(str(error)) from error
        assert isinstance(made, Router)
        return made

    def draw(self, *, seed: int = 0, **options: Any) -> Router:
        """The router as a run starts with it: its parameters drawn from a seed."""
        router = self.make(**options)
        initialize(router, seed)
        router.prepare(torch.arange(1, VOCABULARY + 1))
        return router

    def build(self, *, seed: int = 0, **options: Any) -> Router:
        """The same for most checks: what starts at one number, such as zero, is moved off it, or would hide what it
        will do once it has learnt."""
        router = self.draw(seed=seed, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in router.parameters():
                if parameter.is_floating_point() and len(parameter.unique()) == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return router

    def use(self) -> Router:
        """The same after a step of training, so that there is something to remember."""
        router, groups = self.build(), groups_of(32 * self.scale, 32 * self.scale)
        with seeded():
            plan: RoutingPlan = router(*self.tokens(groups.num_tokens, seed=100), groups)
        router.end_step(router.step_sums(plan.detached()))
        return router

    def ways(self) -> Iterator[tuple[str, Router]]:
        """The router in training and in each of its evaluation modes, after a step."""
        router = self.use()
        for way in (TRAINING, *router.evaluation_modes):
            yield way, set_way(copy.deepcopy(router), way)

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


Decision = list[tuple[int, float]]


def decisions(plan: RoutingPlan) -> list[Decision]:
    """For every token its experts with their gates, in the order of the experts."""
    found: list[Decision] = [[] for _ in range(plan.num_tokens)]
    triples = zip(plan.token_index.tolist(), plan.expert_index.tolist(), plan.weight.tolist(), strict=True)
    for token, expert, weight in triples:
        found[token].append((expert, weight))
    return [sorted(experts) for experts in found]


def differ(one: Decision, other: Decision) -> bool:
    """Whether a token is treated differently, by more than another order of the same sums makes."""
    if [expert for expert, _ in one] != [expert for expert, _ in other]:
        return True
    pairs = zip(one, other, strict=True)
    return not all(math.isclose(gate, another, rel_tol=1e-5, abs_tol=1e-7) for (_, gate), (_, another) in pairs)


def told(decision: Decision) -> str:
    """A token's experts in words."""
    if not decision:
        return "no expert"
    return ", ".join(f"expert {expert} with gate {weight:.4g}" for expert, weight in decision)


def first_difference(one: list[Decision], other: list[Decision]) -> int | None:
    """The first token that is treated differently."""
    return next((t for t, (a, b) in enumerate(zip(one, other, strict=True)) if differ(a, b)), None)


def losses_of(plan: RoutingPlan) -> dict[str, Tensor]:
    """Its auxiliary losses; of those over a whole step, what the gradient flows through."""
    return {**plan.losses, **{name: part.probability_sum for name, part in plan.step_losses.items()}}


def other_loss(one: RoutingPlan, other: RoutingPlan) -> str | None:
    """The first loss that differs, with both values; None if they are the same."""
    for name, value in losses_of(one).items():
        another = losses_of(other).get(name, torch.tensor(torch.nan))
        if value.shape != another.shape or not torch.allclose(value.double(), another.double(), rtol=1e-5, atol=1e-7):
            return f"its {name} went from {brief(value)} to {brief(another)}"
    return None


def brief(value: Tensor) -> str:
    """Its numbers, the first of many."""
    numbers = [f"{number:.6g}" for number in value.detach().double().flatten().tolist()]
    return ", ".join([*numbers[:4], "..."] if len(numbers) > 4 else numbers)
