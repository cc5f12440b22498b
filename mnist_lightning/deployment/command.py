"""``export``: write the network of a run for other programs, or as a page to draw on."""

from pathlib import Path

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from mnist_lightning.commands.cli import RunCLI
from mnist_lightning.deployment import formats
from mnist_lightning.deployment.page import write_page
from mnist_lightning.system.console import rank_zero_print
from mnist_lightning.system.files import atomic_write, make_room
from mnist_lightning.training.runs import newest_result
from mnist_lightning.training.saved_run import check_finite, outputs


class ExportCLI(RunCLI):
    """Export the newest tuned run, or else the newest baseline, unless ``name`` or ``ckpt_path`` is given."""

    default_checkpoint = "last"
    common_options = ("data", "data.data_dir")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None)
        parser.add_argument("--output", type=str | None, help="File to write, .onnx or .pt2 (torch.export.load).")
        parser.add_argument(
            "--page", type=str | None, help="Page to write, for drawing in a browser, such as digit.html."
        )
        parser.set_defaults({"name": None})  # the newest tuned run, or else the newest baseline

    def find_checkpoint(self) -> Path | None:
        if self.config.name is None and self.config.ckpt_path in (None, "last", "best"):
            return newest_result(self.logs, self.config.ckpt_path or "last")
        return super().find_checkpoint()

    def run(self) -> None:
        """Write the requested files, after checking that they predict what the checkpoint predicts."""
        page = Path(self.config.page) if self.config.page else None
        output = Path(self.config.output or "network.onnx") if self.config.output or page is None else None
        for option, path in (("output", output), ("page", page)):
            if path is not None:
                make_room(option, path)
        form = None if output is None else formats.format_of(output)
        checkpoint, data, classifier = self.config.ckpt_path, self.datamodule, self.model.eval()
        data.setup("test")
        assert self.saved is not None
        assert data.test is not None
        self.saved.restore(classifier)
        rank_zero_print(f"Exporting {checkpoint}: {type(classifier.network).__name__} for {data.source}")
        batches = torch.arange(len(data.test)).split(data.eval_batch_size)
        expected = outputs(classifier, data.test, batches).softmax(dim=1)
        check_finite(expected, checkpoint)
        if output is not None and form is not None:
            self.write_file(output, form, expected)
        if page is not None:
            self.write_page(page, expected)

    def write_file(self, path: Path, form: formats.Format, expected: Tensor) -> None:
        """Write a file for other programs, if it predicts what the checkpoint predicts."""
        data, checkpoint = self.datamodule, self.config.ckpt_path
        with atomic_write(path, overwrite=False) as partial:
            program = formats.exported(self.model.network, data)
            form.write(program, formats.metadata(data, expected, checkpoint), partial)
            difference = formats.compare(
                expected, formats.predict(form.read(partial), data), f"Nothing is written: {form.checker}"
            )
        rank_zero_print(
            f"{path}: {path.stat().st_size / 2**10:,.0f} KiB. {form.checker} gives all {len(expected):,} test images "
            f"the checkpoint's labels, and probabilities that differ by at most {difference:.1e}."
        )

    def write_page(self, path: Path, expected: Tensor) -> None:
        """Write a page to draw on."""
        html, weights = write_page(self.model.network, self.datamodule, expected)
        with atomic_write(path, overwrite=False) as partial:
            partial.write_text(html, encoding="utf-8")
        rank_zero_print(f"{path}: {path.stat().st_size / 2**10:,.0f} KiB, {weights} Open it in a browser.")


main = ExportCLI.main
