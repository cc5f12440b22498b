"""``report``: compare models, by default the newest baseline and the newest tuned run."""

import argparse
from pathlib import Path


def main(command: str, description: str, arguments: list[str]) -> None:
    """Run the command. Slow imports wait until the arguments are valid."""
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
    """Parse the options. They are named as in the other commands; older names still work."""
    parser = argparse.ArgumentParser(prog=f"python -m mnist_lightning {command}", description=description)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a name, for its newest complete run in the logs, or the path of a run or checkpoint, or NAME=PATH; give "
        "several seeds of one model as NAME=PATH,PATH,... or 'NAME=FOLDER/*'; each model is compared with the first "
        "(default: baseline tuned; with --study_name, only the study)",
    )
    parser.add_argument("--name", action="append", default=[], help="a model, like MODEL; can be repeated")
    parser.add_argument(
        "--ckpt_path",
        "--weights",
        choices=("last", "best"),
        default="last",
        help="weights of the last epoch, as in the notebook, or of the best validation epoch (default: last)",
    )
    parser.add_argument(
        "--study_name", "--study", help="name of the study to show (default: the study that produced a model)"
    )
    parser.add_argument("--storage", help="journal file or URL of the study (default: journal.log in its folder)")
    parser.add_argument("--logs", type=Path, default=Path("lightning_logs"), help="(default: lightning_logs)")
    parser.add_argument("--output", type=Path, help="folder of the report, which is replaced (default: LOGS/report)")
    return parser.parse_args(arguments)
