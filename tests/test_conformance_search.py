"""Whether each sampler that Optuna has does in ``tune`` what it does by itself, and ``tune`` what ``fit`` does."""

import importlib.util
import json
import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from conformance import public, read, rows
from helpers.commands import in_process
from helpers.studies import load
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing import pytest_samplers, pytest_storages
from optuna.trial import TrialState
from scipy import stats

from mnist_lightning.commands.parsing import patched_jsonargparse
from mnist_lightning.search.command import SearchCLI
from mnist_lightning.search.sampler import TrialSampler, draw, make_sampler
from mnist_lightning.search.space import SearchSpace
from mnist_lightning.search.storage import open_storage

pytestmark = pytest.mark.slow


SAMPLERS = {each.__name__: each for each in public(optuna.samplers, BaseSampler)}
CONTINUOUS = {"x": FloatDistribution(-1.0, 1.0), "y": FloatDistribution(1e-4, 1.0, log=True)}
MIXED = {**CONTINUOUS, "n": IntDistribution(1, 100), "c": CategoricalDistribution(["a", "b", "c"])}
FINITE = {"n": IntDistribution(1, 4), "c": CategoricalDistribution(["a", "b", "c"])}
NEEDS = {"CmaEsSampler": "cmaes"}
"""Samplers, and the packages that they need but Optuna does not install."""
ABSTRACT = {name for name, each in SAMPLERS.items() if each.__abstractmethods__}
OF_FINITE_SPACES = {"GridSampler": {"search_space": {"n": [1, 2, 3, 4], "c": ["a", "b", "c"]}}, "BruteForceSampler": {}}
DRAWN = {
    **{name: {} for name in SAMPLERS if name not in {*ABSTRACT, *OF_FINITE_SPACES, "PartialFixedSampler"}},
    "PartialFixedSampler": {"fixed_params": {"n": 7}, "base_sampler": "RandomSampler"},
}
"""Samplers of infinite spaces, and their required arguments."""
NESTED = {
    "PartialFixedSampler of TPESampler": (
        "PartialFixedSampler",
        {"fixed_params": {"n": 7}, "base_sampler": "TPESampler"},
    ),
    "PartialFixedSampler of QMCSampler": (
        "PartialFixedSampler",
        {"fixed_params": {"n": 7}, "base_sampler": "QMCSampler"},
    ),
    **{
        f"{name} with RandomSampler": (name, {"independent_sampler": "RandomSampler"})
        for name in ("QMCSampler", "GPSampler", "CmaEsSampler")
        if name in SAMPLERS
    },
}
"""Samplers that draw with another sampler."""
ROWS = {**{name: (name, arguments) for name, arguments in DRAWN.items()}, **NESTED}
COUNTS = {"GPSampler": 24, "CmaEsSampler": 24}
"""Number of trials where the usual 200 would be slow, or depend so much on each other that any two runs differ."""


def skip_without_package(sampler):
    package = NEEDS.get(sampler)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{sampler} needs the package {package}")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def options(data_dir):
    """Return the option ``sampler`` as the command parses it."""

    def parse(name, arguments):
        given = [f"--sampler.{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in arguments.items()]
        with patched_jsonargparse():
            return SearchCLI("tune", [f"--data.data_dir={data_dir}", f"--sampler={name}", *given]).config.sampler

    return parse


def searched(sampler, space, count, seed=42, directions=("minimize",)):
    """Return a study with a sampler, whose trials are drawn as the workers draw them, but not trained."""
    study, space = optuna.create_study(directions=directions), SearchSpace(space)
    study.sampler = make_sampler(study, sampler, seed, space)

    def objective(trial):
        draw(trial, space)
        return [value(trial.params), trial.params.get("x", 0)][: len(directions)]

    study.optimize(objective, n_trials=count)
    return study


def value(params):
    """Return the value to minimize, which is lowest at x = 0.5, y = 0.01, n = 1 and c = a."""
    distance = (params.get("x", 0.5) - 0.5) ** 2 + (math.log10(params.get("y", 0.01)) + 2) ** 2 / 4
    return distance + params.get("n", 1) / 100 + "abc".index(params.get("c", "a")) / 3


def drawn(study):
    return [trial.params for trial in study.get_trials(deepcopy=False)]


@pytest.mark.parametrize("row", ROWS)
def test_no_two_trials_are_alike(options, row):
    name, arguments = ROWS[row]
    skip_without_package(name)
    count = 12 if name == "GPSampler" else 24  # it takes seconds for a trial when there are many
    params = drawn(searched(options(name, arguments), MIXED, count))
    assert len(params) == count
    assert len({(each["x"], each["y"]) for each in params}) == count
    assert len({each["c"] for each in params}) > 1
    assert len({each["n"] for each in params}) > 1 or "fixed_params" in arguments


@pytest.mark.parametrize("row", ROWS)
def test_draws_follow_the_seed(options, row):
    name, arguments = ROWS[row]
    skip_without_package(name)
    sampler = options(name, arguments)
    one, again, other = (drawn(searched(sampler, MIXED, 12, seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", OF_FINITE_SPACES)
def test_a_finite_space_is_drawn_once(options, name):
    sampler = options(name, OF_FINITE_SPACES[name])
    one, again, other = (drawn(searched(sampler, FINITE, 99, seed)) for seed in (1, 1, 2))
    assert Counter(map(str, one)) == Counter(str({"n": n, "c": c}) for n in (1, 2, 3, 4) for c in "abc")
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", DRAWN)
def test_trials_are_distributed_as_by_the_sampler_alone(options, name):
    """Check the Kolmogorov-Smirnov distance; by chance, it exceeds the bound once in 10,000 times."""
    skip_without_package(name)
    count = COUNTS.get(name, 200)
    arguments = DRAWN[name]
    inner = (
        {"base_sampler": SAMPLERS[arguments["base_sampler"]](seed=7)} if "base_sampler" in arguments else {"seed": 7}
    )
    alone = optuna.create_study(sampler=SAMPLERS[name](**arguments | inner))
    for _ in range(count):
        trial = alone.ask(MIXED)
        alone.tell(trial, value(trial.params))
    study = searched(options(name, arguments), MIXED, count)
    ours, theirs = (pd.DataFrame(drawn(each)) for each in (study, alone))
    # genetic samplers copy values of earlier trials; a copy is not an independent draw
    sizes = [each["x"].nunique() for each in (ours, theirs)]
    bound = math.sqrt(-math.log(1e-4 / 2) / 2 * sum(sizes) / math.prod(sizes))
    for key in ("x", "y", "n"):
        assert stats.ks_2samp(ours[key], theirs[key]).statistic <= bound, key
    counts = [each["c"].value_counts() * size / count for each, size in zip((ours, theirs), sizes, strict=True)]
    table = pd.DataFrame(counts).fillna(0) + 1
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("name", [name for name in DRAWN if name.startswith("NSGA")])
def test_genetic_samplers_learn_from_several_metrics(options, name):
    sampler = options(name, {"population_size": 10})
    study = searched(sampler, MIXED, 60, directions=("minimize", "maximize"))
    first, *_, last = [np.mean([trial.values[0] for trial in study.trials[i : i + 10]]) for i in range(0, 60, 10)]
    assert last < first
    assert drawn(study) == drawn(searched(sampler, MIXED, 60, directions=("minimize", "maximize")))
    assert len({(each["x"], each["y"], each["n"], each["c"]) for each in drawn(study)}) > 30


# --- the command --------------------------------------------------------------------------------------------

REFUSED = {
    "sampler=GridSampler": "the following arguments are required: search_space",
    'sampler=GridSampler --sampler.search_space={"x":[1]}': "GridSampler cannot draw. The parameter name, ",
    "sampler=PartialFixedSampler": "the following arguments are required: fixed_params, base_sampler",
    "sampler=NSGAIISampler --sampler.population_size=1": "`population_size` must be greater than or equal to 2",
    "sampler=GPSampler --metric=val/loss --metric=val/accuracy --pruner=MedianPruner": "A pruner supports only one",
    "pruner=PatientPruner": "the following arguments are required: patience",
    "pruner=PercentilePruner": "the following arguments are required: percentile",
    "pruner=ThresholdPruner": "Either lower or upper must be specified",
}
SMALL = ["--n_trials=3", "--executions_per_trial=1", "--workers=1", "--trainer.limit_train_batches=4"]


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(tune, tmp_path, row):
    code, _, errors = tune(*f"--{row}".split())
    assert code in (1, 2)
    errors = errors.removesuffix("For the options, add --help\n")
    assert errors.startswith("error: ")
    assert REFUSED[row] in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "here/lightning_logs").exists()


@pytest.mark.parametrize("name", ["TPESampler", "QMCSampler", "NSGAIISampler"])
def test_a_trial_of_a_search_is_what_fit_makes_of_its_config(tune, capfd, tmp_path, name):
    augmentation = ["--data.augmentation+=Distortion"] if name == "TPESampler" else []
    code, _, errors = tune(*SMALL, f"--sampler={name}", *augmentation)
    assert code == 0, errors
    trials = load(tmp_path / "here").trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    folder = "lightning_logs/tune/trial_002/execution_0"
    code, _, errors = in_process(capfd, "fit", f"--config={folder}/config.yaml", "--name=again")
    assert code == 0, errors
    table = pd.read_csv("lightning_logs/again/version_0/metrics.csv", float_precision="round_trip")
    assert table["val/accuracy"].max() == trials[2].value


VALIDATED = (
    *("max_steps=6", "limit_train_batches=1", "limit_val_batches=0.5", "overfit_batches=2", "val_check_interval=3"),
    *("val_check_interval=0.25", "check_val_every_n_epoch=2", "accumulate_grad_batches=3", "num_sanity_val_steps=2"),
)
"""Arguments of the Trainer that change what is validated, and when."""
MEASURED = [row for row in rows() if not row.refusal and (row.kind == "callbacks" or row.name in VALIDATED)]


@pytest.mark.xdist_group("trials against fit")  # another worker may run them than the tests above
@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.name)
def test_a_trial_is_measured_as_a_run_of_fit(tune, capfd, tmp_path, row):
    """Check the metrics of each epoch; a callback may change weights after they were validated."""
    options = ["--n_trials=1", "--executions_per_trial=1", "--workers=1", "--data.eval_batch_size=50"]
    code, output, errors = tune(*row.options, *options, epochs=3)
    assert code == 0, output + errors
    folder = tmp_path / "here/lightning_logs/tune/trial_000/execution_0"
    code, _, errors = in_process(capfd, "fit", f"--config={folder}/config.yaml", "--name=again")
    assert code == 0, errors
    trial, run = (read(path / "metrics.csv") for path in (folder, Path("lightning_logs/again/version_0")))
    names = [name for name in run[0] if name.startswith(("train/", "val/")) or name in ("epoch", "step")]
    assert "val/accuracy" in names
    assert [[row.get(name) for name in names] for row in trial] == [[row[name] for name in names] for row in run]
    (found,) = load(tmp_path / "here").trials
    assert found.value == max(float(row["val/accuracy"]) for row in run if row["val/accuracy"])
    assert not (folder / "checkpoints").exists()
    is_left_out = row.name.endswith("ProgressBar") or row.name in ("ModelCheckpoint", "OnExceptionCheckpoint")
    assert (f"Only the refit uses {row.name}: " in output) == is_left_out


# --- Optuna's own tests of storages and samplers ------------------------------------------------------------


class TestStorage(pytest_storages.StorageTestCase):
    """Optuna's tests for the storage of :func:`open_storage`."""

    test_pickle_storage = None  # processes open the journal by its path instead

    @pytest.fixture
    def storage(self, tmp_path):
        """Open a journal."""
        return open_storage(str(tmp_path / "journal.log"))


class TestTrialSampler(pytest_samplers.BasicSamplerTestCase):
    """Optuna's tests for the wrapper around a sampler."""

    @pytest.fixture(params=["RandomSampler", "TPESampler"])
    def sampler(self, request):
        """Return a factory of trial samplers."""
        return lambda: TrialSampler(optuna.create_study(), lambda number: SAMPLERS[request.param](seed=number))
