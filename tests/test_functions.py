"""The commands as functions, and runs."""

import functools
import inspect
import io
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
import yaml
from helpers.commands import ROUNDING
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from optuna.distributions import FloatDistribution, IntDistribution
from torch import nn
from torchvision.transforms import v2

import mnist_lightning
from mnist_lightning import CNN, MLP, Ensemble, MNISTDataModule, Run, augmentation, export, fit, report, runs, tune
from mnist_lightning.commands.keywords import words
from mnist_lightning.networks import TorchvisionModel
from mnist_lightning.search.space import NOTEBOOK_SPACE, full_names
from mnist_lightning.system.errors import UserError


@pytest.fixture
def small(data_dir, monkeypatch, tmp_path):
    """Call a function in a folder of its own, on the small data set."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(MNISTDataModule, data_dir=str(data_dir))


class Keeping(nn.Module):
    """A network that keeps its argument."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images):
        """Return the logits."""
        return self.layers(images)


class Forgetting(Keeping):
    """A network that does not keep its argument."""

    def __init__(self, size: int):
        super().__init__(size)


class Misleading(Keeping):
    """A network with another value under the name of its argument."""

    def __init__(self, width: int = 8):
        super().__init__(width)
        self.width = nn.Dropout()


def test_the_package_is_imported_without_torch():
    code = (
        "import sys, mnist_lightning; print(*mnist_lightning.__all__); assert not {'torch', 'pandas'} & {*sys.modules}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == mnist_lightning.__all__
    assert all(hasattr(mnist_lightning, name) for name in mnist_lightning.__all__)
    with pytest.raises(AttributeError, match="has no attribute tune_all"):
        mnist_lightning.tune_all  # noqa: B018


def test_fit_is_the_command(small, quick, tmp_path):
    run = fit(
        MLP([16], dropout=0.1),
        small(
            batch_size=50,
            augmentation=[augmentation.Distortion(degrees=3.0), functools.partial(v2.RandomErasing, p=0.4)],
        ),
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3),
        max_epochs=np.int64(1),
        **{"trainer.limit_val_batches": 2},
    )
    options = ["--model.network.units=[16]", "--model.network.dropout=0.1", "--data.batch_size=50"]
    options += ["--data.augmentation+=Distortion", "--data.augmentation.degrees=3.0"]
    options += ["--data.augmentation+=torchvision.transforms.v2.RandomErasing", "--data.augmentation.p=0.4"]
    options += ["--model.optimizer=AdamW"]
    options += ["--model.optimizer.lr=2e-3", "--trainer.max_epochs=1", "--trainer.limit_val_batches=2"]
    quick(tmp_path, "fit", *options)
    command = Run("lightning_logs/baseline/version_1")
    for file in ("metrics.csv", "test.csv"):
        assert (run.path / file).read_text() == (command.path / file).read_text()
    assert run.config == command.config
    again = fit(config=run.path / "config.yaml", name="again", **{"model.optimizer.lr": 2e-3})
    assert again.name == "again/version_0"
    pd.testing.assert_frame_equal(again.history, run.history)


def test_a_run_knows_what_it_has(small, tmp_path, mnist):
    run = fit(data=small(), max_epochs=2)
    assert run.history.index.tolist() == [1, 2]
    state = torch.get_rng_state()
    assert not run.classifier.training
    assert len(runs()) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert run.test.index.tolist()[0] == "last epoch (2)"
    images = mnist.test.images[:300]
    table = run.predict(images)
    assert (table.columns.tolist(), len(table)) == ([*"0123456789"], 300)
    right = (table.to_numpy().argmax(axis=1) == mnist.test.labels[:300].numpy()).mean()
    assert right == pytest.approx(run.test["test/accuracy"].iloc[0], abs=1e-6)
    assert not run.classifier.training
    shown = run._repr_html_()
    assert shown.count("<table") == 2
    assert f"{run.test['test/accuracy'].iloc[0]}" in shown
    (row,) = runs().to_dict("records")
    assert (row["name"], row["version"], row["network"], row["epochs"]) == ("baseline", 0, "MLP 128-64", 2)
    assert row["parameters"] == 785 * 128 + 129 * 64 + 65 * 10
    assert row["val/accuracy"] == run.history["val/accuracy"].max()
    assert row["seconds"] > 0
    program = torch.export.load(export(run, "digit.pt2")).module()
    probabilities = program(images[:9] / 255).detach().numpy()
    assert abs(probabilities - table[:9].to_numpy()).max() < ROUNDING
    with pytest.raises(UserError, match="exists and is not overwritten"):
        export(run.saved().path, "digit.pt2")
    (run.path / "checkpoints/last.ckpt").write_bytes(b"damaged")
    (run.path / "checkpoints/best.ckpt").unlink()
    (run.path / "test.csv").unlink()
    (row,) = runs().to_dict("records")
    assert pd.isna(row["parameters"])
    assert pd.isna(row["test/accuracy"])
    with pytest.raises(UserError, match="the run was stopped before the file was written"):
        run.test  # noqa: B018
    with pytest.raises(UserError, match="has no checkpoint best"):
        run.saved("best")
    with pytest.raises(UserError, match="is not the folder of a run"):
        Run(tmp_path)
    assert runs(tmp_path / "none").empty


def test_objects_are_used_but_not_in_the_config(small, capsys):
    stopping = EarlyStopping("val/loss", patience=1, min_delta=9.0)
    run = fit(data=small(), max_epochs=9, callbacks=[stopping, functools.partial(EarlyStopping, "val/accuracy")])
    assert len(run.history) == 2
    assert stopping.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert "EarlyStopping is an object, so config.yaml does not hold it" in capsys.readouterr().out
    (callback,) = run.config["trainer"]["callbacks"]
    assert callback["init_args"]["monitor"] == "val/accuracy"


@pytest.mark.slow
def test_a_stopped_training_keeps_its_epochs_and_the_process_goes_on(small, capsys):
    def stop(trainer, _):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt

    torch.set_num_threads(2)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(data=small(), max_epochs=5, callbacks=[LambdaCallback(on_train_epoch_start=stop)])
    assert signal.getsignal(signal.SIGINT) == handler
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    run = Run("lightning_logs/baseline/version_0")
    assert run.history.index.tolist() == [1, 2]
    assert {path.stem for path in run.path.glob("figures/*.png")} == {"samples", "accuracy", "loss"}
    assert f"--ckpt_path {run.path.relative_to(run.path.parents[2])}" in capsys.readouterr().out
    rest = fit(ckpt_path=run.saved().path, **{"data.data_dir": str(small().data_dir)})
    whole = fit(data=small(), max_epochs=5)
    pd.testing.assert_frame_equal(rest.history, whole.history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, "There is no option epochs: did you mean min_epochs, max_epochs?"),
        ({"zzz": 3}, "There is no option zzz: other options have dots"),
        ({"max_epochs": "many"}, "trainer.max_epochs: many is not one of int, null"),
        ({"network": "Nothing"}, "model.network: there is no class Nothing"),
        ({"network": Forgetting(3)}, "model.network: Forgetting does not keep its argument size."),
        ({"network": Misleading()}, "model.network: Misleading does not keep its arguments as attributes"),
        ({"data": MNISTDataModule(data_dir="nowhere"), "max_epochs": 1}, "nowhere"),
        ({"logger": False}, "fit returns a run, but with logger=False"),
    ],
)
def test_a_mistake_is_told_in_a_line(small, options, message):
    with pytest.raises(UserError) as error:
        fit(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert runs().empty


def test_a_network_that_was_trained_is_not_made_anew(small):
    for network in (MLP([8]), Keeping(8)):
        description, _ = words({"model.network": network}, {})
        assert '"init_args"' in description[0]
        with torch.no_grad():
            next(network.parameters()).add_(1)
        with pytest.raises(UserError, match="this one has been trained or changed"):
            fit(network, small())


def test_networks_and_augmentation_of_the_package_keep_their_arguments():
    classes = [
        each
        for each in vars(augmentation).values()
        if isinstance(each, type) and issubclass(each, nn.Module) and each.__module__ == augmentation.__name__
    ]
    made = [MLP([3, 4], 0.5, normalization="batch"), CNN([4], kernel_size=5), TorchvisionModel("resnet18")]
    (word,), _ = words({"model.network": Ensemble(made[:2])}, {})
    members = yaml.safe_load(word.partition("=")[2])["init_args"]["members"]
    assert [member["init_args"].get("dropout") for member in members] == [0.5, 0.0]
    for value in [*made, *(each() for each in classes), v2.RandomAffine(5, (0.1, 0.1))]:
        (word,), _ = words({"model.network": value}, {})
        spec = yaml.safe_load(word.partition("=")[2])
        arguments = spec["init_args"]
        assert arguments.keys() == inspect.signature(type(value)).parameters.keys()
        for name, given in getattr(value, "hparams", {}).items():
            assert arguments[name] == given


def test_short_names_of_a_search_space():
    config = {"model": {"network": {"class_path": "MLP", "init_args": {"units": [1, 2], "l2": 0.0}}}, "trainer": {}}
    config["model"]["optimizer"] = {"class_path": "Adam", "init_args": {"lr": 1.0, "eps": 1.0}}
    config["data"] = {"class_path": "M", "init_args": {"batch_size": 64, "lr": 3}}
    space = {"units": [1, 2], "l2.1": 3, "optimizer": 4, "eps": {"when": {"optimizer": ["Adam"]}}, "units.length": 5}
    space |= {"data.batch_size": 6, "model.network.init_args.l2.0": 7, "batch_size": 8, "nothing": 9}
    assert full_names(space, config) == {
        "model.network.init_args.units.0": 1,
        "model.network.init_args.units.1": 2,
        "model.network.init_args.l2.1": 3,
        "model.optimizer.class_path": 4,
        "model.optimizer.init_args.eps": {"when": {"model.optimizer.class_path": ["Adam"]}},
        "model.network.init_args.units.length": 5,
        "data.batch_size": 6,
        "model.network.init_args.l2.0": 7,
        "data.init_args.batch_size": 8,
        "nothing": 9,
    }
    assert full_names(NOTEBOOK_SPACE, config) == NOTEBOOK_SPACE
    with pytest.raises(UserError, match="lr may be model"):
        full_names({"lr": 1}, config)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (MLP([128, 64]), "MLP 128-64"),
        (TorchvisionModel("resnet18"), "TorchvisionModel resnet18"),
        (Ensemble([MLP([8]), CNN([4, 6]), CNN([4, 6])]), "Ensemble of 1 MLP 8, 2 CNN 4-6"),
    ],
)
def test_runs_names_a_network_with_its_widths(tmp_path, network, name):
    run = tmp_path / "some/version_0"
    run.mkdir(parents=True)
    (option,), _ = words({"model.network": network}, {})
    (run / "config.yaml").write_text(f"model: {{network: {option.partition('=')[2]}}}")
    assert runs(tmp_path)["network"].tolist() == [name]


@pytest.mark.slow
def test_tune_gives_the_study_and_its_runs(small, tmp_path):
    space = {"units": [IntDistribution(8, 16)] * 2, "lr": FloatDistribution(1e-3, 1e-2, log=True)}
    sampler = functools.partial(optuna.samplers.TPESampler, multivariate=True)
    options = {"n_trials": 3, "max_epochs": 2, "refit_epochs": 1, "sampler": sampler, "workers": 1}
    verbosity = optuna.logging.get_verbosity()
    study = tune(space, data=small(), metric=["val/loss", "parameters"], **options)
    assert optuna.logging.get_verbosity() == verbosity
    assert len(study.best_trials) >= 1
    assert study.best_run.name == "tuned/version_0"
    first, second = study.runs(top=2)
    assert first.history.index.tolist() == [1, 2]
    assert first.history["val/loss"].min() <= second.history["val/loss"].min()
    params = study.get_trials()[int(first.path.parent.name[-3:])].params
    arguments = first.config["model"]["network"]["init_args"]
    assert arguments["units"] == [params[f"model.network.init_args.units.{index}"] for index in (0, 1)]
    assert "<table" in study._repr_html_()
    shutil.rmtree(first.path)  # as if another machine had trained it
    with pytest.warns(UserWarning, match=f"^1 of 3 runs are not here, such as {re.escape(str(first.path))}$"):
        assert study.runs()[0].path == second.path
    fit(data=small(), max_epochs=1)
    optuna.logging.set_verbosity(verbosity - 10)
    page = report(Run("lightning_logs/baseline/version_0"), study.best_run, "again=lightning_logs/baseline/version_0")
    assert optuna.logging.get_verbosity() == verbosity - 10
    optuna.logging.set_verbosity(verbosity)
    assert page.quantities.columns.tolist()[:3] == ["baseline", "tuned", "again"]
    assert "Misclassified" in page._repr_html_()
    with pytest.raises(UserError, match=r"pruner.*functools.partial|MedianPruner does not keep"):
        tune(space, data=small(), pruner=optuna.pruners.MedianPruner(), **options)


@pytest.mark.slow
def test_a_script_needs_no_guard(small, tmp_path):
    (tmp_path / "script.py").write_text(
        textwrap.dedent(f"""
        from torch import nn
        from optuna.distributions import FloatDistribution
        from mnist_lightning import MLP, MNISTDataModule, tune
        from mnist_lightning.system.errors import UserError

        class Own(MLP):
            pass

        print("begins")
        data = MNISTDataModule(data_dir={str(small().data_dir)!r})
        study = tune({{"lr": FloatDistribution(1e-4, 1e-2)}}, MLP([8]), data, n_trials=4, max_epochs=1, refit_epochs=1)
        print(len(study.trials), study.best_run.name)
        try:
            tune({{"lr": FloatDistribution(1e-4, 1e-2)}}, Own([8]), data)
        except UserError as error:
            print(error)
    """)
    )
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("begins") == 1
    assert "4 tuned/version_0" in result.stdout
    assert "Own: workers cannot import a class of a script or a cell." in result.stdout


def test_the_command_runs_lists_filters_and_sorts(small, quick, tmp_path, capfd, monkeypatch):
    fit(MLP([8]), small(), name="one", max_epochs=1)
    fit(MLP([8]), small(), name="two", max_epochs=2, tags=["narrow", "long"], notes="two epochs, 8 units")

    capfd.readouterr()

    def names(*options):
        output = quick(tmp_path, "runs", *options, data=False).stdout
        return [line.split()[0] for line in output.splitlines()[1:]]

    assert names() == ["two", "one"]
    assert names("--sort=epochs", "--ascending") == ["one", "two"]
    assert names("--name", "o*") == ["one"]
    assert names("--filter", "epochs > 1 and `test/accuracy` > 0") == ["two"]
    (tmp_path / "lightning_logs/three/version_0").mkdir(parents=True)
    (tmp_path / "lightning_logs/three/version_0/config.yaml").write_text("name: [three")  # damaged
    assert names("--tags", "long", "narrow") == ["two"]
    shutil.rmtree(tmp_path / "lightning_logs/three")
    assert "narrow, long" in (shown := quick(tmp_path, "runs", data=False).stdout)
    assert "two epochs, 8 units" in shown
    for options, message in (
        (["--sort=size"], "--sort size is not a column. Columns: name, version, when"),
        (["--filter=epoch > 1"], "--filter epoch > 1: name 'epoch' is not defined."),
        (["--name=three"], "There is no run in lightning_logs that matches."),
        (["--tags=wide"], "There is no run in lightning_logs that matches."),
    ):
        with pytest.raises(AssertionError, match=message):
            quick(tmp_path, "runs", *options, data=False)


def test_runs_are_archived_and_deleted_after_a_question(small, quick, tmp_path, capfd, monkeypatch):
    for name in ("one", "two", "two"):
        fit(MLP([8]), small(), name=name, max_epochs=1)
    capfd.readouterr()
    logs = tmp_path / "lightning_logs"

    def answer(text, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return quick(tmp_path, "runs", *options, data=False).stdout

    for text in ("n\n", ""):
        with pytest.raises(AssertionError, match="Nothing was changed"):
            answer(text, "--name=two", "--delete")
    assert len(runs()) == 3
    (logs / "two/version_1/test.csv").unlink()
    output = answer("y\n", "--name=two", "--archive=old")
    assert re.search(r"Move 2 runs, \d+ files, 0\.\d MB to old\? Not tested, so perhaps still running: 1\.", output)
    assert [path.name for path in sorted(logs.glob("*/version_*"))] == ["version_0"]
    assert runs("old")["name"].tolist() == ["two", "two"]
    fit(MLP([8]), small(), name="two", max_epochs=1)
    with pytest.raises(AssertionError, match="old/two/version_0 exists already"):
        answer("y\n", "--archive=old")
    answer("yes\n", "--name=two", "--delete")
    assert runs()["name"].tolist() == ["one"]
    assert len(runs("old")) == 2
