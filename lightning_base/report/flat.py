"""Nested configurations as dotted keys."""

from typing import Any


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; an empty mapping leaves no key.

    >>> flatten({"trainer": {"devices": 1}, "seed": 3})
    {'trainer.devices': 1, 'seed': 3}
    """
    if not isinstance(node, dict):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return found
