"""What a configuration may build, and what it is told when it may not."""

import subprocess
import sys
from typing import Any, Literal

import pytest
import torch
from pytorch_lightning import Callback
from router_arms import FOLDER, ROUTERS, build_router

from lightning_base.instantiation import (
    ALLOWED,
    ConfigError,
    check_arguments,
    describe,
    fits,
    instantiate,
    resolve,
    trust,
)
from lightning_base.routing import Router, Switch, TopK

SWITCH = "lightning_base.routing.switch.Switch"


def build(**node: object) -> Router:
    return instantiate(node, "router", Router, width=16)


def refusal(**node: object) -> str:
    """The one sentence a user gets."""
    with pytest.raises(ConfigError) as caught:
        build(**node)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_file_names_a_class_of_this_package(name: str) -> None:
    router = build_router(name)
    assert type(router).__module__.startswith("lightning_base.routing.")
    assert "_target_: lightning_base.routing." in (FOLDER / f"{name}.yaml").read_text()


def test_options_reach_the_class_and_the_program_supplies_the_rest() -> None:
    router = build(_target_=SWITCH, num_experts=4, capacity_factor=None)
    assert isinstance(router, Switch)
    assert (router.num_experts, router.capacity_factor, router.gate.in_features) == (4, None, 16)


def test_what_the_program_supplies_is_left_out_where_a_class_does_not_take_it() -> None:
    optimizer = instantiate(
        {"_target_": "torch.optim.SGD", "lr": 0.5},
        "optimizer",
        torch.optim.Optimizer,
        params=torch.nn.Linear(2, 2).parameters(),
        width=16,
    )
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "torch.load",
        "torch.nn.Linear",
        "os.system",
        "subprocess.Popen",
        "joblib.load",
        "builtins.eval",
        "hydra.utils.instantiate",
        "lightning_base",
        "lightning_base_evil.Router",
        "Switch",
        "",
    ],
)
def test_a_target_outside_the_allow_list_is_refused(target: str) -> None:
    message = refusal(_target_=target, num_experts=4)
    assert message.startswith(f"router._target_={target} is not allowed: name a class of lightning_base or one of ")
    assert all(allowed in message for allowed in ALLOWED)


@pytest.mark.parametrize(
    "target",
    [
        "lightning_base.model.torch",
        "lightning_base.model.nn",
        "lightning_base.model.checkpoint",
        "lightning_base.model.hashlib",
        "lightning_base.instantiation.importlib",
        "lightning_base.routing.switch",
    ],
)
def test_what_only_passes_through_this_package_is_refused(target: str) -> None:
    assert refusal(_target_=target) == f"router._target_={target} is not allowed: it only passes through lightning_base"


@pytest.mark.parametrize(
    "target",
    [
        "lightning_base.model.nn.Linear",
        "lightning_base.model.torch.hub.load",
        "lightning_base.instantiation.importlib.import_module",
        "lightning_base.routing.switch.Switch.nothing",
        "lightning_base.routing.Swich",
        "lightning_base.nowhere.Switch",
        "lightning_base..os.system",
        "lightning_base.",
    ],
)
def test_what_is_not_there_is_refused(target: str) -> None:
    assert refusal(_target_=target).startswith(f"router._target_={target} does not exist: ")


def test_importing_nothing_precedes_the_allow_list() -> None:
    # ``this`` prints a poem when it is imported.
    code = (
        "from lightning_base.instantiation import *\n"
        "try: instantiate({'_target_': 'this.s'}, 'router', object)\n"
        "except ConfigError : print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


@pytest.mark.parametrize(
    "target",
    [
        "lightning_base.model.Transformer",
        "lightning_base.model.initialize",
        "lightning_base.routing.switch.Switch.__init__",
    ],
)
def test_an_object_of_another_kind_is_refused(target: str) -> None:
    assert refusal(_target_=target) == f"router._target_={target} is not a Router"


def test_a_package_alone_is_no_class() -> None:
    trust("a_package_alone")
    sentence = "router._target_=a_package_alone does not exist: it names no class: write package.module.Class"
    assert refusal(_target_="a_package_alone") == sentence


def test_the_base_class_itself_is_refused() -> None:
    assert "name a kind of it" in refusal(_target_="lightning_base.routing.Router", num_experts=4)


@pytest.mark.parametrize("node", [{}, {"num_experts": 4}, "switch", None, [SWITCH]])
def test_a_node_without_a_target_is_refused(node: Any) -> None:
    with pytest.raises(ConfigError, match=r"^router has no _target_: name the class to build$"):
        instantiate(node, "router", Router)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_facto": 1.0}, "router.capacity_facto is not an option of Switch; did you mean capacity_factor"),
        ({"num_expert": 1}, "router.num_expert is not an option of Switch; did you mean num_experts?"),
        (
            {"zzz": 1},
            "router.zzz is not an option of Switch; choose one of "
            "balance_scope, capacity_factor, evaluation_capacity_factor, gate, num_experts",
        ),
        # Supplied by the program, so that it is no option of the user's.
        ({"width": 32}, "router.width is not an option of Switch"),
        ({"self": 1}, "router.self is not an option of Switch"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_names(options: dict, message: str) -> None:
    assert refusal(**{"_target_": SWITCH, "num_experts": 4, **options}).startswith(message)


def test_an_option_whose_name_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^router\.3 is not an option of Switch"):
        instantiate({"_target_": SWITCH, "num_experts": 4, 3: 4}, "router", Router, width=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": "8"}, "router.num_experts='8' should be a whole number"),
        ({"num_experts": 8.0}, "router.num_experts=8.0 should be a whole number"),
        ({"num_experts": True}, "router.num_experts=True should be a whole number"),
        ({"num_experts": None}, "router.num_experts=null has to be given: a whole number"),
        ({"capacity_factor": "high"}, "router.capacity_factor='high' should be a number or null"),
        ({"capacity_factor": True}, "router.capacity_factor=True should be a number or null"),
        ({"capacity_factor": [1.0]}, "router.capacity_factor=[1.0] should be a number or null"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type_wanted(options: dict, message: str) -> None:
    assert refusal(**{"_target_": SWITCH, "num_experts": 4, **options}) == message


def test_a_missing_option_is_named() -> None:
    assert refusal(_target_=SWITCH) == "router.num_experts is missing: Switch needs it"


def test_a_value_out_of_range_is_refused_in_the_words_of_the_class() -> None:
    message = "router.capacity_factor=-1.0: a capacity factor is a number above 0, or null to drop nothing"
    assert refusal(_target_=SWITCH, num_experts=4, capacity_factor=-1.0) == message
    target = "lightning_base.routing.TopK"
    assert refusal(_target_=target, num_experts=4, top_k=5).startswith("router.top_k=5 with router.num_experts=4: ")


def test_a_whole_number_will_do_for_a_fraction_and_arrives_as_one() -> None:
    router = build(_target_=SWITCH, num_experts=4, capacity_factor=1)
    assert isinstance(router, Switch)
    assert type(router.capacity_factor) is float
    whole = build(_target_="lightning_base.routing.TopK", num_experts=4, top_k=2)
    assert isinstance(whole, TopK)
    assert type(whole.top_k) is int


def test_every_allowed_class_exists() -> None:
    for target in ALLOWED:
        base = Callback if "callbacks" in target else torch.optim.Optimizer
        assert issubclass(resolve(target, "key", base), base)


class Example:
    """A test double with one option of every kind a configuration knows."""

    def __init__(
        self,
        *,
        name: str = "",
        mode: Literal["a", "b"] = "a",
        layers: Literal["every_other"] | int | list[int] = 1,
        rates: dict[str, float] | None = None,
        on: bool = False,
        anything: Any = None,
    ) -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {"name": "x", "mode": "b", "on": True},
        {"layers": "every_other"},
        {"layers": 3},
        {"layers": [1, 2]},
        {"layers": []},
        {"rates": {"a": 1.0, "b": 2}},
        {"rates": None},
        {"anything": True},
        {"anything": ["x", 1]},
    ],
)
def test_values_of_the_right_type_are_taken_as_they_are(options: dict) -> None:
    assert check_arguments(options, Example, "example", hidden=set()) == options


class Loosely:
    """One whose annotations nobody can evaluate, or that say less than its defaults."""

    def __init__(
        self,
        *,
        name: str = None,  # type: ignore[assignment] # noqa: RUF013
        bias: "Nowhere" = None,  # type: ignore[name-defined]
        number: int = 1,
    ) -> None: ...


def test_a_default_always_fits_and_an_annotation_that_cannot_be_evaluated_takes_anything() -> None:
    for options in ({"name": None}, {"bias": None}, {"bias": 3}):
        assert check_arguments(options, Loosely, "loosely", hidden=set()) == options
    with pytest.raises(ConfigError, match=r"^loosely\.number='x' should be a whole number$"):
        check_arguments({"number": "x"}, Loosely, "loosely", hidden=set())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"name": 1}, "a text"),
        ({"mode": "c"}, "a or b"),
        ({"layers": "all"}, "every_other or a whole number or a list of a whole number"),
        ({"layers": [1, "2"]}, "every_other or a whole number or a list of a whole number"),
        ({"layers": True}, "every_other or a whole number or a list of a whole number"),
        ({"rates": 3}, "a group of options or null"),
        ({"on": 1}, "true or false"),
        ({"on": "yes"}, "true or false"),
    ],
)
def test_values_of_the_wrong_type_are_told_what_is_wanted(options: dict, wanted: str) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError) as caught:
        check_arguments(options, Example, "example", hidden=set())
    assert str(caught.value) == f"example.{name}={value!r} should be {wanted}"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (1.0, int, False),
        (False, int, False),
        (False, float, False),
        (False, bool, True),
        (0, bool, False),
        ({"a": "x"}, dict[str, float], False),
        ({1: 1.0}, dict[str, float], False),
        ([1, None], list[int | None], True),
    ],
)
def test_types_are_compared_as_yaml_means_them(value: object, hint: Any, expected: bool) -> None:
    assert fits(value, hint) == expected


def test_types_are_described_in_words() -> None:
    assert describe(float | None) == "a number or null"
    assert describe(list[float]) == "a list of a number"
