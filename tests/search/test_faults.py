"""What kills, stops or hinders a search costs no more than time."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import optuna
import psutil
import pytest
from helpers.studies import choices, counted_trials, load, outcome, reported, session, start, stopped_worker, wait_for
from optuna.trial import TrialState

from mnist_lightning.search.recovery import Recovery, process_name
from mnist_lightning.search.storage import open_storage

pytestmark = pytest.mark.slow


def test_a_killed_worker_loses_only_its_execution(whole, tune_beside, tmp_path):
    cwd = tmp_path / "here"

    def kill():
        with stopped_worker(cwd, execution=1) as (pid, number):
            os.kill(pid, signal.SIGKILL)
        return number

    (code, output, errors), number = tune_beside(kill, "--n_trials=5", "--workers=1")
    assert code == 0, errors
    study = load(cwd)
    assert outcome(study) == outcome(load(whole[0]))
    assert len(study.trials) == 5
    assert f"Trial {number:3} continues with another worker" in output
    assert study.trials[number].user_attrs["attempts"] == 0  # it made progress
    assert [execution["execution"] for execution in study.trials[number].user_attrs["executions"]] == [0, 1]


def test_a_trial_that_kills_its_workers_fails_and_the_study_goes_on(tune, monkeypatch, tmp_path):
    (tmp_path / "suicidal.py").write_text(
        "import os, signal\n"
        "from mnist_lightning.networks import MLP\n"
        "class Net(MLP):\n"
        "    def __init__(self, deadly: bool = False):\n"
        "        super().__init__(units=[8], dropout=0, l2=0)\n"
        "        if deadly:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, output, errors = tune(
        choices(**{"model.network.init_args.deadly": [True, False]}), "--model.network=suicidal.Net",
        "--sampler=BruteForceSampler", "--workers=1", epochs=1,
    )  # fmt: skip
    assert code == 0, errors
    assert "1 complete, 0 pruned, 1 failed" in output
    reasons = [t.user_attrs["error"] for t in load(tmp_path / "here").trials if "error" in t.user_attrs]
    assert reasons == ["3 processes died while running it"]


def test_a_killed_parent_leaves_no_process_and_no_trial_behind(whole, data_dir, tune, tmp_path):
    cwd = tmp_path / "here"
    cwd.mkdir()
    parent = start(data_dir, cwd, "--n_trials=5", "--workers=2")
    wait_for(lambda: reported(cwd))
    parent.kill()
    parent.wait()
    wait_for(lambda: not session(parent.pid))
    before = load(cwd)
    assert any(trial.state == TrialState.RUNNING for trial in before.trials)
    finished = {trial.number: trial.value for trial in before.trials if trial.state == TrialState.COMPLETE}
    code, _, errors = tune("--n_trials=5")
    assert code == 0, errors
    study = load(cwd)
    assert outcome(study) == outcome(load(whole[0]))
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert finished.items() <= {trial.number: trial.value for trial in study.trials}.items()


def test_ctrl_c_puts_trials_back_and_says_how_to_continue(whole, data_dir, tune, tmp_path):
    cwd = tmp_path / "here"
    cwd.mkdir()
    parent = start(data_dir, cwd, "--n_trials=5", "--workers=2")
    wait_for(lambda: reported(cwd))
    with stopped_worker(cwd, execution=1):  # otherwise the search might finish first
        os.killpg(parent.pid, signal.SIGINT)  # a terminal sends it to all processes
        output, _ = parent.communicate(timeout=300)
    assert parent.returncode == 130
    assert "Traceback" not in output
    assert "Best: trial" in output
    assert output.splitlines()[-1].startswith("Stopped. Continue: python -m mnist_lightning tune --data.data_dir=")
    wait_for(lambda: not session(parent.pid))
    states = [trial.state for trial in load(cwd).trials]
    assert TrialState.RUNNING not in states
    assert TrialState.WAITING in states
    code, _, errors = tune("--n_trials=5")
    assert code == 0, errors
    assert outcome(load(cwd)) == outcome(load(whole[0]))


def test_machines_share_a_database_that_is_restarted_while_one_of_them_vanishes(whole, data_dir, postgresql, tmp_path):
    url = postgresql("status")
    more = [f"--storage={url}", "--n_trials=14", "--workers=1", "--grace_period=3", "--refit=true", "--refit_epochs=1"]
    parents = [start(data_dir, tmp_path, *more, epochs=10) for _ in range(3)]
    storage = open_storage(url)  # once, as opening takes so long that a trial may finish meanwhile

    def running():
        with suppress(KeyError):
            return optuna.load_study(storage=storage, study_name="tune").get_trials(states=[TrialState.RUNNING])
        return []

    workers = {}

    def all_are_at_it():
        workers.clear()
        for attributes in [trial.user_attrs for trial in running()]:
            owner = psutil.Process(int(attributes["owner"].split(":")[-2])) if attributes.get("owner") else None
            if owner is not None:  # the worker's parent is the fork server, whose parent is the command
                workers[owner.parent().ppid()] = attributes["owner"]
        return len(workers) == 3

    wait_for(all_are_at_it)
    parents[0].kill()
    name = workers[parents[0].pid]
    wait_for(lambda: process_name(int(name.split(":")[-2])) != name)  # the worker dies with its parent
    killed = [trial.number for trial in running() if trial.user_attrs.get("owner") == name]
    postgresql("restart", "-m", "immediate")
    outputs = [parent.communicate(timeout=300)[0] for parent in parents]
    for parent, output in zip(parents[1:], outputs[1:], strict=True):
        assert parent.returncode == 0, output
        assert "14 complete, 0 pruned, 0 failed" in output
        assert "The storage answers again." in output
    assert sum("Refit: left to" in output for output in outputs) == 1
    assert len([*tmp_path.glob("lightning_logs/tuned/version_*")]) == 1
    study = optuna.load_study(storage=open_storage(url), study_name="tune")
    counted = counted_trials(study)
    assert [trial.state for trial in counted] == [TrialState.COMPLETE] * 14
    assert all(trial.state.is_finished() for trial in study.trials)
    assert study.best_value == max(trial.value for trial in counted)
    drawn = [list(trial.params.values()) for trial in counted]
    for trial in load(whole[0]).trials:  # the draws of an undisturbed process
        assert list(trial.params.values()) in drawn
    assert all(f"Trial {number:3} is requeued" in "".join(outputs) for number in killed)
    for trial in counted:
        assert [execution["execution"] for execution in trial.user_attrs["executions"]] == [0, 1]


def test_a_trial_that_others_have_taken_is_left_to_them(whole, tune_beside, tmp_path):
    cwd = tmp_path / "here"

    def take():
        with stopped_worker(cwd, execution=0) as (_, number):
            storage = open_storage(str(cwd / "lightning_logs/tune/journal.log"))
            study_id = storage.get_study_id_from_name("tune")
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            storage.set_trial_user_attr(trial_id, "owner", "another machine:1:2")
        wait_for(lambda: sum(trial.state == TrialState.COMPLETE for trial in load(cwd).trials) == 4)
        study = load(cwd)
        assert study.trials[number].state == TrialState.RUNNING
        Recovery(study, storage).put_back(number, died=True)

    (code, _, errors), _ = tune_beside(take, "--n_trials=5", "--workers=1")
    assert code == 0, errors
    assert outcome(load(cwd)) == outcome(load(whole[0]))


def test_a_fault_of_the_machine_ends_the_search_and_is_not_a_trial_s(whole, tune, tmp_path):
    blocked = tmp_path / "here/lightning_logs/tune/trial_001"
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # a file in place of a folder
    code, _, errors = tune("--n_trials=5", "--workers=1")
    assert code == 1
    assert re.search(r"^error: .*trial_001.*: (File exists|Not a directory). Finished work is kept: .*\n$", errors)
    blocked.unlink()
    code, _, errors = tune("--n_trials=5", "--workers=1")
    assert code == 0, errors
    assert outcome(load(tmp_path / "here")) == outcome(load(whole[0]))


def test_a_study_is_shown_while_it_is_searched_and_ends_when_it_is_moved_away(tune, data_dir, tmp_path):
    cwd = tmp_path / "here"
    cwd.mkdir()
    parent = start(data_dir, cwd, "--n_trials=500", "--workers=1")
    wait_for(lambda: reported(cwd))
    code, output, errors = tune("--show")
    assert code == 0, errors
    assert re.search(r"^Trials of study tune: \d+ complete, 0 pruned, 0 failed, 1 running$", output, re.MULTILINE)
    assert "Best: trial" in output
    assert "Refit" not in output
    code, _, errors = tune("--show", "--study_name=none")
    assert code == 1
    assert "There is no study none in lightning_logs/none/journal.log" in errors
    assert not (cwd / "lightning_logs/none").exists()
    (cwd / "lightning_logs/tune").rename(tmp_path / "moved")
    output, _ = parent.communicate(timeout=240)
    assert parent.returncode == 1, output
    assert "was moved or deleted while" in output
    assert "Traceback" not in output
    wait_for(lambda: session(parent.pid) == [])
    assert not (cwd / "lightning_logs/tune/journal.log").exists()
    trials = optuna.load_study(storage=open_storage(str(tmp_path / "moved/journal.log")), study_name="tune").trials
    assert TrialState.COMPLETE in [trial.state for trial in trials]


def handles(pid, number):
    """Return whether a process has a handler for a signal."""
    (mask,) = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(mask, 16) >> (number - 1) & 1


@pytest.mark.parametrize("moment", ["at its start", "while it imports", "in a trial"])
def test_several_signals_at_once_end_a_search(data_dir, tmp_path, moment):
    parent = start(data_dir, tmp_path, "--n_trials=50", "--workers=2")
    moments = {
        "at its start": lambda: handles(parent.pid, signal.SIGTERM),
        "while it imports": lambda: psutil.Process(parent.pid).children(),
        "in a trial": lambda: reported(tmp_path),
    }
    wait_for(moments[moment])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGINT):
        os.killpg(parent.pid, number) if number == signal.SIGINT else os.kill(parent.pid, number)
    output, _ = parent.communicate(timeout=300)
    assert parent.returncode != 0
    wait_for(lambda: session(parent.pid) == [], seconds=60)
    assert "Traceback" not in output
    assert "ignored" not in output
    if moment == "in a trial":
        assert parent.returncode == 130
        assert "Stopped. Continue:" in output
        assert (tmp_path / "lightning_logs/tune/best.yaml").is_file()
        assert all(trial.state != TrialState.RUNNING for trial in load(tmp_path).trials)


def test_the_death_of_the_fork_server_loses_nothing(whole, data_dir, tmp_path):
    parent = start(data_dir, tmp_path, "--n_trials=5", "--workers=1")
    with stopped_worker(tmp_path, execution=1) as (pid, _):
        server = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        for child in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text(encoding="utf-8").split():
            os.kill(int(child), signal.SIGKILL)  # also the resource tracker
        wait_for(lambda: process_name(server).endswith(":None"))
        wait_for(lambda: process_name(pid).endswith(":None"))  # no other process would end the worker
    output, _ = parent.communicate(timeout=240)
    assert parent.returncode == 0, output
    assert "Traceback" not in output
    assert outcome(load(tmp_path)) == outcome(load(whole[0]))
    for trial in load(tmp_path).trials:
        assert [execution["execution"] for execution in trial.user_attrs["executions"]] == [0, 1]
    wait_for(lambda: session(parent.pid) == [])


def test_a_trial_that_diverges_or_raises_is_recorded_with_its_reason(tune, tmp_path):
    space = choices(**{
        "model.optimizer.init_args.lr": [1e-3, 1e30],
        "model.network.init_args.activation": ["ReLU", "Bogus"],
    })  # fmt: skip
    code, output, _ = tune(space, "--n_trials=9", "--executions_per_trial=1", "--sampler=BruteForceSampler")
    assert code == 0
    drawn = counted_trials(load(tmp_path / "here"))
    trials = {tuple(trial.params.values()): trial for trial in drawn}
    assert len(trials) == len(drawn) == 4  # the space of the sampler is exhausted
    assert trials[1e-3, "ReLU"].state == TrialState.COMPLETE
    diverged = trials[1e30, "ReLU"].user_attrs["error"]
    assert diverged.startswith("ArithmeticError: ")
    assert "after epoch 1" in diverged
    assert "Bogus" in trials[1e-3, "Bogus"].user_attrs["error"]
    assert "1 complete, 0 pruned, 3 failed" in output


def test_a_study_without_any_success_ends_with_the_reason(tune):
    code, _, errors = tune(choices(**{"model.network.init_args.activation": ["Bogus"]}), "--n_trials=1")
    assert code == 1
    assert "No trial is complete" in errors
    assert "Bogus" in errors
