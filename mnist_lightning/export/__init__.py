"""``export``: the network of a run as a file for other programs, or as a page to draw on."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningArgumentParser

from mnist_lightning.cli import RunCLI, quieten_lightning
from mnist_lightning.console import note
from mnist_lightning.errors import UserError, user_errors
from mnist_lightning.export import formats
from mnist_lightning.export.page import write_page
from mnist_lightning.files import place
from mnist_lightning.parsing import corrected
from mnist_lightning.runs import newest_result
from mnist_lightning.saved_run import check_finite, outputs
from mnist_lightning.signals import leave_as_usual


class ExportCLI(RunCLI):
    """Takes the newest tuned run, or else the newest baseline, unless ``name`` or ``ckpt_path`` is given."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None)
        parser.add_argument("--output", type=str | None, help="File to write, .onnx or .pt2 (torch.export.load).")
        parser.add_argument(
            "--page", type=str | None, help="Page to write, to draw on in a browser; such as digit.html."
        )
        parser.set_defaults({"name": None})  # the newest tuned run, or else the newest baseline

    def _find_checkpoint(self) -> Path | None:
        if self.config.name is None:
            self.config.name = "baseline"  # where it does not matter
            if self.config.ckpt_path in (None, "last", "best"):
                return newest_result(self.logs).with_name(f"{self.config.ckpt_path or 'last'}.ckpt")
        return super()._find_checkpoint()


def export(run: RunCLI) -> None:
    """Write what is asked for, once it gives what the checkpoint gives."""
    checkpoint, data, classifier = run.config.ckpt_path, run.datamodule, run.model.eval()
    page = Path(run.config.page) if run.config.page else None
    output = Path(run.config.output or "network.onnx") if run.config.output or page is None else None
    for option, path in (("output", output), ("page", page)):
        if path is not None and path.exists():
            raise UserError(f"{path} exists and is not overwritten: choose another --{option}.")
    form = None if output is None else formats.format_of(output)
    data.setup("test")
    assert run.saved is not None
    assert data.test is not None
    run.saved.restore(classifier)
    note(f"Exporting {checkpoint}: {type(classifier.network).__name__} for {data.source}")
    expected = outputs(classifier, data.test, torch.arange(len(data.test)).split(data.eval_batch_size)).softmax(dim=1)
    check_finite(expected, checkpoint)
    if output is not None and form is not None:
        with _new_file(output) as partial:
            program = formats.exported(classifier.network, data)
            form.write(program, formats.metadata(data, expected, checkpoint), partial)
            difference = formats.compare(expected, formats.predict(form.read(partial), data), form.checker)
        note(
            f"{output}: {output.stat().st_size / 2**10:,.0f} KiB. {form.checker} gives all {len(expected):,} test "
            f"images the checkpoint's labels, and probabilities that differ by at most {difference:.1e}."
        )
    if page is not None:
        html, weights = write_page(classifier.network, data, expected)
        with _new_file(page) as partial:
            partial.write_text(html, encoding="utf-8")
        note(f"{page}: {page.stat().st_size / 2**10:,.0f} KiB, {weights} Open it in a browser.")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Give another path to write to, of the same suffix; what is there becomes ``path``, unless an error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        yield partial
        place(partial, path)


def main(command: str, description: str, arguments: Sequence[str]) -> None:
    """Run the command."""
    quieten_lightning()
    with user_errors(), corrected():
        run = ExportCLI(command, arguments, description)
        leave_as_usual()
        export(run)
