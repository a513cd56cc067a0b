"""From ``_target_`` in a configuration to an object, held against an allow-list: a config file is data, not code."""

import difflib
import importlib
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
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


def raised(error: BaseException, file: str | None) -> str:
    """What an error of somebody's own code says in one line, with the line of ``file`` it came from."""
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" (line {theirs[-1].lineno} of {theirs[-1].filename})" if theirs else ""
    said = f"it raised {type(error).__name__}: {one_line(error) or 'without a message'}{where}"
    return "; ".join([said, *getattr(error, "__notes__", ())])


def one_line(error: BaseException) -> str:
    """The message of an error, whatever lines its author has broken it into."""
    return " ".join(str(error).split())


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
    try:
        found = _imported(target)
    except (ImportError, AttributeError) as error:
        there = getattr(getattr(error, "obj", None), "__dict__", {})
        kinds = [name for name, each in there.items() if _is_kind(each, base)]
        near = did_you_mean(target.rpartition(".")[2], kinds) if kinds else ""
        raise ConfigError(f"{key}._target_={target} does not exist: {error}{near}") from error
    except (Exception, SystemExit) as error:  # whatever its author has written
        message = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{key}._target_={target} cannot be imported ({message}): mend it first") from error
    package = target.partition(".")[0]
    if home is not None and not f"{getattr(found, '__module__', '')}.".startswith(f"{package}."):
        raise ConfigError(f"{key}._target_={target} is not allowed: it only passes through {package}")
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(f"{key}._target_={target} is not a {base.__name__}")
    if found is base:
        raise ConfigError(f"{key}._target_={target} is what every {base.__name__} has in common: name a kind of it")
    return found


def _imported(target: str) -> Any:
    """What a name stands for: in a module, or in a class there."""
    home, _, name = target.rpartition(".")
    if not home:
        raise AttributeError("it names no class: write package.module.Class")
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        owner = _imported(home) if error.name == home and "." in home else None
        if not inspect.isclass(owner):
            raise
        return getattr(owner, name)


def _is_kind(found: object, base: type) -> bool:
    return inspect.isclass(found) and issubclass(found, base) and found is not base


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
    try:
        return construct(found, arguments, given)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # whatever its author has written
        if isinstance(error, ValueError) and str(error).strip():
            raise ConfigError(one_line(error)) from error
        file = getattr(sys.modules.get(found.__module__), "__file__", None)
        target = f"{found.__module__}.{found.__qualname__}"
        raise ConfigError(f"{key}._target_={target} cannot be built: {raised(error, file)}") from error


def construct(found: type, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """An object of a class, of its options and of what it takes of ``given``; raises whatever its ``__init__`` does."""
    parameters = inspect.signature(found).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return found(**arguments, **{name: value for name, value in given.items() if takes_all or name in parameters})


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
    hints = annotations(found)
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
        default = parameters[name].default
        if not (fits(value, hint) or (type(value) is type(default) and value == default)):
            if value is None:
                raise ConfigError(f"{prefix}{name}=null has to be given: {describe(hint)}")
            raise ConfigError(misfit(f"{prefix}{name}", value, hint))
        kinds = (hint, *typing.get_args(hint))
        if type(value) is int and float in kinds and int not in kinds:
            taken[name] = float(value)  # YAML writes 1 for 1.0.
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing: {found.__name__} needs it")
    return taken


def annotations(found: type) -> dict[str, Any]:
    """What the arguments of a class are annotated with; Any where that cannot be evaluated here."""
    init = found.__init__  # type: ignore[misc]
    try:
        return typing.get_type_hints(init)
    except Exception:  # whatever an annotation is when it is evaluated
        return {name: _annotation(name, written, init) for name, written in init.__annotations__.items()}


def _annotation(name: str, written: Any, init: Any) -> Any:
    alone = types.SimpleNamespace(__annotations__={name: written})
    try:
        return typing.get_type_hints(alone, getattr(init, "__globals__", {}))[name]
    except Exception:
        return Any


def misfit(key: str, value: object, hint: Any) -> str:
    """The sentence for a value of another type; of a group of options, for the first of them."""
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        of_all = typing.get_args(hint)[1]
        for name, each in value.items():
            if not fits(each, of_all):
                return misfit(f"{key}.{name}", each, of_all)
    return f"{key}={value!r} should be {describe(hint)}"


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
    if origin in (list, tuple, Sequence):
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
    # In letters of either size.
    names = {each.lower(): each for each in known}
    near = [names[each] for each in difflib.get_close_matches(name.lower(), list(names), n=3, cutoff=0.5)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; choose one of {', '.join(sorted(known)) or '(it has none)'}"


def describe(hint: Any) -> str:
    """A type in words a configuration's author would use."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is dict:
        return "a group of options"
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(hint) in (list, tuple, Sequence):
        return "a list" + (f" of {describe(arguments[0])}" if arguments else "")
    if arguments:
        return " or ".join(describe(a) for a in arguments)
    return getattr(hint, "__name__", str(hint))
