"""The command line's parser: errors in one line, checked files, corrections to jsonargparse.

The corrections wrap private functions of jsonargparse (4.53). They apply only within :func:`patched_jsonargparse`,
which every command enters, so importing the package does not affect other programs.
"""

import argparse
import copy
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from numbers import Number
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from jsonargparse import Namespace, _typehints, set_parsing_settings
from jsonargparse._common import parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from mnist_lightning.classifier import TOTAL_STEPS, Classifier
from mnist_lightning.commands.help import print_help
from mnist_lightning.commands.model import flat_config, flat_text, flat_words, grouped, is_config
from mnist_lightning.data import ImageDataModule
from mnist_lightning.networks import Ensemble
from mnist_lightning.system.errors import OptionError, UserError
from mnist_lightning.system.nested import as_list
from mnist_lightning.training.runs import LOGS

MAX_NODES = 10_000
"""The most values in a config file; aliases in a few lines of YAML can expand to billions."""

HELP = {
    "config": "YAML file with values for any option; options on the command line take precedence.",
    "print_config": "Print the value of every option and exit.",
    "seed_everything": "Seed of all random numbers.",
    "ckpt_path": "Checkpoint to continue from or to evaluate: last, best (of the newest run), or a path.",
    "verbose": "Whether to print the results.",
    "trainer.max_epochs": "Epochs of training.",
    "trainer.accelerator": "cpu, gpu, mps, ...",
    "trainer.devices": "Number of devices that train together.",
    "trainer.precision": "32-true, bf16-mixed, ... or auto: bf16 where it is fast.",
    "data": "FashionMNIST, KMNIST, EMNIST, QMNIST, USPS, CIFAR10, ImageFolder, or your own class.",
    "data.data_dir": "Folder of the data set; for MNIST, any four files in its format.",
    "data.batch_size": "Images in a training batch.",
    "data.eval_batch_size": "Images in a batch of validation, test or prediction.",
    "data.val_split": "Share of the training images, taken from their end, that is held out for validation.",
    "data.augmentation": "Changes to training images, such as +=Distortion --data.augmentation.degrees=10.",
    "trainer.callbacks": "Lightning's callbacks, such as +=EarlyStopping --trainer.callbacks.monitor=val/loss.",
}
"""Help texts that are shorter than Lightning's."""

SIZE_ARGUMENTS = ("in_features", "in_channels", "num_classes")
"""Arguments of networks, augmentation and metrics that the data determines: numbers per image, channels, classes."""

UNKNOWN_SIZE = 1
"""Placeholder for an argument in :data:`SIZE_ARGUMENTS` without a default, until the data determines it."""

MLRUNS = "./mlruns"
"""MLFlowLogger's default folder, which recent versions of MLflow refuse."""

typed: set[str] = set()
"""The options of the command line that is being parsed, without their dashes."""


class Parser(LightningArgumentParser):
    """Report an error in one line instead of a page of usage.

    Attributes:
        typed: The options of the last command line, without their dashes.
        common_options: Options of trainer, model and data for the short help.
    """

    common_options: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.typed: frozenset[str] = frozenset()

    def parse_args(self, args: Any = None, *arguments: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        if {"-h", "--help"} & {*args} and args[-1] != "all":
            print_help(self.prog, self.description, self.short_help())
            self.exit(0)
        args = flat_words(args[:-1] if [*args[-2:]] == ["--help", "all"] else args)
        self.typed = frozenset(word.partition("=")[0].lstrip("-") for word in args if word.startswith("--"))
        typed.update(self.typed)
        try:
            config: Namespace = super().parse_args(_order(args), *arguments, **kwargs)
        finally:
            typed.clear()  # a config that is parsed later, such as a trial's, was not typed
        return config

    def _parse_common(self, cfg: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        if isinstance(cfg.get("trainer"), Namespace):
            _place_loggers(cfg.trainer)
        if hasattr(self, "print_config"):  # print a complete config
            try:
                fill_sizes(cfg, self.make_data(cfg), self.typed)
            except Exception as error:  # print an invalid config unchanged
                if isinstance(error, UserError):
                    raise
        config: Namespace = super()._parse_common(cfg, *args, **kwargs)
        return config

    def make_data(self, config: Namespace) -> ImageDataModule:
        """Build the data module of a config, without its augmentation."""
        arguments = Namespace({**vars(config.data.get("init_args", Namespace())), "augmentation": None})
        spec = Namespace(class_path=config.data.class_path, init_args=arguments)
        data: ImageDataModule = self.instantiate(Namespace(data=spec), instantiate_groups=False).data
        return data

    def short_help(self) -> dict[str, dict[str, str]]:
        """Return the help texts of the command's own options, and of the common ones that it uses."""
        actions, defaults = {action.dest: action for action in self._actions}, self.get_defaults()
        hidden = {"help", "origin", "trainer", "model", "data"}
        if "trainer.max_epochs" not in self.common_options:  # only training draws random numbers
            hidden.add("seed_everything")
        own = [key for key in actions if "." not in key and key not in hidden]
        groups: dict[str, dict[str, str]] = {}
        for title, keys in (("options of the command", own), ("common options", self.common_options)):
            groups[title] = {}
            for key in keys:
                default = defaults.get(key, defaults.get(key.replace("data.", "data.init_args.")))
                if isinstance(default, Namespace | dict):
                    default = default.get("class_path", "").rpartition(".")[2]
                text = HELP.get(key) or str(actions[key].help).replace("``", "")
                text += f" (default: {default})" if default not in (None, "", [], argparse.SUPPRESS) else ""
                groups[title][key] = text
        return groups

    def parse_path(self, cfg_path: Any, **kwargs: Any) -> Namespace:
        """Parse a config file, after checking that it is plain YAML of a limited size."""
        try:
            nodes = [yaml.safe_load(Path(cfg_path).read_text(encoding="utf-8"))]
            for count, node in enumerate(nodes):  # nodes grows here; an alias may contain itself
                nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
                if count > MAX_NODES:
                    raise ValueError("it has too many values")
            images = nodes[0].get("images") if isinstance(nodes[0], dict) else None
            if images is not None and not (isinstance(images, list) and all(isinstance(each, str) for each in images)):
                raise ValueError(f"images is {images}, but must be a list of files, folders and patterns")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.error(f"{cfg_path} is not a config: {error}", error)
        config: Namespace = super().parse_path(cfg_path, **kwargs)
        return config

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse the text of a config; the model's arguments may be in ``init_args``, as Lightning writes them."""
        config: Namespace = super().parse_string(flat_text(content), *args, **kwargs)
        return config

    def parse_object(self, config: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config, as :meth:`parse_string` does."""
        flat = flat_config(config) if isinstance(config, dict) else config
        # a copy: jsonargparse replaces the classes in a given list in place
        parsed: Namespace = super().parse_object(copy.deepcopy(flat), *args, **kwargs)
        return parsed

    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Build the objects of a config."""
        namespace = namespace.clone()
        if isinstance(namespace.get("model"), Namespace):
            namespace.model.pop("class_path", None)  # the parser is for this class
        made: Namespace = super().instantiate(namespace, *args, **kwargs)
        return made

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an OptionError with a message in one line."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise OptionError(shorten(message)) from ex


def fill_sizes(config: Namespace, data: ImageDataModule, typed: Collection[str] | None = ()) -> list[str]:
    """Set the size of the images and the number of classes in the config's model, augmentation and metrics.

    A network may have more outputs than there are classes: a larger ``num_classes`` in the config is kept, and
    augmentation and metrics use it too. A value that equals the class's default cannot be told from a missing value.

    Args:
        config: The config to change.
        data: The config's data module.
        typed: Options whose values are kept; None keeps the whole model, as with a checkpoint.

    Returns:
        A line for each value of the model that was changed, or that differs from the data.
    """
    channels, height, width = data.image_shape
    sizes = dict(zip(SIZE_ARGUMENTS, (channels * height * width, channels, len(data.classes)), strict=True))
    remarks = []
    sized = {"model.network": config.model.get("network")}
    if "class_path" in config.model:  # a model of the user's own, which may make its network itself
        sized["model"] = Namespace(class_path=config.model.class_path, init_args=config.model)
    for index, member in enumerate(_members_of(sized["model.network"])):
        sized[f"model.network.members.{index}"] = member
    outputs = []
    for key, spec in sized.items():
        if not isinstance(spec, Namespace):
            continue
        for name in [] if typed is None else _sizes_of(spec):
            found, size = spec.init_args.get(name), sizes[name]
            default = inspect.signature(_typehints.import_object(spec.class_path)).parameters[name].default
            if typed and {f"{key}.{name}", f"{key}.init_args.{name}"} & {*typed}:
                continue
            is_given = isinstance(found, int) and found > UNKNOWN_SIZE and found not in (default, size)
            if is_given and name == "num_classes" and found > size:
                remarks.append(f"{key}.{name} stays {found}, as in the config: the data has {size} classes")
                continue
            if is_given:
                remarks.append(f"{key}.{name} is {size} to match the data, not {found} as in the config")
            spec.init_args[name] = size
        outputs.append(spec.get("init_args", Namespace()).get("num_classes"))
    sizes["num_classes"] = max([sizes["num_classes"], *(each for each in outputs if isinstance(each, int))])
    for spec in config.data.init_args.get("augmentation") or []:
        for name in _sizes_of(spec):
            spec.init_args[name] = sizes[name]
    metrics = config.model.get("metrics")
    for spec in metrics if isinstance(metrics, list) else []:
        for name in _sizes_of(spec) if isinstance(spec, Namespace) else []:
            if typed is not None or spec.init_args.get(name) == UNKNOWN_SIZE:  # a checkpoint's are known
                spec.init_args[name] = sizes[name]
    return remarks


def _members_of(spec: Any) -> list[Any]:
    """Return the members of a network if its class is an Ensemble."""
    made = _typehints.import_object(spec.class_path) if isinstance(spec, Namespace) else None
    is_ensemble = isinstance(made, type) and issubclass(made, Ensemble)
    return as_list(spec.get("init_args", Namespace()).get("members")) if is_ensemble else []


def _sizes_of(spec: Namespace) -> list[str]:
    """Return the names of a class's arguments that the data determines; add ``init_args`` for them if missing."""
    parameters = inspect.signature(_typehints.import_object(spec.class_path)).parameters
    names = [name for name in SIZE_ARGUMENTS if name in parameters]
    if names and "init_args" not in spec:
        spec["init_args"] = Namespace()
    return names


def _place_loggers(trainer: Namespace) -> None:
    """Make loggers without a given folder write next to the runs."""
    folder, loggers = Path(trainer.get("default_root_dir") or ".").expanduser() / LOGS, trainer.get("logger")
    for logger in as_list(loggers):
        if not isinstance(logger, Namespace):
            continue
        name, given = str(logger.get("class_path")).rpartition(".")[2], vars(logger.get("init_args", Namespace()))
        place: dict[str, str] = {}
        if name in ("CSVLogger", "TensorBoardLogger") and given.get("save_dir") is None:
            label = given.get("name", LOGS)  # the default
            place = {"save_dir": str(folder), "name": "" if label == LOGS else label}
        elif name == "WandbLogger" and given.get("save_dir", ".") == "." and given.get("dir") is None:
            place = {"save_dir": os.environ.get("WANDB_DIR", str(folder))}
        elif name == "MLFlowLogger" and given.get("save_dir", MLRUNS) == MLRUNS:
            if given.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI"):
                continue
            place = {"tracking_uri": f"sqlite:///{(folder / 'mlflow.db').as_posix()}"}
            place["artifact_location"] = given.get("artifact_location") or (folder / "mlruns").as_posix()
        if place:
            logger["init_args"] = Namespace({**given, **place})


def fill_nulls(arguments: Namespace, made: type) -> None:
    """Replace null by the default where an argument of a class cannot be null, and in nested classes too.

    jsonargparse accepts null for every type.
    """
    with suppress(NameError, TypeError):  # an annotation cannot be resolved
        hints: dict[str, Any] = {}
        parameters: dict[str, inspect.Parameter] = {}
        for each in (Classifier, made) if issubclass(made, Classifier) else (made,):  # it may pass **kwargs on
            hints |= get_type_hints(each.__init__)
            parameters |= inspect.signature(each).parameters
        for name, parameter in parameters.items():
            may_be_null = parameter.default in (None, parameter.empty) or hints.get(name, Any) is Any
            if name in arguments and arguments[name] is None and not may_be_null:
                default = parameter.default
                if isinstance(default, type):
                    default = Namespace(class_path=f"{default.__module__}.{default.__qualname__}")
                if NoneType not in get_args(hints[name]):
                    arguments[name] = default
    for value in vars(arguments).values():
        for spec in as_list(value):
            if isinstance(spec, Namespace) and "class_path" in spec and isinstance(spec.get("init_args"), Namespace):
                fill_nulls(spec.init_args, _typehints.import_object(spec.class_path))


def check_numbers(config: Any, key: str) -> None:
    """Check that the numbers in a config are finite.

    Raises:
        UserError: If a number is NaN or infinite.
    """
    if isinstance(config, Namespace | dict):
        for name, value in (vars(config) if isinstance(config, Namespace) else config).items():
            check_numbers(value, key if name == "init_args" else f"{key}.{name}")
    elif isinstance(config, list | tuple):
        for value in config:
            check_numbers(value, key)
    elif isinstance(config, float) and not math.isfinite(config):
        raise UserError(f"--{key} is {config}, but must be a finite number.")


def shorten(message: str) -> str:
    """Return an error message of jsonargparse in one line: the key, the value, and what was expected."""
    text = " ".join(message.split())
    keys, found, problem = text.rpartition("Problem with given class_path '")  # the innermost
    if found and "Parser key" not in problem:
        name, _, reason = problem.partition("': ")
        reason = re.split(r" - (?:Not a valid|Expected a|Import path|Does not)|\.? Got value: | Given value", reason)[0]
        key = ".".join(re.findall(r'Parser key "([^"]*)"', keys))
        return f"{key}: {name.rpartition('.')[2]}: {reason}".removeprefix(": ")
    inner = re.match(r"(?:\w+\.)*(\w+)': (Parser key .*?(?:Given|Got) value: \S+)", problem)
    if inner and "Errors: - Does not validate" in keys:  # an argument of a class in a list that may also hold words
        key = ".".join(re.findall(r'Parser key "([^"]*)"', keys))
        return f"{key}: {inner[1]}: {shorten(inner[2])}"
    text = re.sub(r"- Expected a path but (?:\S+ )?either not accessible or invalid - ", "", text)
    union = "Does not validate against any of the Union subtypes Subtypes: "
    of_class = r"(?:Problem with given class_path '[^']*'|Type \S.*? expects a function or a callable class): "
    # for a class (or a list of a class) or null, keep only the part about the class
    or_null = rf"{union}\[[^,]*, <class 'NoneType'>\] Errors: - (Problem .*) - Expected a <class 'NoneType'> Given .*"
    for _ in range(text.count(union)):
        text = re.sub(or_null, r"\1", text)
    text = re.sub(rf'(Parser key "[^"]*)": {of_class}Parser key "', r"\1.", text)
    if match := re.search(rf"{union}\[(.*?)\] Errors: - (.*) Given value type: .*? Given value: ?(.*)", text):
        types, errors, value = match.groups()
        value = re.sub(r"^\[?Namespace\(class_path='([^']*)'.*", r"\1", value) or "''"
        reasons = [
            error
            for error in errors.split(" - ")
            if not re.match(r"Expected a (<class|typing.Literal)|Does not validate", error)
        ]
        reason = re.sub(rf"{of_class}|\. Got value: Namespace\(.*", "", reasons[0]) if reasons else ""
        text = f"{text[: match.start()]}{value} is not one of {types}{f' ({reason})' if reason else ''}"
        if re.match(r"list\[\w+\.[^,]*\], <class 'NoneType'>$", types) and not reason:
            text += ": give a list, or add an item with +="
    text = re.sub(r"\. Got value: Namespace\(.*", "", text)
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)'", r"\1", text)
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class \1", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[([^]]*)\]", r"\1", text)
    text = re.sub(r"\b(?:typing|torch|lightning|collections)\.(?:\w+\.)*(\w+)", r"\1", text).replace("NoneType", "null")
    return re.sub(r'Parser key "([^"]*)"', r"\1", text)


def _order(words: Sequence[str]) -> list[str]:
    """Order options: files first, so that typed options override them; ``--print_config`` last, to print all."""

    def rank(option: list[str]) -> int:
        name = option[0].partition("=")[0] if option else ""
        if is_config(name):
            return 0
        if name in ("--trainer", "--model", "--data"):
            return 1
        return 3 if "--print_config".startswith(name) and len(name) > 2 else 2

    return [word for option in sorted(grouped(words), key=rank) for word in option]


@contextmanager
def patched_jsonargparse() -> Iterator[None]:
    """Make jsonargparse resolve, exchange and call classes as this package documents."""
    corrections: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
        "resolve_class_path_by_name": _prefer_own,
        "get_import_path": _full_path,
        "discard_init_args_on_class_path_change": _discard_defaults,
        "adapt_partial_callable_class": _require_class,
        "sort_subtypes_for_union": _whole_numbers_first,
        "serialize_as_import_path": _keep_names,
    }
    originals = {name: getattr(_typehints, name) for name in corrections}
    settings = dict(parsing_settings)
    try:
        for name, correct in corrections.items():
            setattr(_typehints, name, correct(originals[name]))
        # A config or checkpoint may be untrusted: make only classes of the type that a key expects, and none of os,
        # subprocess, ... (jsonargparse 5 will do so itself, see its pull request 959).
        # A config must be able to hold all arguments: StochasticWeightAveraging has a device, torchvision's rotations
        # a Number, Timer an Enum.
        register_type(torch.device, fail_already_registered=False)
        register_type(Number, _identity, _as_number, fail_already_registered=False)
        yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
        set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])
        yield
    finally:
        for name, original in originals.items():
            setattr(_typehints, name, original)
        parsing_settings.update(settings)
        yaml.SafeDumper.yaml_multi_representers.pop(Enum, None)


def _identity(value: Any) -> Any:
    return value


def _as_number(value: Any) -> Any:
    value = yaml.safe_load(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, Number):
        raise ValueError(f"{value} is not a number")
    return value


def _keep_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a name as text where a function or its name is allowed, as in ModelPruning."""
    return lambda value: value if isinstance(value, str) else original(value)


def _full_path(original: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """Name a class of this package by its module: the shortest path may be ``mnist_lightning.MLP``."""

    def path(value: Any) -> str | None:
        is_own = isinstance(value, type) and value.__module__.startswith("mnist_lightning.")
        return f"{value.__module__}.{value.__qualname__}" if is_own else original(value)

    return path


def _prefer_own(original: Callable[..., str]) -> Callable[..., str]:
    """Make an ambiguous short name mean the class of this package or of Lightning.

    jsonargparse refuses a name that several classes have: torchvision also has an MLP, and torch's ReduceLROnPlateau
    has no ``monitor``.
    """

    def resolve(class_type: Any, name: str) -> str:
        try:
            return original(class_type, name)
        except ValueError:
            paths = [path for path in _typehints.get_all_subclass_paths(class_type) if path.endswith(f".{name}")]
            own = [path for path in paths if path.startswith(("mnist_lightning.", "lightning."))]
            if len(own) != 1:
                raise
            return own[0]

    return resolve


def _discard_defaults(original: Callable[..., Any]) -> Callable[..., Any]:
    """Drop the old class's defaults when one class replaces another.

    jsonargparse passes every argument that both classes have to the new one, even a default (its issue 460): SGD would
    train with Adam's default learning rate. Here only arguments that were typed, or that differ from the old class's
    default, are passed on. And a schedule's missing number of steps becomes that of the training.
    """

    def discard(action: Any, previous: Any, value: Any) -> None:
        if isinstance(previous, Namespace) and "init_args" in previous and previous.class_path != value["class_path"]:
            defaults = _typehints.ActionTypeHint.get_class_parser(
                previous.class_path, getattr(action, "sub_add_kwargs", {})
            ).get_defaults()
            for name, given in list(previous.init_args.items(branches=True, nested=False)):
                default = defaults.get(name)
                is_default = given == (list(default) if isinstance(default, tuple) else default)
                if is_default and not any({f"{key}.{name}", f"{key}.init_args.{name}"} & typed for key in typed):
                    previous.init_args.pop(name)
        original(action, previous, value)
        handed_on = previous.get("init_args", {}) if isinstance(previous, Namespace) else {}
        arguments = value.get("init_args", Namespace())
        parameters = inspect.signature(_typehints.import_object(value["class_path"])).parameters
        open_values = dict.fromkeys(TOTAL_STEPS, -1) | dict.fromkeys(SIZE_ARGUMENTS, UNKNOWN_SIZE)
        for name, open_value in open_values.items() if isinstance(arguments, Namespace) else ():
            is_required = name in parameters and parameters[name].default is inspect.Parameter.empty
            if is_required and name not in arguments and name not in handed_on:
                arguments = value["init_args"] = Namespace({**vars(arguments), name: open_value})

    return discard


def _whole_numbers_first(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Keep 1 an integer where int and float are allowed: to Lightning, 1 means one batch, and 1.0 all batches.

    Python caches ``int | float`` and ``float | int`` as one union, in the order that was written first.
    """

    def sort(subtypes: Any, *arguments: Any) -> list[Any]:
        ordered = [*original(subtypes, *arguments)]
        if int in ordered and float in ordered:
            places = sorted((ordered.index(int), ordered.index(float)))
            ordered[places[0]], ordered[places[1]] = int, float
        return ordered

    return sort


def _require_class(original: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Refuse a function as the class path of a callable.

    jsonargparse calls any function that is not on its denylist (pull request 959), with arguments from the config.
    """

    def adapt(callable_type: Any, spec: Any) -> tuple[Any, Any]:
        spec, skipped = original(callable_type, spec)
        if not isinstance(_typehints.import_object(spec["class_path"]), type):
            raise ImportError(f"{spec['class_path']} is not a class")
        return spec, skipped

    return adapt
