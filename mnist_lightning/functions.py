"""The commands as functions: ``fit``, ``tune``, ``report`` and ``export`` from Python and Jupyter."""

import gc
import logging
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
import torch

from mnist_lightning.commands.cli import quieten_lightning
from mnist_lightning.commands.fit import FitCLI
from mnist_lightning.commands.keywords import words
from mnist_lightning.commands.parsing import patched_jsonargparse
from mnist_lightning.comparison.page import write
from mnist_lightning.comparison.summary import Report
from mnist_lightning.deployment.command import ExportCLI
from mnist_lightning.run import Run
from mnist_lightning.search.command import SearchCLI, SearchOptions
from mnist_lightning.search.command import tune as search
from mnist_lightning.search.record import TrialRecord, metrics_of
from mnist_lightning.search.storage import open_storage
from mnist_lightning.search.study import best_trial, ranked_trials, results, source_of
from mnist_lightning.search.worker import start_server
from mnist_lightning.system.console import command_line
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import as_list
from mnist_lightning.system.signals import interruptible
from mnist_lightning.training.runs import LOGS


@contextmanager
def as_function() -> Iterator[None]:
    """Run a command within a process that goes on: errors are exceptions, and settings of the process stay.

    Raises:
        UserError: If the command would end with a message.
        TrialPruned: If a callback prunes a trial.
        KeyboardInterrupt: If the command was stopped.
    """
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    verbosity = optuna.logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)  # a cell need not say which devices there are not
    quieten_lightning()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # tune prints its trials itself
    try:
        with patched_jsonargparse():
            yield
    except SystemExit as end:
        cause = end.__context__
        if isinstance(cause, optuna.TrialPruned):  # for an objective of the user's own
            raise cause from None
        if isinstance(cause, KeyboardInterrupt) or end.code == 130:
            raise KeyboardInterrupt from None
        raise UserError(str(end.code).removeprefix("error: ")) from cause
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Lightning makes a process that was stopped ignore Ctrl-C
        gc.collect()  # trainer, data and parser of a command are in reference cycles


def fit(network: Any = None, data: Any = None, *, config: str | Path | None = None, **options: Any) -> Run:
    """Train a network and test it, as ``python -m mnist_lightning fit`` does.

    Args:
        network: The network: an object such as ``MLP([256, 128])``, its class or the name of its class, or
            ``functools.partial(Class, ...)``. A new one is made from the same arguments after the seed is set.
        data: The data module, in one of the same forms.
        config: A config file; options take precedence.
        **options: Any option of the command, by its dotted key, as in ``**{"model.optimizer.lr": 1e-3}``. The names of
            the arguments of ``Trainer`` and ``Classifier`` need no dots: ``max_epochs=20``, ``optimizer="AdamW"``. Nor
            do those of your own ``model``, a subclass of ``Classifier``: ``model=Focal, gamma=1.5``.
            Callbacks and loggers may be objects, but then the run's config does not hold them.

    Returns:
        The run.

    Raises:
        UserError: If an option is wrong, or the training fails.
        KeyboardInterrupt: If the training was stopped; the epochs so far are kept.
    """
    arguments, objects = words({"config": config, "model.network": network, "data": data}, options)
    for value in objects.values():
        for each in as_list(value):
            print(
                f"{type(each).__name__} is an object, so config.yaml does not hold it: to continue the run, give it "
                "again."
            )
    with as_function():
        command = FitCLI("fit", arguments, objects=objects)
        if not command.keeps_run:
            raise UserError("fit returns a run, but with logger=False, fast_dev_run or barebones none is kept.")
        command.run()
    assert command.run_dir is not None
    return Run(command.run_dir)


class Study(optuna.Study):
    """The Optuna study of a search, and its runs.

    Args:
        name: Name of the study.
        storage: Its storage.
        logs: The folder of the runs.
    """

    def __init__(self, name: str, storage: optuna.storages.BaseStorage, logs: Path) -> None:
        super().__init__(name, storage)
        self._logs = logs.absolute()

    def _repr_html_(self) -> str:
        keys = list(dict.fromkeys(key for trial in self.get_trials(deepcopy=False) for key in trial.params))
        return f"<p>Study <b>{self.study_name}</b></p>{results(self, keys).head(10).to_html(index=False)}"

    @property
    def best_run(self) -> Run:
        """The newest complete run of the best trial's config: its refit.

        Raises:
            UserError: If no trial is complete, or the best has no refit.
        """
        origin = {"study_name": self.study_name, "trial": best_trial(self).number}
        complete = [Run(path.parent) for path in self._logs.glob("*/version_*/test.csv")]
        runs = [run for run in complete if run.config.get("origin") == origin]
        if not runs:
            raise UserError(f"Trial {origin['trial']} has no refit yet: call tune with refit=True, or fit(config=…).")
        return max(runs, key=lambda run: (run.path / "test.csv").stat().st_mtime)

    def runs(self, top: int | None = None) -> list[Run]:
        """Return the best execution of each complete trial, best trial first.

        It warns of trials whose folders are not here, because they have been deleted or are on another machine.

        Args:
            top: How many trials; all by default.
        """
        metric, folder = metrics_of(self)[0], self._logs / self.study_name
        best = [folder / TrialRecord.of(trial).best_execution(metric)["folder"] for trial in ranked_trials(self)[:top]]
        missing = [path for path in best if not (path / "config.yaml").is_file()]
        if missing:
            warnings.warn(f"{len(missing)} of {len(best)} runs are not here, such as {missing[0]}", stacklevel=2)
        return [Run(path) for path in best if path not in missing]


def tune(
    search_space: Any = None, network: Any = None, data: Any = None, *, config: str | Path | None = None, **options: Any
) -> Study:
    """Search hyper-parameters and refit the best, as ``python -m mnist_lightning tune`` does.

    Args:
        search_space: From each key to an Optuna distribution, or to a list of them, one for each item of a list. A key
            may lack its first parts: ``{"units": [IntDistribution(32, 512), IntDistribution(32, 512)]}``.
        network: The network, as for :func:`fit`.
        data: The data module, as for :func:`fit`.
        config: A config file; options take precedence.
        **options: Any option of the command, as for :func:`fit`: ``n_trials=20``, ``max_epochs=5``. A sampler and a
            pruner are given by name, or as ``functools.partial(TPESampler, multivariate=True)``.

    Returns:
        The study.

    Raises:
        UserError: If an option is wrong, or no trial is complete.
        KeyboardInterrupt: If the search was stopped; the same call continues it.
    """
    own = {field.name: options.pop(field.name, None) for field in fields(SearchOptions) if field.name != "search_space"}
    several = [(name, own.pop(name)) for name in ("metric", "direction") if isinstance(own[name], list | tuple)]
    own |= {"config": config, "search_space": search_space, "model.network": network, "data": data}
    arguments, objects = words(own, options)
    for name, values in several:
        arguments += [f"--{name}{'+' if index else ''}={value}" for index, value in enumerate(values)]
    if objects:
        raise UserError(
            f"{next(iter(objects))}: each worker makes its own objects. Give functools.partial(Class, ...)."
        )
    if found := re.search(r"__main__\.([\w.]+)", " ".join(arguments)):
        raise UserError(f"{found[1]}: workers cannot import a class of a script or a cell. Move it to a module.")
    start_server()
    with as_function(), interruptible() as interrupt:
        command = SearchCLI("tune", arguments)
        study = search(command, command_line("tune", *arguments), interrupt)
        source = source_of(study.study_name, command.config.storage, command.logs)
    return Study(study.study_name, open_storage(source), command.logs)


def report(
    *models: Run | str | Path,
    ckpt_path: str = "last",
    study_name: str | None = None,
    storage: str | None = None,
    logs: str | Path = LOGS,
    output: str | Path | None = None,
) -> Report:
    """Compare models on one page, as ``python -m mnist_lightning report`` does; a cell shows the page.

    Args:
        *models: Runs, or their paths; or names, for their newest complete runs; or ``NAME=PATH,PATH,...`` for several
            seeds of a model. By default baseline and tuned or, with ``study_name``, only the study.
        ckpt_path: ``last`` or ``best``: the weights to compare.
        study_name: Name of the study to show; by default the study that produced a model.
        storage: Journal file or URL of the study; by default the journal in its folder.
        logs: Folder of the runs.
        output: Folder of the report, which is replaced; by default ``report`` in ``logs``.

    Returns:
        The report.

    Raises:
        UserError: If a run or the study is missing or damaged, or the models cannot be compared.
    """
    given = [str(each.path if isinstance(each, Run) else each) for each in models]
    given = given or ([] if study_name else ["baseline", "tuned"])
    with as_function():
        return write(given, ckpt_path, study_name, storage, Path(logs), None if output is None else Path(output))


def export(run: Run | str | Path, output: str | Path, **options: Any) -> Path:
    """Write the network of a run, as ``python -m mnist_lightning export`` does.

    Args:
        run: A run, whose last epoch is taken, or a checkpoint.
        output: The file to write: ``.onnx``, ``.pt2`` (``torch.export.load``), or ``.html``, a page to draw on.
        **options: Other options of the command, as for :func:`fit`.

    Returns:
        The path of the file.

    Raises:
        UserError: If the run has no checkpoint, or the file exists or cannot predict what the checkpoint predicts.
    """
    path = Path(output)
    kind = "page" if path.suffix == ".html" else "output"
    own = {"ckpt_path": run.saved().path if isinstance(run, Run) else run, kind: path}
    with as_function():
        ExportCLI("export", words(own, options)[0]).run()
    return path
