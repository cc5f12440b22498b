"""Search spaces: from config keys to Optuna's distributions, and back to a config."""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jsonargparse import ArgumentParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch.nn import Module

from mnist_lightning.commands.parsing import Parser, shorten
from mnist_lightning.system.console import PROG
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import flatten, get_value


class SearchSpace(dict[str, BaseDistribution]):
    """A mapping from keys of the config, with dots and list indices, to the distributions of their values.

    A key comes after the keys on which it depends.

    Args:
        distributions: From each key to its distribution.

    Attributes:
        conditions: From each conditional key to the keys on which it depends, each with the values that allow a draw.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution] | None = None) -> None:
        super().__init__(distributions or {})
        self.conditions: dict[str, dict[str, list[Any]]] = {}

    def is_drawn(self, key: str, params: Mapping[str, Any]) -> bool:
        """Return whether a key is drawn, given the values of other keys."""
        conditions = self.conditions.get(key, {}).items()
        return all(parent in params and params[parent] in values for parent, values in conditions)

    def has_all(self, params: Mapping[str, Any]) -> bool:
        """Return whether ``params`` has exactly the keys of a complete trial."""
        return {key for key in self if self.is_drawn(key, params)} == params.keys()

    def example(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a trial that contains the given ones; all free values are the lowest or first."""
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

NOTEBOOK_SPACE: dict[str, dict[str, Any] | list[dict[str, Any]]] = {
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
    """Create an object from a class path and arguments."""
    # the command's parser would mix a key's default arguments into its new distribution
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=base_class)
    return parser.instantiate(parser.parse_object({"value": config})).value


def full_names(config: Mapping[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a search space with the full keys of the base config.

    Args:
        config: From each key to its distribution. A key may be short: the end of a full key, without ``init_args`` and
            ``class_path``, such as ``units.0``, ``lr`` or ``optimizer``. A list of distributions is for the items of a
            list.
        base: Config of a run.

    Raises:
        UserError: If a short key could mean several keys.
    """
    known: dict[str, list[str]] = {}
    for key in flatten({group: base[group] for group in ("trainer", "model", "data")}):
        parts = key.replace(".init_args", "").removesuffix(".class_path").split(".")
        for start in range(1, len(parts)):
            known.setdefault(".".join(parts[start:]), []).append(key)

    def full(key: str) -> str:
        name, _, item = key.rpartition(".") if re.search(r"\.(\d+|length)$", key) else (key, "", "")
        found = known.get(name, [name])
        if len(found) > 1:
            raise UserError(f"search_space: {key} may be {' or '.join(found)}: give the longer key.")
        return ".".join(filter(None, (found[0], item)))

    named: dict[str, Any] = {}
    for key, distribution in ((str(key), each) for key, each in config.items()):
        if isinstance(distribution, list):
            named |= {f"{full(key)}.{index}": each for index, each in enumerate(distribution)}
        else:
            named[full(key)] = distribution
    for key, distribution in named.items():
        if isinstance(distribution, dict) and isinstance(conditions := distribution.get("when"), dict):
            named[key] = {**distribution, "when": {full(parent): values for parent, values in conditions.items()}}
    return named


def make_space(config: dict[str, Any] | None, base: dict[str, Any]) -> SearchSpace:
    """Make a search space from a config, and check it.

    Args:
        config: From each key to class path and arguments of its distribution and, if the key is conditional, ``when``:
            one or several values of each key on which it depends.
        base: Config of a run.

    Raises:
        UserError: If a distribution, a condition or a key is invalid, or the space is empty.
    """
    if not config:
        raise UserError("search_space is empty: give at least one key and its distribution.")
    distributions: dict[str, BaseDistribution] = {}
    conditions: dict[str, Any] = {}
    for key, distribution in config.items():
        try:
            conditions[key] = dict(distribution.get("when") or {})
            distributions[key] = _make_distribution(**{k: v for k, v in distribution.items() if k != "when"})
        except Exception as error:  # jsonargparse and Optuna raise many types
            reason = shorten(str(error)).removeprefix("value: ")
            raise UserError(f"search_space: {key} has no valid distribution. {reason}") from error
    space = SearchSpace()
    while len(space) < len(distributions):
        ready = [key for key in distributions if key not in space and conditions[key].keys() <= space.keys()]
        if not ready:
            key = next(key for key in distributions if key not in space)
            parents = ", ".join(conditions[key].keys() - space.keys())
            raise UserError(f"search_space: {key} depends on {parents}, which is not searched, or depends on {key}.")
        for key in ready:
            space[key] = distributions[key]
            if conditions[key]:
                space.conditions[key] = {
                    parent: _condition(key, parent, values, space[parent]) for parent, values in conditions[key].items()
                }
    for key in space:
        for part in space:
            if f"{full_key(part)}.".startswith(f"{full_key(key)}.") and part != key:
                raise UserError(f"search_space: {part} is a part of {key}: search only one of them.")
        try:
            if not key.startswith(("trainer.", "model.", "data.")):
                raise KeyError(key)
            config_with(base, space.example({key: bounds(space[key])[0]}), space)
        except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(
                f"search_space: trainer, model and data have no key {key}. "
                f"`{PROG} tune --print_config` shows their keys; for an item of a list, append .0, .1, ... to the key, "
                "for the number of items .length."
            ) from error
    epochs = space.get("trainer.max_epochs")
    for value in bounds(epochs) if epochs else [base["trainer"]["max_epochs"]]:
        if not isinstance(value, int) or value < 1:
            raise UserError(f"A search needs a fixed number of epochs, but trainer.max_epochs is {value}.")
    return space


def _make_distribution(
    class_path: str | None = None, init_args: dict[str, Any] | None = None, **others: Any
) -> BaseDistribution:
    """Make a distribution from its class path and arguments; null means an argument's default."""
    if not isinstance(class_path, str):
        raise ValueError("its class_path is not the name of an Optuna distribution, such as FloatDistribution")
    arguments = {name: value for name, value in (init_args or {}).items() if value is not None}
    if isinstance(arguments.get("choices"), list):
        arguments["choices"] = [_encode(choice) for choice in arguments["choices"]]
    made: BaseDistribution = instantiate(
        BaseDistribution, {"class_path": class_path, "init_args": copy.deepcopy(arguments), **others}
    )
    json.dumps(made._asdict(), allow_nan=False)  # with infinite bounds, Optuna fails at a draw
    return made


def _condition(key: str, parent: str, values: Any, distribution: BaseDistribution) -> list[Any]:
    """Return the values of ``parent`` for which ``key`` is drawn, in the distribution's own form."""
    found = []
    for value in values if isinstance(values, list) else [values]:
        among = in_distribution(value, distribution)
        if not among:
            raise UserError(
                f"search_space: {key} is drawn when {parent} is {value}, which is not searched "
                f"({describe(distribution)})."
            )
        found += among
    return found


def in_distribution(value: Any, distribution: BaseDistribution) -> list[Any]:
    """Return a list of the value in the distribution's own form; empty if the distribution does not contain it."""
    if isinstance(distribution, CategoricalDistribution):
        return [choice for choice in distribution.choices if _is_same(choice, _encode(value))][:1]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] if is_number and distribution._contains(distribution.to_internal_repr(value)) else []


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, or one is the short name of the other, a class path."""
    if isinstance(one, str) and isinstance(other, str):
        return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _encode(value: Any) -> Any:
    """Encode lists and mappings as JSON: Optuna's storages hold only text, numbers and None."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def check_values(space: SearchSpace, base: dict[str, Any], parser: Parser) -> None:
    """Check that the config is valid with the lowest and the highest value, or with each choice, of every key.

    Raises:
        UserError: If a value is invalid.
    """
    parser.exit_on_error = False
    for key, distribution in space.items():
        for value in bounds(distribution):
            params = space.example({key: value})
            if key not in params:
                raise UserError(f"search_space: the conditions of {key} exclude each other.")
            config = config_with(base, params, space)
            try:
                parser.parse_object(config)
                last = key.rpartition(".")[2]
                if key.startswith("model.network.") and (last == "length" or last.isdigit()):  # lists must fit together
                    instantiate(Module, config["model"]["network"])
            except Exception as error:  # networks raise any type
                reason = shorten(str(getattr(error, "message", error)))
                raise UserError(f"search_space: {key} cannot be {value!r}. {reason}") from error
    parser.exit_on_error = True


def params_of(values: Mapping[str, Any], space: SearchSpace, what: str) -> dict[str, Any]:
    """Return the values of a trial in the form of the space.

    Args:
        values: From keys to values; a value that is not drawn with the others is dropped, a missing one will be drawn.
        space: The search space.
        what: Where the values come from, for the message.

    Raises:
        UserError: If a value is not searched.
    """
    params: dict[str, Any] = {}
    for key, distribution in space.items():
        if key in values and space.is_drawn(key, params):
            found = in_distribution(values[key], distribution)
            if not found:
                raise UserError(
                    f"{what}: {key} is {values[key]}, which is not searched ({describe(distribution)}). "
                    f"Give another value, or widen the space."
                )
            params[key] = found[0]
    return params


def config_with(base: dict[str, Any], params: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """Return the config of a run with the given values of the search space.

    A new class does not inherit the old class's arguments. A list gets as many items as its ``length`` says, by
    repeating the last one; an item that is searched but not drawn, or is drawn beyond that length, is left out.
    """
    config = copy.deepcopy(base)
    lengths = {full_key(key).removesuffix(".length"): n for key, n in params.items() if key.endswith(".length")}
    for key, value in sorted(
        ((full_key(key), value) for key, value in params.items()), key=lambda item: _order(item[0])
    ):
        if isinstance(value, str) and value[:1] in ("[", "{"):
            value = json.loads(value)
        parent, _, last = key.removesuffix(".class_path").rpartition(".")
        node = get_value(config, parent)
        if key.endswith(".class_path"):
            if _is_same(get_value(node, f"{last}.class_path"), value):  # keep its arguments
                continue
            value = value and {"class_path": value, "init_args": {}}
        if last == "length" and isinstance(node, list):
            node[value:] = node[-1:] * (value - len(node))
        elif isinstance(node, list):
            if last.isdigit() and int(last) >= lengths.get(parent, math.inf):
                continue
            index = [str(i) for i in range(len(node) + 1)].index(last)  # refuses 00, another spelling of 0
            node[index : index + 1] = [value]
        elif last in node or parent.endswith(".init_args"):  # the parser knows the arguments of a class
            node[last] = value
        else:
            raise KeyError(last)
    for key in sorted(map(full_key, space.keys() - params.keys()), key=_order, reverse=True):
        parent, _, last = key.rpartition(".")
        with suppress(KeyError, TypeError, IndexError, ValueError):  # the key belongs to another class
            node = get_value(config, parent)
            if isinstance(node, list) and last != "length":
                del node[int(last)]
    return config


def full_key(key: str) -> str:
    """Return the config's full key for a key that may lack ``init_args`` after ``data``, as on the command line."""
    return re.sub(r"^data\.(?!class_path$|init_args\b)", "data.init_args.", str(key))


def _order(key: str) -> tuple[int, int]:
    """Return a sort key that puts classes before their arguments, and lengths before items in order."""
    last = key.rpartition(".")[2]
    return {"class_path": 0, "length": 1}.get(last, 2), int(last) if last.isdigit() else 0


def bounds(distribution: BaseDistribution) -> list[Any]:
    """Return the lowest and the highest value of a distribution, or all of its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def describe(distribution: BaseDistribution) -> str:
    """Describe a distribution in words."""
    if isinstance(distribution, CategoricalDistribution):
        return "one of " + ", ".join(short_value(choice) for choice in distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = "" if distribution.step is None or distribution.log else f", step {distribution.step:g}"
    return f"{distribution.low:g} to {distribution.high:g}{step}{', logarithmic' if distribution.log else ''}"


def describe_conditions(conditions: Mapping[str, Sequence[Any]]) -> str:
    """Describe in words when a key is drawn; return an empty text if always."""
    parts = [f"{short_key(key)} is {' or '.join(map(short_value, values))}" for key, values in conditions.items()]
    return f", when {' and '.join(parts)}" if parts else ""


def short_key(key: str) -> str:
    """Shorten a config key to its meaningful parts: ``units.0``, ``optimizer``."""
    parts = [part for part in key.split(".") if part not in ("init_args", "class_path")]
    return ".".join(parts[2:] if parts[:2] == ["model", "network"] and len(parts) > 2 else parts[1:] or parts)


def short_value(value: Any) -> str:
    """Shorten a parameter's value: numbers to four digits, class paths to the class name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    is_path = isinstance(value, str) and all(part.isidentifier() for part in value.split("."))
    return value.rpartition(".")[2] if is_path else str(value)
