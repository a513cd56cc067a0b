"""Every router that a configuration can name, small. A new file in conf/router/ is tested without a line here."""

from pathlib import Path

from omegaconf import OmegaConf

from lightning_base.check_router import Subject, subject
from lightning_base.check_router.subject import VOCABULARY, WIDTH, groups_of, random_tokens
from lightning_base.instantiation import instantiate
from lightning_base.model import initialize
from lightning_base.routing import Router, RoutingPlan

__all__ = ["VOCABULARY", "WIDTH", "decisions", "groups_of", "random_tokens"]

FOLDER = Path(__file__).parents[1] / "conf" / "router"
# A router with an option that must be given ("???") needs something that no random tokens have: replay knows the text
# of its source alone, and has tests of its own for the same promises.
ROUTERS = sorted(file.stem for file in FOLDER.glob("*.yaml") if not OmegaConf.missing_keys(OmegaConf.load(file)))


def options_of(name: str, **options: object) -> dict[str, object]:
    """The options of conf/router/{name}.yaml with ``options`` on top."""
    return {**OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml")), **options}


def build_router(name: str, width: int = WIDTH, seed: int = 0, **options: object) -> Router:
    """The router of conf/router/{name}.yaml with ``options`` on top, its parameters drawn."""
    router = instantiate(options_of(name, **options), "router", Router, width=width, vocab_size=VOCABULARY)
    initialize(router, seed)
    return router


def decisions(plan: RoutingPlan) -> list[list[tuple[int, float]]]:
    """For every token its experts with their gates, rounded to what is compared."""
    return [[(expert, round(gate, 5)) for expert, gate in found] for found in subject.decisions(plan)]


def subject_of(name: str, **options: object) -> Subject:
    """The router of conf/router/{name}.yaml with ``options`` on top, to be checked."""
    node = options_of(name, **options)
    return Subject(str(node.pop("_target_")), node, seconds=120.0)
