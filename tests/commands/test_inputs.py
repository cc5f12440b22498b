"""What comes from outside: configs, search spaces, data, checkpoints and studies, damaged, odd or malicious."""

import contextlib
import copy
import dataclasses
import functools
import gzip
import itertools
import json
import math
import operator
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tracemalloc

import optuna
import pytest
import torch
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from mnist_lightning.__main__ import main
from mnist_lightning.comparison import page
from mnist_lightning.data import MNISTDataModule, idx
from mnist_lightning.search.command import SearchOptions
from mnist_lightning.search.pool import Pool
from mnist_lightning.search.storage import open_storage
from mnist_lightning.system.errors import UserError

save = page.save
LAST = "lightning_logs/baseline/version_0/checkpoints/last.ckpt"
JOURNAL = "lightning_logs/tune/journal.log"
UNITS, RATE = "model.network.init_args.units.0", "model.optimizer.init_args.lr"
TUNE = [
    "tune", "--trainer.max_epochs=1", "--n_trials=1", "--executions_per_trial=1", "--workers=1", "--refit=false",
    "--config=space.yaml",
]  # fmt: skip


def spec(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}


INTEGER = spec("IntDistribution", low=8, high=32)


def run_command(*arguments):
    """Run a command in this process; return exit code or message."""
    try:
        main(arguments)
    except SystemExit as exit:
        return exit.code or 0
    return 0


def one_trial(pool, _):
    """Replace the search by one finished trial, which saves the time of workers."""
    trial = pool.study.ask({UNITS: IntDistribution(8, 32)})
    pool.names.add("worker")
    trial.set_user_attr("owner", "worker")
    trial.set_user_attr("attempts", 0)
    trial.set_user_attr(
        "executions", [{"execution": 0, "seed": 42, "score": 0.5, "seconds": 1.0, "values": [[0, 0.5]]}]
    )
    pool.study.tell(trial, 0.5)


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    """A folder with a run of one epoch and a study of one trial."""
    cwd = tmp_path_factory.mktemp("made")
    (cwd / "space.yaml").write_text(yaml.safe_dump({"search_space": {UNITS: INTEGER}}))
    with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "run", one_trial)
        assert run_command("fit", f"--data.data_dir={data_dir}", "--trainer.max_epochs=1") == 0
        assert run_command(*TUNE, f"--data.data_dir={data_dir}") == 0
    return cwd


@pytest.fixture
def cwd(made, tmp_path, monkeypatch):
    """A copy of that folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(cwd, monkeypatch, capfd, data_dir):
    """Run a command; check that it runs no code from its inputs and changes no files; return code and message."""
    # the slow part of a report reads no further inputs
    monkeypatch.setattr(page, "save", lambda *_: sys.exit(0))

    def command(name, *options):
        before = {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
        code = run_command(name, *options, *([] if name == "report" else [f"--data.data_dir={data_dir}"]))
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert not (cwd / "hacked").exists()
        # a command that asks for a study appends to its journal
        assert all(path.read_bytes().startswith(content) for path, content in before.items())
        return (1, code) if isinstance(code, str) else (code, err[err.find("error: ") :])

    return command


@pytest.fixture
def refused(run):
    """Run a command that must refuse its input in one or two lines that say what is wrong."""

    def command(message, *arguments):
        code, error = run(*arguments)
        assert code in (1, 2)
        assert error.startswith("error: ")
        assert re.search(message, error), error
        assert len(error.splitlines()) <= 2

    return command


def mutated(content, generator):
    """Return bytes with one to fifty of them changed, or truncated somewhere."""
    if generator.random() < 0.3:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(generator.choice([1, 5, 50])):
        changed[generator.randrange(len(content))] = generator.randrange(256)
    return bytes(changed)


# --- configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"trainer: {max_epochs: [", "c.yaml is not a config: .*expected"),
        (b"name: !!python/object/apply:os.system [touch hacked]", "c.yaml is not a config: could not determine"),
        (b"name: !!python/object/new:subprocess.Popen [[touch, hacked]]", "c.yaml is not a config: could not"),
        (b"name: a\0b", "c.yaml is not a config: .*special characters"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "c.yaml is not a config: 'utf-8' codec"),
        ("name: é".encode("latin-1"), "c.yaml is not a config: 'utf-8' codec"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "c.yaml is not a config: maximum recursion depth"),
        (b"a: &a [*a]", "c.yaml is not a config: it has too many values"),
        (
            b"a: &a [1]\n" + b"".join(b"%c: &%c [%s]\n" % (i, i, b"*%c," % (i - 1) * 9) for i in b"bcdefghijk"),
            "c.yaml is not a config: it has too many values",
        ),
        (b"seed_everything: " + b"9" * 5000, "c.yaml is not a config: Exceeds the limit"),
        (b"[1, 2]", "error: "),
        (b"trainer: {nope: 1}", "nope"),
        (b"trainer: 5", "trainer"),
        (b"name: !!binary aGVsbG8=", "error: name: "),
        (b"num_threads: 99999999999999999999", "error: num_threads: "),
        (b"seed_everything: -5", "seed_everything -5 must be from 0"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)  # fmt: skip
def test_a_file_that_is_not_a_config_is_refused(refused, cwd, content, message):
    (cwd / "c.yaml").write_bytes(content)
    refused(message, "fit", "--config=c.yaml")


@pytest.mark.parametrize("path", [".", "/dev/null/x", "nope.yaml"])
def test_a_config_that_is_not_a_file_is_refused(refused, path):
    refused(re.escape(path), "fit", f"--config={path}")


SYSTEM = spec("os.system", command="touch hacked")
EVALUATE = spec("sympy.sympify", a="__import__('os').system('touch hacked')")  # evaluates its argument
MALICIOUS = {
    "network subprocess.Popen": {"network": spec("subprocess.Popen", args=["touch", "hacked"])},
    "optimizer os.system": {"optimizer": SYSTEM},
    "optimizer through torch": {"optimizer": {**SYSTEM, "class_path": "torch.os.system"}},
    "optimizer any function": {"optimizer": EVALUATE},
    "scheduler any function": {"lr_scheduler": EVALUATE},
    "argument of any type": {"network": spec("torch.nn.Linear", in_features=784, out_features=10, device=EVALUATE)},
    "callable argument": {"network": spec("torch.nn.TransformerEncoderLayer", d_model=8, nhead=1, activation=EVALUATE)},
}


@pytest.mark.parametrize("model", MALICIOUS.values(), ids=MALICIOUS)
def test_a_config_runs_no_code(refused, cwd, model):
    (cwd / "c.yaml").write_text(yaml.safe_dump({"model": model}))
    refused("", "fit", "--config=c.yaml", "--trainer.fast_dev_run=true")


# --- search spaces ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({UNITS: spec("IntDistribution", low=9, high=8)}, "has no valid distribution"),
        ({RATE: spec("FloatDistribution", low=-1.0, high=1.0, log=True)}, "has no valid distribution"),
        ({RATE: spec("FloatDistribution", low=float("nan"), high=1.0)}, "has no valid distribution"),
        ({RATE: spec("FloatDistribution", low=0.1, high=float("inf"))}, "has no valid distribution"),
        ({UNITS: spec("CategoricalDistribution", choices=[])}, "has no valid distribution"),
        ({UNITS: spec("CategoricalDistribution", choices=[[1], {"a": 2}])}, r"cannot be '\[1\]'"),
        ({"model.optimizer": spec("CategoricalDistribution", choices=[EVALUATE])}, "sympify is not a class"),
        ({"model.optimizer": spec("CategoricalDistribution", choices=["os.system"])}, "cannot be 'os.system'"),
        ({UNITS: SYSTEM}, "has no valid distribution"),
        ({UNITS: spec("torch.nn.Linear", in_features=1, out_features=1)}, "has no valid distribution"),
        *[({UNITS: value}, "error: ") for value in (None, [1])],
        *[
            ({key: INTEGER}, "have no key")
            for key in (
                "trainer.", "trainer", "..", "name", "x" * 5000,
                *(f"model.network.init_args.units.{index}" for index in ("3", "-1", "00")),
            )
        ],
        (
            {"model.network.init_args.units.2": INTEGER, "model.network.init_args.dropout.0": INTEGER},
            "the length of dropout is 2, but the number of hidden layers .units. is 3",
        ),
        ({5: INTEGER}, "have no key 5"),
        ({"model.network.init_args.units": INTEGER, UNITS: INTEGER}, "is a part of"),
        ({"trainer.max_epochs": spec("CategoricalDistribution", choices=[1, None])}, "max_epochs is None"),
        (None, "search_space is empty"),
        ({}, "search_space is empty"),
    ],
)  # fmt: skip
def test_a_malformed_search_space_is_refused(refused, cwd, space, message):
    (cwd / "space.yaml").write_text(yaml.safe_dump({"search_space": space}))
    refused(message, *TUNE, "--study_name=other")


# --- options of tune ----------------------------------------------------------------------------------------

OPTIONS = {field.name: field.default for field in dataclasses.fields(SearchOptions) if field.name != "search_space"}


@pytest.fixture
def tune_with(run, cwd, monkeypatch):
    """Run ``tune`` with a value of an option and without training; return code and message."""
    monkeypatch.setattr(Pool, "run", one_trial)
    names = itertools.count()

    def command(**options):
        space = {"search_space": {UNITS: INTEGER}, "trainer": {"max_epochs": 1}, "refit": False}
        (cwd / "c.yaml").write_text(yaml.safe_dump({"study_name": f"study {next(names)}", **space, **options}))
        return run("tune", "--config=c.yaml")

    return command


def test_null_is_the_default_of_an_option(tune_with, cwd):
    for path in (cwd / "lightning_logs").glob("tune"):
        shutil.rmtree(path)
    code, error = tune_with(**dict.fromkeys(OPTIONS) | {"refit": False})
    assert code == 0, error
    assert (cwd / JOURNAL).is_file()


@pytest.mark.parametrize("option", ["workers", "executions_per_trial", "n_trials"])
def test_a_number_that_would_fill_the_memory_is_refused(tune_with, option):
    code, error = tune_with(**{option: 10**12})
    assert code == 2
    assert error.startswith(f"error: {option}: ")


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_a_limit_that_limits_nothing_is_refused(tune_with, limit):
    options = {"metric": ["val/loss", "parameters"], "limits": {"parameters": limit}}
    assert tune_with(**options) == (1, "error: limits: the limit of parameters must be a finite number.")


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_has_a_value_or_is_refused(tune_with, option):
    """Try a random sample of odd values, drawn with a seed."""
    for value in random.Random(option).sample([None, 0, -1, 0.5, math.nan, math.inf, 10**12, "", "x", [], [1], {}], 6):
        code, error = tune_with(**{option: value})
        assert code in (0, 1, 2)
        assert code == 0 or error.startswith("error: "), (value, error)
        assert len(error.removesuffix("\nFor the options, add --help\n").splitlines()) <= 1, (value, error)
        assert code != 2 or option in error, (value, error)


# --- data ---------------------------------------------------------------------------------------------------


@pytest.fixture
def images(data_dir, tmp_path):
    """A copy of the test images next to their labels."""
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(data_dir / f"t10k-{kind}-ubyte", tmp_path)
    return tmp_path / "t10k-images-idx3-ubyte"


@pytest.mark.parametrize("seed", range(60))
def test_damaged_data_are_refused_or_valid(images, seed):
    generator = random.Random(seed)
    path = generator.choice(sorted(images.parent.iterdir()))
    content = path.read_bytes()
    damage = generator.choice([mutated, lambda content, _: content + b"x", lambda content, generator: (
        content[:4] + struct.pack(">I", generator.choice([0, 1, 301, 2**31, 2**32 - 1])) + content[8:]
    ), lambda content, generator: mutated(content[:16], generator) + content[16:]])  # fmt: skip
    if generator.random() < 0.5:
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
        content = (
            gzip.compress(content, 1) if generator.random() < 0.5 else damage(gzip.compress(content, 1), generator)
        )
    path.write_bytes(damage(content, generator) if path.suffix != ".gz" else content)
    datamodule = MNISTDataModule(str(images.parent))
    try:
        datamodule.setup("test")
        refusal = ""
    except UserError as error:
        refusal = str(error)
    assert refusal.startswith(str(images.parent)) if refusal else datamodule.test.images.shape == (300, 1, 28, 28)


@pytest.mark.parametrize("count", [300, 2**32 - 1])
def test_a_gzip_bomb_does_not_fill_the_memory(images, monkeypatch, count):
    monkeypatch.setattr(idx, "MAX_BYTES", 2**20)
    images.unlink()
    with gzip.open(f"{images}.gz", "wb", 1) as file:
        file.write(struct.pack(">4I", 0x803, count, 28, 28))
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match=f"its header says {count}x28x28 values"):
        MNISTDataModule(str(images.parent)).setup("test")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


# --- checkpoints --------------------------------------------------------------------------------------------

READERS = {
    "fit": ["fit", "--ckpt_path=x.ckpt", "--trainer.max_epochs=2"],
    "test": ["test", "--ckpt_path=x.ckpt"],
    "report": ["report", "one=lightning_logs/baseline/version_0", "other=x.ckpt"],
}


@pytest.fixture
def checkpoint(made):
    return torch.load(made / LAST, weights_only=True)


class _Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    ("reader", "kind"),
    [("fit", "zip"), ("test", "legacy"), ("validate", "pickle"), ("predict", "zip"), ("report", "zip")],
)
def test_a_malicious_pickle_is_not_run(refused, checkpoint, reader, kind):
    checkpoint["extra"] = _Malicious()
    if kind == "pickle":
        with open("x.ckpt", "wb") as file:
            pickle.dump(_Malicious(), file)
    else:
        torch.save(checkpoint, "x.ckpt", _use_new_zipfile_serialization=kind == "zip")
    refused("x.ckpt cannot be used: it is damaged or not", *READERS.get(reader, [reader, "--ckpt_path=x.ckpt"]))


@pytest.mark.parametrize("reader", ["test", "report"])
@pytest.mark.parametrize(
    "parameters",
    [
        *MALICIOUS.values(),
        {"_class_path": "os.system", "command": "touch hacked"},
        {"network": 5},
    ],
    ids=str,
)
def test_hyper_parameters_run_no_code(refused, checkpoint, reader, parameters):
    checkpoint["hyper_parameters"] |= parameters
    torch.save(checkpoint, "x.ckpt")
    refused("x.ckpt cannot be used", *READERS[reader])


@pytest.mark.parametrize("path", ["os.system"])
def test_no_other_instantiator_is_called(run, cwd, checkpoint, path):
    checkpoint["hyper_parameters"]["_instantiator"] = path
    torch.save(checkpoint, "x.ckpt")
    for reader in READERS.values():
        assert run(*reader)[0] == 0


def save_with(checkpoint, key, value):
    """Write a checkpoint with another value at a path of keys."""
    tree = checkpoint
    for part in key[:-1]:
        tree = tree[part]
    tree[key[-1]] = value
    torch.save(checkpoint, "x.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(("hyper_parameters",), value) for value in (None, 5)],
        (("datamodule_hyper_parameters",), 5),
        *[(("state_dict",), value) for value in (None, {})],
        *[(("state_dict", "network.dense_1.weight"), value) for value in (5, torch.zeros(3, 3))],
        (("pytorch-lightning_version",), "x"),
        *[(("loops",), value) for value in (None, {}, {"fit_loop": {}})],
        *[(("optimizer_states",), value) for value in ([], [{}])],
        (("lr_schedulers",), None),
        *[(("callbacks",), value) for value in (5, {"RunCheckpoint": {}})],
        *[(("callbacks", "RunCheckpoint", "history"), value) for value in ([], [{}])],
        (("callbacks", "RunCheckpoint", "seconds"), None),
        (("callbacks", "RunCheckpoint", "random_states"), [{}]),
        (("callbacks", "RunCheckpoint", "best_model_score"), "x"),
    ],
    ids=str,
)
def test_fit_refuses_a_garbled_checkpoint(refused, checkpoint, key, value):
    shutil.copy(LAST.replace("last", "best"), ".")
    save_with(checkpoint, key, value)
    refused("x.ckpt cannot be used", *READERS["fit"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("callbacks", "RunCheckpoint"), {}),
        (("callbacks", "RunCheckpoint", "history"), [{"epoch": "x"}]),
        (("datamodule_hyper_parameters",), {"nope": 1}),
        (("datamodule_hyper_parameters",), {"val_split": "x"}),
    ],
    ids=str,
)
def test_a_report_refuses_a_garbled_checkpoint(refused, checkpoint, key, value):
    save_with(checkpoint, key, value)
    refused("x.ckpt cannot be used: it is damaged", *READERS["report"])


@pytest.mark.parametrize("content", [b"a: [", b"5", b"\xff"])
def test_a_report_refuses_a_garbled_config_of_a_run(refused, cwd, content):
    (cwd / "lightning_logs/baseline/version_0/config.yaml").write_bytes(content)
    refused("config.yaml is damaged", "report", "one=lightning_logs/baseline/version_0", "other=x.ckpt")


@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_of_a_checkpoint_are_refused_or_harmless(run, cwd, seed):
    generator = random.Random(seed)
    (cwd / "x.ckpt").write_bytes(mutated((cwd / LAST).read_bytes(), generator))
    code, error = run(*READERS[generator.choice(["fit", "test", "report"])])
    assert code == 0 or (code == 1 and "x.ckpt cannot be used" in error)


# --- studies ------------------------------------------------------------------------------------------------


STUDY_READERS = [TUNE, ["report", "one=lightning_logs/baseline/version_0", f"other={LAST}", "--study=tune"]]


@pytest.mark.slow
@pytest.mark.parametrize("reader", STUDY_READERS, ids=["tune", "report"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: bytes(range(256)), "journal.log cannot be opened"),
        (lambda content: content + b"garbage\n", "journal.log cannot be opened: its last line is damaged"),
        (lambda content: content.replace(b"\n", b"\nxx", 1), "journal.log cannot be opened"),
        (lambda content: content + b'{"op_code":77,"worker_id":"x"}\n', "journal.log cannot be opened"),
        (lambda content: content + b"[1]\n", "journal.log cannot be opened"),
    ],
)
def test_a_damaged_journal_is_refused(refused, cwd, reader, change, message):
    journal = cwd / JOURNAL
    journal.write_bytes(change(journal.read_bytes()))
    refused(message, *reader)


def with_attribute(journal, name, value, *, finished=True):
    """Change an attribute of the study or its trials in a journal, or remove it if the value is None."""
    records = [json.loads(line) for line in journal.read_bytes().splitlines()]
    if not finished:
        records = [record for record in records if record["op_code"] != JournalOperation.SET_TRIAL_STATE_VALUES]
    if value is None:
        records = [record for record in records if name not in record.get("user_attr", {})]
    for record in records:
        if name in record.get("user_attr", {}):
            record["user_attr"][name] = value
    journal.write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.mark.parametrize("settings", ["x", {}, {"search_space": {UNITS: "{"}}])
def test_a_study_with_odd_settings_is_refused(refused, cwd, settings):
    with_attribute(cwd / JOURNAL, "settings", settings)
    refused("The study tune (was not made by tune|has other settings)", *TUNE)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("executions", value) for value in (5, [{}])],
        *[("executions", [{"execution": "x", "score": 1, "values": v}]) for v in ([[0, "x"]], [[0, 0.5]])],
        ("owner", 5),
        ("attempts", "x"),
    ],
)
def test_trials_with_odd_attributes_are_refused(refused, cwd, name, value, finished):
    with_attribute(cwd / JOURNAL, name, value, finished=finished)
    refused("Trial 0 of the study tune is damaged or was not made by tune", *TUNE)
    if finished:
        refused("Trial 0 of the study tune is damaged or was not made by tune", *STUDY_READERS[1])


@pytest.mark.parametrize("reader", STUDY_READERS, ids=["tune", "report"])
@pytest.mark.parametrize("content", [bytes(range(256)) * 40])
def test_a_file_that_is_not_a_database_is_refused(refused, cwd, reader, content):
    (cwd / "study.db").write_bytes(content)
    refused("study.db cannot be opened", *reader, "--storage=sqlite:///study.db")


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bytes_of_a_journal_are_refused_or_harmless(run, cwd, seed):
    generator = random.Random(seed)
    content = (cwd / JOURNAL).read_bytes()
    (cwd / JOURNAL).write_bytes(mutated(content, generator))
    code, error = run(*STUDY_READERS[1])
    assert code == 0 or (code == 1 and re.search(r"journal\.log|study tune", error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.dirpath=elsewhere", "callbacks.0.dirpath"),
        ("--trainer.logger+=CSVLogger --trainer.logger.save_dir=elsewhere", "logger.0.save_dir"),
        ("--trainer.profiler=AdvancedProfiler --trainer.profiler.dirpath=elsewhere", "profiler.dirpath"),
        ("--trainer.default_root_dir=elsewhere", "default_root_dir"),
    ],
)
def test_a_checkpoint_from_elsewhere_writes_nowhere_else(run, cwd, options, key):
    code, error = run("fit", "--trainer.max_epochs=1", "--name=theirs", *options.split())
    assert code == 0, error
    (theirs,) = cwd.glob("**/theirs/version_0/checkpoints/last.ckpt")
    shutil.copy(theirs, "mailed.ckpt")
    shutil.rmtree("elsewhere", ignore_errors=True)
    code, error = run("fit", "--ckpt_path=mailed.ckpt", "--trainer.max_epochs=2")
    assert code == 1
    assert f"with its trainer.{key} elsewhere would write outside" in error
    assert not (cwd / "elsewhere").exists()
    typed = options.replace("+=", "=").split()
    assert run("fit", "--ckpt_path=mailed.ckpt", "--trainer.max_epochs=2", *typed)[0] == 0


@pytest.fixture
def studied(cwd):
    """The journal of a study of six trials in this folder: one is waiting, one has failed and one is running."""
    journal = cwd / "lightning_logs/odd/journal.log"
    study = optuna.create_study(
        storage=open_storage(str(journal)), study_name="odd", directions=["maximize", "minimize"]
    )
    study.set_user_attr("settings", {"metric": ["val/accuracy", "parameters"], "search_space": {}})
    study.set_user_attr("limits", {"parameters": 1e5})
    study.set_user_attr("deadline", 1e9)
    study.enqueue_trial({UNITS: 9})
    space = {UNITS: IntDistribution(8, 32), RATE: FloatDistribution(1e-4, 1.0, log=True)}
    space["model.optimizer.class_path"] = CategoricalDistribution(["KerasAdam", "KerasSGD"])
    for number in range(5):
        trial = study.ask(space)
        study._storage.set_trial_intermediate_value(trial._trial_id, 0, number / 10)
        trial.set_user_attr("owner", "another machine:1:2")
        trial.set_user_attr("workers", {"1": "another worker:1:2"})
        values = [[0, number / 10], [1, number / 8]]
        trial.set_user_attr("executions", [{"execution": 0, "score": number / 8, "scores": [1, 2], "values": values}])
        if number < 3:
            study.tell(trial, [number / 8, 100 - number])
        elif number == 3:
            trial.set_user_attr("error", "it diverged")
            study.tell(trial, state=TrialState.FAIL)
    study.enqueue_trial({UNITS: 9})
    return journal


DELETED = object()
READ = {"show": ["tune", "--show", "--study_name=odd"], "report": ["report", "--study=odd"]}
ODD = [None, math.nan, math.inf, -1, 0.5, 10**12, 10**400, "", "x", [], [None], {}, {"x": None}, True, 2, DELETED]


def paths(tree, path=()):
    """Yield the path of every node in a tree of mappings and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from paths(value, (*path, key))


def odd_journal(records, number, path, value):
    """Return the text of a journal in which one record has another value at a path, or lacks it."""
    records = copy.deepcopy(records)
    *parts, last = path
    node = functools.reduce(operator.getitem, parts, records[number])
    if value is DELETED:
        del node[last]
    else:
        node[last] = value
    return "".join(f"{json.dumps(record)}\n" for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READ)
@pytest.mark.parametrize(
    ("op_code", "path", "value", "message"),
    [
        (6, ["values", 0], math.nan, "Trial 0 of the study odd is damaged .*: nan is not a finite number"),
        (6, ["values", 1], math.inf, "Trial 0 of the study odd is damaged .*: inf is not a finite"),
        (6, ["values"], [0.5], "Trial 0 of the study odd is damaged .*: the number of its values is 1, not 2"),
        (6, ["values"], None, "Trial 0 of the study odd is damaged"),
        (5, ["param_value_internal"], 99, "Trial 0 of the study odd is damaged .*: its .*units.0 is 99, not 8 to 32"),
        (5, ["param_name"], 5, "Trial 0 of the study odd is damaged"),
        (7, ["intermediate_value"], "x", "Trial 0 of the study odd is damaged"),
        (7, ["step"], "x", "Trial 0 of the study odd is damaged"),
        (4, ["system_attrs"], "x", "Trial 0 of the study odd is damaged"),
        (2, ["user_attr", "limits"], "x", "The study odd is damaged"),
        (2, ["user_attr", "limits"], {"parameters": "x"}, "The study odd is damaged"),
        (2, ["user_attr", "deadline"], "x", "The study odd is damaged"),
        (0, ["directions"], [], "The study odd is damaged .*: it has no direction"),
    ],
)
def test_a_study_that_was_edited_is_refused(refused, studied, reader, op_code, path, value, message):
    records = [json.loads(line) for line in studied.read_bytes().splitlines()]
    number = next(
        number
        for number, record in enumerate(records)
        if record["op_code"] == op_code and tuple(path) in paths(record) and (op_code != 6 or record["values"])
    )
    studied.write_text(odd_journal(records, number, path, value))
    refused(message, *READ[reader])


@pytest.mark.slow
@pytest.mark.parametrize("reader", READ)
def test_a_record_of_a_study_is_read_or_refused(run, studied, monkeypatch, reader):
    """Change or delete single fields of the records: a random sample of fields and odd values, drawn with a seed."""
    monkeypatch.setattr(page, "save", save)  # run the whole report
    records = [json.loads(line) for line in studied.read_bytes().splitlines()]
    places = [(number, path) for number, record in enumerate(records) for path in paths(record)]
    generator = random.Random(0)
    for _ in range({"show": 40, "report": 10}[reader]):
        number, path = generator.choice(places)
        value = generator.choice(ODD)
        studied.write_text(odd_journal(records, number, path, value))
        shutil.rmtree("lightning_logs/report", ignore_errors=True)
        code, error = run(*READ[reader])
        assert code == 0 or (code == 1 and error.startswith("error: ") and len(error.splitlines()) == 1), (path, value)
