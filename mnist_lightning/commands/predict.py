"""``predict``: classify the test images or your own pictures."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mnist_lightning.commands.cli import DEFAULTS, FLAG, RunCLI, add_method_options
from mnist_lightning.data import DOUBTFUL, Split
from mnist_lightning.data.pictures import PictureError, find, read
from mnist_lightning.data.placing import count_characters
from mnist_lightning.system.console import colored, fill_terminal, format_table, rank_zero_print, shorten_middle
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.files import atomic_write, make_room, write_csv
from mnist_lightning.training import figures
from mnist_lightning.training.precision import Trainer
from mnist_lightning.training.runs import newest_result
from mnist_lightning.training.saliency import integrated_gradients, smoothed
from mnist_lightning.training.saved_run import check_finite

SHOWN = 500
"""The most pictures on a contact sheet."""


class PredictCLI(RunCLI):
    """Predicts with a checkpoint: by default of the newest baseline; for pictures of the newest tuned run, if any."""

    default_checkpoint = "last"
    common_options = ("trainer.accelerator", "trainer.precision", "data", "data.data_dir", "data.eval_batch_size")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--output", type=str, default="predictions.csv", help="CSV file to write; it must not exist yet."
        )
        parser.add_argument(
            "--images",
            type=str,
            nargs="+",
            help="Pictures to predict instead of the test images: files, folders or patterns.",
        )
        parser.add_argument("--sheet", **FLAG, help="Whether each picture has many digits to cut out.")
        parser.add_argument("--explain", **FLAG, help="Whether to draw what speaks for the class and the runner-up.")
        add_method_options(parser, "predict")
        parser.set_defaults({"name": None})  # the default run depends on whether there are pictures

    def normalize(self, config: Namespace) -> None:
        super().normalize(config)
        for option in ("sheet", "explain"):
            if config[option] and not config.images:
                raise UserError(f"--{option} needs pictures: name some with --images.")

    def find_checkpoint(self) -> Path | None:
        if self.config.images and self.config.name is None and self.config.ckpt_path in (None, "last", "best"):
            return newest_result(self.logs, self.config.ckpt_path or "last")
        self.config.name = self.config.name or DEFAULTS["name"]
        return super().find_checkpoint()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1:
            raise UserError("predict writes one file and runs on one device: --trainer.devices 1")
        return trainer

    def run(self) -> None:
        output = Path(self.config.output)
        if self.config.images:
            self.predict_pictures(output)
        else:
            self.predict_test_images(output)

    def predict_test_images(self, output: Path) -> None:
        """Write the true label, the predicted label and the probabilities of each test image."""
        make_room("output", output)
        import pandas as pd  # slow to import

        self.datamodule.setup("predict")
        rank_zero_print(f"Network: {self.config.ckpt_path}\n{fill_terminal(self.datamodule.describe())}")
        if self.trainer.limit_predict_batches == 0:
            raise UserError("--trainer.limit_predict_batches 0 leaves nothing to predict.")
        probabilities = self.probabilities()
        names = np.array(self.datamodule.names(probabilities.shape[1]))
        table = pd.DataFrame(probabilities.numpy(), columns=names).add_prefix("probability_")
        assert self.datamodule.test is not None
        table.insert(0, "label", names[self.datamodule.test.labels[: len(table)]])
        table.insert(1, "predicted", names[probabilities.argmax(dim=1)])
        with atomic_write(output, overwrite=False) as partial:
            table.to_csv(partial, index_label="index", encoding="utf-8")
        print(f"{len(table)} prediction{'s' * (len(table) != 1)} in {output}")

    def predict_pictures(self, output: Path) -> None:
        """Write and print class, probability and runner-up of each picture, and draw it as the network sees it."""
        if not output.name or output.suffix == ".png":
            raise UserError("--output must name the CSV file; the pictures are drawn next to it, as .png.")
        sheet, data, checkpoint = output.with_suffix(".png"), self.datamodule, self.config.ckpt_path
        make_room("output", output, sheet)
        rank_zero_print(f"Network: {checkpoint}\nTrained on {data.source}")
        places, made, skipped = self.read_pictures()
        if data.standardize or self.config.explain:
            data.setup("fit")
        images = torch.from_numpy(made)
        statistics = data.train.statistics if data.train else None
        data.test = Split(images, torch.zeros(len(images), dtype=torch.long), statistics=statistics)
        probabilities = self.probabilities().float()
        rows = self.rows(places, probabilities)
        self.print_rows(rows)
        pixels = figures.render(self.draw(rows[:SHOWN], probabilities))  # if this fails, no file is written
        write_csv(output, rows, overwrite=False)
        with atomic_write(sheet, overwrite=False) as partial:
            Image.fromarray(pixels).save(partial, "PNG")
        limit = f" (the first {SHOWN})" if len(rows) > SHOWN else ""
        left_out = f", {skipped} left out" if skipped else ""
        print(
            f"{len(rows)} prediction{'s' * (len(rows) != 1)}{left_out}: {output}\nWhat the network sees{limit}: {sheet}"
        )

    def print_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Print the answers as a table, the doubtful ones with a question mark."""
        table = [[*(title.replace("_", " ") for title in [*rows[0]][:-1]), "probability"]]
        for row in rows:
            cells = {name: f"{cell:.4f}" if isinstance(cell, float) else str(cell) for name, cell in row.items()}
            cells["file"] = shorten_middle(" ".join(cells["file"].split()), 32)
            cells["probability"] += "?" if _is_doubtful(row) else " "
            table.append([*cells.values()])
        header, *lines = format_table(table).splitlines()
        print(colored(header, "bold"))
        for row, line in zip(rows, lines, strict=True):
            print(colored(line, "yellow") if _is_doubtful(row) else line)
        if count := sum(map(_is_doubtful, rows)):
            print(f"? marks answers with a probability below {DOUBTFUL}: {count} of {len(rows)}")

    def read_pictures(self) -> tuple[list[tuple[str, int]], NDArray[np.uint8], int]:
        """Read the pictures, and report which are left out and why.

        Returns:
            For each image its file and its number in the file; the images; the number of pictures left out.

        Raises:
            UserError: If all pictures are left out.
        """
        places, images, skipped = [], [], 0
        for path, problem in find(self.config.images):
            try:
                if problem:
                    raise PictureError(problem)
                picture, remark = read(path)
                found = self.datamodule.from_picture(picture, self.config.sheet)
            except PictureError as error:
                print(f"{path} is left out: {error}", file=sys.stderr)
                skipped += 1
                continue
            if remark:
                print(f"{path}: {remark}", file=sys.stderr)
            if self.datamodule.placing and not self.config.sheet and (count := count_characters(picture)) > 1:
                things = "digits" if all(name.isdigit() for name in self.datamodule.classes) else "characters"
                print(f"{path} seems to hold {count} {things}: try --sheet", file=sys.stderr)
            file = str(path).encode(errors="backslashreplace").decode()  # a name may not be valid UTF-8
            places += [(file, number + 1) for number in range(len(found))]
            images.append(found)
        if not images:
            raise UserError("There is nothing to predict: none of the --images can be used.")
        return places, np.concatenate(images), skipped

    def probabilities(self) -> Tensor:
        """Return the probabilities of the test images, of shape (n, classes).

        Raises:
            UserError: If a probability is not finite.
        """
        checkpoint = self.config.ckpt_path
        batches: Any = self.trainer.predict(self.model, datamodule=self.datamodule, ckpt_path=checkpoint)
        probabilities = torch.cat(batches)
        check_finite(probabilities, checkpoint)
        return probabilities

    def rows(self, places: Sequence[tuple[str, int]], probabilities: Tensor) -> list[dict[str, Any]]:
        """Return a table row for each image."""
        names, best = self.datamodule.names(probabilities.shape[1]), probabilities.topk(2)
        rows: list[dict[str, Any]] = []
        for (file, number), values, indices in zip(places, best.values.tolist(), best.indices.tolist(), strict=False):
            rows.append({"file": file} | ({"number": number} if self.config.sheet else {}))
            rows[-1] |= {"class": names[indices[0]], "probability": values[0]}
            rows[-1] |= {"runner_up": names[indices[1]], "runner_up_probability": values[1]}
        return rows

    def draw(self, rows: list[dict[str, Any]], probabilities: Tensor) -> Any:
        """Draw the images as the network sees them and, with --explain, what speaks for class and runner-up."""
        data = self.datamodule
        assert data.test is not None
        titles = [
            f"{shorten_middle(Path(row['file']).name, 14)}\n"
            f"{row['class']}{'?' if _is_doubtful(row) else ''}  {row['probability']:.1%}"
            for row in rows
        ]
        images = data.test.scaled(range(len(rows)))
        drawn = figures.pictures(images)
        if self.config.explain:  # each explanation next to its image
            assert data.train is not None
            pairs = probabilities.topk(2).indices[: len(rows)].T
            attributions = integrated_gradients(self.model.network, images, data.train, *pairs)
            explained = figures.colored(drawn, smoothed(attributions))
            drawn = np.stack([figures.colored(drawn), explained], axis=1).reshape(-1, *explained.shape[1:])
            reasons = [f"orange: {row['class']}\nblue: {row['runner_up']}" for row in rows]
            titles = [title for pair in zip(titles, reasons, strict=True) for title in pair]
        return figures.image_grid(drawn, titles, columns=min(10, len(titles)))


def _is_doubtful(row: dict[str, Any]) -> bool:
    return bool(row["probability"] < DOUBTFUL)


main = PredictCLI.main
