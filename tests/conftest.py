"""Small pieces of the real MNIST, and the command run as a user runs it."""

import base64
import html
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from numpy.typing import NDArray
from optuna.trial import TrialState

from mnist_lightning.__main__ import main
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.search.record import is_counted
from mnist_lightning.search.storage import open_storage

ROOT = Path(__file__).parents[1]
SPACE = {
    "model.network.init_args.units.0": {"class_path": "IntDistribution", "init_args": {"low": 8, "high": 32}},
    "model.network.init_args.l2.1": {"class_path": "CategoricalDistribution", "init_args": {"choices": [0.01, 0.1]}},
    "model.optimizer.class_path": {
        "class_path": "CategoricalDistribution",
        "init_args": {"choices": ["KerasAdam", "KerasSGD", "mnist_lightning.optimizers.KerasRMSprop"]},
    },
}
"""A small search space."""

ROUNDING = 2e-5
"""By what two ways of computing in float32 may differ: 6e-8, times the root of 784 summands, times logits of about 10.
"""

posix = pytest.mark.skipif(os.name == "nt", reason="uses what Windows lacks")

Run = Callable[..., subprocess.CompletedProcess[str]]


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by a shell, for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or the commands that are tested would ignore it, too


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array as an IDX file."""
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, lest all wait for one at the end; a worker has a file or a group."""
    longest = ["test_conformance.py", "test_faults.py", "test_search.py", "test_cli.py", "test_report.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def mnist() -> MNISTDataModule:
    """All of MNIST."""
    datamodule = MNISTDataModule()
    datamodule.setup("fit")
    datamodule.setup("test")
    return datamodule


@pytest.fixture(scope="session")
def data_dir(mnist: MNISTDataModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the data set with the first 1,250 training images (1,000 + 250) and 300 test images."""
    folder = tmp_path_factory.mktemp("mnist")
    for prefix, split, count in (("train", mnist.train, 1250), ("t10k", mnist.test, 300)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", split.images[:count, 0].numpy())
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", split.labels[:count].numpy())
    return folder


@pytest.fixture(scope="session")
def command(data_dir: Path) -> Run:
    """Runs ``python -m mnist_lightning`` on the small data set in a folder."""

    def run(
        cwd: Path, name: str, *options: str, check: bool = True, data: bool = True
    ) -> subprocess.CompletedProcess[str]:
        small = [f"--data.data_dir={data_dir}"] if data else []
        arguments = [sys.executable, "-m", "mnist_lightning", name, *small, *options]
        result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert not check or result.returncode == 0, result.stderr
        return result

    return run


def tune_options(data_dir: Path, *more: str, epochs: int = 2) -> list[str]:
    """Arguments of a small search without a refit."""
    has_space = any(option.startswith(("--search_space", "--config=")) for option in more)
    space = [] if has_space else [f"--search_space={json.dumps(SPACE)}"]
    return [
        "tune", f"--data.data_dir={data_dir}", f"--trainer.max_epochs={epochs}", "--refit=false", *space, *more,
    ]  # fmt: skip


def in_process(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command without the seconds that a new process takes; gives exit code, standard output and error."""
    code: int | str | None = 0
    try:
        main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capfd.readouterr()
    if isinstance(code, str):  # what Python does with sys.exit("message")
        return 1, captured.out, captured.err + code + "\n"
    return code or 0, captured.out, captured.err


def spelled_and_default(capfd: pytest.CaptureFixture[str], command: str, config: Path) -> tuple[Any, Any]:
    """What a config says and what a command does without it, which the config must not change."""
    _, defaults, _ = in_process(capfd, command, "--print_config")
    _, with_file, _ = in_process(capfd, command, f"--config={config}", "--print_config")
    assert yaml.safe_load(with_file) == yaml.safe_load(defaults)
    return yaml.safe_load(config.read_text(encoding="utf-8")), yaml.safe_load(defaults)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], data_dir: Path) -> Run:
    """Runs a command as ``command`` does, but in this process."""

    def run(cwd: Path, name: str, *options: str, data: bool = True) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        small = [f"--data.data_dir={data_dir}"] if data else []
        code, output, errors = in_process(capfd, name, *small, *options)
        assert code == 0, errors
        return subprocess.CompletedProcess([name, *options], code, output, errors)

    return run


@pytest.fixture(scope="session")
def fitted(command: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of four epochs, and what it printed."""
    cwd = tmp_path_factory.mktemp("fitted")
    result = command(cwd, "fit", "--trainer.max_epochs=4")
    return cwd / "lightning_logs/baseline/version_0", result.stdout + result.stderr


BEFORE = """<script>
  const errors = [];
  for (const name of ["error", "securitypolicyviolation", "unhandledrejection"])
    addEventListener(name, (event) => errors.push(name + " " + (event.message ?? event.blockedURI ?? event.reason)));
  for (const name of ["error", "warn"]) console[name] = (...texts) => errors.push(texts.join(" "));
</script>"""
AFTER = """<script>
  const all_ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const wait = () => new Promise((go) => setTimeout(go, 100));
  addEventListener("load", async () => {
    const found = {};
    try { await wait(); await (async () => { %s })(); } catch (error) { errors.push(String(error)); }
    found.errors = errors;
    const requests = performance.getEntriesByType("resource").map(({ name }) => name);
    found.requests = requests.filter((name) => !name.startsWith("data:"));
    parent.document.title = JSON.stringify(found);
  });
</script>"""


def as_bytes(images: NDArray[Any]) -> str:
    """A line of JavaScript that makes ``bytes`` of images, for a script in a page."""
    text = base64.b64encode(images.tobytes()).decode()
    return f"const bytes = Uint8Array.from(atob('{text}'), (c) => c.charCodeAt(0));\n"


def in_browser(text: str, script: str, width: int = 1280, *flags: str) -> dict[str, Any]:
    """Run a script in a page in headless Chromium; gives the dictionary ``found`` that the script fills."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no browser here (Debian: apt-get install chromium)")
    with_script = text.replace("<head>", f"<head>{BEFORE}").replace("</body>", AFTER % script + "</body>")
    # in a frame, since windows have a least width
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(with_script)}">'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--virtual-time-budget=5000"]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(f"<title></title>{frame}", encoding="utf-8")
        command = [chromium, *options, *flags, "--dump-dom", page.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found: dict[str, Any] = json.loads(html.unescape(re.search("<title>(.*?)</title>", result.stdout)[1]))
    assert (found.pop("errors"), found.pop("requests")) == ([], [])
    return found


@pytest.fixture
def postgresql() -> Iterator[Callable[..., str]]:
    """A PostgreSQL server of its own on the loopback address; ``postgresql(*arguments of pg_ctl)`` gives its URL."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    pg_ctl = shutil.which("pg_ctl", path=str(binaries[-1])) if binaries else shutil.which("pg_ctl")
    if pg_ctl is None:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp())  # where any user may look
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


def choices(**values):
    """A search space of choices."""
    space = {key: {"class_path": "CategoricalDistribution", "init_args": {"choices": v}} for key, v in values.items()}
    return f"--search_space={json.dumps(space)}"


@pytest.fixture
def tune(data_dir, tmp_path, monkeypatch, capfd):
    """Runs ``tune`` in this process in a folder of its own, with real workers."""

    def run(*more, folder="here", **keywords):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        return in_process(capfd, *tune_options(data_dir, *more, **keywords))

    return run


@pytest.fixture
def tune_beside(tune):
    """Runs ``tune`` while a function looks at it or disturbs it; gives what either gives."""

    def run(function, *more, **keywords):
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(function)
            result = tune(*more, **keywords)
            return result, other.result()

    return run


def load(folder, name="tune"):
    storage = open_storage(str(Path(folder) / f"lightning_logs/{name}/journal.log"))
    return optuna.load_study(storage=storage, study_name=name)


def outcome(study):
    """What must not depend on workers, interruptions and processes: parameters and value of each trial that counts."""
    trials = [trial for trial in study.trials if is_counted(trial)]
    return sorted((tuple(trial.params.values()), trial.value) for trial in trials)


@pytest.fixture(scope="session")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted study of five trials, by one worker, and what the command printed."""
    cwd, output = tmp_path_factory.mktemp("whole"), io.StringIO()
    with chdir(cwd), redirect_stdout(output):
        main(tune_options(data_dir, "--n_trials=5", "--workers=1"))
    return cwd, output.getvalue()


def start(data_dir, cwd, *more, epochs=2):
    command = [sys.executable, "-m", "mnist_lightning", *tune_options(data_dir, *more, epochs=epochs)]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)  # to look costs time as well


def reported(cwd):
    """Whether a trial is running that has had its first epoch, after one that is complete."""
    journal = cwd / "lightning_logs/tune/journal.log"
    if not journal.exists() or b'"owner"' not in journal.read_bytes():  # the study may not be there yet
        return False
    states = [trial.state for trial in load(cwd).trials if trial.intermediate_values]
    return TrialState.COMPLETE in states and TrialState.RUNNING in states


def session(leader):
    """The processes of a session that are left."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, fields = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, number, *_ = fields.split()
        if int(number) == leader and state != "Z":
            left.append(stat.parent.name)
    return left


@contextmanager
def stopped_worker(cwd, execution):
    """Stop a worker while it is at an execution with this number; gives its process and the number of the trial."""

    def is_at(trial):
        return len(trial.user_attrs.get("executions", [])) == execution and len(trial.params) == len(SPACE)

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        journal = cwd / "lightning_logs/tune/journal.log"
        for trial in load(cwd).trials if journal.exists() and b'"owner"' in journal.read_bytes() else []:
            name = trial.user_attrs.get("owner")
            if name and trial.state == TrialState.RUNNING and is_at(trial):
                pid = int(name.split(":")[-2])
                os.kill(pid, signal.SIGSTOP)
                try:
                    now = load(cwd).trials[trial.number]
                    if (
                        now.state == TrialState.RUNNING
                        and now.user_attrs["owner"] == name
                        and is_at(now)
                        and not journal.with_name("journal.log.lock").exists()
                    ):
                        yield pid, trial.number
                        return
                finally:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
    raise AssertionError("no worker was caught")
