"""Workers of a command: start, watch, replace and stop them."""

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import torch
from optuna.pruners import WilcoxonPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from mnist_lightning.search.record import TrialRecord, is_counted
from mnist_lightning.search.recovery import ATTEMPTS, SWEEPS, Recovery
from mnist_lightning.search.space import short_key, short_value
from mnist_lightning.search.study import format_value, is_time_up, time_left
from mnist_lightning.search.trial import Search
from mnist_lightning.search.worker import Worker
from mnist_lightning.system.console import colored, fill_terminal
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.signals import Interrupt


def devices(options: Any) -> list[str | None]:
    """Return for each possible worker the GPU that it sees, or None."""
    gpus: list[str] = []
    if options.trainer.devices == 1 and options.trainer.accelerator in ("auto", "gpu", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = options.workers or len(gpus) or cores
    return [gpus[i % len(gpus)] if gpus else None for i in range(count)]


OF_BARS: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "disable": None}
"""Arguments of a bar that only a terminal shows."""


class Pool:
    """The workers of a command.

    Args:
        search: The search.
        study: The search's study.
        storage: The study's storage.
        devices: For each possible worker the GPU that it sees, or None.

    Attributes:
        names: Names of all workers so far.
    """

    def __init__(self, search: Search, study: Study, storage: Any, devices: Sequence[str | None]) -> None:
        self.search = search
        self.study = study
        self.storage = storage
        self.names: set[str] = set()
        self._free = [*reversed(devices)]
        self._workers: list[Worker] = []
        self._recovery = Recovery(study, storage)
        self._is_exhausted = False
        self._early_deaths = 0
        self._shown = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}

    def run(self, interrupt: Interrupt) -> bool:
        """Search until nothing is left to do; return whether the search was interrupted."""
        total = self.search.options.n_trials * self._epochs_of_trial
        shape = "{percentage:3.0f} % |{bar}| {n}/{total} epochs, {desc}{remaining} left"
        self.bar: tqdm[Any] = tqdm(total=total, initial=self._epochs(self._trials()), bar_format=shape, **OF_BARS)
        self._lines: list[tqdm[Any]] = []
        try:
            self._watch(interrupt)
        except KeyboardInterrupt:
            pass
        finally:
            interrupt.is_put_off = True
            for worker in self._workers:
                worker.stop()  # ask all before waiting for the first
            for worker in self._workers:
                worker.end()
            self.storage.patience = 0.0
            with suppress(UserError):  # without the storage, the next command notices these trials
                for trial in self._recovery.running(self.names):
                    self._recovery.put_back(trial.number, died=False)
            for line in (*self._lines, self.bar):
                line.close()
            interrupt.is_put_off = False
        return interrupt.received

    def _watch(self, interrupt: Interrupt) -> None:
        """Keep the workers busy, and show the study's progress."""
        next_sweep = 0.0
        while not interrupt.received:  # some libraries swallow a KeyboardInterrupt
            if time.monotonic() > next_sweep:
                self._recovery.beat(self.names)
                for number in self._recovery.sweep():
                    self._print(f"Trial {number:3} is requeued: its process died or was silent for too long")
                next_sweep = time.monotonic() + self.search.options.grace_period / SWEEPS
            trials = [trial for trial in self.study.get_trials(deepcopy=False) if is_counted(trial)]
            is_running = any(trial.state == TrialState.RUNNING for trial in trials)
            to_begin = 0 if is_time_up(self.study) else self._to_begin(trials)
            if is_time_up(self.study) and not self.search.options.finish_trials:
                return
            if not (self._workers or is_running or to_begin):
                return
            own = len(self._recovery.running([worker.name for worker in self._workers]))
            while self._free and len(self._workers) < own + to_begin:
                self._workers.append(Worker(self.search, self._free.pop()))
                self.names.add(self._workers[-1].name)
            sentinels = [worker.process.sentinel for worker in self._workers]
            ended = wait(sentinels, timeout=1)
            if not sentinels:  # only other commands have trials to run
                time.sleep(1)
            self._show_progress()
            for worker in [worker for worker in self._workers if worker.process.sentinel in ended]:
                self._workers.remove(worker)
                self._free.append(worker.device)
                self._end(worker)
        self._show_progress()

    def _to_begin(self, trials: Sequence[FrozenTrial]) -> int:
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        return waiting + (0 if self._is_exhausted else max(0, self.search.options.n_trials - len(trials)))

    def _end(self, worker: Worker) -> None:
        """Handle a worker's end: raise the error that it sent, or requeue its trial if it died."""
        code, message = worker.end(), worker.error_line()
        if message is not None:
            raise UserError(message)
        if code == 0:  # the worker found no trial to start
            self._is_exhausted = True
            return
        trials = self._recovery.running([worker.name])
        for trial in trials:
            self._recovery.put_back(trial.number, died=True)
            self._print(f"Trial {trial.number:3} continues with another worker: its worker died (exit code {code})")
        self._early_deaths = 0 if trials else self._early_deaths + 1
        if self._early_deaths == ATTEMPTS:
            raise UserError(
                f"{ATTEMPTS} workers died before they started a trial, the last with exit code {code}. Is there enough "
                "memory? Try fewer --workers."
            )

    def _show_progress(self) -> None:
        trials = self._trials()
        finished = [trial for trial in trials if trial.state.is_finished()]
        for trial in finished:
            if trial.number not in self._shown:
                self._shown.add(trial.number)
                result = " ".join(map(format_value, trial.values or [])) or TrialRecord.of(trial).error
                params = ", ".join(f"{short_key(key)}\0{short_value(value)}" for key, value in trial.params.items())
                state = f"{trial.state.name.lower():8}"
                state = colored(state, "red") if trial.state == TrialState.FAIL else state
                self._print(fill_terminal(f"Trial {trial.number:3} {state} {result}  {params}").replace("\0", " "))
        remarks = [f"{len(finished)}/{self.search.options.n_trials} trials", *self._remarks(finished), ""]
        self.bar.set_description_str(", ".join(remarks), refresh=False)
        self.bar.n = self._epochs(trials)
        self.bar.refresh()
        running = {TrialRecord.of(trial).owner: trial for trial in trials if trial.state == TrialState.RUNNING}
        texts = [self._describe(running.get(worker.name)) for worker in self._workers]
        while len(self._lines) < len(texts):
            self._lines.append(tqdm(bar_format="{desc}", **OF_BARS))
        for number, line in enumerate(self._lines):
            line.set_description_str(texts[number] if number < len(texts) else "")

    @property
    def _epochs_of_trial(self) -> int:
        return int(self.search.options.executions_per_trial * self.search.epochs)

    def _trials(self) -> list[FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if is_counted(trial)]

    def _epochs(self, trials: Sequence[FrozenTrial]) -> int:
        """Return how many epochs of trials are done; a pruned or failed trial has all of its epochs."""
        return sum(self._epochs_of_trial if t.state.is_finished() else self._epochs_of(t) for t in trials)

    def _describe(self, trial: FrozenTrial | None) -> str:
        """Return what a worker runs."""
        if trial is None:
            return "  starts"
        total = self.search.options.executions_per_trial
        done = min(len(TrialRecord.of(trial).executions), total - 1)  # the last may be stored, and the trial not ended
        text = f"  trial {trial.number:3}, execution {done + 1}/{total}"
        if len(self.search.metrics) > 1 or isinstance(self.study.pruner, WilcoxonPruner):
            return text  # which epoch it is, is not in the study
        epoch = self._epochs_of(trial) - done * self.search.epochs + 1
        of_all = "" if "trainer.max_epochs" in self.search.space else f"/{self.search.epochs}"
        return f"{text}, epoch {min(epoch, self.search.epochs):2}{of_all}"

    def _remarks(self, finished: Sequence[FrozenTrial]) -> list[str]:
        states = [trial.state for trial in finished]
        remarks = [
            f"{states.count(state)} {name}"
            for name, state in (("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL))
            if state in states
        ]
        if TrialState.COMPLETE in states:
            complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
            remarks.append(f"best {self.search.metrics[0].best(trial.values[0] for trial in complete):.4f}")
        if (left := time_left(self.study)) < math.inf:
            remarks.append(f"{tqdm.format_interval(left)} left to start trials")
        return remarks

    def _epochs_of(self, trial: FrozenTrial) -> int:
        """Return the number of epochs that a trial has reported."""
        executions = len(TrialRecord.of(trial).executions)
        is_by_epoch = not isinstance(self.study.pruner, WilcoxonPruner) and trial.intermediate_values
        return len(trial.intermediate_values) if is_by_epoch else executions * self.search.epochs

    def _print(self, line: str) -> None:
        with self.bar.external_write_mode():
            print(line, flush=True)
