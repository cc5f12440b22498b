"""Notice a trial whose process died, and put it back into the queue.

The command (``search.pool``) calls this for its own workers, and from time to time for the trials of all processes.
"""

import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mnist_lightning.search.record import TrialRecord

ATTEMPTS = 3
"""How many processes may die while running a trial, without finishing an execution, before the trial fails."""

SWEEPS = 6
"""Sweeps in a grace period: a process on another machine that is silent for all of them is considered dead."""


def process_name(pid: int | None = None) -> str:
    """Return the unique name of a process, by default of this one: its machine, number and start time."""
    pid = pid or os.getpid()
    return f"{_machine()}:{pid}:{_start_time(pid)}"


def _machine() -> str:
    """Return a name for the scope of process numbers: this host since its boot, or a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """Return when a process started, in seconds; empty if the system does not tell, None if the process is dead."""
    try:
        process = psutil.Process(pid)
        # a container's first process may never reap zombies
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        # Linux counts from boot, and the boot time that psutil adds changes when the clock is set
        return f"{process.create_time() - (psutil.boot_time() if psutil.LINUX else 0):.2f}"
    except psutil.NoSuchProcess:
        return None
    except (psutil.Error, OSError):
        return ""


class Recovery:
    """Put the running trials of dead processes back into the queue of a study.

    Processes on this machine are looked up. Commands on other machines change the ``heartbeat`` of their workers'
    trials. Sweeps without a change are counted, not seconds, so clocks need not agree, and an outage of the storage
    makes no process look dead.

    Args:
        study: The study.
        storage: The study's storage.
    """

    def __init__(self, study: Study, storage: BaseStorage) -> None:
        self._study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._silence: dict[int, tuple[float | None, int]] = {}  # trial: last heartbeat, sweeps since it changed

    def running(self, owners: Collection[str]) -> list[FrozenTrial]:
        """Return the running trials of some processes."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in trials if trial.user_attrs.get("owner") in owners]

    def beat(self, owners: Collection[str]) -> None:
        """Record that the processes with running trials are alive."""
        for trial in self.running(owners):
            with suppress(UpdateFinishedTrialError):
                self._set(trial.number, heartbeat=time.time())

    def put_back(self, number: int, died: bool) -> None:
        """Put a running trial back into the queue: another process continues with its parameters and executions.

        Args:
            number: Number of the trial.
            died: Whether the trial's process died, rather than being stopped.
        """
        # read again: another process may have finished or requeued the trial since it was listed
        trial = self._study.get_trials(deepcopy=False)[number]
        if trial.state != TrialState.RUNNING:
            return
        with suppress(UpdateFinishedTrialError):
            self._set(number, owner="", attempts=TrialRecord.of(trial).attempts + died)
            self._storage.set_trial_state_values(self._id(number), TrialState.WAITING)

    def sweep(self) -> list[int]:
        """Requeue the running trials whose process is dead or whose machine has vanished; return their numbers."""
        dead = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state != TrialState.RUNNING:
                self._silence.pop(trial.number, None)
            elif self._is_dead(trial):
                self._silence.pop(trial.number)  # the next owner gets a full grace period
                self.put_back(trial.number, died=True)
                dead.append(trial.number)
        return dead

    def _is_dead(self, trial: FrozenTrial) -> bool:
        record = TrialRecord.of(trial)
        before, silent = self._silence.get(trial.number, (record.heartbeat, -1))
        silent = silent + 1 if record.heartbeat == before else 0
        self._silence[trial.number] = record.heartbeat, silent
        machine, _, process = record.owner.partition(":")
        if machine != _machine():  # or there is no owner: the process has not yet written its name, or never will
            return silent >= SWEEPS
        pid, _, start = process.partition(":")
        return not pid.isdecimal() or _start_time(int(pid)) not in (start, "")

    def _set(self, number: int, **attributes: Any) -> None:
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), name, value)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
