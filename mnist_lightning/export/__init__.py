"""``export``: the network of a run as a file for other programs."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mnist_lightning.checkpoints import checkpoint_errors
from mnist_lightning.cli import RunCLI, quieten_lightning
from mnist_lightning.export import formats
from mnist_lightning.parsing import corrected
from mnist_lightning.runs import newest_file, note, user_errors
from mnist_lightning.signals import leave_as_usual


class ExportCLI(RunCLI):
    """Takes the newest tuned run, or else the newest baseline, unless ``name`` or ``ckpt_path`` is given."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None)
        parser.add_argument(
            "--output", default="network.onnx", help="File to write: .onnx, or .pt2 for torch.export.load."
        )
        parser.set_defaults({"name": None})  # the newest tuned run, or else the newest baseline

    def _find_checkpoint(self) -> Path | None:
        if self.config.name is None:
            tuned = newest_file((self.logs / "tuned").glob("version_*/test.csv"))  # which a complete run has
            if tuned is not None and self.config.ckpt_path in (None, "last", "best"):
                return tuned.parent / f"checkpoints/{self.config.ckpt_path or 'last'}.ckpt"
            self.config.name = "baseline"
        return super()._find_checkpoint()


def export(run: RunCLI) -> None:
    """Write the file, once what it gives is what the checkpoint gives."""
    output, checkpoint = Path(run.config.output), run.config.ckpt_path
    if output.exists():
        raise MisconfigurationException(f"{output} exists and is not overwritten: choose another --output.")
    form = formats.format_of(output)
    data, classifier = run.datamodule, run.model.eval()
    data.setup("test")
    with checkpoint_errors(checkpoint):
        classifier.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    note(f"Exporting {checkpoint}: {type(classifier.network).__name__} for {data.source}")
    with torch.no_grad():
        expected = torch.cat([classifier.predict_step(batch) for batch in data.test_dataloader()])
    with _new_file(output) as partial:
        form.write(formats.exported(classifier.network, data), formats.metadata(data, expected, checkpoint), partial)
        found = formats.predict(form.read(partial), data)
        difference = formats.compare(expected, found, f"{form.checker} on the exported network")
    note(
        f"{output}: {output.stat().st_size / 2**10:,.0f} KiB. {form.checker} gives {len(expected):,} test images the "
        f"labels that the checkpoint gives; probabilities differ by at most {difference:.1e}."
    )


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Give another path to write to, of the same suffix; what is there becomes ``path``, unless an error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        yield partial
        partial.rename(path)


def main(command: str, description: str, arguments: Sequence[str]) -> None:
    """Run the command."""
    quieten_lightning()
    with user_errors(), corrected():
        run = ExportCLI(command, arguments, description)
        leave_as_usual()
        export(run)
