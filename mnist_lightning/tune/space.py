"""Search spaces: from keys of the config to Optuna's distributions, and from drawn values back to a config."""

import copy
import json
import math
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_lightning.parsing import Parser, shorten
from mnist_lightning.runs import PROG

SearchSpace = dict[str, BaseDistribution]
"""From a key of the config, with dots and the indices of lists, to the distribution of its values."""


def _distribution(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"optuna.distributions.{name}", "init_args": arguments}


_UNITS = _distribution("IntDistribution", low=32, high=512, step=32)
_DROPOUT = _distribution("FloatDistribution", low=0.1, high=0.5, step=0.1)
_L2 = _distribution("CategoricalDistribution", choices=[0.01, 0.1, 1.0])
_OPTIMIZER = _distribution(
    "CategoricalDistribution",
    choices=[f"mnist_lightning.optimizers.Keras{name}" for name in ("Adam", "SGD", "RMSprop")],
)

NOTEBOOK_SPACE: dict[str, dict[str, Any]] = {
    "model.network.init_args.units.0": _UNITS,
    "model.network.init_args.l2.0": _L2,
    "model.network.init_args.dropout.0": _DROPOUT,
    "model.network.init_args.units.1": _UNITS,
    "model.network.init_args.l2.1": _L2,
    "model.network.init_args.dropout.1": _DROPOUT,
    "model.optimizer.class_path": _OPTIMIZER,
}
"""The seven hyper-parameters that the notebook searches."""


def instantiate(base_class: type, config: Any) -> Any:
    """Make an object of a class path and arguments."""
    # not by the command's parser: it would give a key's new distribution arguments of the default one
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=base_class)
    return parser.instantiate(parser.parse_object({"value": config})).value


def make_space(config: dict[str, Any] | None, base: dict[str, Any]) -> SearchSpace:
    """Make the distributions, and see that each has a key.

    Args:
        config: From a key to class path and arguments of its distribution.
        base: Config of a run.

    Raises:
        MisconfigurationException: A distribution or a key is none, or there are none.
    """
    if not config:
        raise MisconfigurationException("search_space is empty: give at least one key and its distribution.")
    space: SearchSpace = {}
    for key, distribution in config.items():
        try:
            space[key] = instantiate(BaseDistribution, distribution)
            json.dumps(space[key]._asdict(), allow_nan=False)  # Optuna takes infinite bounds, and fails at a draw
        except Exception as error:  # jsonargparse and Optuna have many
            reason = " ".join(str(error).split())
            raise MisconfigurationException(f"search_space: {key} has no valid distribution. {reason}") from error
    for key in space:
        try:
            if not key.startswith(("trainer.", "model.", "data.")):
                raise KeyError(key)
            get_value(base, key)
        except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
            raise MisconfigurationException(
                f"search_space: trainer, model and data have no key {key}. "
                f"`{PROG} tune --print_config` shows their keys; an item of a list is its key with .0, .1, ..."
            ) from error
        for part in space:
            if part.startswith(f"{key}."):
                raise MisconfigurationException(f"search_space: {part} is a part of {key}: search one of them.")
    epochs = space.get("trainer.max_epochs")
    for value in bounds(epochs) if epochs else [base["trainer"]["max_epochs"]]:
        if not isinstance(value, int) or value < 1:
            raise MisconfigurationException(f"A search needs a number of epochs: trainer.max_epochs is {value}.")
    return space


def check_values(space: SearchSpace, base: dict[str, Any], parser: Parser) -> None:
    """See that each key can have the outermost of its values, or all that it chooses from.

    Raises:
        MisconfigurationException: It cannot.
    """
    first = {key: bounds(distribution)[0] for key, distribution in space.items()}
    parser.exit_on_error = False
    for key, distribution in space.items():
        for value in bounds(distribution):
            try:
                parser.parse_object(config_with(base, {**first, key: value}))
            except ArgumentError as error:
                reason = shorten(str(error.message))
                raise MisconfigurationException(f"search_space: {key} cannot be {value!r}. {reason}") from error
    parser.exit_on_error = True


def check_in_space(values: dict[str, Any], space: SearchSpace) -> None:
    """See that values can be a trial.

    Raises:
        MisconfigurationException: One is not among those that are searched.
    """
    for key, distribution in space.items():
        try:
            is_in = distribution._contains(distribution.to_internal_repr(values[key]))
        except (TypeError, ValueError):  # not among the choices
            is_in = False
        if not is_in:
            raise MisconfigurationException(
                f"enqueue_baseline: {key} is {values[key]} in the config, but {describe(distribution)} is searched. "
                f"Give another --{key}, or widen its space."
            )


def config_with(base: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """A config of a run with these values of the search space."""
    config = copy.deepcopy(base)
    for key in sorted(params, key=lambda key: not key.endswith(".class_path")):  # a class, then its arguments
        parent, _, last = key.rpartition(".")
        node = get_value(config, parent)
        if last == "class_path" and node[last] != params[key]:
            node["init_args"] = {}  # not those of the class before
        node[int(last) if isinstance(node, list) else last] = params[key]
    return config


def get_value(config: Any, key: str) -> Any:
    """What a config has at a key with dots."""
    for part in key.split("."):
        # an index has one name, so that no item is searched twice
        config = config[[str(i) for i in range(len(config))].index(part)] if isinstance(config, list) else config[part]
    return config


def max_epochs(space: SearchSpace, base: dict[str, Any]) -> Any:
    """The epochs of the longest execution."""
    epochs = space.get("trainer.max_epochs")
    return max(bounds(epochs)) if epochs else base["trainer"]["max_epochs"]


def bounds(distribution: BaseDistribution) -> list[Any]:
    """The lowest and the highest value of a distribution, or all of its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def size(space: SearchSpace) -> float:
    """The number of combinations in a space, infinite where a value has no steps."""
    sizes: list[float] = []
    for distribution in space.values():
        if isinstance(distribution, CategoricalDistribution):
            sizes.append(len(distribution.choices))
        else:
            assert isinstance(distribution, FloatDistribution | IntDistribution)
            step = distribution.step
            sizes.append(round((distribution.high - distribution.low) / step) + 1 if step else math.inf)
    return math.prod(sizes)


def describe(distribution: BaseDistribution) -> str:
    """A distribution in words."""
    if isinstance(distribution, CategoricalDistribution):
        return "one of " + ", ".join(short_value(choice) for choice in distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = "" if distribution.step is None or distribution.log else f", step {distribution.step:g}"
    return f"{distribution.low:g} to {distribution.high:g}{step}{', logarithmic' if distribution.log else ''}"


def short_key(key: str) -> str:
    """A config key without what only the config's nesting needs: ``units.0``, ``optimizer``."""
    parts = [part for part in key.split(".") if part not in ("init_args", "class_path")]
    return ".".join(parts[2:] if parts[:2] == ["model", "network"] and len(parts) > 2 else parts[1:] or parts)


def short_value(value: Any) -> str:
    """A value of a parameter: numbers in few digits, class paths by their last name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value.rpartition(".")[2] if isinstance(value, str) else str(value)
