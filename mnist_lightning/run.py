"""A run of ``fit`` from Python: its metrics, its network, its predictions; and the list of all runs."""

import html
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from mnist_lightning.classifier import Classifier
from mnist_lightning.networks import count_parameters
from mnist_lightning.predictor import Predictor
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.runs import LOGS, read_config
from mnist_lightning.training.saved_run import SavedRun


class Run:
    """A run folder of ``fit`` or ``tune``.

    Args:
        path: The folder, ``lightning_logs/<name>/version_<N>``.

    Attributes:
        path: The folder's absolute path.

    Raises:
        UserError: If the folder is not a run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        if not (self.path / "config.yaml").is_file():
            raise UserError(f"{path} is not the folder of a run: it has no config.yaml.")

    def __repr__(self) -> str:
        here = Path.cwd()
        path = self.path.relative_to(here) if self.path.is_relative_to(here) else self.path
        return f"Run({path.as_posix()!r})"

    def _repr_html_(self) -> str:
        tables = []
        for make in (lambda: self.history.tail(3), lambda: self.test):
            with suppress(UserError):  # the run was stopped
                tables.append(make().to_html(na_rep=""))
        return f"<p>{html.escape(repr(self))}</p>{''.join(tables)}"

    @property
    def name(self) -> str:
        """The name and the version of the run, such as ``baseline/version_0``."""
        return "/".join(self.path.parts[-2:])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values of all options; ``fit(config=run.path / "config.yaml")`` repeats the run.

        Raises:
            UserError: If the file is damaged.
        """
        return read_config(self.path)

    @property
    def history(self) -> pd.DataFrame:
        """The metrics of each epoch, with the epochs, counted from 1, as the index.

        Raises:
            UserError: If the run was stopped before its first epoch ended, or the file is damaged.
        """
        table = self._table("metrics.csv", "epoch")
        return table.set_index(table.index + 1)

    @property
    def test(self) -> pd.DataFrame:
        """The metrics of the test images: a row for the weights of the last epoch, and one for those of the best.

        Raises:
            UserError: If the run was stopped before it was tested, or the file is damaged.
        """
        return self._table("test.csv", "weights")

    def _table(self, file: str, index: str) -> pd.DataFrame:
        try:
            return pd.read_csv(self.path / file, index_col=index)
        except FileNotFoundError:
            raise UserError(f"{self.path} has no {file}: the run was stopped before the file was written.") from None
        except ValueError as error:
            raise UserError(f"{self.path / file} is damaged: {' '.join(str(error).split())}") from error

    def saved(self, weights: Literal["last", "best"] = "last") -> SavedRun:
        """Return what the checkpoint of the last or the best epoch holds.

        Raises:
            UserError: If the run does not have the checkpoint, or it cannot be used.
        """
        path = self.path / f"checkpoints/{weights}.ckpt"
        if not path.is_file():
            raise UserError(f"{self.path} has no checkpoint {weights}.ckpt.")
        return SavedRun.read(path)

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier with the weights of the last epoch, in evaluation mode, on the CPU.

        Raises:
            UserError: If the run has no checkpoint, or it cannot be used.
        """
        return self.saved().classifier

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor(self.saved().path)

    def predict(self, images: str | Path | Image.Image | ArrayLike | Tensor) -> pd.DataFrame:
        """Return the probabilities of the classes, by the weights of the last epoch; see :class:`Predictor`."""
        return self._predictor(images)


def runs(logs: str | Path = LOGS) -> pd.DataFrame:
    """Return a table of all runs, the newest first.

    Args:
        logs: The folder of the runs.

    Returns:
        A row for each run: its name and version, when it was started, its network, its number of trainable parameters,
        its epochs, its best validation accuracy, the test accuracy of its last epoch, its seconds of training, its tags
        and its notes. A value that a run does not have, for example because it was stopped, is missing.
    """
    columns = ["name", "version", "when", "network", "parameters", "epochs", "val/accuracy", "test/accuracy", "seconds"]
    columns += ["tags", "notes"]
    found = pd.DataFrame([_describe(path.parent) for path in Path(logs).glob("*/version_*/config.yaml")], None, columns)
    numbers = {"version": "Int64", "parameters": "Int64", "epochs": "Int64"}
    found = (
        found.fillna({"tags": "", "notes": ""}).astype(numbers).sort_values("when", ascending=False, ignore_index=True)
    )
    return found.assign(when=pd.to_datetime(found["when"]).dt.floor("s"))


def _describe(folder: Path) -> dict[str, Any]:
    """Return the row of a run; leave out what is missing or damaged."""
    run, version = Run(folder), folder.name.removeprefix("version_")
    row: dict[str, Any] = {"name": folder.parent.name, "version": int(version) if version.isdigit() else None}
    row["when"] = datetime.fromtimestamp((folder / "config.yaml").stat().st_mtime)
    with suppress(UserError, KeyError, TypeError, AttributeError):
        row["network"] = "".join(_network(run.config["model"]))
    with suppress(UserError):
        row |= {"tags": ", ".join(run.config.get("tags") or ()), "notes": run.config.get("notes") or ""}
    with suppress(UserError, KeyError):
        history = run.history
        row |= {"epochs": len(history), "val/accuracy": history["val/accuracy"].max()}
    with suppress(UserError, KeyError, IndexError):
        row["test/accuracy"] = run.test["test/accuracy"].iloc[0]
    with suppress(UserError, OSError):
        saved = run.saved()
        row["seconds"] = round(saved.seconds, 1)
        row["parameters"] = count_parameters(saved.classifier)
    return row


def _network(model: dict[str, Any]) -> Iterator[str]:
    """Yield the class of a model, unless it is the Classifier; the class of its network; and widths or members."""
    if path := model.get("class_path"):
        yield str(path).rpartition(".")[2]
    if "network" not in model:
        return
    spec = model["network"]
    yield ": " if path else ""
    yield str(spec["class_path"]).rpartition(".")[2]
    arguments = spec.get("init_args") or {}
    for name in ("units", "channels", "model"):
        if name in arguments:
            widths = arguments[name]
            yield f" {'-'.join(map(str, widths)) if isinstance(widths, list) else widths}"
    members = Counter("".join(_network({"network": member})) for member in arguments.get("members", []))
    yield " of " * bool(members) + ", ".join(f"{count} {name}" for name, count in members.items())
