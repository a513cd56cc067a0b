"""Options that contradict a router: refused before anything is spent, by key, with the reason."""

import inspect

import pytest
from router_arms import FOLDER, ROUTERS, build_router

from lightning_base.instantiation import ConfigError

# Router, options, the key that the sentence has to name, and a part of the reason.
CONTRADICTIONS = [
    ("switch", {"top_k": 2}, "router.top_k=2", "one expert"),
    ("switch", {"renormalize": True}, "router.renormalize=True", "could not learn"),
    ("top_k", {"top_k": 1}, "router.renormalize=true", "the gate would always be 1"),
    ("top_k", {"top_k": 1, "gate": "sigmoid"}, "router.renormalize=true", "the gate would always be 1"),
    ("top_k", {"gate": "sigmoid", "z_loss": True}, "router.z_loss=true", "has no softmax"),
    ("top_k", {"gate": "tanh"}, "router.gate=tanh", "softmax, sigmoid"),
    ("top_k", {"balance_scope": "world"}, "router.balance_scope=world", "group, sequence, step"),
    ("top_k", {"top_k": 9}, "router.top_k=9", "between 1 and 8 experts"),
    ("noisy_top_k", {"top_k": 1}, "router.top_k=1", "could not learn"),
    ("noisy_top_k", {"top_k": 8}, "router.top_k=8", "no load to balance"),
    ("noisy_top_k", {"renormalize": False}, "router.renormalize=False", "always sums to 1"),
    ("noisy_top_k", {"capacity_factor": 1.25}, "router.capacity_factor=1.25", "drops nothing"),
    ("noisy_top_k", {"balance_scope": "step"}, "router.balance_scope='step'", "importance and load"),
    ("gshard", {"num_experts": 1}, "router.num_experts=1", "two experts"),
    ("gshard", {"top_k": 1}, "router.top_k=1", "at most two experts"),
    ("gshard", {"renormalize": False}, "router.renormalize=False", "always sum to 1"),
    ("gshard", {"capacity_factor": 0.0}, "router.capacity_factor=0.0", "above 0"),
    ("gshard", {"balance_scope": "all"}, "router.balance_scope=all", "group, sequence, step"),
    ("expert_choice", {"capacity_factor": 2.0}, "router.capacity_factor=2.0", "router.top_k"),
    ("expert_choice", {"renormalize": True}, "router.renormalize=True", "always have gate 1"),
    ("expert_choice", {"balance_scope": "group"}, "router.balance_scope='group'", "balanced by construction"),
    ("expert_choice", {"top_k": 0}, "router.top_k=0", "between 1 and 8 experts"),
    ("hash", {"top_k": 2}, "router.top_k=2", "one expert"),
    ("hash", {"renormalize": True}, "router.renormalize=True", "always 1"),
    ("hash", {"capacity_factor": 1.0}, "router.capacity_factor=1.0", "table is fixed"),
    ("hash", {"balance_scope": "group"}, "router.balance_scope='group'", "nothing to learn"),
    ("hash", {"variant": "md5"}, "router.variant=md5", "balanced, random"),
    ("hash", {"num_experts": 101}, "router.num_experts=101", "100 tokens of the vocabulary"),
    ("random", {"renormalize": True}, "router.renormalize=True", "always sums to 1"),
    ("random", {"capacity_factor": 1.0}, "router.capacity_factor=1.0", "without drops"),
    ("random", {"balance_scope": "group"}, "router.balance_scope='group'", "nothing to learn"),
    ("skewed", {"top_k": 2}, "router.top_k=2", "one expert"),
    ("skewed", {"renormalize": True}, "router.renormalize=True", "always 1"),
    ("skewed", {"capacity_factor": 1.0}, "router.capacity_factor=1.0", "cost of imbalance"),
    ("skewed", {"balance_scope": "group"}, "router.balance_scope='group'", "nothing to learn"),
]


def refusal(name: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build_router(name, **options)
    return str(caught.value)


@pytest.mark.parametrize(("name", "options", "key", "reason"), CONTRADICTIONS)
def test_a_contradiction_is_refused_by_key_with_the_reason(name: str, options: dict, key: str, reason: str) -> None:
    message = refusal(name, **options)
    assert message.startswith(key)
    assert reason in message.removeprefix(key)
    assert "\n" not in message
    assert ". " not in message, "more than one sentence"


@pytest.mark.parametrize("name", ROUTERS)
def test_what_a_router_refuses_is_refused_for_any_value_and_is_no_option_of_it(name: str) -> None:
    router = type(build_router(name))
    taken = set(inspect.signature(router).parameters)
    assert not taken & set(router.refused_options)
    for option, reason in router.refused_options.items():
        assert refusal(name, **{option: None}) == f"router.{option}=None contradicts {router.__name__}: {reason}"


@pytest.mark.parametrize("name", ROUTERS)
def test_an_option_unknown_to_all_routers_is_refused_without_a_made_up_reason(name: str) -> None:
    assert refusal(name, warp=2.0).startswith("router.warp is not an option of ")


def test_the_options_that_routers_share_are_taken_or_refused_with_a_reason_by_each() -> None:
    shared = {"top_k", "renormalize", "capacity_factor", "balance_scope"}
    silent = {}
    for name in ("switch", "top_k", "noisy_top_k", "gshard", "expert_choice", "hash", "random", "skewed"):
        router = type(build_router(name))
        missing = shared - set(inspect.signature(router).parameters) - set(router.refused_options)
        silent.update({name: missing} if missing else {})
    assert silent == {}


def test_every_router_in_the_table_exists() -> None:
    assert {name for name, *_ in CONTRADICTIONS} <= {file.stem for file in FOLDER.glob("*.yaml")}
