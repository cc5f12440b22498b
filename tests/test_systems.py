"""What differs between systems: the commands without what Windows lacks, names of processes, files that are open."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from helpers.studies import load, tune_options, wait_for
from optuna.trial import TrialState
from PIL import Image

from mnist_lightning.search.recovery import process_name
from mnist_lightning.system.files import atomic_write

LIKE_WINDOWS = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parent / "like_windows"),
    "PYTHONIOENCODING": "cp1252",
    "PYTHONWARNDEFAULTENCODING": "1",
}


def start(cwd, *arguments):
    command = [sys.executable, "-m", "mnist_lightning", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=LIKE_WINDOWS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="cp1252"
    )


def finished_executions(cwd):
    return [execution for trial in load(cwd).trials for execution in trial.user_attrs.get("executions", [])]


@pytest.mark.slow
def test_all_commands_work_without_what_windows_lacks(data_dir, tmp_path):
    def run(*arguments):
        if arguments[0] not in ("report", "tune"):
            arguments = (*arguments, f"--data.data_dir={data_dir}")
        process = start(tmp_path, *arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert "Traceback" not in output
        return output

    # the terminal's encoding does not have this letter
    assert f"Run: {Path('lightning_logs/?/version_0')}" in run("fit", "--trainer.max_epochs=1", "--name=λ")
    options = tune_options(data_dir, "--n_trials=6", "--workers=2", "--refit=true", "--refit_epochs=1")
    killed = start(tmp_path, *options)
    journal = tmp_path / "lightning_logs/tune/journal.log"
    wait_for(lambda: journal.exists() and b'"executions"' in journal.read_bytes())
    children = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.communicate()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    finished = finished_executions(tmp_path)
    assert "6 complete, 0 pruned, 0 failed" in run(*options)
    assert all(trial.state == TrialState.COMPLETE for trial in load(tmp_path).trials)
    assert all(execution in finished_executions(tmp_path) for execution in finished)
    run("report", "λ", "tuned")
    report = json.loads((tmp_path / "lightning_logs/report/report.json").read_text(encoding="utf-8"))
    assert [*report["models"]] == ["λ", "tuned"]
    assert "300 predictions" in run("predict", "--name=λ")
    samples = Image.open(tmp_path / "lightning_logs/λ/version_0/figures/samples.png")
    picture = tmp_path / "λ.png"
    samples.crop((0, 60, *samples.size)).save(picture)  # without the title
    assert "25 predictions" in run("predict", f"--images={picture}", "--sheet", "--output=sheet.csv")
    run("export", "--page=page.html", "--output=network.pt2")


def test_what_windows_lacks_is_away_there():
    program = """
        import os, signal
        names = [hasattr(os, "fork"), hasattr(signal, "SIGHUP")]
        for attempt in (lambda: os.symlink("a", "b"), lambda: open("/proc/stat"), lambda: os.kill(os.getpid(), 0)):
            try:
                attempt()
            except OSError:
                names.append(False)
        print(names)
    """
    code = f"exec({textwrap.dedent(program)!r}, {{'__name__': 'mnist_lightning.probe'}})"
    result = subprocess.run([sys.executable, "-c", code], env=LIKE_WINDOWS, capture_output=True, text=True)
    assert result.stdout == "[False, False, False, False, False]\n", result.stderr


@pytest.mark.skipif(not psutil.LINUX, reason="only Linux counts a process's start from the system's")
def test_a_process_keeps_its_name_when_the_clock_is_set(tmp_path, monkeypatch):
    name = process_name()
    assert name == process_name(os.getpid())
    lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
    later = [f"btime {int(line.split()[1]) + 3600}" if line.startswith("btime") else line for line in lines]
    (tmp_path / "stat").write_text("\n".join(later))
    (tmp_path / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert process_name() == name


def test_a_dead_process_and_one_that_nobody_has_buried_have_no_start():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not process_name(child.pid).endswith(":None")
    child.stdin.close()
    wait_for(lambda: process_name(child.pid).endswith(":None"))  # the child is a zombie
    child.wait()
    assert process_name(child.pid).endswith(":None")


def test_a_file_that_somebody_reads_is_replaced_once_they_have_read_it(tmp_path, monkeypatch):
    genuine, refusals = Path.replace, [PermissionError(13, "Access is denied")] * 3

    def replace(self, target):
        if refusals:
            raise refusals.pop()
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with atomic_write(tmp_path / "metrics.csv") as partial:
        partial.write_text("new")
    assert (tmp_path / "metrics.csv").read_text() == "new"
    assert refusals == []
    refusals += [PermissionError(13, "Access is denied")] * 100
    with pytest.raises(PermissionError, match=r"metrics\.csv"), atomic_write(tmp_path / "metrics.csv") as partial:
        partial.write_text("newer")
    assert (tmp_path / "metrics.csv").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
