"""One sentence for whatever Hydra or OmegaConf found wrong with a configuration."""

import os
import re
import traceback
from dataclasses import MISSING, fields
from typing import Any

import hydra
import yaml
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_base.instantiation import ConfigError, did_you_mean
from lightning_base.program.config import Config
from lightning_base.program.keys import nearest_keys, possible_keys
from lightning_base.program.trainer_arguments import without_plus

# What Hydra and OmegaConf find wrong, and what this program does: each has a sentence.
MISTAKES = (ConfigError, HydraException, OmegaConfBaseException, OSError, yaml.YAMLError)
# The exit code of whatever is wrong with the input, before anything is spent.
BAD_INPUT = 2


def is_mistake(error: Exception) -> bool:
    """Whether an error is somebody's mistake: one of those, or a value that Hydra itself refuses."""
    if isinstance(error, ValueError) and error.__traceback__ is not None:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        return isinstance(error, MISTAKES) or raised_in.startswith(os.path.dirname(hydra.__file__) + os.sep)
    return isinstance(error, MISTAKES)


def explain(error: Exception) -> str:
    """The mistake in one line: the key, what was given, what would do."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name} is no YAML: {error.problem} in line {mark.line + 1}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} does not exist{did_you_mean(name, error.options)}"
    if isinstance(error, OSError):
        # Hydra makes the directories; what goes wrong later on is in a status.json.
        return f"the run directory cannot be used: {error}"
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    text = str(error)
    if "raised while resolving interpolation: " in text:  # by one of our resolvers
        return _first_line(text.partition("raised while resolving interpolation: ")[2])
    if "Config group override must be" in text:
        given = _held(error, "override")
        can_go = any(one.name == given.key_or_group and one.default_factory is not MISSING for one in fields(Config))
        return f"{given.input_line} names no choice: leave it out" + f", or write ~{given.key_or_group}" * can_go
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        key, _, values = several.group(1).partition("=")
        # A list is nothing for a group, or a key at the top.
        a_list = f", or {key}=[{values}] for a list" * ("." in key)
        return f"{several.group(1)} is several values: write -m in front to train each{a_list}"
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) or "is not in struct" in text:
        found = re.search(r"Could not (?:override|delete)[^']*'([^']+)'", text)
        if found and ("not in struct" in f"{text} {cause}" or "Could not delete" in text):
            return _no_key(error, found.group(1))
        if found and "No match in the defaults list" in text:
            return f"{found.group(1)} is not a group of the configuration"
        there = re.search(r"An item is already at '([^']+)'", text)
        if there:
            return f"{there.group(1)} is in the configuration already: leave out the plus"
    return _first_line(text) + (f" ({_first_line(str(cause))})" if cause else "")


def _no_key(error: Exception, key: str) -> str:
    """Of an override that changes or removes what is not there."""
    group, _, name = key.rpartition(".")
    of_lightning = without_plus(name) if group == "trainer" else None
    if of_lightning:
        return of_lightning
    composed: Any = OmegaConf.to_container(_held(error, "cfg") or OmegaConf.create(), resolve=False)
    composed.pop("hydra", None)
    if key in (known := possible_keys(composed)) and isinstance(getattr(error.__cause__, "full_key", None), str):
        # Of several keys that were given at once.
        key = max(key, error.__cause__.full_key, key=len)  # type: ignore[union-attr]
        group, _, name = key.rpartition(".")
    parent: Any = composed
    for part in group.split(".") if group else ():
        parent = parent.get(part) if isinstance(parent, dict) else None
    if "Could not delete" not in str(error) and (key in known or parent == {}):
        # Whether an empty group takes this very name, nobody has looked yet.
        lacks = f"{key} is not in the configuration yet: add it" if key in known else f"{group} is empty: add to it"
        return f"{lacks} with a plus, +{_held(error, 'override').input_line}"
    there = [one for one in parent if one != "_target_"] if isinstance(parent, dict) else []
    owner = str(parent["_target_"]).rpartition(".")[2] if "_target_" in (parent or {}) else None
    near = nearest_keys(key, known)
    told = f"{key} is not a key of the configuration" + (f" while {group} is {owner}" if owner else "")
    told += f"; did you mean {' or '.join(near)}?" if near else did_you_mean(name, there) if there else ""
    if owner and _held(error, "run_mode") == RunMode.MULTIRUN:
        # Hydra composes a sweep once with the default of every group, before it composes the jobs.
        told += f"; in a sweep over {group}, write ++{key}=..."
    return told


def _unreadable(override: str) -> str:
    """Of what is no ``key=value``, or has a value with characters that mean something to Hydra."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} has no value: write {override}=..."
    if value.startswith("="):
        return f"{override} has an equals sign too many: write {key}={value.lstrip('=')}"
    if set(value) & set("[]{}()\"'"):
        return f"{override} cannot be read: close its brackets and quotes"
    return f"{override} cannot be read: quote the value, '{key}=\"{os.path.expanduser(value)}\"'"


def _held(error: Exception, name: str) -> Any:
    """What Hydra had in a variable of this name when it raised an error, which tells less; None if there is none."""
    held = [frame.f_locals[name] for frame, _ in traceback.walk_tb(error.__traceback__) if name in frame.f_locals]
    return held[-1] if held else None


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown"
