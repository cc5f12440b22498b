"""Progress of a training: lines in a terminal, a table in a cell of a notebook."""

import html
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class EpochProgressBar(ProgressBar):
    """A line for each finished epoch, and in a terminal a bar for the running epoch.

    The bar moves 20 times an epoch: drawing it at every batch takes longer than the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._enabled = True
        self._every: float = 1
        self._start = 0.0
        self._line = ""
        self._is_validated = False

    def disable(self) -> None:
        # Lightning calls this in all processes but the first
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the previous epoch and start a bar."""
        self._print_line(trainer)
        self._start = time.perf_counter()
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        self._line = f"Epoch {trainer.current_epoch + 1:{len(epochs) - 1}}{epochs}"
        total = self.total_train_batches
        self._bar = tqdm(
            desc=self._line,
            total=int(total) if total < float("inf") else None,
            unit="batch",
            leave=False,
            disable=None if self._enabled else True,  # None: if the output is not a terminal
        )
        self._every = max(1, (self._bar.total or 1000) // 20)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self._every == 0:
            self._bar.update(self._every)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()
        self._line += f"  {time.perf_counter() - self._start:5.1f} s"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_validated = not trainer.sanity_checking

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the last epoch."""
        self._print_line(trainer)

    def _print_line(self, trainer: Trainer) -> None:
        # printed one hook late: callbacks see the metrics of an epoch only after its end
        if self._line and self._enabled:
            for stage, values in self._metrics(trainer).items():
                shown = "".join(f" {name.partition('/')[2]} {value:.4f}" for name, value in values.items())
                self._line += f"  {stage}:{shown}" if shown else ""
            print(self._line, flush=True)
        self._line, self._is_validated = "", False

    def _metrics(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Return the metrics of the epoch by stage; those of ``val`` only if the epoch was validated."""
        return {
            stage: {name: value for name, value in trainer.callback_metrics.items() if name.startswith(f"{stage}/")}
            for stage in (("train", "val") if self._is_validated else ("train",))
        }


class CellProgressBar(EpochProgressBar):
    """A table in a cell of a notebook: a row for each finished epoch, and the time that is left."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[dict[str, str]] = []
        self._train_start = self._shown = 0.0
        self._first_epoch = 0
        self._handle: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of the trainer's own bar."""
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, ProgressBar) and other is not self:
                other.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows, self._handle, self._first_epoch = [], None, trainer.current_epoch
        self._train_start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the row of the previous epoch and start a row."""
        self._complete_row(trainer)
        self._start = time.perf_counter()
        self._rows.append({"epoch": str(trainer.current_epoch + 1)})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self._shown > 1:
            total = self.total_train_batches
            share = (batch_idx + 1) / total if total < float("inf") else 0.0
            self._show(trainer, trainer.current_epoch + share)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows[-1]["seconds"] = f"{time.perf_counter() - self._start:.1f}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the row of the last epoch."""
        self._complete_row(trainer)
        self._show(trainer, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Show what there is, without the epoch that did not end."""
        self._rows = [row for row in self._rows if "seconds" in row]
        self._show(trainer, None)

    def _complete_row(self, trainer: Trainer) -> None:
        if self._rows:
            for values in self._metrics(trainer).values():
                self._rows[-1] |= {name: f"{value:.4f}" for name, value in values.items()}
        self._is_validated = False

    def _show(self, trainer: Trainer, epochs: float | None) -> None:
        """Show the table.

        Args:
            trainer: The trainer.
            epochs: The epochs that are finished, with the share of the running one; None at the end.
        """
        if not self._enabled:
            return
        from IPython.display import display

        self._shown = time.perf_counter()
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        cells = [names, *([row.get(name, "") for name in names] for row in self._rows)]
        state = ""
        if epochs is not None and trainer.max_epochs and trainer.max_epochs > 0:
            elapsed, done = self._shown - self._train_start, epochs - self._first_epoch
            left = elapsed / done * (trainer.max_epochs - epochs) if done else 0
            state = f"epoch {int(epochs) + 1} of {trainer.max_epochs}, {tqdm.format_interval(left)} left"
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
