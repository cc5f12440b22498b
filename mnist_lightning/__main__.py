"""``python -m mnist_lightning <command>``: name the commands, load only the chosen one."""

import argparse
import atexit
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import mnist_lightning
from mnist_lightning.commands.help import print_help, stored_help
from mnist_lightning.system import console, signals

COMMANDS = {
    "fit": "Train the network on MNIST and evaluate it on the test images.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
    "predict": "Classify your own images, or the test images, into a CSV file.",
    "tune": "Search hyper-parameters with Optuna and refit the best trial.",
    "report": "Compare models, by default baseline and tuned, on one page.",
    "runs": "List all runs; delete or archive some.",
    "export": "Write a network as ONNX, or as a page to draw on.",
}
MODULES = {
    "fit": "commands.fit",
    "validate": "commands.evaluate",
    "test": "commands.evaluate",
    "predict": "commands.predict",
    "tune": "search",
    "report": "comparison.command",
    "runs": "commands.runs",
    "export": "deployment.command",
}
"""The module whose ``main`` runs a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Show the help or run the command.

    Args:
        arguments: A command and its options; by default the arguments of the process.

    Raises:
        SystemExit: If the command fails; with a message or an exit code other than 0.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m mnist_lightning",
        description=mnist_lightning.__doc__,
        epilog="Each command has its own --help. Without options, fit, tune and report do what the notebook does.",
    )
    parser.add_argument("--version", action="version", version=mnist_lightning.__version__)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="<command>", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(arguments[:1] or ["--help"]).command
    if {"-h", "--help"} & {*arguments} and arguments[-1] != "all" and (groups := stored_help(command)):
        print_help(f"{parser.prog} {command}", COMMANDS[command], groups)
        return
    try:
        Path.cwd()
    except FileNotFoundError:
        sys.exit("error: The current folder has been deleted: change to another one.")
    if "LOCAL_RANK" not in os.environ:  # once for all processes
        console.show_status("Loading …")
    module = importlib.import_module(f"mnist_lightning.{MODULES[command]}")
    module.main(command, COMMANDS[command], arguments[1:])  # the import takes seconds: torch, Lightning


def run() -> None:
    """Run the command, then end the process."""
    signals.leave_at_once()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack a character
    if not sys.flags.safe_path and "" not in sys.path:  # user classes may be in this folder, as with `python -m`
        sys.path.append(os.curdir)
    try:
        main()
    finally:
        signals.ignore()
    # Tearing down an interpreter that holds torch and Lightning takes two seconds and 120 MB. So run only the exit
    # handlers.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    run()
