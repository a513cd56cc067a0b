"""Routers from other packages, named by an entry point of the group ``lightning_base.routers`` or by ``plugins=[...]``.

A configuration is data: it may name a class of this package, and of those that whoever runs it has declared.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_base.instantiation import ConfigError, plain_defaults, resolve, trust
from lightning_base.routing.router import Router

GROUP = "lightning_base.routers"
NUM_EXPERTS = 8  # of the routers in conf/router, for one that asks how many and has no default


def entry_points() -> dict[str, str]:
    """``package.module.Class`` of every installed router of another package, by the name of its entry point.

    Raises:
        ConfigError: two packages give one name.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        before = found.setdefault(point.name, point)
        if before.value != point.value:
            raise ConfigError(
                f"two installed packages name a router {point.name}, {before.value} and {point.value} (entry points of "
                f"{GROUP}): uninstall one of them"
            )
    return {name: point.value.replace(":", ".") for name, point in found.items()}


def declare(plugins: Iterable[str]) -> None:
    """Lets configurations of this process name classes of these packages and of installed plugins.

    Raises:
        ConfigError: a package that is not there or cannot be imported.
    """
    for plugin in plugins:
        root = plugin.partition(".")[0]
        if root == "lightning_base" or not plugin.replace(".", "").replace("_", "").isalnum():
            raise ConfigError(f"plugins={plugin} is no package of yours: name one that can be imported, as my_package")
        try:
            importlib.import_module(plugin)
        except (Exception, SystemExit) as error:  # whatever its author has written
            where = "is it installed, or on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else "mend it first"
            raise ConfigError(
                f"plugins={plugin} cannot be imported ({type(error).__name__}: {_line(error)}): {where}"
            ) from error
        trust(plugin)
    for target in entry_points().values():
        trust(target)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def router_nodes(ours: Iterable[str]) -> dict[str, str]:
    """The installed routers that ``router=NAME`` may name without a file.

    Raises:
        ConfigError: one has the name of a router of ours.
    """
    found = entry_points()
    for name in found.keys() & set(ours):
        raise ConfigError(
            f"the router {name} of {found[name]} (an entry point of {GROUP}) has the name of a router of "
            "lightning_base: rename it"
        )
    return found


def store_routers(arguments: Iterable[str], ours: Iterable[str]) -> None:
    """Makes ``router=my_package.MyRouter`` and ``router=entry_point`` choices that Hydra knows, without a YAML file.

    Args:
        arguments: of the command line; ``plugins=`` among them declares packages.
        ours: the names of the files in ``conf/router``.

    Raises:
        ConfigError: a plugin, or a router that is named, cannot be used.
    """
    from hydra.core.config_store import ConfigStore

    given = [argument.lstrip("+").partition("=") for argument in arguments]
    declared = [name for key, _, value in given if key == "plugins" for name in value.strip("[]'\"").split(",") if name]
    installed = router_nodes(ours)
    if not declared and not installed:
        chosen = [name for key, _, value in given if key == "router" for name in value.split(",") if "." in name]
        if chosen:
            package = chosen[0].partition(".")[0]
            raise ConfigError(f"router={chosen[0]} is of a package that is not declared: add plugins=[{package}]")
        return
    declare([name.strip() for name in declared])
    for key, _, value in given:
        for name in value.split(",") if key == "router" else ():
            target = installed.get(name, name)
            if "." in target:
                ConfigStore.instance().store(group="router", name=name, node=node_of(target, declared))


def node_of(target: str, declared: Iterable[str]) -> dict[str, Any]:
    """The entry of the configuration for a router without a YAML file: its options with their defaults."""
    package = target.partition(".")[0]
    if package not in {plugin.partition(".")[0] for plugin in declared} and target not in entry_points().values():
        raise ConfigError(f"router={target} is of a package that is not declared: add plugins=[{package}]")
    found = resolve(target, "router", Router)
    options = plain_defaults(found)
    if "num_experts" in inspect.signature(found).parameters:
        options.setdefault("num_experts", NUM_EXPERTS)
    return {"_target_": target, **options}


def refuse_shadowed(arguments: Sequence[str], ours: Path) -> None:
    """Raises ConfigError for a file of somebody's that has the name of one of ours and would never be read.

    Hydra looks into ``--config-dir`` and ``hydra.searchpath`` after our own folder. A copy of ours hides nothing.

    Args:
        arguments: of the command line.
        ours: our folder of configuration groups.
    """
    for theirs in added_folders(arguments):
        for file in sorted(theirs.rglob("*.yaml")):
            name = file.relative_to(theirs)
            own = ours / name
            if own.is_file() and own.read_bytes() != file.read_bytes():
                what = f"{name.parent}={name.stem}" if len(name.parts) > 1 else name.name
                raise ConfigError(
                    f"{what} stands in {own} and in {file}, and only the first would be read: give yours another "
                    f"name, as {name.with_stem(f'my_{name.stem}')}"
                )


def added_folders(arguments: Sequence[str]) -> list[Path]:
    """Where Hydra looks for a file after our own folder."""
    from hydra._internal.utils import get_args
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = get_args(arguments)
    if given.config_path is not None:
        return []  # theirs is the first folder then, on purpose
    searched = [override for override in given.overrides if override.lstrip("+").startswith("hydra.searchpath=")]
    found = [] if given.config_dir is None else [given.config_dir]
    for override in OverridesParser.create().parse_overrides(searched):
        value = override.value()
        found += map(str, value) if isinstance(value, list) else []
    return [Path(folder.removeprefix("file://")) for folder in found if "://" not in folder.removeprefix("file://")]
