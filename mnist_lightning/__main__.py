"""``python -m mnist_lightning <command>``: names the commands and loads only what the chosen one needs."""

import argparse
import atexit
import os
import sys

import mnist_lightning

COMMANDS = {
    "fit": "Train the network on MNIST and evaluate it on the test set.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
    "predict": "Write label and probabilities of every test image to a CSV file.",
    "tune": "Search hyper-parameters with an Optuna study and refit the best.",
    "report": "Compare the tuned model with the baseline on one page.",
}


def main() -> None:
    """Show the help, or hand over to the command."""
    parser = argparse.ArgumentParser(
        prog="python -m mnist_lightning",
        description=mnist_lightning.__doc__,
        epilog="Each command has a --help of its own. Without options, each does what the notebook does.",
    )
    parser.add_argument("--version", action="version", version=mnist_lightning.__version__)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="<command>", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(sys.argv[1:2] or ["--help"]).command

    if command == "report":
        from mnist_lightning import report

        report.main(parser.prog, COMMANDS[command], sys.argv[2:])
    else:
        if command == "tune" and not {"-h", "--help"} & set(sys.argv):
            from mnist_lightning import workers

            workers.start_server()  # imports, in a process beside this one, what the workers need
        from mnist_lightning import cli  # takes seconds: torch and Lightning

        cli.main(command, COMMANDS[command])
    # Tearing down an interpreter that holds torch and Lightning takes two seconds and 120 MB. Run what is registered
    # for the exit, then leave.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
