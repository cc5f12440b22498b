"""Search spaces: conditions, values and configs, words and short names."""

import pytest
from helpers.studies import counted_trials
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BruteForceSampler, RandomSampler, TPESampler

from mnist_lightning.search.record import Metric
from mnist_lightning.search.sampler import TrialSampler, draw
from mnist_lightning.search.space import (
    config_with,
    describe,
    make_space,
    params_of,
    short_key,
)
from mnist_lightning.search.storage import open_storage
from mnist_lightning.search.study import open_study
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import spread

BASE = {
    "trainer": {"max_epochs": 2},
    "model": {
        "network": {"class_path": "MLP", "init_args": {"units": [128, 64], "dropout": [0.2, 0.2], "l2": 0.01}},
        "optimizer": {"class_path": "mnist_lightning.optimizers.KerasAdam", "init_args": {"lr": 0.003}},
        "lr_scheduler": None,
    },
}
NETWORK = "model.network.init_args"
LENGTH = f"{NETWORK}.units.length"


def integer(low, high, **more):
    return {"class_path": "IntDistribution", "init_args": {"low": low, "high": high}, **more}


def choice(*choices, **more):
    return {"class_path": "CategoricalDistribution", "init_args": {"choices": [*choices]}, **more}


DEEP = {
    f"{NETWORK}.dropout.2": choice(0.1, 0.5, when={LENGTH: 3}),  # listed before the key that it depends on
    f"{NETWORK}.units.2": integer(16, 32, when={LENGTH: 3}),
    LENGTH: integer(1, 3),
    f"{NETWORK}.dropout.1": choice(0.1, 0.5, when={LENGTH: [2, 3]}),
    "model.optimizer.class_path": choice("KerasAdam", "torch.optim.SGD"),
    "model.optimizer.init_args.momentum": choice(0.5, 0.9, when={"model.optimizer.class_path": "SGD"}),
    "model.lr_scheduler.class_path": choice(None, "OneCycleLR"),
    "model.lr_scheduler.init_args.max_lr": choice(0.1, when={"model.lr_scheduler.class_path": "OneCycleLR"}),
}


def test_a_config_has_what_was_drawn_and_nothing_else():
    space = make_space(DEEP, BASE)
    flat = {LENGTH: 1, "model.optimizer.class_path": "KerasAdam", "model.lr_scheduler.class_path": None}
    assert space.has_all(flat)
    assert not space.has_all({**flat, LENGTH: 2})
    model = config_with(BASE, flat, space)["model"]
    assert model["network"]["init_args"] == {"units": [128], "dropout": [0.2], "l2": 0.01}
    assert model["optimizer"] == BASE["model"]["optimizer"]  # a short name of the same class keeps the arguments
    assert model["lr_scheduler"] is None

    deep = {
        **{LENGTH: 3, f"{NETWORK}.units.2": 32, f"{NETWORK}.dropout.1": 0.5, f"{NETWORK}.dropout.2": 0.1},
        **{"model.optimizer.class_path": "torch.optim.SGD", "model.optimizer.init_args.momentum": 0.9},
        **{"model.lr_scheduler.class_path": "OneCycleLR", "model.lr_scheduler.init_args.max_lr": 0.1},
    }
    assert space.has_all(deep)
    model = config_with(BASE, deep, space)["model"]
    assert model["network"]["init_args"] == {"units": [128, 64, 32], "dropout": [0.2, 0.5, 0.1], "l2": 0.01}
    assert model["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    assert model["lr_scheduler"] == {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.1}}
    assert BASE["model"]["network"]["init_args"]["units"] == [128, 64]


def test_an_item_beyond_the_length_is_left_out():
    space = make_space({LENGTH: integer(1, 3), f"{NETWORK}.units.2": integer(16, 32)}, BASE)
    for length, units in ((1, [128]), (2, [128, 64]), (3, [128, 64, 32])):
        config = config_with(BASE, {LENGTH: length, f"{NETWORK}.units.2": 32}, space)
        assert config["model"]["network"]["init_args"]["units"] == units


def test_a_number_for_all_layers_is_a_list_where_an_item_is_searched():
    keys = [f"{NETWORK}.l2.1", f"{NETWORK}.units.0", f"{NETWORK}.activation.0", "model.optimizer.init_args.lr.0", 5]
    with_list = spread(BASE, keys)
    assert with_list["model"]["network"]["init_args"] == {**BASE["model"]["network"]["init_args"], "l2": [0.01, 0.01]}
    assert with_list["model"]["optimizer"] == BASE["model"]["optimizer"]
    space = make_space({f"{NETWORK}.l2.1": choice(0.1, 1.0)}, with_list)
    assert config_with(with_list, {f"{NETWORK}.l2.1": 0.1}, space)["model"]["network"]["init_args"]["l2"] == [0.01, 0.1]
    assert spread({"model": "x"}, keys) == {"model": "x"}


def test_a_choice_can_be_a_list():
    space = make_space({f"{NETWORK}.units": choice([64], [128, 64], 32)}, BASE)
    params = params_of({f"{NETWORK}.units": [128, 64]}, space, "here")
    assert config_with(BASE, params, space)["model"]["network"]["init_args"]["units"] == [128, 64]
    assert describe(space[f"{NETWORK}.units"]) == "one of [64], [128, 64], 32"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({f"{NETWORK}.units.0": integer(8, 9, when={"data.x": 1})}, "depends on data.x, which is not searched"),
        ({LENGTH: integer(1, 2), f"{NETWORK}.units.1": integer(8, 9, when={LENGTH: 3})}, "is 3, which is not searched"),
        ({f"{NETWORK}.units.3": integer(8, 9)}, "have no key model.network.init_args.units.3"),
        ({f"{NETWORK}.unit.length": integer(1, 2)}, "have no key model.network.init_args.unit.length"),
        (
            {f"{NETWORK}.units.{i}": integer(8, 9, when={f"{NETWORK}.units.{1 - i}": 8}) for i in (0, 1)},
            "or depends on model.network",
        ),
        ({"model.optimizer.class_path": choice("A", "B", when=3)}, "has no valid distribution"),
    ],
)
def test_conditions_that_cannot_be_are_refused(space, message):
    with pytest.raises(UserError, match=message):
        make_space(space, BASE)


def opened(tmp_path, space):
    return open_study(open_storage(str(tmp_path / "journal.log")), "study", [Metric("value", "maximize")], {}, space)


@pytest.mark.parametrize("make", [RandomSampler, lambda seed: TPESampler(multivariate=True, group=True, seed=seed)])
def test_samplers_draw_a_key_only_where_it_has_a_sense(tmp_path, make):
    space = make_space(DEEP, BASE)
    study = opened(tmp_path, space)
    study.sampler = TrialSampler(study, make)
    for _ in range(30):
        trial = study.ask()
        draw(trial, space)
        study.tell(trial, len(trial.params))
    assert all(space.has_all(trial.params) for trial in study.trials)
    assert {trial.params[LENGTH] for trial in study.trials} == {1, 2, 3}
    assert opened(tmp_path, make_space(DEEP, BASE)).trials == study.trials
    other = make_space({**DEEP, f"{NETWORK}.units.2": integer(16, 32, when={LENGTH: [2, 3]})}, BASE)
    with pytest.raises(UserError, match=r"units\.2 is 16 to 32, step 1, when units.length is 3 in the"):
        opened(tmp_path, other)


def test_a_tree_of_values_is_searched_whole(tmp_path):
    space = make_space({key: value for key, value in DEEP.items() if "units.2" not in key}, BASE)
    study = opened(tmp_path, space)
    study.sampler = TrialSampler(study, lambda _: BruteForceSampler(seed=0))

    def objective(trial):
        draw(trial, space)
        return 0.0

    study.optimize(objective)
    # depth 1, 2 (with two rates) and 3 (with four); SGD with two momenta or the other optimizer; a schedule or none
    size = (1 + 2 + 4) * 3 * 2
    complete = counted_trials(study)
    assert len({tuple(sorted(trial.params.items(), key=str)) for trial in complete}) == len(complete) == size


def test_distributions_in_words():
    assert describe(IntDistribution(32, 512, step=32)) == "32 to 512, step 32"
    assert describe(FloatDistribution(1e-4, 0.1, log=True)) == "0.0001 to 0.1, logarithmic"
    assert describe(CategoricalDistribution([None, True, 0.1, "torch.optim.Adam"])) == "one of None, True, 0.1, Adam"


def test_short_keys_are_what_the_config_s_nesting_leaves():
    keys = ["model.network.init_args.units.0", "model.optimizer.class_path", "data.batch_size", "model.optimizer"]
    assert list(map(short_key, keys)) == ["units.0", "optimizer", "batch_size", "optimizer"]
    assert short_key("model.network.class_path") == "network"
    assert short_key("model.optimizer.init_args.lr") == "optimizer.lr"
