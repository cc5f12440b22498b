"""``tune``: searches hyper-parameters with an Optuna study and refits the best."""


def main(command: str, description: str, arguments: list[str]) -> None:
    """Run the command; a process beside this one imports what the workers need."""
    if not {"-h", "--help"} & set(arguments):
        from mnist_lightning import workers

        workers.start_server()
    from mnist_lightning import cli

    cli.main(command, description, arguments)
