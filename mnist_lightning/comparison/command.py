"""``report``: compare models, by default the newest baseline and the newest tuned run."""

import argparse
from pathlib import Path


def main(command: str, description: str, arguments: list[str]) -> None:
    """Run the command; what takes long to import waits until the arguments are right."""
    options = parse(command, description, arguments)
    models = [*options.models, *options.name] or ([] if options.study_name else ["baseline", "tuned"])

    from mnist_lightning.commands.parsing import patched_jsonargparse
    from mnist_lightning.comparison.page import write
    from mnist_lightning.system.errors import user_errors
    from mnist_lightning.system.signals import leave_as_usual

    leave_as_usual()
    with user_errors(), patched_jsonargparse():
        write(models, options.ckpt_path, options.study_name, options.storage, options.logs, options.output)


def parse(command: str, description: str, arguments: list[str]) -> argparse.Namespace:
    """Read the options, which have the names that they have in other commands; older names go on to work."""
    parser = argparse.ArgumentParser(prog=f"python -m mnist_lightning {command}", description=description)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a name, whose newest complete run is taken from the logs, or NAME=PATH, a run's folder or checkpoint; "
        "several seeds of one model are NAME=PATH,PATH,... or 'NAME=FOLDER/*'; all are compared to the first "
        "(default: baseline tuned; with --study_name, the study alone)",
    )
    parser.add_argument("--name", action="append", default=[], help="a model, as MODEL; several times for several")
    parser.add_argument(
        "--ckpt_path",
        "--weights",
        choices=("last", "best"),
        default="last",
        help="weights of the last epoch, as the notebook, or of the best validation epoch (default: last)",
    )
    parser.add_argument(
        "--study_name", "--study", help="name of the study to show (default: the one that made a model)"
    )
    parser.add_argument("--storage", help="its journal file or URL (default: journal.log in its folder)")
    parser.add_argument("--logs", type=Path, default=Path("lightning_logs"), help="(default: lightning_logs)")
    parser.add_argument("--output", type=Path, help="folder of the report, written anew (default: LOGS/report)")
    return parser.parse_args(arguments)
