"""Which keys a configuration may have, and which of them somebody may have meant by one that it has not."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import SequenceMatcher
from typing import Any

from lightning_base.instantiation import ConfigError, plain_defaults, resolve
from lightning_base.model_options import HuggingFaceConfig, ModelConfig, ModelOptions
from lightning_base.program.config import Config
from lightning_base.program.read_config import GIVEN_TO_CALLBACKS

# Words of a name that say how much, and not of what.
HOW_MUCH = {"size", "num", "number", "n", "max", "min", "every", "of", "per"}
NEAR, SURE, AS_NEAR = 0.65, 0.85, 0.11


def possible_keys(composed: Mapping[str, Any]) -> set[str]:
    """Every key that a configuration may have: those of the schema, those it has, and the options of their classes.

    Args:
        composed: the configuration as far as there is one, as plain containers.
    """
    return {*_of_schema(Config, ""), *_of_node(composed, "")} - {"trainer.lightning"}


def _of_schema(schema: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        for kind in (ModelConfig, HuggingFaceConfig) if hint is ModelOptions else (hint,):
            if dataclasses.is_dataclass(kind):
                yield from _of_schema(typing.cast(type, kind), f"{prefix}{name}.")


def _of_node(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
    if "_target_" in node:
        with suppress(ConfigError):
            options = plain_defaults(resolve(str(node["_target_"]), prefix.rstrip("."), object))
            yield from (prefix + name for name in options.keys() - GIVEN_TO_CALLBACKS)
    for name, below in node.items():
        if name != "_target_":
            yield f"{prefix}{name}"
        if isinstance(below, Mapping):
            yield from _of_node(below, f"{prefix}{name}.")


def nearest_keys(given: str, known: Iterable[str]) -> list[str]:
    """The keys that somebody may have meant, the likeliest first: at most three, or none.

    >>> nearest_keys("max_steps", ["trainer.max_steps", "module.warmup_steps"])
    ['trainer.max_steps']
    >>> nearest_keys("optimizer.lr", ["logger", "module.learning_rate"])
    ['module.learning_rate']
    """
    group, _, name = given.rpartition(".")
    known, rated = set(known), []
    for key in sorted(known):
        place, _, last = key.rpartition(".")
        alike = likeness(name, last)
        # Who names a group that there is seldom means another.
        if alike >= (NEAR if place == group or group not in known else SURE):
            # Somebody who leaves the group out seldom means a key that lies deep.
            rated.append((alike + SequenceMatcher(None, group, place).ratio() / 5 - key.count(".") / 20, key))
    rated.sort(key=lambda each: -each[0])
    return [key for rate, key in rated if rate >= rated[0][0] - AS_NEAR][:3]


def likeness(given: str, known: str) -> float:
    """From 0 to 1, how likely a name stands for another: letters, initials (lr) or words (batch_size) in common."""
    given, known = given.lower(), known.lower()
    words, others = ({word.rstrip("s") for word in name.split("_")} - HOW_MUCH for name in (given, known))
    shared = len(words & others) / len(words | others) if words & others else 0
    initials = "_" in known and given == "".join(word[:1] for word in known.split("_"))
    return max(SequenceMatcher(None, given, known).ratio(), 0.9 * initials, 0.5 + 0.4 * shared if shared else 0)
