"""Search spaces: from config keys to Optuna's distributions, and back to a config."""

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from jsonargparse import ArgumentParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch.nn import Module

from mnist_lightning.commands.parsing import Parser, shorten
from mnist_lightning.system.console import PROG
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import get_value


class SearchSpace(dict[str, BaseDistribution]):
    """From a key of the config, with dots and the indices of lists, to the distribution of its values.

    A key comes after those on which it depends.

    Args:
        distributions: The distributions.

    Attributes:
        conditions: From a key to those on which it depends, and the values that they must have for it to be drawn.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution] | None = None) -> None:
        super().__init__(distributions or {})
        self.conditions: dict[str, dict[str, list[Any]]] = {}

    def is_drawn(self, key: str, params: Mapping[str, Any]) -> bool:
        """Whether a key is drawn beside these values."""
        conditions = self.conditions.get(key, {}).items()
        return all(parent in params and params[parent] in values for parent, values in conditions)

    def has_all(self, params: Mapping[str, Any]) -> bool:
        """Whether these are the values of a whole trial."""
        return {key for key in self if self.is_drawn(key, params)} == params.keys()

    def example(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a trial: these, those on which they depend, and the lowest or first of all others."""
        wanted, waiting = dict(values), [*values]
        while waiting:
            for parent, allowed in self.conditions.get(waiting.pop(), {}).items():
                wanted[parent] = allowed[0]
                waiting.append(parent)
        params: dict[str, Any] = {}
        for each, distribution in self.items():
            if self.is_drawn(each, params):
                params[each] = wanted.get(each, bounds(distribution)[0])
        return params


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
        config: From a key to class path and arguments of its distribution and, if it is not always drawn, ``when``: a
            value or several of each key on which it depends.
        base: Config of a run.

    Raises:
        UserError: A distribution, a condition or a key is none, or there are none.
    """
    if not config:
        raise UserError("search_space is empty: give at least one key and its distribution.")
    distributions: dict[str, BaseDistribution] = {}
    conditions: dict[str, Any] = {}
    for key, distribution in config.items():
        try:
            conditions[key] = dict(distribution.get("when") or {})
            distribution = copy.deepcopy({name: value for name, value in distribution.items() if name != "when"})
            arguments = distribution.get("init_args", {})
            if isinstance(arguments.get("choices"), list):
                arguments["choices"] = [_encode(choice) for choice in arguments["choices"]]
            distributions[key] = instantiate(BaseDistribution, distribution)
            json.dumps(distributions[key]._asdict(), allow_nan=False)  # Optuna takes infinite bounds, fails at a draw
        except Exception as error:  # jsonargparse and Optuna have many
            reason = " ".join(str(error).split())
            raise UserError(f"search_space: {key} has no valid distribution. {reason}") from error
    space = SearchSpace()
    while len(space) < len(distributions):
        ready = [key for key in distributions if key not in space and conditions[key].keys() <= space.keys()]
        if not ready:
            key = next(key for key in distributions if key not in space)
            parents = ", ".join(conditions[key].keys() - space.keys())
            raise UserError(f"search_space: {key} depends on {parents}, which is not searched, or depends on it.")
        for key in ready:
            space[key] = distributions[key]
            if conditions[key]:
                space.conditions[key] = {
                    parent: _condition(key, parent, values, space[parent]) for parent, values in conditions[key].items()
                }
    for key in space:
        for part in space:
            if f"{full_key(part)}.".startswith(f"{full_key(key)}.") and part != key:
                raise UserError(f"search_space: {part} is a part of {key}: search one of them.")
        try:
            if not key.startswith(("trainer.", "model.", "data.")):
                raise KeyError(key)
            config_with(base, space.example({key: bounds(space[key])[0]}), space)
        except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(
                f"search_space: trainer, model and data have no key {key}. "
                f"`{PROG} tune --print_config` shows their keys; an item of a list is its key with .0, .1, ..., "
                "its number of items the key with .length."
            ) from error
    epochs = space.get("trainer.max_epochs")
    for value in bounds(epochs) if epochs else [base["trainer"]["max_epochs"]]:
        if not isinstance(value, int) or value < 1:
            raise UserError(f"A search needs a number of epochs: trainer.max_epochs is {value}.")
    return space


def _condition(key: str, parent: str, values: Any, distribution: BaseDistribution) -> list[Any]:
    """The values of ``parent`` with which ``key`` is drawn, as the distribution has them."""
    found = []
    for value in values if isinstance(values, list) else [values]:
        among = in_distribution(value, distribution)
        if not among:
            raise UserError(
                f"search_space: {key} is drawn when {parent} is {value}, but {describe(distribution)} is searched."
            )
        found += among
    return found


def in_distribution(value: Any, distribution: BaseDistribution) -> list[Any]:
    """A value as a distribution has it; nothing if it has not."""
    if isinstance(distribution, CategoricalDistribution):
        return [choice for choice in distribution.choices if _is_same(choice, _encode(value))][:1]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] if is_number and distribution._contains(distribution.to_internal_repr(value)) else []


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, or one is the short name of the other's class."""
    if isinstance(one, str) and isinstance(other, str):
        return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _encode(value: Any) -> Any:
    """Lists and mappings as JSON: Optuna's storages keep nothing but text, numbers and None."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def check_values(space: SearchSpace, base: dict[str, Any], parser: Parser) -> None:
    """See that each key can have the outermost of its values, or all that it chooses from.

    Raises:
        UserError: It cannot.
    """
    parser.exit_on_error = False
    for key, distribution in space.items():
        for value in bounds(distribution):
            params = space.example({key: value})  # with what depends on the value
            if key not in params:
                raise UserError(f"search_space: the conditions of {key} exclude each other.")
            config = config_with(base, params, space)
            try:
                parser.parse_object(config)
                last = key.rpartition(".")[2]
                if key.startswith("model.network.") and (last == "length" or last.isdigit()):  # lists must fit together
                    instantiate(Module, config["model"]["network"])
            except Exception as error:  # networks raise what they like
                reason = shorten(str(getattr(error, "message", error)))
                raise UserError(f"search_space: {key} cannot be {value!r}. {reason}") from error
    parser.exit_on_error = True


def params_of(values: Mapping[str, Any], space: SearchSpace, what: str) -> dict[str, Any]:
    """The values of a trial, as the space has them.

    Args:
        values: From keys to values; what is not drawn beside the others is left out, what is missing will be drawn.
        space: The search space.
        what: Where the values come from, for the message.

    Raises:
        UserError: One is not among those that are searched.
    """
    params: dict[str, Any] = {}
    for key, distribution in space.items():
        if key in values and space.is_drawn(key, params):
            found = in_distribution(values[key], distribution)
            if not found:
                raise UserError(
                    f"{what}: {key} is {values[key]}, but {describe(distribution)} is searched. "
                    f"Give another value, or widen its space."
                )
            params[key] = found[0]
    return params


def config_with(base: dict[str, Any], params: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """A config of a run with these values of the search space.

    A class comes without the arguments of the class before. A list gets as many items as its ``length`` says, the last
    one repeated; an item that is searched, but not drawn, is not there.
    """
    config = copy.deepcopy(base)
    for key, value in sorted(
        ((full_key(key), value) for key, value in params.items()), key=lambda item: _order(item[0])
    ):
        if isinstance(value, str) and value[:1] in ("[", "{"):
            value = json.loads(value)
        parent, _, last = key.removesuffix(".class_path").rpartition(".")
        node = get_value(config, parent)
        if key.endswith(".class_path"):
            if _is_same(get_value(node, f"{last}.class_path"), value):  # its arguments stay
                continue
            value = value and {"class_path": value, "init_args": {}}
        if last == "length" and isinstance(node, list):
            node[value:] = node[-1:] * (value - len(node))
        elif isinstance(node, list):
            index = [str(i) for i in range(len(node) + 1)].index(last)  # one name, so that no item is searched twice
            node[index : index + 1] = [value]
        elif last in node or parent.endswith(".init_args"):  # the parser knows the arguments of a class
            node[last] = value
        else:
            raise KeyError(last)
    for key in sorted(map(full_key, space.keys() - params.keys()), key=_order, reverse=True):
        parent, _, last = key.rpartition(".")
        with suppress(KeyError, TypeError, IndexError, ValueError):  # of another class
            node = get_value(config, parent)
            if isinstance(node, list) and last != "length":
                del node[int(last)]
    return config


def spread(config: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return a config in which a number that stands for all layers is a list, where one of its items is searched.

    There are as many layers as the first list among the network's arguments has items.
    """
    config = copy.deepcopy(config)
    for key in keys:
        parent, _, index = full_key(key).rpartition(".")
        parent, _, name = parent.rpartition(".")
        # make_space says that there is no such key
        with suppress(AttributeError, KeyError, TypeError, IndexError, ValueError):
            arguments = get_value(config, parent)
            layers = [len(value) for value in arguments.values() if isinstance(value, list)] if index.isdigit() else []
            if layers and isinstance(arguments[name], int | float):
                arguments[name] = [arguments[name]] * layers[0]
    return config


def full_key(key: str) -> str:
    """The key in a config: that of an argument of ``data`` may be written as on the command line."""
    return re.sub(r"^data\.(?!class_path$|init_args\b)", "data.init_args.", str(key))


def _order(key: str) -> tuple[int, int]:
    """Classes come before their arguments, lengths before items, items in their order."""
    last = key.rpartition(".")[2]
    return {"class_path": 0, "length": 1}.get(last, 2), int(last) if last.isdigit() else 0


def max_epochs(space: SearchSpace, base: dict[str, Any]) -> Any:
    """The epochs of the longest execution."""
    epochs = space.get("trainer.max_epochs")
    is_base = epochs is None or "trainer.max_epochs" in space.conditions
    return max([*(bounds(epochs) if epochs else []), *([base["trainer"]["max_epochs"]] if is_base else [])])


def bounds(distribution: BaseDistribution) -> list[Any]:
    """The lowest and the highest value of a distribution, or all of its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def describe(distribution: BaseDistribution) -> str:
    """A distribution in words."""
    if isinstance(distribution, CategoricalDistribution):
        return "one of " + ", ".join(short_value(choice) for choice in distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = "" if distribution.step is None or distribution.log else f", step {distribution.step:g}"
    return f"{distribution.low:g} to {distribution.high:g}{step}{', logarithmic' if distribution.log else ''}"


def describe_conditions(conditions: Mapping[str, Sequence[Any]]) -> str:
    """When a key is drawn, in words; nothing if always."""
    parts = [f"{short_key(key)} is {' or '.join(map(short_value, values))}" for key, values in conditions.items()]
    return f", when {' and '.join(parts)}" if parts else ""


def short_key(key: str) -> str:
    """A config key without what only the config's nesting needs: ``units.0``, ``optimizer``."""
    parts = [part for part in key.split(".") if part not in ("init_args", "class_path")]
    return ".".join(parts[2:] if parts[:2] == ["model", "network"] and len(parts) > 2 else parts[1:] or parts)


def short_value(value: Any) -> str:
    """A value of a parameter: numbers in few digits, class paths by their last name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    is_path = isinstance(value, str) and all(part.isidentifier() for part in value.split("."))
    return value.rpartition(".")[2] if is_path else str(value)
