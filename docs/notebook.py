"""Run docs/notebook.ipynb in a new folder and keep its outputs: ``python docs/notebook.py``."""

import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).with_name("notebook.ipynb")


def executed(folder: Path, is_short: bool = False) -> Any:
    """Return the notebook with its outputs.

    Args:
        folder: A new folder for the runs.
        is_short: Whether to train only as long as it takes to see that all cells work.
    """
    notebook = nbformat.read(PATH, as_version=4)
    if is_short:
        for cell in notebook.cells:
            short = re.sub(r"(epochs|n_trials|executions_per_trial)=\d+", r"\1=1", cell.source)
            cell.source = short.replace(" max_epochs=1", " max_epochs=1, limit_train_batches=100")
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=3600, record_timing=False, resources=place).execute()
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = nbformat.writes(executed(Path(folder)))
    PATH.write_text(text.replace(f"{folder}/", "") + "\n", encoding="utf-8")  # the report's commands have whole paths
