"""Progress of a training: a table in a terminal or in a cell of a notebook."""

import html
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from tqdm import tqdm

from mnist_lightning.system.console import colored

REFRESH = 0.25
"""Seconds between two pictures of the running epoch: one for each batch would take longer than the batch."""

LEFT_OUT = "penalized_loss"
"""A metric without a column, so that the table fits 80 columns: ``metrics.csv`` has it."""


class EpochProgressBar(ProgressBar):
    """A table with a line for each finished epoch, and in a terminal one for the running epoch.

    An asterisk marks each epoch that is better than all before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._enabled = True
        self._columns: list[str] = []
        self._monitor = ""
        self._best: Any = None
        self._epoch = ""
        self._seconds = self._start = self._train_start = self._shown = 0.0
        self._first_step = 0
        self._is_validated = False

    def disable(self) -> None:
        # Lightning calls this in all processes but the first
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training."""
        self._columns, self._epoch = [], ""
        self._monitor, self._best = _best(trainer)
        self._train_start, self._first_step = time.perf_counter(), trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the previous epoch and start a bar."""
        self._print_line(trainer)
        self._start = self._shown = time.perf_counter()
        of_all = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        self._epoch = f"{trainer.current_epoch + 1}{of_all}"
        total = self.total_train_batches
        self._bar = tqdm(
            total=int(total) if total < math.inf else None,
            bar_format=" ",  # until the first picture
            leave=False,
            dynamic_ncols=True,
            disable=None if self._enabled else True,  # None: if the output is not a terminal
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self._shown > REFRESH and not self._bar.disable:
            self._show_running(trainer, pl_module, batch_idx + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar.n and not trainer.sanity_checking:
            self._show_running(trainer, pl_module, int(self._bar.total or self._bar.n))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()
        self._seconds = time.perf_counter() - self._start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the last epoch."""
        self._print_line(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        self._bar.close()

    def _print_line(self, trainer: Trainer) -> None:
        # printed one hook late: callbacks see the metrics of an epoch only after its end
        if self._epoch and self._enabled:
            metrics = {name: value for stage in self._metrics(trainer).values() for name, value in stage.items()}
            self._print_header([name for name in metrics if name.partition("/")[2] != LEFT_OUT])
            before, (_, self._best) = self._best, _best(trainer)
            cells = self._cells(metrics, is_best=self._best != before)
            print(f"{self._epoch:>7}{cells}{self._seconds:9.1f}{_time(self._left(trainer)):>9}".rstrip(), flush=True)
        self._epoch, self._is_validated = "", False

    def _show_running(self, trainer: Trainer, module: Any, batches: int) -> None:
        """Show how much of the epoch is done, where the metrics of ``val`` will be."""
        sums = {name: float(total) for name, total in getattr(module, "totals", {}).get("train", {}).items()}
        images = sums.pop("images", 0.0)
        metrics = {f"train/{name}": total / images for name, total in sums.items() if images and name != LEFT_OUT}
        val = [f"val/{name.partition('/')[2]}" for name in metrics] if trainer.enable_validation else []
        val += [f"val/{name}" for name in module.epoch_metrics.names] if val else []
        if not self._columns:
            self._print_header([*metrics, *val])
        columns = [name for name in self._columns if not name.startswith("val/")]
        width = max(0, len(self._cells({})) - len(self._cells({}, columns)) - 8)
        seconds = time.perf_counter() - self._start
        place = f"  {{bar:{width}}} {{percentage:3.0f}} %" if self._bar.total else f"  batch {batches:<{width}}"
        self._bar.n = batches
        self._bar.bar_format = (
            f"{self._epoch:>7}{self._cells(metrics, columns)}{place}{seconds:9.1f}{_time(self._left(trainer)):>9}"
        )
        self._bar.refresh()
        self._shown = time.perf_counter()

    def _print_header(self, names: list[str]) -> None:
        """Print the titles of the columns, again if a metric is new."""
        if not {*names} <= {*self._columns}:
            self._columns = [*dict.fromkeys([*self._columns, *names])]
            self._bar.clear()
            titles = "".join(f"  {name}{' ' * (name == self._monitor)}" for name in self._columns)
            print(colored(f"  epoch{titles}  seconds     left", "bold"), flush=True)

    def _cells(self, metrics: Mapping[str, Any], columns: list[str] | None = None, is_best: bool = False) -> str:
        """Return the cells of some columns, by default all."""
        cells = []
        for name in self._columns if columns is None else columns:
            value = float(metrics[name]) if name in metrics else None
            text = "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
            mark = "" if name != self._monitor else "*" if is_best else " "
            cell = f"  {text:>{len(name)}}{mark}"
            cells.append(colored(cell, "green") if mark == "*" else cell)
        return "".join(cells)

    def _left(self, trainer: Trainer) -> float:
        """Return the seconds until the training ends, if each of its steps takes as long as those so far."""
        elapsed, done = time.perf_counter() - self._train_start, trainer.global_step - self._first_step
        steps = trainer.estimated_stepping_batches - trainer.global_step
        timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
        limits = [left for timer in timers if (left := timer.time_remaining()) is not None]
        return min(elapsed / done * steps if done else math.inf, *limits, math.inf)

    def _metrics(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Return the metrics of the epoch by stage; those of ``val`` only if the epoch was validated."""
        return {
            stage: {name: value for name, value in trainer.callback_metrics.items() if name.startswith(f"{stage}/")}
            for stage in (("train", "val") if self._is_validated else ("train",))
        }


def _best(trainer: Trainer) -> tuple[str, Any]:
    """Return the metric by which the best epoch is chosen, and its best value so far."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint):
        return "", None
    return checkpoint.monitor or "", checkpoint.best_model_score


def _time(seconds: float) -> str:
    """Return hours, minutes and seconds, or nothing if they are unknown."""
    return tqdm.format_interval(seconds) if seconds < math.inf else ""


class CellProgressBar(EpochProgressBar):
    """A table in a cell of a notebook: a row for each finished epoch, and the time that is left."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[dict[str, str]] = []
        self._handle: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of the trainer's own bar."""
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, ProgressBar) and other is not self:
                other.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._rows, self._handle = [], None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the row of the previous epoch and start a row."""
        self._complete_row(trainer)
        self._start = time.perf_counter()
        self._rows.append({"epoch": str(trainer.current_epoch + 1)})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self._shown > 1:
            self._show(trainer, is_running=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows[-1]["seconds"] = f"{time.perf_counter() - self._start:.1f}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the row of the last epoch."""
        self._complete_row(trainer)
        self._show(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Show what there is, without the epoch that did not end."""
        self._rows = [row for row in self._rows if "seconds" in row]
        self._show(trainer)

    def _complete_row(self, trainer: Trainer) -> None:
        if self._rows:
            for values in self._metrics(trainer).values():
                self._rows[-1] |= {name: f"{value:.4f}" for name, value in values.items()}
        self._is_validated = False

    def _show(self, trainer: Trainer, is_running: bool = False) -> None:
        """Show the table."""
        if not self._enabled:
            return
        from IPython.display import display

        self._shown = time.perf_counter()
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        cells = [names, *([row.get(name, "") for name in names] for row in self._rows)]
        left = _time(self._left(trainer)) if is_running else ""
        state = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, {left} left" if left else ""
        rows = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * len(self._rows)], cells, strict=True)
        ]
        table = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table><p>{state}</p>"
        text = "\n".join("  ".join(row) for row in cells)
        content = {"text/html": table, "text/plain": f"{text}\n{state}".rstrip()}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def is_in_cell() -> bool:
    """Return whether this process runs the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
