"""What the parser is taught, and that only commands teach it."""

import contextlib
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.commands import ROOT, in_process
from jsonargparse import _typehints

from mnist_lightning.commands.fit import FitCLI, SilentFit
from mnist_lightning.commands.parsing import Parser, patched_jsonargparse
from mnist_lightning.training.runs import RUN_KEYS


@pytest.fixture
def model(capfd):
    """Return the section ``model`` of the config that results from options."""

    def parse(*options):
        code, out, errors = in_process(capfd, "fit", *options)
        assert code == 0, errors
        return yaml.safe_load(out)["model"]

    return parse


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.optimizer=KerasSGD"], {"lr": 0.01}),
        (["--model.optimizer=KerasRMSprop"], {"lr": 0.001, "eps": 1e-7}),
        (["--model.optimizer=torch.optim.AdamW"], {"eps": 1e-8, "weight_decay": 0.01, "fused": None}),
        ([f"--config={ROOT / 'configs/baseline.yaml'}", "--model.optimizer=KerasSGD"], {"lr": 0.01}),
        (["--model.optimizer.lr=0.5", "--model.optimizer=KerasSGD"], {"lr": 0.5}),
        (["--model.optimizer.lr=0.001", "--model.optimizer=KerasSGD"], {"lr": 0.001}),  # the default of the old class
        (["--model.optimizer.init_args.lr=0.001", "--model.optimizer=KerasSGD"], {"lr": 0.001}),
        (["--model.optimizer.lr=0.5"], {"lr": 0.5, "eps": 1e-7}),
    ],
    ids=str,
)
def test_another_class_comes_with_its_own_defaults(model, options, expected):
    arguments = model(*options, "--print_config")["optimizer"]["init_args"]
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize("network", ["MLP", "CNN", "TorchvisionModel"])
def test_each_config_takes_another_network(model, network):
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        text = config.read_text()
        if "search_space" not in text and "FashionMNIST" not in text:
            made = model(f"--config={config}", f"--model.network={network}", "--print_config")["network"]
            assert made["class_path"] == f"mnist_lightning.networks.{network}", config.stem


def test_a_class_inside_another_can_be_exchanged(model, monkeypatch, tmp_path):
    (tmp_path / "nested_classes.py").write_text(
        "from mnist_lightning.networks import MLP\n"
        "class Outer:\n"
        "    class Net(MLP):\n"
        "        def __init__(self, units: list[int] = [5], l2: float = 0.5):\n"
        "            super().__init__(units, 0.0, l2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    network = model("--model.network=nested_classes.Outer.Net", "--model.network=MLP", "--print_config")["network"]
    assert network["init_args"]["l2"] == 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "data", "options", "expected", "remark"),
    [
        ({"num_classes": 20}, None, [], 20, "num_classes stays 20, as in the config: the data has 10 classes"),
        ({"num_classes": 20}, "EMNIST", [], 47, "num_classes is 47 to match the data, not 20 as in the config"),
        ({"num_classes": 50}, "FashionMNIST", ["--data=EMNIST"], 50, "num_classes stays 50"),
        ({"num_classes": 10}, "FashionMNIST", ["--data=EMNIST"], 47, ""),  # the default of the class
        ({"num_classes": 5}, None, [], 10, "num_classes is 10 to match the data, not 5 as in the config"),
        ({"num_classes": 5}, None, ["--model.network.num_classes=30"], 30, ""),
        ({"num_classes": 20}, None, ["--model.network=CNN"], 20, "num_classes stays 20"),
        ({"in_features": 7}, None, [], 10, "in_features is 784 to match the data, not 7 as in the config"),
        ({}, "EMNIST", ["--data=MNISTDataModule"], 10, ""),
    ],
)
def test_a_config_may_have_a_network_of_more_outputs(tmp_path, capfd, network, data, options, expected, remark):
    mix = {"class_path": "torchvision.transforms.v2.MixUp"}
    config = {
        "model": {"network": {"class_path": "MLP", "init_args": network}},
        "data": {**({"class_path": data} if data else {}), "init_args": {"augmentation": [mix]}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with patched_jsonargparse():
        run = FitCLI("fit", [f"--config={tmp_path / 'config.yaml'}", *options])
        said = capfd.readouterr().out
        again = SilentFit({key: run.plain_config()[key] for key in RUN_KEYS})  # as a search passes it
        assert not capfd.readouterr().out
    for each in (run, again):
        assert each.model.network[-1].out_features == expected
        assert each.datamodule.augmentation[0].num_classes == expected
        assert each.config.model.network.init_args.get("in_features", 784) == 784
    assert said == "" if not remark else f"model.network.{remark}" in said and said.count("\n") == 1


def test_the_members_of_an_ensemble_get_the_sizes_of_the_data():
    members = ["--model.network.members+=MLP", "--model.network.members.units=[4]", "--model.network.members+=CNN"]
    with patched_jsonargparse():
        run = FitCLI("fit", ["--data=CIFAR10", "--model.network=Ensemble", *members])
    mlp, cnn = run.config.model.network.init_args.members
    assert (mlp.init_args.units, mlp.init_args.in_features) == ([4], 32 * 32 * 3)
    assert cnn.init_args.in_channels == 3
    assert not hasattr(mlp.init_args, "in_channels")


def test_an_ensemble_may_make_its_members_itself(tmp_path, monkeypatch):
    (tmp_path / "my_ensemble.py").write_text(
        "from mnist_lightning import MLP, Ensemble\n"
        "class Pair(Ensemble):\n"
        "    def __init__(self, in_features: int, units: int = 4):\n"
        "        super().__init__([MLP([units], in_features=in_features), MLP([units], in_features=in_features)])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with patched_jsonargparse():
        run = FitCLI("fit", ["--data=CIFAR10", "--model.network=my_ensemble.Pair"])
    assert [member.dense_1.in_features for member in run.model.network] == [32 * 32 * 3] * 2


def test_a_number_of_classes_that_is_none_is_refused(tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("model: {network: {class_path: MLP, init_args: {num_classes: many}}}")
    code, _, errors = in_process(capfd, "fit", f"--config={tmp_path / 'config.yaml'}")
    assert code == 2
    assert "num_classes: Expected a int. Got value: many" in errors


def test_a_short_name_means_the_package_s_own_class(model):
    import torchvision.ops  # this module also has an MLP

    assert torchvision.ops.MLP.__name__ == "MLP"
    network = model("--model.network=MLP", "--model.network.units=[7,7]", "--print_config")["network"]
    assert network["class_path"] == "mnist_lightning.networks.MLP"
    assert network["init_args"]["units"] == [7, 7]


@pytest.mark.parametrize(
    "file", [["--config=x.yaml"], ["--config", "x.yaml"], ["-c", "x.yaml"], ["--conf=x.yaml"], ["--model=model.yaml"]]
)
def test_what_is_typed_counts_whatever_the_order(model, monkeypatch, tmp_path, file):
    monkeypatch.chdir(tmp_path)
    spelled = {"network": {"class_path": "MLP", "init_args": {"units": [5, 5]}}, "optimizer": "KerasSGD"}
    Path("x.yaml").write_text(yaml.safe_dump({"model": spelled}), encoding="utf-8")
    Path("model.yaml").write_text(yaml.safe_dump(spelled), encoding="utf-8")
    found = model("--model.network.units=[7,7]", *file, "--print_config")
    assert found["network"]["init_args"]["units"] == [7, 7]
    assert found["optimizer"]["class_path"] == "mnist_lightning.optimizers.KerasSGD"


def test_the_short_name_of_a_scheduler_means_lightning_s(model):
    options = ["--model.lr_scheduler=ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss", "--print_config"]
    assert model(*options)["lr_scheduler"]["class_path"] == "lightning.pytorch.cli.ReduceLROnPlateau"


@pytest.mark.parametrize(
    "again", [[], ["--model.lr_scheduler=CosineAnnealingLR"], ["--model.lr_scheduler.eta_min=0.1"]]
)
def test_steps_that_are_left_out_are_those_of_the_training(model, tmp_path, again):
    file = tmp_path / "x.yaml"
    left_out = {"class_path": "CosineAnnealingLR"}
    for scheduler, expected in ((left_out, -1), ({**left_out, "init_args": {"T_max": 9}}, 9)):
        file.write_text(yaml.safe_dump({"model": {"lr_scheduler": scheduler}}))
        found = model(f"--config={file}", *again, "--print_config")["lr_scheduler"]
        assert found["init_args"]["T_max"] == expected


def test_the_config_is_printed_after_all_options(model):
    config = f"--config={ROOT / 'tests/conf/linear.yaml'}"
    optimizer = model("--print_config", config, "--model.optimizer=KerasRMSprop")["optimizer"]
    assert optimizer["class_path"] == "mnist_lightning.optimizers.KerasRMSprop"


def test_what_was_typed_is_not_handed_to_a_trial_of_another_class():
    with patched_jsonargparse():
        run = FitCLI("fit", ["--model.optimizer=KerasAdam", "--model.optimizer.lr=0.001", "--trainer.logger=false"])
        sgd = {"class_path": "mnist_lightning.optimizers.KerasSGD", "init_args": {}}
        config = run.plain_config(run.parser.parse_object({"model": {"optimizer": sgd}}))
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.01


def test_jsonargparse_is_corrected_only_inside():
    before = _typehints.adapt_partial_callable_class
    with patched_jsonargparse():
        assert _typehints.adapt_partial_callable_class is not before
    with contextlib.suppress(ZeroDivisionError), patched_jsonargparse():
        raise ZeroDivisionError
    assert _typehints.adapt_partial_callable_class is before


@pytest.mark.parametrize(
    "option", ["limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"]
)
@pytest.mark.parametrize(("given", "value"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("12", 12)])
def test_a_whole_number_of_batches_stays_whole(capfd, tmp_path, option, given, value):
    """Check that one batch does not become 100 % of the batches."""
    (tmp_path / "config.yaml").write_text(f"trainer:\n  {option}: {given}\n")
    for way in (f"--trainer.{option}={given}", f"--config={tmp_path / 'config.yaml'}"):
        code, out, errors = in_process(capfd, "fit", way, "--print_config")
        assert code == 0, errors
        found = yaml.safe_load(out)["trainer"][option]
        assert (type(found), found) == (type(value), value)


def test_parsing_opens_no_data_and_makes_no_module(monkeypatch):
    monkeypatch.setattr(Parser, "instantiate", lambda *_, **__: pytest.fail("an object was created"))
    monkeypatch.setattr(FitCLI, "instantiate_classes", lambda self: None)
    options = ["--data=FashionMNIST", "--data.data_dir=/nowhere", "--data.augmentation+=Distortion"]
    with patched_jsonargparse():
        run = FitCLI("fit", [*options, "--model.network=CNN", "--model.network.channels=[4]"])
    assert run.config.model.network.class_path == "mnist_lightning.networks.CNN"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["fit", "--trainer.max_epochs=1"], 1),
        (["fit", "--ckpt_path=last", "--trainer.max_epochs=5"], 2),
        (["test"], 2),
        (["predict", "--images={run}/figures/samples.png"], 2),
        (["export", "--output=network.pt2"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_line_is_parsed_at_most_twice(fitted, quick, monkeypatch, tmp_path, options, count):
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    parsed = []
    original = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", lambda self, *words, **more: (
        parsed.append(words), original(self, *words, **more))[1])  # fmt: skip
    quick(tmp_path, *(option.format(run=fitted[0]) for option in options))
    assert len(parsed) == count
