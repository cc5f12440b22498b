"""The study: draws, owners, totals, and what is refused; without any training."""

import math
import multiprocessing
import os
import time
from collections import Counter

import numpy as np
import optuna
import pytest
from conftest import posix
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner
from optuna.samplers import BruteForceSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from mnist_lightning.tune import study as studies
from mnist_lightning.tune.space import SearchSpace
from mnist_lightning.tune.storage import open_storage
from mnist_lightning.tune.study import (
    SWEEPS,
    TrialSampler,
    give_back,
    is_complete,
    is_counted,
    open_study,
    process_name,
    set_attributes,
    sweep,
)

SPACE = SearchSpace({"a": IntDistribution(1, 1000), "b": CategoricalDistribution(["x", "y"])})


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "study" / "journal.log")


def seeded(number):
    return RandomSampler(int(np.random.SeedSequence([42, number]).generate_state(1)[0]))


def make(journal, space=SPACE, sampler=seeded, name="study", combinations=math.inf, **settings):
    study, _ = open_study(open_storage(journal), name, ["maximize"], settings, space)
    study.sampler = TrialSampler(study, sampler, combinations)
    return study


def ask(study, space, n_trials):
    """Take a trial as a command of its own."""
    number = studies.ask(study, space, n_trials, process_name())
    return None if number is None else study.trials[number]


def set_attribute(study, number, **attributes):
    set_attributes(study, study.trials[number], **attributes)


def in_process(target, *args):
    """Run in a forked process, which ends as if killed: no handler runs."""

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
        trial.should_prune()  # makes the brackets
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


@pytest.mark.parametrize("sampler", [lambda grid: GridSampler(grid, seed=0), lambda _: BruteForceSampler(seed=0)])
def test_a_finite_space_is_known_to_be_exhausted_by_all_who_draw(journal, sampler):
    grid = {"a": [1, 2], "b": ["x", "y"]}
    space = SearchSpace({"a": IntDistribution(1, 2), "b": SPACE["b"]})
    first, second = (make(journal, space, lambda number: sampler(grid), combinations=4) for _ in range(2))
    assert not is_complete(first, 99)
    trials = [ask(study, space, 99) for study in (first, second, first)]
    assert trials[2] is not None
    first.tell(trials[0].number, 0.0)
    last = ask(second, space, 99)
    assert [ask(study, space, 99) for study in (first, second)] == [None, None]
    assert len(first.trials) == 4
    assert not is_complete(first, 99)  # some are at work
    for trial in (*trials[1:], last):
        second.tell(trial.number, 0.0)
    assert is_complete(first, 99)
    counted = [trial for trial in first.trials if is_counted(trial)]
    assert len({tuple(trial.params.values()) for trial in counted}) == len(counted) == 4


def test_the_same_settings_continue_a_study(journal):
    study = make(journal, epochs=3)
    study.tell(study.ask(SPACE), 1.0)
    again, is_new = open_study(open_storage(journal), "study", ["maximize"], {"epochs": 3}, SPACE)
    assert not is_new
    assert again.best_value == 1.0


def test_a_number_for_all_layers_is_what_a_list_of_it_was(journal):
    """As the defaults of earlier versions were."""
    make(journal, model={"dropout": [0.2, 0.2]})
    make(journal, model={"dropout": 0.2})
    with pytest.raises(MisconfigurationException, match="dropout is"):
        make(journal, model={"dropout": 0.1})


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
    with pytest.raises(MisconfigurationException, match=message):
        make(journal, space, **settings)


def test_a_study_of_someone_else_is_left_alone(journal):
    storage = open_storage(journal)
    other = optuna.create_study(storage=storage, study_name="study", direction="maximize")
    other.tell(other.ask(SPACE), 1.0)
    with pytest.raises(MisconfigurationException, match="not made by tune"):
        make(journal)


def test_the_total_counts_every_process(journal):
    study = make(journal)
    trials = [ask(study, SPACE, 3) for _ in range(3)]
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert ask(make(journal), SPACE, 3) is None
    study.tell(0, state=TrialState.PRUNED)
    set_attribute(study, 1, error="it diverged")
    study.tell(1, state=TrialState.FAIL)
    assert ask(study, SPACE, 3) is None  # pruned and failed trials count
    assert ask(study, SPACE, 4).number == 3


def test_the_last_place_is_taken_once(journal, monkeypatch):
    first, second = make(journal), make(journal)
    ask(first, SPACE, 2)
    stale = second.get_trials()
    ask(first, SPACE, 2)
    answers = iter([stale])  # what the second saw before it asked
    real = second.get_trials
    monkeypatch.setattr(second, "get_trials", lambda **options: next(answers, None) or real(**options))
    assert ask(second, SPACE, 2) is None
    monkeypatch.undo()
    assert [is_counted(trial) for trial in second.trials] == [True, True, False]


@posix
def test_processes_share_a_study_exactly(journal):
    make(journal)

    def run():
        study = make(journal)
        while (trial := ask(study, SPACE, 25)) is not None:
            time.sleep(0.002)
            study.tell(trial.number, trial.params["a"])

    processes = [in_process(run) for _ in range(4)]
    for process in processes:
        process.join(60)
    study = make(journal)
    counted = [trial for trial in study.trials if is_counted(trial)]
    assert [trial.state for trial in counted] == [TrialState.COMPLETE] * 25
    assert len({trial.user_attrs["owner"] for trial in counted}) > 1
    drawn = Counter(trial.params["a"] for trial in study.trials)
    assert len(drawn) > 20  # no process repeats what another has drawn


@posix
def test_a_trial_of_a_dead_process_waits_for_another_with_what_it_has(journal):
    study = make(journal)
    own = ask(study, SPACE, 3)

    def die():
        other = make(journal)
        trial = ask(other, SPACE, 3)
        set_attribute(other, trial.number, executions=[{"score": 0.5}], workers={"1": "worker"})

    in_process(die).join(30)
    (dead,) = [trial for trial in study.trials if trial.number != own.number]
    assert sweep(study, {}) == [dead.number]
    assert sweep(study, {}) == []  # the second time there is nothing to do
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "WAITING"]
    again = ask(study, SPACE, 3)
    assert (again.number, again.params) == (dead.number, dead.params)
    assert again.user_attrs == {
        "executions": [{"score": 0.5}], "attempts": 1, "workers": {}, "owner": process_name(),
    }  # fmt: skip
    assert ask(study, SPACE, 3).number == 2
    assert ask(study, SPACE, 3) is None


@posix
def test_a_trial_whose_process_died_when_its_error_was_known_has_failed(journal):
    study = make(journal)

    def die():
        other = make(journal)
        set_attribute(other, ask(other, SPACE, 1).number, error="it diverged")

    in_process(die).join(30)
    sweep(study, {})
    assert [(trial.state.name, is_counted(trial)) for trial in study.trials] == [("FAIL", True)]


@pytest.mark.parametrize("sampler", [seeded, lambda _: GridSampler({"a": [1, 2, 3], "b": ["x"]}, seed=0)])
@posix
def test_dead_trials_shift_no_draw(journal, sampler):
    study, whole = make(journal, sampler=sampler), make(journal, sampler=sampler, name="whole")
    in_process(lambda: ask(make(journal, sampler=sampler), SPACE, 3)).join(30)
    sweep(study, {})
    for expected in range(3):
        assert ask(study, SPACE, 3).number == expected
        whole.ask(SPACE)
    assert ask(study, SPACE, 3) is None
    assert values(study) == values(whole)


@pytest.mark.parametrize("has_owner", [True, False])
@posix
def test_a_trial_whose_process_died_while_drawing_is_drawn_to_its_end(journal, has_owner):
    study, whole, heartbeats = make(journal), make(journal, name="whole"), {}

    def die():
        trial = make(journal).ask({"a": SPACE["a"]})
        if has_owner:
            trial.set_user_attr("owner", process_name())

    in_process(die).join(30)
    for _ in range(0 if has_owner else SWEEPS):
        sweep(study, heartbeats)
        assert study.trials[0].state == TrialState.RUNNING  # it may still be at it
    sweep(study, heartbeats)
    assert study.trials[0].state == TrialState.WAITING
    for expected in range(2):
        assert ask(study, SPACE, 2).number == expected
        whole.ask(SPACE)
    assert ask(study, SPACE, 2) is None
    assert values(study) == values(whole)


def test_a_trial_that_was_finished_meanwhile_is_not_given_back(journal):
    study, other = make(journal), make(journal)
    trial = ask(study, SPACE, 2)
    other.tell(trial.number, 1.0)
    give_back(study, trial, attempts=1)
    assert study.trials[0].state == TrialState.COMPLETE
    assert "attempts" not in study.trials[0].user_attrs


def test_a_machine_that_is_silent_for_the_grace_period_has_vanished(journal, monkeypatch):
    study, other = make(journal), make(journal)
    with monkeypatch.context() as patch:
        patch.setattr(studies.socket, "gethostname", lambda: "elsewhere")
        silent, alive = ask(other, SPACE, 2), ask(other, SPACE, 2)
    heartbeats = {}
    for beat in range(SWEEPS + 1):
        assert study.trials[silent.number].state == TrialState.RUNNING
        set_attribute(other, alive.number, heartbeat=-beat)  # whatever its clock says
        sweep(study, heartbeats)
    assert [trial.state.name for trial in study.trials] == ["WAITING", "RUNNING"]
    with monkeypatch.context() as patch:  # another machine has it now, which has not spoken yet
        patch.setattr(studies.socket, "gethostname", lambda: "a third")
        ask(other, SPACE, 2)
    for beat in range(SWEEPS):
        set_attribute(other, alive.number, heartbeat=beat + 1)
        assert sweep(study, heartbeats) == []


def test_a_process_elsewhere_with_the_number_of_one_here_is_another(journal, monkeypatch):
    study = make(journal)
    ask(study, SPACE, 1)
    monkeypatch.setattr(studies, "_machine", lambda: "another container of this host")
    sweep(study, {})
    assert study.trials[0].state == TrialState.RUNNING


def test_the_first_command_sets_the_time_of_all(journal, monkeypatch):
    study, other = make(journal), make(journal)
    studies.renew_deadline(study, 60.0)
    studies.renew_deadline(other, 3600.0)
    studies.renew_deadline(other, None)
    assert 50 < studies.time_left(study) <= 60
    now = time.time()
    monkeypatch.setattr(studies.time, "time", lambda: now + 61)
    assert studies.is_over(study)
    studies.renew_deadline(other, 3600.0)  # it goes on with new time
    assert 3500 < studies.time_left(study) <= 3600
    monkeypatch.setattr(studies.time, "time", lambda: now + 5000)
    studies.renew_deadline(study, None)
    assert studies.time_left(other) == math.inf
