"""Nested configs: flatten them, look up keys with dots, and read options that may be lists."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any


def flatten(config: Mapping[Any, Any], prefix: str = "", with_items: bool = False) -> dict[str, Any]:
    """Return a nested config as a flat dict with dotted keys.

    Args:
        config: The config.
        prefix: Start of all keys.
        with_items: Whether the items of a list have keys of their own, which end in ``.0``, ``.1`` and so on.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if with_items and isinstance(value, list):
            value = dict(enumerate(value))
        is_nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.", with_items) if is_nested else {f"{prefix}{key}": value}
    return flat


def get_value(config: Any, key: str) -> Any:
    """Return the value at a dotted key; ``class_path`` of None is None, and ``length`` of a list is its length."""
    for part in key.split("."):
        if isinstance(config, list):
            config = len(config) if part == "length" else config[[str(i) for i in range(len(config))].index(part)]
        elif config is not None or part != "class_path":
            config = config[part]
    return config


def spread(config: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return a config in which a number for all layers is a list if one of the keys is for an item of it.

    The number of layers is the length of the first list among the network's arguments. Missing keys are ignored.
    """
    config = copy.deepcopy(config)
    for key in keys:
        parent, _, index = str(key).rpartition(".")
        parent, _, name = parent.rpartition(".")
        with suppress(AttributeError, KeyError, TypeError, IndexError, ValueError):
            arguments = get_value(config, parent)
            layers = [len(value) for value in arguments.values() if isinstance(value, list)] if index.isdigit() else []
            if layers and isinstance(arguments[name], int | float):
                arguments[name] = [arguments[name]] * layers[0]
    return config


def as_list(value: Any) -> list[Any]:
    """Return the values of an option that holds a list, a single value or null."""
    return value if isinstance(value, list) else [] if value is None else [value]
