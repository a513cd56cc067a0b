"""Which modules of a model become sparse.

Shapes: T tokens, D width.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_base.instantiation import ConfigError, did_you_mean
from lightning_base.moe.copies import is_linear

# What architectures call the feed-forward layer of a block.
FEED_FORWARDS = ("mlp", "feed_forward", "ffn")


def sparse_names(network: nn.Module, layers: str | Sequence[str], width: int) -> list[str]:
    """The names of the modules that a pattern means, from the first to the last.

    Args:
        network: without values, if that is faster.
        layers: patterns, such as ``model.layers.*.mlp``, of whose matches the outermost count; or ``every_other``
            feed-forward layer: the second, the fourth and so on.
        width: D.

    Raises:
        ConfigError: a pattern that matches nothing, or a module that is no feed-forward layer.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    feed_forwards = [name for name in modules if name.rpartition(".")[2] in FEED_FORWARDS]
    if layers == "every_other":
        if not feed_forwards:
            raise ConfigError(
                f"model.layers=every_other: {type(network).__name__} has no module called {', '.join(FEED_FORWARDS)}; "
                f"give patterns over its modules, which are {', '.join(list(modules)[:12])}, ..."
            )
        found = feed_forwards[1::2] or feed_forwards[:1]
    else:
        matched: set[str] = set()
        for pattern in [layers] if isinstance(layers, str) else layers:
            hits = {name for name in modules if fnmatchcase(name, pattern)}
            if not hits:
                raise ConfigError(
                    f"model.layers={pattern} names no module of {type(network).__name__}"
                    f"{did_you_mean(pattern, feed_forwards or modules)}"
                )
            matched |= hits
        inner = {name for name in matched if any(name.startswith(f"{other}.") for other in matched)}
        found = [name for name in modules if name in matched - inner]
    if not found:
        raise ConfigError("model.layers=[] makes no layer sparse: name one, or take model.layers=every_other")
    for name in found:
        check_feed_forward(name, modules[name], width)
    return found


def check_feed_forward(name: str, module: nn.Module, width: int) -> None:
    """Raises ConfigError for a module that is not from [T, D] to [T, D], or that mixes tokens."""
    what = f"model.layers matches {name}, a {type(module).__name__}"
    if any("attention" in type(part).__name__.lower() for part in module.modules()):
        raise ConfigError(f"{what}, which mixes tokens by attention: name feed-forward layers")
    if not any(is_linear(part) for part in module.modules()):
        raise ConfigError(f"{what}, which has no linear layer to make experts of: name feed-forward layers")
    device = next(module.parameters()).device
    try:
        with torch.no_grad():
            shape = tuple(module(torch.zeros(2, width, device=device)).shape)
    except Exception as error:  # of whatever kind
        raise ConfigError(f"{what}, which does not take hidden states alone: name feed-forward layers") from error
    if shape != (2, width):
        raise ConfigError(f"{what}, which does not give hidden states of model width {width}: name feed-forward layers")
