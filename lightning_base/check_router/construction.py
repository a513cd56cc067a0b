"""How a router is made: its options, its parameters, and what it refuses."""

import inspect
import math
import typing

import torch

from lightning_base.check_router.check import Broken, NotAsked, check
from lightning_base.check_router.subject import Subject
from lightning_base.instantiation import describe

OTHER_NUMBERS = (1, 2, 3, 16)


@check
def construction(subject: Subject) -> None:
    """It is ready once it is built, and takes other numbers of experts or refuses them in a sentence."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory that nobody has written to is NaN
    try:
        router = subject.make()
    finally:
        torch.use_deterministic_algorithms(before)
    for name, parameter in router.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise Broken(
                f"after __init__ its parameter {name} holds what was in memory before: draw it in reset_parameters and "
                "call that at the end of __init__"
            )
    if router.num_experts < 1 or router.num_experts != subject.options.get("num_experts", router.num_experts):
        raise Broken(
            f"built with {dict(subject.options)} it has num_experts={router.num_experts}: hand num_experts on to "
            "super().__init__(num_experts=num_experts)"
        )
    if "num_experts" not in subject.parameters:
        return
    for number in OTHER_NUMBERS:
        try:
            other = subject.make(num_experts=number)
        except ValueError as error:
            refused_in_one_sentence(error, f"num_experts={number}")
            continue
        except Exception as error:
            raise Broken(
                f"with num_experts={number} it raised {type(error).__name__}: {error}; build it, or raise ValueError "
                "with one sentence"
            ) from error
        if other.num_experts != number:
            raise Broken(f"built with num_experts={number} it has num_experts={other.num_experts}")


@check
def refusals(subject: Subject) -> None:
    """Values that cannot work are refused with a ValueError of one sentence."""
    impossible: list[tuple[str, object]] = []
    if "num_experts" in subject.parameters:
        impossible += [("num_experts", 0), ("num_experts", -1)]
    if "top_k" in subject.parameters:
        impossible += [("top_k", 0), ("top_k", subject.router.num_experts + 1)]
    hints = typing.get_type_hints(subject.kind.__init__)
    impossible += [
        (name, math.nan)
        for name, parameter in subject.parameters.items()
        if float in (hints.get(name), *typing.get_args(hints.get(name)))
        and parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name, value in impossible:
        try:
            subject.make(**{name: value})
        except ValueError as error:
            refused_in_one_sentence(error, f"{name}={value}")
        except Exception as error:
            raise Broken(
                f"{name}={value} raised {type(error).__name__}: {error}; raise ValueError with one sentence that names "
                f"router.{name}"
            ) from error
        else:
            wanted = f", {describe(hints[name])}" if name in hints else ""
            raise Broken(
                f"{name}={value} was accepted: raise ValueError with one sentence that names router.{name}, what was "
                f"given and what would do{wanted}"
            )
    refuses_small_groups(subject)


def refuses_small_groups(subject: Subject) -> None:
    """A training group with fewer tokens than experts is refused, by the option's name."""
    experts = subject.router.num_experts
    try:
        subject.router.check_group(experts)
    except ValueError as error:
        raise Broken(f"check_group({experts}) refused a group with a token for each expert: {error}") from error
    try:
        subject.router.check_group(experts - 1)
    except ValueError as error:
        if f"router.num_experts={experts} " not in str(error):
            raise Broken(f"check_group({experts - 1}) does not name router.num_experts={experts}: {error}") from error
    else:
        raise Broken(
            f"check_group({experts - 1}) accepted a training group with fewer tokens than its {experts} experts: raise "
            "ValueError, as Router.check_group does"
        )


def refused_in_one_sentence(error: ValueError, given: str) -> None:
    if not str(error).strip() or "\n" in str(error).strip():
        raise Broken(f"{given} is refused with {str(error)!r}: one sentence says what was given and what would do")


@check
def initial_parameters(subject: Subject) -> None:
    """What is drawn at first depends on the seed and on nothing else."""
    if not list(subject.router.parameters()):
        raise NotAsked("it has no parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = subject.build(seed=7)
        torch.manual_seed(2)
        same, other = subject.build(seed=7), subject.build(seed=8)
    for (name, first), second, third in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        if not torch.equal(first, second):
            raise Broken(
                f"its parameter {name} was drawn differently twice from one seed: draw it in reset_parameters with "
                "torch's global generator, and there alone"
            )
        # Some papers start a matrix at zero, or every gain at one.
        if torch.equal(first, third) and len(first.unique()) > 1:
            raise Broken(
                f"its parameter {name} is the same from two seeds: draw it in reset_parameters, with torch's global "
                "generator and no seed of its own"
            )
        if not bool(torch.isfinite(first).all()):
            raise Broken(f"reset_parameters leaves {name} with numbers that are not finite")
