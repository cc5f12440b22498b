"""The study: draws, owners, totals, and what is refused; without any training."""

import multiprocessing
import os
import time
from collections import Counter

import numpy as np
import optuna
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner
from optuna.samplers import GridSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from mnist_lightning import study as studies
from mnist_lightning.storage import open_storage
from mnist_lightning.study import SWEEPS, TrialSampler, ask, counts, describe, open_study, put_back, sweep

SPACE = {"a": IntDistribution(1, 1000), "b": CategoricalDistribution(["x", "y"])}


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "study" / "journal.log")


def seeded(number):
    return RandomSampler(int(np.random.SeedSequence([42, number]).generate_state(1)[0]))


def make(journal, space=SPACE, sampler=seeded, name="study", **settings):
    study, _ = open_study(open_storage(journal), name, "maximize", settings, space)
    study.sampler = TrialSampler(study, sampler)
    return study


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


def test_a_grid_is_known_to_be_exhausted(journal):
    grid = {"a": [1, 2], "b": ["x", "y"]}
    study = make(journal, sampler=lambda number: GridSampler(grid, seed=0))
    while not study.sampler.exhausted:
        study.tell(study.ask(SPACE), 0.0)
    assert len(study.trials) == 4
    assert len({tuple(params.values()) for params in values(study)}) == 4


def test_the_same_settings_continue_a_study(journal):
    study = make(journal, epochs=3)
    study.tell(study.ask(SPACE), 1.0)
    again, is_new = open_study(open_storage(journal), "study", "maximize", {"epochs": 3}, SPACE)
    assert not is_new
    assert again.best_value == 1.0


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({"epochs": 4}, SPACE, "epochs is 3 in the study, 4 in the command"),
        ({"epochs": 3}, {"a": SPACE["a"]}, "b is one of x, y in the study, not searched in the command"),
        (
            {"epochs": 3},
            {**SPACE, "a": FloatDistribution(0.1, 1, log=True)},
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
    study.tell(trials[0], state=TrialState.PRUNED)
    trials[1].set_user_attr("error", "it diverged")
    study.tell(trials[1], state=TrialState.FAIL)
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
    assert [counts(trial) for trial in second.trials] == [True, True, False]


def test_processes_share_a_study_exactly(journal):
    make(journal)

    def run():
        study = make(journal)
        while (trial := ask(study, SPACE, 25)) is not None:
            time.sleep(0.002)
            study.tell(trial, trial.params["a"])

    processes = [in_process(run) for _ in range(4)]
    for process in processes:
        process.join(60)
    study = make(journal)
    counted = [trial for trial in study.trials if counts(trial)]
    assert [trial.state for trial in counted] == [TrialState.COMPLETE] * 25
    assert len({trial.user_attrs["owner"] for trial in counted}) > 1
    drawn = Counter(trial.params["a"] for trial in study.trials)
    assert len(drawn) > 20  # no process repeats what another has drawn


def test_trials_of_a_dead_process_are_tried_again(journal):
    study = make(journal)
    own = ask(study, SPACE, 3)

    def die():
        trial = ask(make(journal), SPACE, 3)
        trial.set_user_attr("executions", [{"score": 0.5}])

    in_process(die).join(30)
    (dead,) = [trial for trial in study.trials if trial.number != own.number]
    sweep(study, SPACE, {})
    sweep(study, SPACE, {})  # the second time there is nothing to do
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "FAIL", "WAITING"]
    again = ask(study, SPACE, 3)
    assert again.params == dead.params
    assert {key: value for key, value in again.user_attrs.items() if key != "owner"} == {
        "executions": [{"score": 0.5}], "attempts": 1, "continues": dead.number,
    }  # fmt: skip
    assert ask(study, SPACE, 3).number == 3


def test_a_trial_whose_process_died_when_its_error_was_known_has_failed(journal):
    study = make(journal)
    in_process(lambda: ask(make(journal), SPACE, 1).set_user_attr("error", "it diverged")).join(30)
    sweep(study, SPACE, {})
    assert [(trial.state.name, counts(trial)) for trial in study.trials] == [("FAIL", True)]


def test_dead_trials_do_not_count_and_shift_no_draw(journal):
    study = make(journal)
    in_process(lambda: ask(make(journal), SPACE, 3)).join(30)
    sweep(study, SPACE, {})
    assert [ask(study, SPACE, 3).number for _ in range(3)] == [1, 2, 3]
    assert ask(study, SPACE, 3) is None
    whole = make(journal, name="whole")
    assert values(study)[1:] == [whole.ask(SPACE).params for _ in range(3)]


def test_a_trial_whose_process_died_while_drawing_is_no_trial(journal):
    study, heard = make(journal), {}
    in_process(lambda: make(journal).ask({"a": SPACE["a"]})).join(30)
    for _ in range(SWEEPS):
        sweep(study, SPACE, heard)
    assert study.trials[0].state == TrialState.RUNNING  # it may still be at it
    sweep(study, SPACE, heard)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
    assert not counts(study.trials[0])


def test_a_trial_is_put_back_once(journal):
    study, other = make(journal), make(journal)
    ask(study, SPACE, 2)
    (trial,) = study.trials
    for process in (study, other):
        put_back(process, trial, SPACE, blame=False)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]
    assert study.trials[1].user_attrs["attempts"] == 0


def test_a_trial_given_up_by_a_process_that_died_at_it_is_not_lost(journal, monkeypatch):
    study = make(journal)
    ask(study, SPACE, 1)
    with monkeypatch.context() as patch:
        patch.setattr(studies, "_enqueue_again", lambda *_, **__: None)  # dies between the two
        put_back(study, study.trials[0], SPACE, blame=True)
    assert ask(study, SPACE, 1) is None  # no other trial takes its place
    stale = study.get_trials()
    with monkeypatch.context() as patch:
        patch.setattr(study, "get_trials", lambda **_: stale)
        sweep(study, SPACE, {})  # two at once
        sweep(study, SPACE, {})
    sweep(study, SPACE, {})
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING", "WAITING"]
    again = ask(study, SPACE, 1)
    assert (again.number, again.params) == (1, stale[0].params)
    assert ask(study, SPACE, 1) is None
    assert [counts(trial) for trial in study.trials] == [False, True, False]


def test_a_machine_that_is_silent_for_the_grace_period_has_vanished(journal, monkeypatch):
    study, other = make(journal), make(journal)
    with monkeypatch.context() as patch:
        patch.setattr(studies.socket, "gethostname", lambda: "elsewhere")
        silent, alive = ask(other, SPACE, 2), ask(other, SPACE, 2)
    heard = {}
    for beat in range(SWEEPS + 1):
        assert study.trials[silent.number].state == TrialState.RUNNING
        alive.set_user_attr("heartbeat", -beat)  # whatever its clock says
        sweep(study, SPACE, heard)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING", "WAITING"]


def test_a_process_elsewhere_with_the_number_of_one_here_is_another(journal, monkeypatch):
    study = make(journal)
    ask(study, SPACE, 1)
    monkeypatch.setattr(studies, "_machine", lambda: "another container of this host")
    sweep(study, SPACE, {})
    assert study.trials[0].state == TrialState.RUNNING


def test_distributions_in_words():
    assert describe(IntDistribution(32, 512, step=32)) == "32 to 512, step 32"
    assert describe(FloatDistribution(1e-4, 0.1, log=True)) == "0.0001 to 0.1, logarithmic"
    assert describe(CategoricalDistribution([None, True, 0.1, "torch.optim.Adam"])) == "one of None, True, 0.1, Adam"


def test_short_keys_are_what_the_config_s_nesting_leaves():
    keys = ["model.network.init_args.units.0", "model.optimizer.class_path", "data.batch_size", "model.optimizer"]
    assert list(map(studies.short_key, keys)) == ["units.0", "optimizer", "batch_size", "optimizer"]
    assert studies.short_key("model.network.class_path") == "network"
    assert studies.short_key("model.optimizer.init_args.lr") == "optimizer.lr"
