"""docs/notebook.ipynb runs, and its outputs are those of the commands."""

import importlib.util
import re

import nbformat
import pytest
from helpers.commands import ROOT

SPEC = importlib.util.spec_from_file_location("notebook", ROOT / "docs/notebook.py")
assert SPEC is not None
assert SPEC.loader is not None
notebook = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebook)


def text_of(cells):
    """Return all text in the outputs of cells."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def test_the_outputs_are_those_of_the_commands():
    cells = nbformat.read(notebook.PATH, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    text = text_of(cells)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("last epoch (20)", r"lightning_logs/tuned/version_0"):
        (row,) = {match.group(0) for match in re.finditer(rf"^ *{re.escape(name)} .*$", readme, re.MULTILINE)}
        assert " ".join(row.split()) in " ".join(text.split())
    assert not re.search(r"(/tmp|/home|/work|/root|/Users)/", str(cells))


@pytest.mark.slow
def test_a_short_version_runs(tmp_path):
    cells = notebook.executed(tmp_path, is_short=True).cells
    assert text_of(cells).count("Run: lightning_logs/") == 4  # the baseline, the CNN and two refits
