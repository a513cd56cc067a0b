"""How a router is made: its options, its parameters, and what it refuses."""

import math
import typing

import torch
from torch import Tensor

from lightning_base.check_router.check import Broken, NotAsked, check
from lightning_base.check_router.load import add_up
from lightning_base.check_router.plan import well_formed
from lightning_base.check_router.subject import Subject, groups_of, random_tokens, route, width_for
from lightning_base.instantiation import annotations, describe
from lightning_base.routing.router import Router

OTHER_NUMBERS = (1, 2, 3, 16)
NO_CHOICE = "no_such_choice"


@check
def construction(subject: Subject) -> None:
    """It is ready once it is built, and works with other numbers of experts or refuses them in a sentence."""
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
    for option in ("num_experts", "top_k"):
        for number in OTHER_NUMBERS if option in subject.parameters else ():
            other_number(subject, option, number)


def other_number(subject: Subject, option: str, number: int) -> None:
    """Builds it with another number of experts, or of experts for each token, and routes a few tokens."""
    given = f"{option}={number}"
    try:
        other = subject.make(**{option: number})
    except ValueError as error:
        refused_in_one_sentence(error, given)
        return
    except Exception as error:
        raise Broken(
            f"with {given} it raised {type(error).__name__}: {error}; build it, or raise ValueError with one sentence"
        ) from error
    if getattr(other, option) != number:
        raise Broken(
            f"built with {given} it has {option}={getattr(other, option)}: hand {option} on to super().__init__()"
        )
    router = subject.build(**{option: number})
    size, width = 4 * router.num_experts, width_for(subject.options.get("num_experts", number))
    try:
        plan = route(router, *random_tokens(size, width=width), groups_of(size))
    except Exception as error:
        raise Broken(
            f"built with {given} it raised {type(error).__name__} when it routed: {error}; go by self.{option}, or "
            "refuse the number in __init__"
        ) from error
    well_formed(plan, router, f"built with {given},")
    add_up(plan, router, f"built with {given},")


@check
def refusals(subject: Subject) -> None:
    """Values that cannot work are refused with a ValueError of one sentence."""
    impossible: list[tuple[str, object]] = []
    if "num_experts" in subject.parameters:
        impossible += [("num_experts", 0), ("num_experts", -1)]
    if "top_k" in subject.parameters:
        impossible += [("top_k", 0), ("top_k", subject.router.num_experts + 1)]
    hints = annotations(subject.kind)
    for name, parameter in subject.parameters.items():
        kinds = (hints.get(name), *typing.get_args(hints.get(name)))
        if float in kinds:
            impossible.append((name, math.nan))
        elif str in kinds and isinstance(parameter.default, str):
            impossible.append((name, NO_CHOICE))
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
    if not held(subject.router):
        raise NotAsked("it has no parameters and no buffers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = subject.draw(seed=7)
        torch.manual_seed(2)
        same, other = subject.draw(seed=7), subject.draw(seed=8)
    twice = held(same)
    for name, value in held(one).items():
        if not torch.equal(value, twice[name]):
            raise Broken(
                f"{name} was drawn differently twice from one seed: draw it in reset_parameters with torch's global "
                "generator, and there alone"
            )
    for (name, first), third in zip(one.named_parameters(), other.parameters(), strict=True):
        # Some papers start a matrix at zero, or every gain at one.
        if torch.equal(first, third) and len(first.unique()) > 1:
            raise Broken(
                f"its parameter {name} is the same from two seeds: draw it in reset_parameters, with torch's global "
                "generator and no seed of its own"
            )
        if not bool(torch.isfinite(first).all()):
            raise Broken(f"reset_parameters leaves {name} with numbers that are not finite")


def held(router: Router) -> dict[str, Tensor]:
    """Its parameters and buffers."""
    return {**dict(router.named_parameters()), **dict(router.named_buffers())}
