"""Gives every key of a command's config what it does not expect: is it refused in a line, or does it work?

python tests/keys.py fit       # all keys with all values, two to ten minutes
python tests/keys.py fit lr    # keys with lr in their name
"""

import argparse
import contextlib
import copy
import functools
import io
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from conformance import SMALL, FailedError, read, run, run_folder, write_data

from mnist_lightning.__main__ import main as command
from mnist_lightning.system.nested import flatten

VALUES: dict[str, Any] = {
    "null": None, "0": 0, "-1": -1, "a fraction": 0.37, "not a number": math.nan, "infinite": math.inf,
    "huge": 10**12, "empty": "", "a word": "sloth", "a list": [1, 2], "a mapping": {"a": 1},
    "a class": {"class_path": "torch.nn.ReLU"},
}  # fmt: skip

GENERAL = ("trainer", "model", "data", "init_args", "class_path")
"""Parts of keys that do not identify them."""

JARGON = (
    "not supported between instances",
    "Union subtypes",
    "Problem with given",
    "<class",
    "Namespace(",
    "Parser key",
)
"""Words of Python and of the parser that a user need not know."""

LEFT_OUT = {
    *(("trainer.devices", kind) for kind in ("huge", "-1", "a list", "null")), ("trainer.num_nodes", "huge"),
    # this is an eighth of a validation batch, for which Lightning names limit_val_batches
    ("trainer.overfit_batches", "a fraction"),
}  # fmt: skip
"""Values that would really start, or wait for, that many processes or machines."""


@functools.cache
def defaults(name: str) -> dict[str, Any]:
    """Return a command's config; that of ``fit`` has a schedule."""
    output = io.StringIO()
    more = ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=1"] if name == "fit" else []
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        command([name, *more, "--print_config"])
    config: dict[str, Any] = yaml.safe_load(output.getvalue())
    return config


def keys(name: str) -> list[str]:
    """Return the keys of a command's config, and of whole sections."""
    config = defaults(name)
    sections = ("model", "data", "trainer", "model.optimizer", "model.network")
    return [*flatten(config), *(key for key in sections if key in config or "." in key)]


def config_with(name: str, key: str, value: Any) -> Any:
    """Return a config of a command in which a key has a value."""
    if key.startswith("search_space."):  # its own keys have dots, and a part of it would be another space
        space = copy.deepcopy(defaults(name)["search_space"])
        searched = next(each for each in space if key.startswith(f"search_space.{each}."))
        *parts, last = key.removeprefix(f"search_space.{searched}.").split(".")
        functools.reduce(dict.__getitem__, parts, space[searched])[last] = value
        return {"search_space": space}
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    if key.startswith("model.lr_scheduler."):
        nested["model"]["lr_scheduler"].setdefault("class_path", "StepLR")
        nested["model"]["lr_scheduler"].setdefault("init_args", {}).setdefault("step_size", 1)
    return nested


def try_key(name: str, key: str, value: Any, folder: Path, *options: str) -> str:
    """Return how a command mishandles a value for a key, or an empty text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_with(name, key, value)), encoding="utf-8")
    try:
        result = run(folder, name, *options, "--config=config.yaml")
    except FailedError as error:
        return str(error)
    if result.code:
        lines = [line for line in result.error.splitlines() if "error: " in line]
        if len(lines) != 1 or "Traceback" in result.text:
            return f"is refused in {len(lines)} lines: {result.error[-600:]}"
        words = [part for part in key.split(".") if part not in GENERAL and not part.isdigit()] or key.split(".")
        given = str(value.get("class_path") if isinstance(value, dict) else value).rpartition(".")[2]
        if not any(word in lines[0] for word in (*words, given) if word):
            return f"is refused without its name: {lines[0]}"
        if any(words in lines[0] for words in JARGON):
            return f"is refused in the words of Python or its libraries: {lines[0]}"
        return ""
    where = run_folder(result, folder)
    for line in read(where / "test.csv") if where else []:
        for metric, number in line.items():
            is_finite = metric == "weights" or not number or math.isfinite(float(number))
            if not is_finite and "has diverged" not in result.text:
                return f"ends with {metric} {number}"
    return ""


def options_of(name: str, folder: Path) -> tuple[str, ...]:
    """Return options that make a command short; write its few images into a folder."""
    write_data(folder / "data")
    data = (f"--data.data_dir={folder}/data/MNISTDataModule",)
    short = (*data, *SMALL, "--trainer.max_steps=4", "--trainer.accelerator=cpu", "--tensorboard=false")
    if name == "fit":
        return short
    if name == "tune":
        return (*short, "--refit=false", "--n_trials=1", "--executions_per_trial=1", "--workers=1")
    made = run_folder(run(folder / "made", "fit", *short), folder / "made")
    return (*data, f"--ckpt_path={made}/checkpoints/last.ckpt")


def cases(name: str) -> list[tuple[str, str]]:
    """Return all keys of a command's config, each with all kinds of values."""
    return [(key, kind) for key in keys(name) for kind in VALUES if (key, kind) not in LEFT_OUT]


def without(options: tuple[str, ...], key: str) -> tuple[str, ...]:
    """Return options without those of a key, which would take precedence over the config."""
    return tuple(each for each in options if key.replace(".init_args", "") not in each.partition("=")[0])


def main(words: list[str]) -> int:
    """Try all keys of a command whose name contains one of the words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command")
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args(words)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(arguments.command, Path(folder))
        for key, kind in cases(arguments.command):
            if arguments.words and not any(word in key for word in arguments.words):
                continue
            place = Path(folder, f"{key}-{kind}")
            problem = try_key(arguments.command, key, VALUES[kind], place, *without(options, key))
            failures += bool(problem)
            if problem:
                print(f"{key}: {kind}: {problem}", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
