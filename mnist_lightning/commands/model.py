"""``--model``: the class of the model; its arguments share the keys of the Classifier's."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from mnist_lightning.classifier import Classifier, classifier_class


def grouped(words: Sequence[str]) -> list[list[str]]:
    """Return the words of a command line, grouped by option: each with its values."""
    options: list[list[str]] = [[]]
    for word in words:
        is_option = word.startswith("--") or word.partition("=")[0] == "-c"
        options.append([word]) if is_option else options[-1].append(word)
    return options


def is_config(option: str) -> bool:
    """Return whether an option names a config file; argparse takes abbreviations."""
    return option == "-c" or ("--config".startswith(option) and len(option) > 2)


def named_class(arguments: Sequence[str] | Mapping[str, Any]) -> type[Classifier] | None:
    """Return the class of the model that a command line or a config names; None if it names none.

    The parser is made for this class, so it must be known before anything is parsed.

    Raises:
        UserError: If there is no such class, or it is not a Classifier.
    """
    if isinstance(arguments, Mapping):
        specs = [arguments.get("model")]
    else:
        options = [_split(option) for option in grouped(arguments)]
        configs = [_load(value) for name, value in options if is_config(name)]
        specs = [config.get("model") for config in configs if isinstance(config, dict)]
        specs += [_load(value) for name, value in options if name == "--model"]
        specs += [value for name, value in options if name == "--model.class_path"]
    paths = [spec.get("class_path") if isinstance(spec, dict) else spec for spec in specs]
    named = [path for path in paths if path and isinstance(path, str)]
    return classifier_class(named[-1]) if named else None


def flat_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without the model's class, and with its arguments in flat keys."""
    flat = []
    for option in grouped(words):
        name, value = _split(option)
        if name == "--model.class_path":
            continue
        if name == "--model":
            spec = _load(value)
            if isinstance(spec, str):
                continue
            if isinstance(spec, dict):
                option = [f"--model={json.dumps(flat_config({'model': spec})['model'])}"]
        elif name.startswith("--model.init_args."):
            option = [option[0].replace(".init_args", "", 1), *option[1:]]
        flat += option
    return flat


def flat_text(text: str) -> str:
    """Return the text of a config as :func:`flat_config` returns a config; any other text as it is."""
    config = _load_text(text)
    flat = flat_config(config) if isinstance(config, dict) else config
    return text if flat == config else json.dumps(flat)


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the model's class, and with the model's ``init_args`` as keys of ``model``."""
    model = config.get("model")
    if isinstance(model, str):
        model = {"class_path": model}
    if not isinstance(model, dict) or not {"class_path", "init_args"} & model.keys():
        return config
    arguments = {name: value for name, value in model.items() if name not in ("class_path", "init_args")}
    return {**config, "model": arguments | (model.get("init_args") or {})}


def _split(option: Sequence[str]) -> tuple[str, str]:
    """Return the name and the value of an option: the words of one group."""
    name, _, value = " ".join(option[:1]).partition("=")
    return name, value or " ".join(option[1:2])


def _load(value: str) -> Any:
    """Return the content of a config: a file or the text itself; None if the parser will refuse it."""
    with suppress(OSError, UnicodeDecodeError):
        return _load_text(Path(value).read_text(encoding="utf-8") if os.path.isfile(value) else value)
    return None


def _load_text(text: str) -> Any:
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        return get_loader("yaml")(text)
    return None
