"""Options from Python: keywords and objects as the words of a command line."""

import difflib
import functools
import inspect
import json
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from mnist_lightning.classifier import Classifier, classifier_class
from mnist_lightning.system.errors import UserError, one_line
from mnist_lightning.training.runs import LABELS, RUN_KEYS

GROUPS = {"trainer": pl.Trainer, "model": Classifier}
"""The groups of options whose names can be given without the group."""
OPTIONS = ("config", "name", "origin", "ckpt_path", *LABELS, *RUN_KEYS)
"""Options without a group that commands share."""
AS_TEXT = (Path, torch.device, timedelta)
AS_NUMBERS = (np.generic, np.ndarray, torch.Tensor)
"""Types whose values have a text, or are one or several numbers, that a config can hold."""


def words(own: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Turn keyword arguments into the words of a command line.

    Args:
        own: Options of the command, by name; None leaves out an option.
        options: Any other options, by their dotted keys; the names of the arguments of ``Trainer``, of ``Classifier``
            and of a ``model`` that is among the options need no dots.

    Returns:
        The words; and the trainer's arguments that are objects, which words cannot describe.

    Raises:
        UserError: If an option does not exist, or an object cannot be described.
    """
    found, objects, model = [], {}, _model_class(options.get("model"))
    given = {name: value for name, value in own.items() if value is not None} | {
        full_name(name, own, model): value for name, value in options.items()
    }
    for name, value in given.items():
        group, _, argument = name.partition(".")
        values = value if isinstance(value, list | tuple) else [value]
        if group == "trainer" and any(map(_is_object, values)):
            is_split = argument == "callbacks"  # the config holds those that can be described
            objects[argument] = [each for each in values if _is_object(each)] if is_split else value
            value = [each for each in values if is_split and not _is_object(each)]
            if not value:
                continue
        text = _spec(value, name)
        found.append(f"--{name}={text if isinstance(text, str) else json.dumps(text)}")
    return found, objects


def _model_class(model: Any) -> Any:
    """Return the class of a model that is given as its class path, the class or a partial; by default Classifier.

    Raises:
        UserError: If the model is an object, or there is no such class.
    """
    if isinstance(model, nn.Module):
        made = type(model).__name__
        raise UserError(f"model: give the class {made}, or functools.partial({made}, ...), instead of an object.")
    if isinstance(model, functools.partial):
        return model.func
    model = model.get("class_path") if isinstance(model, Mapping) else model
    return model if isinstance(model, type) else classifier_class(str(model or "Classifier"))


def full_name(name: str, own: Mapping[str, Any], model: Any = Classifier) -> str:
    """Return the dotted key of an option.

    Args:
        name: The option.
        own: Options of the command.
        model: The class of the model.

    Raises:
        UserError: If the option does not exist.
    """
    if "." in name or name in own or name in OPTIONS:
        return name
    arguments = {group: [*inspect.signature(made).parameters] for group, made in GROUPS.items()}
    arguments["model"] += inspect.signature(model).parameters
    for group, names in arguments.items():
        if name in names:
            return f"{group}.{name}"
    known = [*own, *(each for names in arguments.values() for each in names)]
    close = difflib.get_close_matches(name, known)
    hint = f"did you mean {', '.join(close)}?" if close else "other options have dots, as in **{'data.batch_size': 32}."
    raise UserError(f"There is no option {name}: {hint}")


def _is_object(value: Any) -> bool:
    """Return whether a value is an object, such as a callback, that :func:`_spec` would describe by its class."""
    plain = (str, int, float, NoneType, Mapping, list, tuple, type, functools.partial)
    return not isinstance(value, (*plain, *AS_TEXT, *AS_NUMBERS, Enum))


def _spec(value: Any, name: str) -> Any:
    """Describe a value in types that JSON can hold: an object as its class path and arguments."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, AS_TEXT):
        return str(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, AS_NUMBERS):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _spec(each, f"{name}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spec(each, name) for each in value]
    if isinstance(value, type):
        return _class_path(value)
    if isinstance(value, functools.partial):
        inspect.signature(value.func).bind_partial(*value.args, **value.keywords)  # checks the names
        given = inspect.signature(value.func).bind_partial(*value.args).arguments | value.keywords
        return {"class_path": _class_path(value.func), "init_args": _spec(given, name)}
    arguments = _arguments(value, name)
    if isinstance(value, nn.Module):
        _check_unchanged(value, arguments, name)
    return {"class_path": _class_path(type(value)), "init_args": _spec(arguments, name)}


def _class_path(made: Any) -> str:
    """Return the path of a class: for another library, the shortest, since a longer one may be private."""
    parts = made.__module__.split(".")
    shorter = [".".join(parts[:count]) for count in range(1, len(parts))] if parts[0] != "mnist_lightning" else []
    modules = [name for name in shorter if getattr(sys.modules.get(name), made.__qualname__, None) is made]
    return f"{[*modules, made.__module__][0]}.{made.__qualname__}"


def _arguments(value: Any, name: str) -> dict[str, Any]:
    """Return the arguments that an object was made with: its attributes of the same names, or its ``hparams``.

    Raises:
        UserError: If neither has an argument.
    """
    made = type(value)
    known = {**getattr(value, "hparams", {}), **vars(value)}
    arguments = {}
    for parameter in inspect.signature(made).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in known and not hasattr(value, parameter.name):
            raise UserError(
                f"{name}: {made.__name__} does not keep its argument {parameter.name}. Give the class and its "
                f"arguments instead, functools.partial({made.__name__}, ...), or keep the argument as "
                f"self.{parameter.name}."
            )
        arguments[parameter.name] = known.get(parameter.name, getattr(value, parameter.name, None))
    return arguments


def _check_unchanged(value: nn.Module, arguments: Mapping[str, Any], name: str) -> None:
    """Check that a module is as its arguments make it: a run makes a new one from these, after setting the seed.

    Raises:
        UserError: If it has been trained or changed since it was made.
    """
    made = type(value).__name__
    try:
        with isolate_rng(), warnings.catch_warnings(action="ignore"):
            fresh = type(value)(**arguments)
    except Exception as error:
        raise UserError(
            f"{name}: {made} does not keep its arguments as attributes of the same names ({one_line(error)}). Give the "
            f"class and its arguments instead: functools.partial({made}, ...)."
        ) from error
    # torch counts how often a tensor has been changed in place: by its initialization, and later by training
    states = [
        (str(each), [(key, tensor.shape, tensor._version) for key, tensor in each.state_dict(keep_vars=True).items()])
        for each in (fresh, value)
    ]
    if states[0] != states[1]:
        raise UserError(
            f"{name}: a run makes a new {made} from the arguments, but this one has been trained or changed since. "
            f"Give functools.partial({made}, ...) or, to continue a run, ckpt_path."
        )
