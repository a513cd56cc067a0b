"""The flags of the program ``train``, which are Hydra's: all else is ``key=value``."""

from collections.abc import Sequence
from typing import NoReturn

from lightning_base.instantiation import ConfigError
from lightning_base.program.keys import nearest_keys, possible_keys


def check_flags(arguments: Sequence[str]) -> None:
    """Raises ConfigError for a flag that there is not, such as Lightning's ``--max_steps 4``, or in the wrong place."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"the command line cannot be read: {message}")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    given, unknown = parser.parse_known_args(arguments)
    if given.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun reads a pickle, which is code: give the overrides of that run again")
    if unknown and not unknown[0].startswith("-"):
        raise ConfigError(f"{unknown[0]} comes too late: write flags such as -m before all that is key=value")
    if unknown:
        flag, _, value = unknown[0].partition("=")
        after = arguments[arguments.index(unknown[0]) + 1 :]
        value = value or next((one for one in after[:1] if "=" not in one and not one.startswith("-")), "...")
        near = nearest_keys(flag.lstrip("-").replace("-", "_"), possible_keys({}))
        do = f"write {near[0]}={value}" if near else "options are written as trainer.max_steps=4, and --help shows them"
        raise ConfigError(f"{flag} is no flag: {do}")
