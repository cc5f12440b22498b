"""``validate`` and ``test``: evaluate a checkpoint."""

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from mnist_lightning.commands.cli import RunCLI, add_method_options
from mnist_lightning.system.console import fill_terminal, rank_zero_print
from mnist_lightning.system.errors import UserError


class EvaluateCLI(RunCLI):
    """Evaluate a checkpoint, by default the last of the newest run."""

    default_checkpoint = "last"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add_method_options(parser, self.command)

    def make_callbacks(self, options: Namespace) -> list[Callback]:
        if options.barebones:
            raise UserError(f"--trainer.barebones logs nothing, so {self.command} would have no result: leave it out.")
        return super().make_callbacks(options)

    def run(self) -> None:
        self.datamodule.setup(self.command)
        rank_zero_print(f"Network: {self.config.ckpt_path}\n{fill_terminal(self.datamodule.describe())}")
        evaluate = getattr(self.trainer, self.command)
        evaluate(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path, verbose=self.config.verbose)


main = EvaluateCLI.main
