"""Progress in a cell of a notebook."""

import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = """
from mnist_lightning import MLP, Classifier, MNISTDataModule, fit
data = {"data_dir": "DATA"}
run = fit(MLP([8]), MNISTDataModule(**data), max_epochs=3)
run
---
from lightning.pytorch import Trainer
options = {"logger": False, "enable_checkpointing": False}
trainer = Trainer(max_epochs=2, **options)
trainer.fit(Classifier(MLP([8])), MNISTDataModule(**data))
---
Trainer(max_epochs=1, enable_progress_bar=False, **options).fit(Classifier(MLP([8])), MNISTDataModule(**data))
---
from lightning.pytorch.callbacks import LambdaCallback
def stop(trainer, *_):
    if trainer.current_epoch == 1:
        raise KeyboardInterrupt
try:
    fit(data=MNISTDataModule(**data), max_epochs=3, callbacks=[LambdaCallback(on_train_batch_start=stop)])
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
def test_a_cell_shows_a_table_of_the_epochs(data_dir, tmp_path):
    sources = CELLS.replace("DATA", str(data_dir)).split("---\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    tables = []
    for cell in notebook.cells:
        shown = [output.data for output in cell.outputs if output.output_type == "display_data"]
        tables.append([re.findall(r"<tr>(.*?)</tr>", data["text/html"]) for data in shown])
        assert not any(
            "Epoch 1" in output.get("text", "") or "v_num" in output.get("text", "") for output in cell.outputs
        )
    assert [[len(rows) for rows in found] for found in tables] == [
        [4],
        [3],
        [],
        [2],
    ]  # a header, and a row for each epoch
    header, *rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in tables[0][0]]
    assert header[:3] == ["epoch", "seconds", "train/loss"]
    assert header[-1] == "val/accuracy"
    run = notebook.cells[0].outputs[-1].data["text/html"]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[-1][-1][:5] in run  # the run shows its last epochs
    assert "stopped" in notebook.cells[3].outputs[-1].text


@pytest.mark.slow
def test_ten_trainings_need_the_memory_of_two(data_dir, tmp_path):
    code = f"""
import psutil
from mnist_lightning import MNISTDataModule, fit
sizes = []
for _ in range(10):
    fit(data=MNISTDataModule(data_dir={str(data_dir)!r}), max_epochs=1)
    sizes.append(psutil.Process().memory_info().rss)
print("ratio", sizes[9] / sizes[1])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(result.stdout.rpartition("ratio ")[2]) < 1.1
