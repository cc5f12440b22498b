"""The study: draws, owners, totals, and what is refused; without any training."""

import math
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pytest
from helpers.commands import posix
from helpers.studies import counted_trials
from jsonargparse import Namespace
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from mnist_lightning.search import recovery, trial
from mnist_lightning.search import study as studies
from mnist_lightning.search.record import Metric, is_counted
from mnist_lightning.search.recovery import ATTEMPTS, SWEEPS, Recovery, process_name
from mnist_lightning.search.sampler import TrialSampler
from mnist_lightning.search.space import SearchSpace
from mnist_lightning.search.storage import open_storage
from mnist_lightning.search.study import is_complete, open_study
from mnist_lightning.search.trial import FailedTrialError, Objective, Search, run_trials
from mnist_lightning.system.errors import UserError

SPACE = SearchSpace({"a": IntDistribution(1, 1000), "b": CategoricalDistribution(["x", "y"])})


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "study" / "journal.log")


def seeded(number):
    return RandomSampler(int(np.random.SeedSequence([42, number]).generate_state(1)[0]))


def make(journal, space=SPACE, sampler=seeded, name="study", **settings):
    study = open_study(open_storage(journal), name, [Metric("value", "maximize")], settings, space)
    study.sampler = TrialSampler(study, sampler)
    return study


def search(journal, n_trials, space=SPACE, sampler="RandomSampler", executions=1, **arguments):
    """A search of the study ``study``."""
    options = Namespace(
        n_trials=n_trials, executions_per_trial=executions, study_name="study", limits={}, keep_checkpoints="none",
        sampler=Namespace(class_path=f"optuna.samplers.{sampler}", init_args=Namespace(**arguments)),
        pruner=Namespace(class_path="optuna.pruners.NopPruner"),
    )  # fmt: skip
    base = {"seed_everything": 42, "trainer": {"max_epochs": 1}}
    return Search(options, [Metric("value", "maximize")], base, space, journal, Path(journal).parent)


def trained(objective, trial, number, executions):
    """Return the result of an execution without training."""
    return {"execution": number, "seed": 0, "score": float(trial.params["a"]), "values": [[0, trial.params["a"]]]}


@pytest.fixture(autouse=True)
def _without_training(monkeypatch):
    monkeypatch.setattr(Objective, "execute", trained)


def work(journal, n_trials, **options):
    """Run trials as a worker does."""
    make(journal, options.get("space", SPACE))
    run_trials(search(journal, n_trials, **options), open_storage(journal))
    return make(journal, options.get("space", SPACE))


def work_and_die(journal, n_trials, executions=1, after=0):
    """Run trials as a worker that is killed during its first trial, after some executions."""

    def execute(objective, trial, number, done):
        if number == after:
            os._exit(0)
        return trained(objective, trial, number, done)

    def run():
        Objective.execute = execute
        work(journal, n_trials, executions=executions)

    in_process(run).join(30)


def in_process(target, *args):
    """Run a function in a forked process, which ends as if killed: no handler runs."""

    def body():
        target(*args)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def values(study):
    return [trial.params for trial in study.trials]


def test_draws_depend_on_the_place_of_the_trial_only(journal, tmp_path):
    whole = make(journal)
    for _ in range(6):
        whole.ask(SPACE)
    assert len({trial.params["a"] for trial in whole.trials}) > 4
    other = str(tmp_path / "other.log")
    for _ in range(6):  # a new process each time
        make(other).ask(SPACE)
    assert values(make(other)) == values(whole)


def test_no_draw_is_repeated_where_a_pruner_parts_the_study(journal):
    study = make(journal)
    study.pruner = HyperbandPruner(min_resource=1, max_resource=9)
    drawn = []
    for _ in range(12):
        trial = study.ask(SPACE)
        trial.report(0.5, 1)
        trial.should_prune()  # creates the brackets
        drawn.append(trial.params["a"])
    whole = make(journal, name="whole")
    assert drawn == [whole.ask(SPACE).params["a"] for _ in range(12)]


@pytest.mark.parametrize("sampler", [lambda number: TPESampler(n_startup_trials=2, seed=number), seeded])
def test_a_sampler_that_learns_sees_the_trials_before(journal, sampler):
    study = make(journal, sampler=sampler)
    for _ in range(30):
        trial = study.ask(SPACE)
        study.tell(trial, trial.params["a"])
    late = np.mean([params["a"] for params in values(study)[15:]])
    assert (late > 700) == (sampler is not seeded)


FINITE = SearchSpace({"a": IntDistribution(1, 2), "b": SPACE["b"]})


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [{"sampler": "GridSampler", "search_space": {"a": [1, 2], "b": ["x", "y"]}}, {"sampler": "BruteForceSampler"}],
)
@posix
def test_a_finite_space_is_drawn_once_by_all_who_draw(journal, sampler):
    make(journal, FINITE)

    def run():
        time.sleep(0.01)
        work(journal, 99, space=FINITE, **sampler)

    processes = [in_process(run) for _ in range(3)]
    for process in processes:
        process.join(60)
    for _ in range(2):  # the second time, nothing is left
        study = work(journal, 99, space=FINITE, **sampler)
        counted = counted_trials(study)
        assert len({tuple(trial.params.values()) for trial in counted}) == len(counted) == 4
        assert {trial.state for trial in counted} == {TrialState.COMPLETE}


def test_the_same_settings_continue_a_study(journal):
    study = make(journal, epochs=3)
    study.tell(study.ask(SPACE), 1.0)
    again = open_study(open_storage(journal), "study", [Metric("value", "maximize")], {"epochs": 3}, SPACE)
    assert again.best_value == 1.0


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({"epochs": 4}, SPACE, "epochs is 3 in the study, 4 in the command"),
        ({"epochs": 3}, SearchSpace({"a": SPACE["a"]}), "b is one of x, y in the study, not searched in the command"),
        (
            {"epochs": 3},
            SearchSpace({**SPACE, "a": FloatDistribution(0.1, 1, log=True)}),
            "a is 1 to 1000, step 1 in the study, 0.1 to 1, logarithmic in the command",
        ),
    ],
)
def test_a_change_is_refused_and_named(journal, settings, space, message):
    make(journal, epochs=3)
    with pytest.raises(UserError, match=message):
        make(journal, space, **settings)


def test_a_study_of_someone_else_is_left_alone(journal):
    storage = open_storage(journal)
    other = optuna.create_study(storage=storage, study_name="study", direction="maximize")
    other.tell(other.ask(SPACE), 1.0)
    with pytest.raises(UserError, match="not made by tune"):
        make(journal)


def test_a_setting_that_a_study_lacks_has_its_default(journal):
    make(journal, model={"lr": 0.1})
    metrics = [Metric("value", "maximize")]
    newer = {"model": {"lr": 0.1, "lr_interval": "step"}}
    for default, is_refused in (("step", False), ("epoch", True)):
        try:
            open_study(open_storage(journal), "study", metrics, newer, SPACE, {"model.lr_interval": default})
        except UserError as error:
            assert is_refused
            assert "model.lr_interval is epoch in the study, step in the command" in str(error)  # noqa: PT017
        else:
            assert not is_refused


@pytest.mark.slow
def test_the_total_counts_every_trial_but_those_too_many(journal):
    study = work(journal, 3)
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert is_complete(study, 3)
    pruned = study.ask(SPACE)
    study.tell(pruned, state=TrialState.PRUNED)
    failed = study.ask(SPACE)
    failed.set_user_attr("error", "it diverged")
    study.tell(failed, state=TrialState.FAIL)
    study.tell(study.ask(), state=TrialState.FAIL)  # two processes asked simultaneously
    assert len(work(journal, 5).trials) == 6
    assert len(work(journal, 6).trials) == 7


@pytest.mark.slow
def test_a_limit_is_a_constraint_but_not_of_executions_that_are_older(journal, monkeypatch):
    def execute(objective, trial, number, executions):
        limited = {"limited": {"parameters": 5.0}} if trial.number or number else {}
        return trained(objective, trial, number, executions) | limited

    monkeypatch.setattr(Objective, "execute", execute)
    make(journal)
    limited = search(journal, 2, executions=2)
    limited.options.limits = {"parameters": 3.0}
    run_trials(limited, open_storage(journal))
    assert [trial.constraints for trial in make(journal).trials] == [{}, {"parameters": 2.0}]


def test_a_trial_too_many_shifts_no_draw(journal):
    study = work(journal, 2)
    study.tell(study.ask(), state=TrialState.FAIL)
    study, whole = work(journal, 4), make(journal, name="whole")
    for _ in range(4):
        whole.ask(SPACE)
    assert [trial.params for trial in counted_trials(study)] == values(whole)


def test_the_last_place_is_taken_once(journal):
    study = make(journal)
    first, second, third = (study.ask() for _ in range(3))
    objective = Objective(search(journal, 2), study, open_storage(journal), process_name())
    with pytest.raises(FailedTrialError):
        objective(third)
    study.tell(third, state=TrialState.FAIL)
    for each in (second, first):
        study.tell(each, objective(each))
    assert [is_counted(trial) for trial in study.trials] == [True, True, False]


@pytest.mark.slow
@posix
def test_processes_share_a_study_exactly(journal, monkeypatch):
    make(journal)
    start = multiprocessing.get_context("fork").Barrier(4)

    def execute(objective, trial, number, executions):
        if os.getpid() not in started:  # a fast process waits until all have a trial
            started.add(os.getpid())
            start.wait(60)
        return trained(objective, trial, number, executions)

    started = set()
    monkeypatch.setattr(Objective, "execute", execute)
    processes = [in_process(work, journal, 25) for _ in range(4)]
    for process in processes:
        process.join(60)
    study = make(journal)
    counted = counted_trials(study)
    assert [trial.state for trial in counted] == [TrialState.COMPLETE] * 25
    assert len({trial.user_attrs["owner"] for trial in counted}) == 4
    drawn = Counter(trial.params["a"] for trial in counted)
    assert len(drawn) > 20  # no process repeats the draws of another
    alone = make(journal, name="alone")
    for _ in range(25):
        alone.ask(SPACE)
    assert sorted(map(str, values(alone))) == sorted(str(trial.params) for trial in counted)


@posix
def test_a_trial_of_a_dead_process_waits_for_another_with_what_it_has(journal):
    study = make(journal)
    own = study.ask(SPACE)
    own.set_user_attr("owner", process_name())
    work_and_die(journal, 3, executions=2, after=1)
    recovery = Recovery(study, open_storage(journal))
    assert recovery.sweep() == [1]
    assert recovery.sweep() == []  # a second sweep has nothing to do
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "WAITING"]
    dead = study.trials[1]
    assert dead.user_attrs["attempts"] == 1
    assert [execution["execution"] for execution in dead.user_attrs["executions"]] == [0]
    trials = work(journal, 3, executions=2).trials
    assert (trials[1].params, trials[1].value) == (dead.params, dead.params["a"])
    assert [execution["execution"] for execution in trials[1].user_attrs["executions"]] == [0, 1]
    assert trials[1].user_attrs["attempts"] == 0  # it made progress
    assert [trial.state.name for trial in trials] == ["RUNNING", "COMPLETE", "COMPLETE"]


@posix
def test_a_trial_that_kills_its_processes_has_failed(journal):
    study = make(journal)
    for _ in range(ATTEMPTS):
        work_and_die(journal, 1)
        assert Recovery(study, open_storage(journal)).sweep() == [0]
    (trial,) = work(journal, 1).trials
    assert (trial.state, trial.user_attrs["error"]) == (TrialState.FAIL, "3 processes died while running it")


@posix
def test_a_trial_whose_process_died_when_its_error_was_known_has_failed(journal):
    study = make(journal)

    def run():
        trial = make(journal).ask(SPACE)
        trial.set_user_attr("owner", process_name())
        trial.set_user_attr("error", "it diverged")

    in_process(run).join(30)
    Recovery(study, open_storage(journal)).sweep()
    (trial,) = work(journal, 1).trials
    assert (trial.state.name, trial.user_attrs["error"]) == ("FAIL", "it diverged")


@pytest.mark.slow
@pytest.mark.parametrize("has_owner", [True, False])
@posix
def test_a_trial_whose_process_died_while_drawing_is_drawn_to_its_end(journal, has_owner):
    study, whole = make(journal), make(journal, name="whole")

    def die():
        trial = make(journal).ask({"a": SPACE["a"]})
        if has_owner:
            trial.set_user_attr("owner", process_name())

    in_process(die).join(30)
    recovery = Recovery(study, open_storage(journal))
    for _ in range(0 if has_owner else SWEEPS):
        recovery.sweep()
        assert study.trials[0].state == TrialState.RUNNING  # its worker may still be running it
    recovery.sweep()
    assert study.trials[0].state == TrialState.WAITING
    for _ in range(2):
        whole.ask(SPACE)
    assert values(work(journal, 2)) == values(whole)


def test_a_trial_that_was_finished_meanwhile_is_not_put_back(journal):
    study, other = make(journal), make(journal)
    number = study.ask(SPACE).number
    other.tell(number, 1.0)
    Recovery(study, open_storage(journal)).put_back(number, died=True)
    assert study.trials[0].state == TrialState.COMPLETE
    assert "attempts" not in study.trials[0].user_attrs


def test_a_trial_that_others_have_is_left_to_them(journal, monkeypatch):
    study = make(journal)
    other = Recovery(study, open_storage(journal))

    def execute(objective, trial, number, executions):
        if trial.number == 0 and not taken:
            taken.append(trial.number)
            other.put_back(0, died=True)
            again = make(journal).ask()
            again.set_user_attr("owner", "another")
            raise RuntimeError("which is not the trial's")
        return trained(objective, trial, number, executions)

    def body(objective, trial, number, executions):  # like Objective.execute
        try:
            return execute(objective, trial, number, executions)
        except RuntimeError:
            assert not objective.owns(trial)
            raise AbandonedTrial from None

    taken = []
    AbandonedTrial = trial.AbandonedTrial  # noqa: N806
    monkeypatch.setattr(Objective, "execute", body)
    trials = work(journal, 3).trials
    assert [each.state.name for each in trials] == ["RUNNING", "COMPLETE", "COMPLETE"]
    assert trials[0].user_attrs["owner"] == "another"


def test_a_machine_that_is_silent_for_the_grace_period_has_vanished(journal, monkeypatch):
    study, other = make(journal), make(journal)
    elsewhere, alive = Recovery(study, open_storage(journal)), Recovery(other, open_storage(journal))
    for name in ("silent", "alive"):
        other.ask(SPACE).set_user_attr("owner", f"{name}:1:2")
    for _ in range(SWEEPS + 1):
        assert study.trials[0].state == TrialState.RUNNING
        alive.beat(["alive:1:2"])
        elsewhere.sweep()
    assert [trial.state.name for trial in study.trials] == ["WAITING", "RUNNING"]
    other.ask().set_user_attr("owner", "a third:1:2")  # another machine owns it now, which has not reported yet
    for _ in range(SWEEPS):
        alive.beat(["alive:1:2"])
        assert elsewhere.sweep() == []


def test_a_process_elsewhere_with_the_number_of_one_here_is_another(journal, monkeypatch):
    study = make(journal)
    study.ask(SPACE).set_user_attr("owner", process_name())
    monkeypatch.setattr(recovery, "_machine", lambda: "another container of this host")
    Recovery(study, open_storage(journal)).sweep()
    assert study.trials[0].state == TrialState.RUNNING


def test_the_first_command_sets_the_time_of_all(journal, monkeypatch):
    study, other = make(journal), make(journal)
    studies.renew_deadline(study, 60.0)
    studies.renew_deadline(other, 3600.0)
    studies.renew_deadline(other, None)
    assert 50 < studies.time_left(study) <= 60
    now = time.time()
    monkeypatch.setattr(studies.time, "time", lambda: now + 61)
    assert studies.is_time_up(study)
    studies.renew_deadline(other, 3600.0)  # the search continues with a new time limit
    assert 3500 < studies.time_left(study) <= 3600
    monkeypatch.setattr(studies.time, "time", lambda: now + 5000)
    studies.renew_deadline(study, None)
    assert studies.time_left(other) == math.inf
