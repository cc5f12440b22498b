"""What the libraries have, tried in fit, and what nobody should write into a config or a file; see conformance.py."""

import random
import shutil
import subprocess
import sys

import pytest
from conformance import ROOT, SMALL, check, differences, is_expected, rows, run, run_folder, write_data
from keys import VALUES, cases, options_of, try_key, without

ROWS = rows()
SHARES = 4
"""Groups of rows, and of cases, that can run in parallel."""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.xdist_group(f"conformance {number % SHARES}"), id=f"{row.kind} {row.name}")
        for number, row in enumerate(ROWS)
    ],
)
def test_a_row_works_or_is_refused_as_expected(drawn, capfd, row, data, tmp_path):
    verdict = check(row, tmp_path, data)
    assert is_expected(row, verdict), verdict
    assert "Traceback" not in capfd.readouterr().err  # of a library's log, which the row does not redirect


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_run_of_this_one(data, tmp_path):
    """Check one row of each kind, together, in a new process; the rows run in this process."""
    options = [
        "fit", f"--data.data_dir={data}/MNISTDataModule", *SMALL, "--trainer.accelerator=cpu",
        "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss", "--trainer.logger+=CSVLogger",
        "--trainer.profiler=simple", "--model.optimizer=torch.optim.AdamW", "--model.lr_scheduler=CosineAnnealingLR",
        "--data.augmentation+=torchvision.transforms.v2.RandomRotation", "--data.augmentation.degrees=10",
        "--trainer.accumulate_grad_batches=2",
    ]  # fmt: skip
    here = run_folder(run(tmp_path / "here", *options), tmp_path / "here")
    command = [sys.executable, "-m", "mnist_lightning", *options]
    (tmp_path / "there").mkdir()
    subprocess.run(command, cwd=tmp_path / "there", check=True, capture_output=True, timeout=300)
    assert differences(here, tmp_path / "there" / here.relative_to(tmp_path / "here")) == ""


def test_the_table_in_the_docs_has_all_that_is_refused():
    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    assert [row.name for row in ROWS if (row.refusal or row.remark) and f"`{row.name}`" not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "share"),
    [
        pytest.param(command, share, marks=pytest.mark.xdist_group(f"keys {command} {share}"))
        for command, shares in (("fit", SHARES), ("tune", 1), ("predict", 1))
        for share in range(shares)
    ],
)
def test_no_value_of_a_key_ends_in_a_traceback(capfd, command, share, tmp_path):
    """Try a sixth of the cases of fit and a twenty-fourth of others; ``python tests/keys.py fit`` tries all."""
    found = cases(command)
    random.Random(0).shuffle(found)
    options = options_of(command, tmp_path)
    problems = []
    for number, (key, kind) in enumerate(found[share::24]):
        problem = try_key(command, key, VALUES[kind], tmp_path / str(number), *without(options, key))
        problems += [f"{key}: {kind}: {problem}"] if problem else []
    assert not problems
    assert "Traceback" not in capfd.readouterr().err


DAMAGE = {
    "cut": lambda content, other, generator: content[: generator.randrange(len(content) or 1)],
    "emptied": lambda content, other, generator: b"",
    "flipped": lambda content, other, generator: flipped(content, generator),
    "swapped": lambda content, other, generator: other,
    "doubled": lambda content, other, generator: content * 2,
    "replaced": lambda content, other, generator: b"sloth",
    "deleted": None,
    "a folder": None,
}


def flipped(content, generator):
    changed = bytearray(content)
    for _ in range(8 if changed else 0):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a run and a study of one trial."""
    folder = tmp_path_factory.mktemp("kept")
    options = options_of("tune", folder)
    run_folder(run(folder, "fit", *options[:6]), folder)
    assert run(folder, "tune", *options).code == 0
    return folder


READERS = {
    "fit": ("--ckpt_path=last", "--trainer.max_epochs=4", "--trainer.max_steps=-1"),
    "validate": (),
    "test": (),
    "predict": (),
    "report": ("one=lightning_logs/baseline/version_0", "two=lightning_logs/baseline/version_0", "--study=tune"),
    "export": ("--page=digit.html",),
    "tune": ("--show",),
    "fit again": ("--config=lightning_logs/baseline/version_0/config.yaml",),
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", [pytest.param(name, marks=pytest.mark.xdist_group("files")) for name in READERS])
def test_no_damaged_file_ends_in_a_traceback(reader, kept, tmp_path):
    """Try a tenth of the cases: each file of a run and a study, damaged in each way."""
    files = [path.relative_to(kept) for path in kept.rglob("lightning_logs/**/*") if path.is_file()]
    files = sorted(path for path in files if path.suffix in (".ckpt", ".yaml", ".csv", ".log"))
    generator = random.Random(reader)
    for number, (path, kind) in enumerate(
        (path, kind) for path in files for kind in DAMAGE if generator.random() < 0.1
    ):
        folder = tmp_path / str(number)
        shutil.copytree(kept / "lightning_logs", folder / "lightning_logs")
        content, other = (kept / path).read_bytes(), (kept / generator.choice(files)).read_bytes()
        (folder / path).unlink()
        if kind == "a folder":
            (folder / path).mkdir()
        elif DAMAGE[kind] is not None:
            (folder / path).write_bytes(DAMAGE[kind](content, other, generator))
        result = run(folder, reader.partition(" ")[0], *READERS[reader])
        said = [line for line in result.error.splitlines() if "error: " in line]
        assert (len(said), "Traceback" in result.text) == (bool(result.code), False), (path, kind, result.error[-800:])
        shutil.rmtree(folder)
