"""The map of the modules in docs/internals.md is true, and the README's Python works."""

import ast
import os
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ROOT
from PIL import Image

from mnist_lightning import MNISTDataModule, Run

PACKAGE = ROOT / "mnist_lightning"


def imported(path: Path) -> set[str]:
    """Return the package's modules that a file imports anywhere, without the name of the package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            parent = node.module.removeprefix(PACKAGE.name).lstrip(".")
            for alias in node.names:  # a module, or a name in a module
                module = f"{parent}.{alias.name}".lstrip(".")
                names.add(module if (PACKAGE / f"{module.replace('.', '/')}.py").exists() else parent)
    return names - {""}


def test_imports_go_down_the_map_of_modules():
    text = (ROOT / "docs/internals.md").read_text()
    lines = dict(re.findall(r"^    ([a-z_.]+)  +(\S.*)", text, re.MULTILINE))
    modules = list(lines)
    files = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }
    assert sorted(modules) == sorted(files)
    for name, path in files.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert lines[name] == docstring.partition("\n")[0].removesuffix(".").replace("``", "")
        for module in imported(path):
            assert modules.index(module) > modules.index(name), f"{name} imports {module}"


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="a single process runs all tests (-n0)")
def test_one_worker_runs_the_tests_of_a_file(request):
    """Check that xdist has made groups: versions that do not fit together silently ignore them."""
    assert request.node.nodeid.endswith("@test_structure.py")


def python_of(file: str, title: str) -> str:
    """Return the Python code of a section."""
    section = (ROOT / file).read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return textwrap.dedent("".join(re.findall(r"^(?:    .*|)\n", section, re.MULTILINE)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["porting", "results"])
def test_a_table_in_the_docs_is_that_of_its_measurements(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--check"])
    runpy.run_path(str(ROOT / f"benchmarks/{name}.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert table.startswith("| ")
    assert table in (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_objective_in_the_docs_prunes(data_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = python_of("docs/python.md", "An objective of your own").replace(
        "max_epochs=4", f'max_epochs=4, data=MNISTDataModule(data_dir="{data_dir}")'
    )
    names: dict[str, Any] = {"MNISTDataModule": MNISTDataModule}
    exec(compile(code.replace("n_trials=4", "n_trials=8"), "python.md", "exec"), names)
    trials = names["study"].trials
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    for trial in trials:
        history = Run(f"lightning_logs/trial_{trial.number}/version_0").history
        assert trial.intermediate_values == dict(enumerate(history["val/accuracy"]))


@pytest.mark.slow
def test_the_readme_s_python_works(capfd, tmp_path, monkeypatch, mnist):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(mnist.test.images[0, 0].numpy()).resize((280, 280)).save("scan.png")
    code = python_of("README.md", "From Python")
    assert 5 < len(code.strip().splitlines()) < 10
    shorter = re.sub(r"(epochs|n_trials)=\d", r"\1=1", code)
    assert shorter != code
    exec(compile(shorter, "README.md", "exec"), {})
    output = capfd.readouterr().out
    assert output.endswith("0    7\ndtype: str\n")
    assert "last epoch (1)" in output
    assert "Report: lightning_logs/report/report.html" in output
