"""What is lost when fits, workers and parents of a search are killed at random moments: nothing but time.

Run by hand, some forty minutes: python benchmarks/faults.py

fits    A fit is killed (SIGKILL) repeatedly and continued with `--ckpt_path last` until it finishes. After each kill,
        all its checkpoints must load and contain every printed epoch; at the end weights, best weights and metrics.csv
        must equal those of an undisturbed fit.
searches
        In a search with two workers, a worker, Python's fork server or resource tracker, or the parent is killed
        (SIGKILL, SIGTERM, Ctrl-C for all, or several signals), and the same command is started again. After each kill,
        no process may be left and the study must contain every finished execution; at the end all trials must be in a
        final state, and their number, parameters and values must equal those of an undisturbed search. A trial that
        was hit three times is given up, as designed.
storms  A small search and its refit get two to five of SIGINT, SIGTERM and SIGHUP within 20 ms, at any moment after the
        start of the process. The search must end soon, without a traceback, and keep all finished executions.

The moments are drawn from the time that the same command takes undisturbed.
"""

import argparse
import contextlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna
import torch

from mnist_lightning.search.record import is_counted
from mnist_lightning.search.storage import open_storage

SHORT = ["--trainer.limit_train_batches=60", "--trainer.limit_val_batches=10"]
FIT = ["fit", "--trainer.max_epochs=60", *SHORT]
PARTS = ["fits", "searches", "storms"]
STORM = ["tune", "--trainer.max_epochs=2", "--n_trials=6", "--workers=2", "--refit_epochs=8", *SHORT]
TUNE = ["tune", "--trainer.max_epochs=6", "--n_trials=60", "--workers=2", "--refit=false", *SHORT]


def start(folder: Path, command: list[str]) -> "subprocess.Popen[str]":
    """Start a command in its own session; its output goes to ``output.txt``."""
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mnist_lightning", *command],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def check_gone(leader: "subprocess.Popen[str]") -> None:
    """Check that all processes of a session end."""
    deadline = time.monotonic() + 10
    while left := session(leader.pid):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.05)


def session(leader: int) -> list[int]:
    """Return the living processes of a session."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(number) == leader and state != "Z":
            left.append(int(stat.parent.name))
    return left


def children(parent: int) -> list[int]:
    """Return the children of a process."""
    return [int(pid) for task in Path(f"/proc/{parent}/task").glob("*/children") for pid in task.read_text().split()]


def wait_for(text: str, folder: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until the output contains a text or the process ends."""
    while text not in (folder / "output.txt").read_text() and process.poll() is None:
        time.sleep(0.01)


def fits(killed: Path, whole: Path, seconds: float, draw: random.Random) -> Counter[str]:
    """Kill a fit repeatedly until it finishes."""
    kills: Counter[str] = Counter()
    last: Path | None = None
    epochs = 0
    while True:
        process = start(killed, [*FIT, *(["--ckpt_path=last"] if last else [])])
        if draw.random() < 0.8:
            wait_for("epoch", killed, process)
        output = killed / "output.txt"
        try:
            assert process.wait(draw.uniform(0, seconds / 4)) == 0, output.read_text()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        kills["fit by SIGKILL"] += 1
        printed = [int(number) for number in re.findall(r"^ +(\d+)/\d", output.read_text(), re.MULTILINE)]
        files = list(killed.glob("lightning_logs/*/version_*/checkpoints/*.ckpt"))
        loaded = {path: torch.load(path, weights_only=True) for path in files}
        done = max((c["epoch"] + 1 for path, c in loaded.items() if path.name == "last.ckpt"), default=0)
        assert done >= max(printed, default=epochs), f"{done} epochs are saved, {printed[-1]} were printed"
        epochs = done
        last = next((path for path in files if path.name == "last.ckpt"), None)
    runs = sorted(killed.glob("lightning_logs/baseline/*/test.csv"), key=lambda path: path.stat().st_mtime)
    expected = whole / "lightning_logs/baseline/version_0"
    for kind in ("last", "best"):
        one, other = (
            torch.load(run / f"checkpoints/{kind}.ckpt", weights_only=True) for run in (expected, runs[-1].parent)
        )
        assert one["epoch"] == other["epoch"]
        assert all(torch.equal(one["state_dict"][key], other["state_dict"][key]) for key in one["state_dict"])
    for file in ("metrics.csv", "test.csv"):
        assert (expected / file).read_text() == (runs[-1].parent / file).read_text(), f"{file} differs"
    return kills


def load(folder: Path) -> optuna.Study:
    """Load the study in a folder."""
    return optuna.load_study(storage=open_storage(str(folder / "lightning_logs/tune/journal.log")), study_name="tune")


def executions(study: optuna.Study) -> set[str]:
    """Return all finished executions with parameters and values, without wall time and folder, which a kill changes."""
    return {
        str((trial.params, {key: value for key, value in execution.items() if key not in ("seconds", "folder")}))
        for trial in study.get_trials()
        for execution in trial.user_attrs.get("executions", [])
    }


def disturb(process: "subprocess.Popen[str]", seconds: float, draw: random.Random) -> str | None:
    """Kill a part of a search within ``seconds``; return its kind, or None if the search ended first."""
    try:
        process.wait(draw.uniform(seconds / 5, seconds))
    except subprocess.TimeoutExpired:
        # the resource tracker, and the fork server, whose children are the workers
        helpers = children(process.pid)
        workers = [worker for helper in helpers for worker in children(helper)]
        if workers and draw.random() < 0.5:
            kind, victim = draw.choice([*[("worker", worker) for worker in workers], ("helper", draw.choice(helpers))])
            os.kill(victim, signal.SIGKILL)
            return kind
        kind = draw.choice(["SIGKILL", "SIGTERM", "Ctrl-C", "several signals"])
        if kind == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes
        elif kind == "several signals":
            several(process, draw)
        else:
            process.send_signal(signal.Signals[kind])
        return f"parent by {kind}"
    return None


def several(process: "subprocess.Popen[str]", draw: random.Random) -> None:
    """Send two to five signals within 20 ms, some to the parent and some to all."""
    for _ in range(draw.randint(2, 5)):
        number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number) if draw.random() < 0.5 else process.send_signal(number)
        time.sleep(draw.uniform(0, 0.02 / 4))


def storms(killed: Path, whole: Path, seconds: float, draw: random.Random) -> Counter[str]:
    """End a small search by several signals at any moment from start to refit, repeatedly until it finishes."""
    kills: Counter[str] = Counter()
    finished: set[str] = set()
    has_finished = False
    while not has_finished:
        process = start(killed, STORM)
        try:
            process.wait(draw.uniform(0, seconds))
            has_finished = True
            assert process.returncode == 0, (killed / "output.txt").read_text()
        except subprocess.TimeoutExpired:
            several(process, draw)
            kills["several signals"] += 1
            # it may have finished just before the signals
            assert process.wait(seconds) != 0 or "to compare: " in (killed / "output.txt").read_text()
        check_gone(process)
        output = (killed / "output.txt").read_text()
        assert "Traceback" not in output, output
        assert "Exception ignored" not in output, output
        if (killed / "lightning_logs/tune/journal.log").is_file():
            with contextlib.suppress(KeyError):  # the study does not exist yet
                saved = executions(load(killed))
                assert finished <= saved, "a finished execution is lost"
                finished = saved
    assert executions(load(killed)) == executions(load(whole))
    return kills


def searches(killed: Path, whole: Path, seconds: float, draw: random.Random) -> Counter[str]:
    """Kill workers and parents of a search repeatedly until it finishes."""
    kills: Counter[str] = Counter()
    finished: set[str] = set()
    while True:
        process = start(killed, TUNE)
        wait_for("Trial ", killed, process)
        while (kind := disturb(process, seconds / 16, draw)) in ("worker", "helper"):
            kills[kind] += 1
        if kind is None:
            assert process.returncode == 0, (killed / "output.txt").read_text()
            break
        kills[kind] += 1
        assert process.wait(60) != 0, f"{kind} had no effect"
        check_gone(process)
        saved = executions(load(killed))
        assert finished <= saved, "a finished execution is lost"
        finished = saved
    check_gone(process)
    study = load(killed)
    assert all(trial.state.is_finished() for trial in study.trials)
    expected = {str(trial.params): trial.value for trial in load(whole).trials}
    counted = [trial for trial in study.trials if is_counted(trial)]
    drawn = sorted(str(trial.params) for trial in counted)
    assert drawn == sorted(expected), f"{set(drawn) ^ set(expected)} differ"
    for trial in counted:
        if "died while running it" in trial.user_attrs.get("error", ""):
            kills["trial given up after three kills"] += 1
        else:
            assert trial.value == expected[str(trial.params)], f"{trial} differs"
    assert finished <= executions(study) <= executions(load(whole))
    return kills


def main() -> None:
    """Kill until each part has enough kills."""
    parser = argparse.ArgumentParser(description="Kill fits, workers and parents at random; see this file's docstring.")
    parser.add_argument("--kills", type=int, default=50, help="minimum number for each part")
    parser.add_argument("--which", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)  # noqa: S311
    # a shell makes background processes ignore SIGINT, and nohup makes them ignore SIGHUP
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for part, command in ((fits, FIT), (searches, TUNE), (storms, STORM)):
        if part.__name__ not in arguments.which:
            continue
        print(shlex.join(command), flush=True)
        kills: Counter[str] = Counter()
        rounds, since = 0, time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            whole = Path(name, "whole")
            whole.mkdir()
            begin = time.perf_counter()
            assert start(whole, command).wait() == 0
            undisturbed = time.perf_counter() - begin
            while (total := kills.total() - kills["trial given up after three kills"]) < arguments.kills:
                rounds += 1
                killed = Path(name, str(rounds))
                killed.mkdir()
                kills += part(killed, whole, undisturbed, draw)
        table = ", ".join(f"{kind} {count}" for kind, count in sorted(kills.items()))
        seconds = time.perf_counter() - since
        print(f"  {total} kills in {rounds} rounds ({table}), {seconds:.0f} s: nothing lost", flush=True)


if __name__ == "__main__":
    main()
