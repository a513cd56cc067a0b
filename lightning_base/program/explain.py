"""One sentence for whatever Hydra or OmegaConf found wrong with a configuration."""

import re

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from lightning_base.instantiation import ConfigError, did_you_mean
from lightning_base.program.trainer_arguments import without_plus

# What Hydra and OmegaConf find wrong, and what this program does: each has a sentence.
MISTAKES = (ConfigError, HydraException, OmegaConfBaseException, OSError)
# The exit code of whatever is wrong with the input, before anything is spent.
BAD_INPUT = 2


def explain(error: Exception) -> str:
    """The mistake in one line: the key, what was given, what would do."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        # Hydra makes the directories; what goes wrong later on is in a status.json.
        return f"the run directory cannot be used: {error}"
    text = str(error)
    if "raised while resolving interpolation: " in text:  # by one of our resolvers
        return _first_line(text.partition("raised while resolving interpolation: ")[2])
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} does not exist{did_you_mean(name, error.options)}"
    cause = error.__cause__
    text = str(cause or error)
    if isinstance(error, ConfigCompositionException) or "is not in struct" in text:
        found = re.search(r"Could not override '([^']+)'", str(error))
        near = _near_keys(cause, found.group(1)) if found else ""
        if found and ("not in struct" in text or "not in struct" in str(error)):
            group, _, name = found.group(1).rpartition(".")
            of_lightning = without_plus(name) if group == "trainer" else None
            if of_lightning:
                return of_lightning
            return f"{found.group(1)} is not a key of the configuration{near}"
        unknown_group = re.search(r"Could not override '([^']+)'. No match in the defaults list", str(error))
        if unknown_group:
            return f"{unknown_group.group(1)} is not a group of the configuration"
    if (isinstance(error, HydraException) and "mismatched input" in text) or "no viable alternative" in text:
        return f"an override cannot be read: {_first_line(text)}"
    return _first_line(str(error)) + (f" ({_first_line(str(cause))})" if cause else "")


def _near_keys(cause: BaseException | None, key: str) -> str:
    """The nearest keys of the group in which an override looked for its key."""
    parent = getattr(cause, "parent_node", None)
    if parent is None:
        return ""
    group, _, name = key.rpartition(".")
    near = did_you_mean(name, [str(one) for one in parent if one != "_target_"])
    if "_target_" not in parent:
        return near
    # Hydra composes a sweep once with the default of every group, before it composes the jobs.
    owner = str(parent._get_node("_target_")).rpartition(".")[2]
    return f" while {group} is {owner}{near}; in a sweep over {group}, write ++{key}=..."


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown"
