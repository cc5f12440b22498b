"""``tune``: search hyper-parameters with an Optuna study and refit the best."""

from collections.abc import Sequence

from mnist_lightning.search.worker import start_server


def main(name: str, description: str, arguments: Sequence[str]) -> None:
    """Run the command, while another process imports what the workers need."""
    if not {"-h", "--help"} & set(arguments):
        start_server()
    from mnist_lightning.search import command

    command.main(name, description, arguments)
