"""From ``_target_`` in a configuration to an object, held against an allow-list: a config file is data, not code."""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

# Classes outside this package that a configuration may name, besides everything in ``lightning_base``.
ALLOWED = (
    "pytorch_lightning.callbacks.EarlyStopping",
    "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.callbacks.StochasticWeightAveraging",
    "torch.optim.Adam",
    "torch.optim.AdamW",
    "torch.optim.SGD",
)
# Packages and classes of others that this process may name too; see ``plugins``.
_TRUSTED: set[str] = set()


class ConfigError(ValueError):
    """One sentence that names the key, what was given and what would do."""


def require(holds: bool, key: str, value: object, accepted: str) -> None:
    """Raises ConfigError in the one form all range errors have."""
    if not holds:
        raise ConfigError(f"{key}={value} is out of range: {accepted}")


def trust(name: str) -> None:
    """Allows configurations of this process to name a class, or the classes of a package."""
    _TRUSTED.add(name)


def resolve(target: str, key: str, base: type) -> type:
    """The class that ``target`` names, a subclass of ``base``.

    Raises:
        ConfigError: outside the allow-list, not there, or not such a class.
    """
    home = next((root for root in ("lightning_base", *_TRUSTED) if target.startswith(f"{root}.")), None)
    home = target if target in _TRUSTED else home
    # Held against the list before the import too: importing a module runs it.
    if home is None and target not in ALLOWED:
        package = target.partition(".")[0]
        raise ConfigError(
            f"{key}._target_={target} is not allowed: name a class of lightning_base or one of "
            f"{', '.join(ALLOWED)}, or declare its package: plugins=[{package}]"
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}._target_={target} does not exist: {error}") from error
    except (Exception, SystemExit) as error:  # whatever its author has written
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{key}._target_={target} cannot be imported ({message}): mend it first") from error
    package = target.partition(".")[0]
    if home is not None and not f"{getattr(found, '__module__', '')}.".startswith(f"{package}."):
        raise ConfigError(f"{key}._target_={target} is not allowed: it only passes through {package}")
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(f"{key}._target_={target} is not a {base.__name__}")
    if found is base:
        raise ConfigError(f"{key}._target_={target} is what every {base.__name__} has in common: name a kind of it")
    return found


def instantiate(node: object, key: str, base: type, **given: Any) -> Any:
    """Builds ``node["_target_"]`` with the other entries of ``node`` as keyword arguments, checked by its signature.

    Args:
        node: from a resolved configuration; a mapping, if nothing is wrong.
        key: where it stands in the configuration, for messages.
        base: what the class must be.
        given: arguments the program supplies; the class takes them or not.

    Raises:
        ConfigError: one sentence for whatever is wrong.
    """
    found, arguments = check_node(node, key, base, hidden=set(given))
    parameters = inspect.signature(found).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    try:
        return found(**arguments, **given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_node(node: object, key: str, base: type, hidden: set[str]) -> tuple[type, dict[str, Any]]:
    """The class that ``node`` names and its arguments, checked as ``instantiate`` does; nothing is built.

    Args:
        node: from a resolved configuration.
        key: where it stands there.
        base: what the class must be.
        hidden: arguments the program supplies, which a configuration cannot give.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key} has no _target_: name the class to build")
    found = resolve(str(node["_target_"]), key, base)
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(found).parameters.values()):
        arguments = check_arguments(arguments, found, key, hidden)
    return found, arguments


def check_arguments(arguments: Mapping[str, Any], found: type, key: str, hidden: set[str]) -> dict[str, Any]:
    """The arguments as ``found`` takes them; ConfigError for one that it does not take, lacks, or wants otherwise."""
    parameters = {n: p for n, p in inspect.signature(found).parameters.items() if n not in hidden}
    hints = typing.get_type_hints(found.__init__)  # type: ignore[misc]
    taken = dict(arguments)
    prefix = f"{key}." if key else ""
    refused: Mapping[str, str] = getattr(found, "refused_options", {})
    for name, value in arguments.items():
        if name in refused:
            raise ConfigError(f"{prefix}{name}={value!r} contradicts {found.__name__}: {refused[name]}")
        if name not in parameters:
            owner = found.__name__ if key else "the configuration"
            raise ConfigError(f"{prefix}{name} is not an option of {owner}{did_you_mean(str(name), parameters)}")
        hint = hints.get(name, Any)
        if not fits(value, hint):
            raise ConfigError(f"{prefix}{name}={value!r} should be {describe(hint)}")
        kinds = (hint, *typing.get_args(hint))
        if type(value) is int and float in kinds and int not in kinds:
            taken[name] = float(value)  # YAML writes 1 for 1.0.
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing: {found.__name__} needs it")
    return taken


def plain_defaults(found: type) -> dict[str, Any]:
    """The options of a class that have a default which YAML can write."""
    parameters = inspect.signature(found).parameters.items()
    plain = (bool, int, float, str, list, dict, type(None))
    return {name: p.default for name, p in parameters if isinstance(p.default, plain)}


def fits(value: object, hint: Any) -> bool:
    """Whether a value read from YAML is of a type; every item of a list or mapping is looked at, and 1 is a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items()
        )
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint if inspect.isclass(hint) else object)


def did_you_mean(name: str, known: Any) -> str:
    """The end of a sentence that names the nearest known names, or all."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; choose one of {', '.join(sorted(known)) or '(it has none)'}"


def describe(hint: Any) -> str:
    """A type in words a configuration's author would use."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if hint in names:
        return names[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(hint) in (list, tuple):
        return "a list" + (f" of {describe(arguments[0])}" if arguments else "")
    if arguments:
        return " or ".join(describe(a) for a in arguments)
    return getattr(hint, "__name__", str(hint))
