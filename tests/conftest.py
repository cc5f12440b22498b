"""Small pieces of the real MNIST, and the command run as a user runs it."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import in_process, write_idx
from helpers.studies import tune_options

from mnist_lightning.__main__ import main
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.training import callbacks, figures

Run = Callable[..., subprocess.CompletedProcess[str]]


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell makes background processes ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # otherwise the tested commands would ignore it, too


@pytest.hookimpl(tryfirst=True)  # before xdist's, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slowest files, so that no worker ends late; a worker runs a whole file or group."""
    longest = ["test_conformance.py", "test_cli.py", "test_conformance_search.py", "test_faults.py", "test_search.py"]
    longest += ["test_report.py", "test_examples.py", "test_export.py", "test_notebook.py", "test_metrics.py"]
    longest += ["test_structure.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


BLANK = {name: lambda *_, **__: None for name in ("image_grid", "predictions", "confusion_matrix", "curves")}


@pytest.fixture(autouse=True)
def _blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of `fit` blank, which take 80 % of a short training; `drawn` has them drawn."""
    if "drawn" not in request.fixturenames:
        white = {"render": lambda _: np.full((8, 8, 3), 255, np.uint8)}
        monkeypatch.setattr(callbacks, "figures", SimpleNamespace(**{**vars(figures), **BLANK, **white}))


@pytest.fixture
def drawn() -> None:
    """Let `fit` draw its figures."""


@pytest.fixture(scope="session")
def mnist() -> MNISTDataModule:
    """All of MNIST."""
    datamodule = MNISTDataModule()
    datamodule.setup("fit")
    datamodule.setup("test")
    return datamodule


@pytest.fixture(scope="session")
def data_dir(mnist: MNISTDataModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first 1,250 training images (1,000 + 250) and 300 test images of MNIST."""
    folder = tmp_path_factory.mktemp("mnist")
    for prefix, split, count in (("train", mnist.train, 1250), ("t10k", mnist.test, 300)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", split.images[:count, 0].numpy())
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", split.labels[:count].numpy())
    return folder


@pytest.fixture(scope="session")
def command(data_dir: Path) -> Run:
    """Run ``python -m mnist_lightning`` on the small data set in a folder."""

    def run(
        cwd: Path, name: str, *options: str, check: bool = True, data: bool = True
    ) -> subprocess.CompletedProcess[str]:
        small = [f"--data.data_dir={data_dir}"] if data else []
        arguments = [sys.executable, "-m", "mnist_lightning", name, *small, *options]
        result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert not check or result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], data_dir: Path) -> Run:
    """Run a command as ``command`` does, but in this process."""

    def run(cwd: Path, name: str, *options: str, data: bool = True) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        small = [f"--data.data_dir={data_dir}"] if data else []
        code, output, errors = in_process(capfd, name, *small, *options)
        assert code == 0, errors
        return subprocess.CompletedProcess([name, *options], code, output, errors)

    return run


@pytest.fixture(scope="session")
def fitted(command: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of four epochs, and its output."""
    cwd = tmp_path_factory.mktemp("fitted")
    result = command(cwd, "fit", "--trainer.max_epochs=4")
    return cwd / "lightning_logs/baseline/version_0", result.stdout + result.stderr


@pytest.fixture
def postgresql() -> Iterator[Callable[..., str]]:
    """A new PostgreSQL server on the loopback address; ``postgresql(*arguments of pg_ctl)`` returns its URL."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    pg_ctl = shutil.which("pg_ctl", path=str(binaries[-1])) if binaries else shutil.which("pg_ctl")
    if pg_ctl is None:
        pytest.skip("this machine does not have PostgreSQL (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp())  # a folder that any user may enter
    if user:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def control(*arguments: str) -> str:
        command = [pg_ctl, "-D", str(folder / "data"), "-l", str(folder / "log"), "-w", *arguments]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=240)
        return f"postgresql://tester@127.0.0.1:{port}/postgres"

    try:
        control("initdb", "-o", "-U tester -A trust --no-sync")
        control("start", "-o", f"-h 127.0.0.1 -p {port} -k {folder} -F")
        yield control
    finally:
        control("stop", "-m", "immediate")
        shutil.rmtree(folder)


@pytest.fixture
def tune(data_dir, tmp_path, monkeypatch, capfd):
    """Run ``tune`` in this process in its own folder, with real workers."""

    def run(*more, folder="here", **keywords):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        return in_process(capfd, *tune_options(data_dir, *more, **keywords))

    return run


@pytest.fixture
def tune_beside(tune):
    """Run ``tune`` while a function watches or disturbs it; return both results."""

    def run(function, *more, **keywords):
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(function)
            result = tune(*more, **keywords)
            return result, other.result()

    return run


@pytest.fixture(scope="session")
def whole(data_dir, tmp_path_factory):
    """The folder of an uninterrupted study of five trials by one worker, and its output.

    ``terminal.txt`` has what only a terminal shows.
    """
    cwd, output, terminal = tmp_path_factory.mktemp("whole"), io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    with chdir(cwd), redirect_stdout(output), redirect_stderr(terminal):
        main(tune_options(data_dir, "--n_trials=5", "--workers=1"))
    (cwd / "terminal.txt").write_text(terminal.getvalue())
    return cwd, output.getvalue()
