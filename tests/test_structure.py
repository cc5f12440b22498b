"""The map of the modules in docs/internals.md is true, and the README's Python works."""

import ast
import re
import textwrap
from pathlib import Path

import pytest
from helpers.commands import ROOT
from PIL import Image

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


@pytest.mark.slow
def test_the_readme_s_python_works(capfd, tmp_path, monkeypatch, mnist):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(mnist.test.images[0, 0].numpy()).resize((280, 280)).save("scan.png")
    section = (ROOT / "README.md").read_text().partition("## From Python")[2]
    code = textwrap.dedent("".join(re.findall(r"^(?:    .*|)\n", section.partition("\n## ")[0], re.MULTILINE)))
    assert 5 < len(code.strip().splitlines()) < 10
    exec(compile(code, "README.md", "exec"), {})
    output = capfd.readouterr().out
    assert output.endswith("0    7\ndtype: str\n")
    assert "last epoch (5)" in output
    assert "Report: lightning_logs/report/report.html" in output
