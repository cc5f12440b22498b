"""Precision ``auto`` is bfloat16 where a device computes in it, and a run keeps what was taken."""

import pytest
import torch
import yaml
from helpers.commands import in_process
from lightning.pytorch.accelerators import CUDAAccelerator

from mnist_lightning.commands import cli
from mnist_lightning.training import precision
from mnist_lightning.training.precision import Trainer, choose_precision, has_bf16

X86 = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}


@pytest.fixture
def cpu(monkeypatch):
    """Pretend that the processor has certain instructions, and whether oneDNN uses them."""

    def pretend(instructions, onednn=True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)

    return pretend


@pytest.mark.parametrize(
    ("instructions", "onednn", "expected"),
    [
        ({**X86, "avx512_bf16": True}, True, True),
        ({**X86, "amx_bf16": True}, True, True),
        ({**X86, "avx512_bf16": True}, False, False),  # ONEDNN_MAX_CPU_ISA=AVX2
        (X86, True, False),  # AVX-512 without bfloat16, which oneDNN emulates
        ({"architecture": "arm64", "bf16": True}, True, None),
    ],
)
def test_a_processor_has_bfloat16_if_it_has_the_instructions(cpu, instructions, onednn, expected):
    cpu(instructions, onednn)
    assert has_bf16("cpu") is expected
    assert choose_precision("auto", "cpu") == ("bf16-mixed" if expected else "32-true")


@pytest.mark.parametrize("is_new", [True, False])
def test_a_gpu_is_asked_by_torch(monkeypatch, is_new):
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_new and not including_emulation)
    assert [has_bf16(name) for name in ("auto", "gpu", "cuda")] == [is_new] * 3
    assert choose_precision("auto", "auto") == ("bf16-mixed" if is_new else "32-true")


def test_other_devices_and_other_precisions_are_left_alone(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # torch before 2.12
    assert [has_bf16(name) for name in ("cpu", "mps", "tpu")] == [None] * 3
    assert [choose_precision(each, "cpu") for each in (None, "bf16-true", 16)] == [None, "bf16-true", 16]


@pytest.mark.slow
@pytest.mark.parametrize(("has", "taken"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_run_keeps_what_was_taken(quick, monkeypatch, tmp_path, has, taken):
    for module in (precision, cli):
        monkeypatch.setattr(module, "has_bf16", lambda accelerator: has)
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    assert "emulated" not in quick(tmp_path, "fit", *short, "--trainer.precision=auto").stdout
    run = tmp_path / "lightning_logs/baseline/version_0"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"] == taken
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["RunCheckpoint"]
    assert state["config"]["trainer"]["precision"] == taken
    # another processor continues and evaluates in the precision of the run
    monkeypatch.setattr(precision, "has_bf16", lambda accelerator: not has)
    assert "precision" not in quick(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_epochs=2").stdout
    continued = tmp_path / "lightning_logs/baseline/version_1"
    assert yaml.safe_load((continued / "config.yaml").read_text())["trainer"]["precision"] == taken


def test_what_is_imitated_is_said_once(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "has_bf16", lambda accelerator: False)
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.precision=bf16-mixed"]
    output = quick(tmp_path, "fit", *options).stdout
    assert output.count("emulated") == 1
    (line,) = [line for line in output.splitlines() if "emulated" in line]
    assert line.startswith("Precision bf16-mixed is emulated here, several times slower than 32-true")
    assert quick(tmp_path, "test").stdout.count("emulated") == 1


def test_a_study_is_of_the_precision_that_was_taken(tune, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "has_bf16", lambda accelerator: False)
    short = ["--n_trials=1", "--executions_per_trial=1", "--workers=1", "--trainer.limit_train_batches=2"]
    code, _, errors = tune(*short, "--trainer.precision=auto", epochs=1)
    assert code == 0, errors
    (config,) = (tmp_path / "here").glob("lightning_logs/tune/trial_000/execution_0/config.yaml")
    assert yaml.safe_load(config.read_text())["trainer"]["precision"] == "32-true"
    monkeypatch.setattr(precision, "has_bf16", lambda accelerator: True)
    code, _, errors = tune(*short, "--trainer.precision=auto", epochs=1)
    assert code == 1
    assert "trainer.precision" in errors


def test_a_trainer_of_one_s_own_takes_it_as_well(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda accelerator: accelerator == "cpu")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    assert Trainer(precision="auto", accelerator="cpu", **options).precision == "bf16-mixed"


def test_another_word_is_refused(capfd):
    code, _, errors = in_process(capfd, "fit", "--trainer.precision=fast")
    assert code == 2
    assert errors.startswith("error: trainer.precision: fast is not one of")
