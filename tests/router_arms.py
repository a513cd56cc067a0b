"""Every router that a configuration can name, small. A new file in conf/router/ is tested without a line here."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from lightning_base.instantiation import instantiate
from lightning_base.model import initialize
from lightning_base.routing import Router, RoutingGroups, RoutingPlan

FOLDER = Path(__file__).parents[1] / "conf" / "router"
# A router with an option that must be given ("???") needs something that no random tokens have: replay knows the text
# of its source alone, and has tests of its own for the same promises.
ROUTERS = sorted(file.stem for file in FOLDER.glob("*.yaml") if not OmegaConf.missing_keys(OmegaConf.load(file)))
WIDTH = 16
VOCABULARY = 100


def options_of(name: str, **options: object) -> dict[str, object]:
    """The options of conf/router/{name}.yaml with ``options`` on top."""
    return {**OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml")), **options}


def build_router(name: str, width: int = WIDTH, seed: int = 0, **options: object) -> Router:
    """The router of conf/router/{name}.yaml with ``options`` on top, its parameters drawn."""
    router = instantiate(options_of(name, **options), "router", Router, width=width, vocab_size=VOCABULARY)
    initialize(router, seed)
    return router


def random_tokens(count: int, seed: int = 0, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Token vectors [count, width], large enough that routers are decided about them, and ids [count]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 3 * torch.randn(count, width, generator=generator)
    return tokens, torch.randint(0, VOCABULARY, (count,), generator=generator)


def groups_of(*sizes: int) -> RoutingGroups:
    return RoutingGroups(tuple(sizes))


def decisions(plan: RoutingPlan) -> list[list[tuple[int, float]]]:
    """For every token its experts with their gates, in the order of the experts."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(plan.num_tokens)]
    triples = zip(plan.token_index.tolist(), plan.expert_index.tolist(), plan.weight.tolist(), strict=True)
    for token, expert, weight in triples:
        found[token].append((expert, round(weight, 5)))
    return [sorted(experts) for experts in found]
