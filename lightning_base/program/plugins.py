"""Routers from other packages, named by an entry point of the group ``lightning_base.routers`` or by ``plugins=[...]``.

A configuration is data: it may name a class of this package, and of those that whoever runs it has declared.
"""

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_base.instantiation import ConfigError, fits, plain_defaults, resolve, trust
from lightning_base.routing.router import Router

if TYPE_CHECKING:
    from omegaconf import DictConfig

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


class Routers(dict[str, Any]):
    """Hydra's group ``router`` beside our files: installed routers by their names, and any ``package.Class``.

    A class of a package that is declared on the command line comes with its options. A file may declare others, which
    is known when everything is composed: of their classes only the name is given, and ``complete`` adds the options.
    """

    def __init__(self, ours: Mapping[str, Path], declared: Sequence[str]) -> None:
        super().__init__({f"{name}.yaml": target for name, target in router_nodes(ours).items()})
        self.ours, self.declared = ours, declared

    def __contains__(self, file: object) -> bool:
        return super().__contains__(file) or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+\.yaml", str(file)) is not None

    def __getitem__(self, file: str) -> Any:
        from hydra.core.config_store import ConfigNode
        from omegaconf import OmegaConf

        target = self.get(file, file.removesuffix(".yaml"))
        if target.startswith("lightning_base."):
            named = [name for name, own in self.ours.items() if f"_target_: {target}\n" in own.read_text()]
            names = ", ".join(named or self.ours)
            raise ConfigError(f"router={target} is of lightning_base, whose routers have short names: router={names}")
        node = OmegaConf.create({"_target_": target}, flags={"struct": False})  # takes options not known yet
        if is_declared(target, self.declared):
            with suppress(
                ConfigError
            ):  # Hydra asks for every router when it lists them; `complete` says it of the chosen
                node = OmegaConf.create(node_of(target))
        return ConfigNode(name=file, node=node, group="router", package=None, provider=GROUP)


def offer_routers(arguments: Sequence[str], folder: Path) -> None:
    """Makes ``router=my_package.MyRouter`` and ``router=entry_point`` choices that Hydra knows, without a YAML file.

    Args:
        arguments: of the command line; ``plugins=`` among them declares packages.
        folder: our own files.

    Raises:
        ConfigError: a plugin cannot be used.
    """
    from hydra.core.config_store import ConfigStore

    declared = typed(arguments, "plugins")
    routers = Routers({file.stem: file for file in sorted(folder.glob("*.yaml"))}, declared)
    declare(declared)
    ConfigStore.instance().repo["router"] = routers


def complete(config: "DictConfig") -> None:
    """Gives the router of a composed configuration the options it does not name, if it is of another package.

    Raises:
        ConfigError: the package is not declared, or has no such router.
    """
    from omegaconf import OmegaConf

    target, declared = (OmegaConf.select(config, key) for key in ("router._target_", "plugins"))
    if not isinstance(target, str) or target.startswith("lightning_base."):
        return
    if not OmegaConf.is_list(declared) or not fits(list(declared), list[str]):
        return  # as the schema will say
    declare(declared)
    if not is_declared(target, declared):
        raise ConfigError(
            f"router._target_={target} is not allowed, since its package is not declared: add "
            f"plugins=[{target.partition('.')[0]}], or name a router of lightning_base"
        )
    config.router = OmegaConf.merge(node_of(target), config.router)


def is_declared(target: str, declared: Iterable[str]) -> bool:
    """Whether a class is an installed router, or of a declared package."""
    packages = {plugin.partition(".")[0] for plugin in declared}
    return target.partition(".")[0] in packages or target in entry_points().values()


def node_of(target: str) -> dict[str, Any]:
    """The entry of the configuration for a router without a YAML file: its options with their defaults."""
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

    given = get_args(arguments)
    if given.config_path is not None:
        return []  # theirs is the first folder then, on purpose
    found = [given.config_dir] * (given.config_dir is not None) + typed(arguments, "hydra.searchpath")
    return [Path(folder.removeprefix("file://")) for folder in found if "://" not in folder.removeprefix("file://")]


def typed(arguments: Sequence[str], key: str) -> list[str]:
    """The items of the list that a command line gives for a key, as Hydra reads them."""
    from hydra._internal.utils import get_args
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [override for override in get_args(arguments).overrides if override.lstrip("+").startswith(f"{key}=")]
    values = [override.value() for override in OverridesParser.create().parse_overrides(given)]
    return [str(item) for value in values if isinstance(value, list) for item in value]
