"""A model of the user's own, a subclass of Classifier in the current folder, goes through all commands."""

import re
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import in_process

from mnist_lightning import MLP, MNISTDataModule, Run, fit, runs
from mnist_lightning.system.errors import UserError

MODELS = """
    import torch.nn.functional as F
    from lightning.pytorch import LightningModule
    from torch import nn
    from mnist_lightning import MLP, Classifier

    class Focal(Classifier):
        def __init__(self, gamma: float = 2.0, sure: float = 0.5, **arguments):
            super().__init__(**arguments)
            self.gamma, self.sure = gamma, sure

        def objective(self, logits, labels, loss):
            losses = F.cross_entropy(logits, labels, reduction="none")
            return ((1 - (-losses).exp()) ** self.gamma * losses).mean()

        def metrics(self, logits, labels, loss):
            sure = logits.softmax(dim=1).amax(dim=1) > self.sure
            return super().metrics(logits, labels, loss) | {"sure": sure}

    class Whole(Classifier):
        def __init__(self, in_features: int, num_classes: int, width: int = 12, **arguments):
            super().__init__(MLP([width], 0.0, 0.0, in_features=in_features, num_classes=num_classes), **arguments)
            self.save_hyperparameters()

    class Narrow(Classifier):
        def __init__(self, network: nn.Module, needed: int):
            super().__init__(network)
            self.needed = needed

    class Foreign(LightningModule):
        pass

    def function():
        pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the module ``my_models``."""
    (tmp_path / "my_models.py").write_text(textwrap.dedent(MODELS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_models", None)


@pytest.fixture
def run(folder, capfd, data_dir):
    """Run a command on the small data set; return its output."""

    def run(name, *options):
        code, output, errors = in_process(capfd, name, f"--data.data_dir={data_dir}", *options)
        assert code == 0, errors
        return output

    return run


def model_of(name):
    """Return the section ``model`` of the first run of a name."""
    return yaml.safe_load(Path(f"lightning_logs/{name}/version_0/config.yaml").read_text(encoding="utf-8"))["model"]


def last(name):
    """Return the last checkpoint of a run."""
    return torch.load(f"lightning_logs/{name}/checkpoints/last.ckpt", weights_only=True)


def test_a_model_is_trained_and_its_checkpoint_brings_it(run, capfd):
    options = ["--model.network.units=[16]", "--trainer.max_epochs=2"]
    output = run("fit", "--model=my_models.Focal", "--model.gamma=0", *options)
    assert "test sure" in output
    assert model_of("baseline")["class_path"] == "my_models.Focal"
    assert model_of("baseline")["gamma"] == 0
    assert 0 < Run("lightning_logs/baseline/version_0").history["val/sure"].iloc[-1] < 1

    # without the focus on hard images, it learns what the Classifier learns
    run("fit", "--name=plain", *options)
    focal, plain = model_of("baseline"), model_of("plain")
    assert focal == {"class_path": "my_models.Focal", "gamma": 0, "sure": 0.5, **plain}
    weights = [last(f"{name}/version_0")["state_dict"] for name in ("baseline", "plain")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name

    for command, metric in (("test", "test/sure"), ("validate", "val/sure")):
        found = float(re.search(rf"{metric} +([\d.]+)", run(command))[1])
        table = Run("lightning_logs/baseline/version_0")
        known = table.test if command == "test" else table.history
        assert found == pytest.approx(known[metric].iloc[0 if command == "test" else -1])
    assert "300 predictions" in run("predict")
    code, _, errors = in_process(
        capfd, "test", "--model=my_models.Focal", "--ckpt_path=lightning_logs/plain/version_0/checkpoints/last.ckpt"
    )
    assert code == 1
    assert "last.ckpt holds a Classifier, not a Focal: leave out --model." in errors


def test_the_objective_is_what_is_minimized(run):
    for gamma in (0, 5):
        run("fit", "--model=my_models.Focal", f"--model.gamma={gamma}", f"--name=gamma_{gamma}",
            "--trainer.max_epochs=3")  # fmt: skip
    sure = [Run(f"lightning_logs/gamma_{gamma}/version_0").history["val/sure"].iloc[-1] for gamma in (0, 5)]
    assert sure[1] < sure[0] - 0.1  # it does not push images that are already right


def test_a_continued_run_ends_as_one_that_was_not_stopped(run):
    options = ["--model=my_models.Focal", "--model.gamma=3"]
    run("fit", "--name=whole", *options, "--trainer.max_epochs=3")
    run("fit", *options, "--trainer.max_epochs=2")
    run("fit", "--ckpt_path=last", "--trainer.max_epochs=3")
    whole, continued = last("whole/version_0"), last("baseline/version_1")
    assert continued["hyper_parameters"] == whole["hyper_parameters"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(continued["state_dict"][name], tensor), name


def test_a_model_may_make_its_network_from_the_sizes_of_the_data(run, capfd, recwarn):
    run("fit", "--model=my_models.Whole", "--model.width=9", "--trainer.max_epochs=1")
    assert {"in_features": 784, "num_classes": 10, "width": 9}.items() <= model_of("baseline").items()
    assert "network" not in model_of("baseline")
    assert "test/accuracy" in run("test")
    found = Run("lightning_logs/baseline/version_0")
    assert found.classifier.network.dense_1.weight.shape == (9, 784)
    loaded = type(found.classifier).load_from_checkpoint(found.saved().path, weights_only=True)  # Lightning's own way
    assert loaded.network.dense_1.weight.equal(found.classifier.network.dense_1.weight)
    assert runs()["network"].tolist() == ["Whole"]
    code, _, errors = in_process(capfd, "test", "--model.network.units=[3]")
    assert code == 1
    assert re.match(
        r"error: unrecognized arguments: --model.network.units=\[3\]: \S+ has a model of the class Whole", errors
    )
    assert not [each for each in recwarn if "is an instance of" in str(each.message)]


def test_a_model_need_not_take_all_arguments(run):
    run("fit", "--model=my_models.Narrow", "--model.needed=3", "--trainer.max_epochs=1")
    assert {*model_of("baseline")} == {"class_path", "network", "needed"}
    assert "test/accuracy" in run("test")
    run("fit", "--ckpt_path=last", "--trainer.max_epochs=2")


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("model: my_models.Focal", ["--model.sure=0.25"]),
        ("model: {class_path: my_models.Focal, init_args: {sure: 25e-2}}", []),
        ("model: {class_path: my_models.Focal, sure: 0.5}", ["--model.init_args.sure", "0.25"]),
        ("model: {init_args: {sure: 0.25}}", ["--model.class_path=my_models.Focal"]),
        ("model: {sure: 0.25}", ["--model", '{"class_path": "my_models.Focal"}']),
        ("model: my_models.Whole", ["--model", "my_models.Focal", "--model.sure", "0.25"]),
        ("name: x", ["--model", '{"class_path": "my_models.Focal", "init_args": {"sure": 0.25}}']),
        ("name: x", ["--model=section.yaml"]),
    ],
)
def test_the_class_may_be_written_as_lightning_writes_it(run, folder, config, options):
    (folder / "mine.yaml").write_text(config)
    (folder / "section.yaml").write_text("class_path: my_models.Focal\ninit_args: {sure: 0.25}\n")
    output = run("fit", "--config=mine.yaml", "--model.network.units=[5]", *options, "--print_config")
    model = yaml.safe_load(output)["model"]
    assert (model["class_path"], model["sure"], model["gamma"]) == ("my_models.Focal", 0.25, 2.0)
    assert model["network"]["init_args"]["units"] == [5]


def test_null_is_the_default_of_an_inherited_argument(run, folder):
    (folder / "mine.yaml").write_text("model: {class_path: my_models.Focal, compile: null, sure: null}")
    assert "test sure" in run("fit", "--config=mine.yaml", "--trainer.fast_dev_run=true")


def test_naming_the_classifier_changes_nothing(run):
    plain = run("fit", "--print_config")
    for name in ("Classifier", "mnist_lightning.Classifier", "mnist_lightning.classifier.Classifier"):
        assert run("fit", f"--model={name}", "--print_config") == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=nowhere.Module"], "model: there is no class nowhere.Module: No module named 'nowhere'."),
        (["--model=my_models.Nope"], "model: there is no class my_models.Nope: my_models has no Nope."),
        (["--model=Focal"], "model: there is no class Focal: give its class path"),
        (["--model=my_models.Foreign"], "my_models.Foreign is not a subclass of mnist_lightning.Classifier. It lacks"),
        (["--model=my_models.function"], "my_models.function is not a subclass of mnist_lightning.Classifier"),
        (["--model=os.system"], "os.system is not a subclass"),
        (["--model=my_models.Narrow"], "the following arguments are required: model.needed"),
        (["--model=my_models.Focal", "--model.gamma=x"], "model.gamma: Expected a float. Got value: x"),
        (["--model=my_models.Focal", "--model.gama=1"], "unrecognized arguments: --model.gama=1"),
        (["--model.gamma=1"], "unrecognized arguments: --model.gamma=1"),
    ],
)
def test_a_mistake_ends_in_one_or_two_lines(folder, capfd, options, message):
    code, _, errors = in_process(capfd, "fit", *options)
    assert code in (1, 2)
    assert errors.startswith("error: ")
    assert message in errors
    assert len(errors.splitlines()) <= 2
    assert not (folder / "lightning_logs").exists()


def test_a_checkpoint_whose_class_is_gone_is_named(run, folder, capfd):
    run("fit", "--model=my_models.Focal", "--trainer.max_epochs=1")
    (folder / "my_models.py").unlink()
    del sys.modules["my_models"]
    for options in (["test"], ["report", "baseline"]):
        code, _, errors = in_process(capfd, *options)
        assert code == 1
        assert "last.ckpt cannot be used: model: there is no class my_models.Focal: No module named" in errors
    assert runs()["network"].tolist() == ["Focal: MLP 128-64"]  # the list has what it can read


def test_a_model_from_python(folder, data_dir):
    import my_models

    data = partial(MNISTDataModule, data_dir=str(data_dir))
    run = fit(MLP([8]), data, model=my_models.Focal, gamma=1, max_epochs=1)
    assert run.config["model"]["class_path"] == "my_models.Focal"
    assert (run.classifier.gamma, run.classifier.sure) == (1, 0.5)
    made = fit(data=data, model=partial(my_models.Focal, network=MLP([7]), sure=0.1), max_epochs=1)
    assert (made.classifier.sure, len(made.classifier.network.dense_1.weight)) == (0.1, 7)
    again = fit(config=run.path / "config.yaml")
    assert again.test.equals(run.test)
    with pytest.raises(UserError, match=r"give the class Focal, or functools.partial\(Focal, ...\)"):
        fit(data=data, model=my_models.Focal(network=MLP([8])))
    with pytest.raises(UserError, match=r"my_models\.Foreign is not a subclass"):
        fit(data=data, model=my_models.Foreign)
    with pytest.raises(UserError, match="There is no option gama: did you mean gamma"):
        fit(data=data, model=my_models.Focal, gama=1)


@pytest.mark.slow
def test_a_model_is_searched_refitted_reported_and_exported(run, folder, capfd):
    run("fit", "--model=my_models.Focal", "--trainer.max_epochs=2")
    (folder / "space.yaml").write_text(
        "search_space:\n"
        "  gamma: {class_path: FloatDistribution, init_args: {low: 0.0, high: 4.0}}\n"
        "  model.network.init_args.units.0: {class_path: IntDistribution, init_args: {low: 8, high: 64}}\n"
    )
    search = ["--config=space.yaml", "--model=my_models.Focal", "--metric=val/sure", "--direction=maximize",
              "--executions_per_trial=1", "--trainer.max_epochs=2", "--refit_epochs=2", "--workers=2"]  # fmt: skip
    run("tune", *search, "--n_trials=2")
    output = run("tune", *search, "--n_trials=3", "--refit=false")  # continues the study
    assert re.search(r"trial +val/sure +executions +gamma +units\.0", output)
    best = yaml.safe_load(Path("lightning_logs/tune/best.yaml").read_text(encoding="utf-8"))["model"]
    assert best["class_path"] == "my_models.Focal"
    assert 0 <= best["gamma"] <= 4
    code, output, errors = in_process(capfd, "report", "baseline", "tuned")
    assert code == 0, errors
    assert re.search(r"test/sure \(last epoch\) +0\.\d+ +0\.\d+", output)
    assert "network.onnx" in run("export", "--name=tuned")
