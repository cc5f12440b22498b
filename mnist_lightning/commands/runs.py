"""``runs``: list all runs; delete or move some."""

import argparse
import shutil
import sys
from pathlib import Path


def main(command: str, description: str, arguments: list[str]) -> None:
    """Run the command. Slow imports wait until the arguments are valid."""
    options = parse(command, description, arguments)

    from mnist_lightning.run import runs
    from mnist_lightning.system.console import terminal_width
    from mnist_lightning.system.errors import UserError, user_errors

    with user_errors():
        table = runs(options.logs)
        if options.name:
            table = table[[any(Path(name).match(pattern) for pattern in options.name) for name in table["name"]]]
        if options.tags:
            table = table[[{*options.tags} <= {*tags.split(", ")} for tags in table["tags"]]]
        if options.filter:
            try:
                table = table.query(options.filter)
            except Exception as error:  # pandas raises any type
                raise UserError(
                    f"--filter {options.filter}: {' '.join(str(error).split())}. Give a condition such as "
                    "'epochs >= 20' or '`test/accuracy` > 0.97'."
                ) from error
        if options.sort:
            if options.sort not in table:
                raise UserError(f"--sort {options.sort} is not a column. Columns: {', '.join(map(str, table))}.")
            table = table.sort_values(options.sort, ascending=options.ascending)
        if table.empty:
            is_all = not (options.name or options.tags or options.filter)
            remedy = (
                "yet. Start one: python -m mnist_lightning fit"
                if is_all
                else "that matches: change --name, --tags or --filter."
            )
            raise UserError(f"There is no run in {options.logs} {remedy}")
        shown = table.drop(columns=[label for label in ("tags", "notes") if not table[label].any()])
        shown["seconds"] = shown["seconds"].map("{:.1f}".format, na_action="ignore")
        print(shown.to_string(index=False, na_rep="-", float_format="{:.4f}".format, line_width=terminal_width()))
        if options.delete or options.archive:
            names = table[["name", "version"]].itertuples(index=False)
            clear([options.logs / name / f"version_{version}" for name, version in names], options.archive)


def clear(folders: list[Path], archive: Path | None) -> None:
    """Delete runs, or move them to an archive, if the user agrees.

    Args:
        folders: The folders of the runs.
        archive: The folder to move them to, or None to delete them.

    Raises:
        UserError: If the user does not agree, or the archive already has one of the runs.
    """
    from mnist_lightning.system.errors import UserError

    targets = {folder: archive / folder.parent.name / folder.name for folder in folders} if archive else {}
    if taken := [target for target in targets.values() if target.exists()]:
        raise UserError(f"{taken[0]} exists already. Choose another folder, or leave out this run.")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    untested = sum(not (folder / "test.csv").is_file() for folder in folders)
    warning = f" Not tested, so perhaps still running: {untested}." if untested else ""
    what = f"{len(folders)} run{'s' if len(folders) > 1 else ''}, {len(files)} files, {size:.1f} MB"
    question = f"\n{'Move' if archive else 'Delete'} {what}{f' to {archive}' if archive else ''}?{warning} [y/N] "
    print(question, end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was changed: the answer was not y.")
    for folder in folders:
        if targets:
            targets[folder].parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, targets[folder])
        else:
            shutil.rmtree(folder)


def parse(command: str, description: str, arguments: list[str]) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(prog=f"python -m mnist_lightning {command}", description=description)
    parser.add_argument("--name", nargs="+", default=[], help="only runs of these names; patterns such as 'cnn*' work")
    parser.add_argument("--tags", nargs="+", default=[], help="only runs with all of these tags")
    parser.add_argument(
        "--filter", help="a condition on the columns, such as 'epochs >= 20 and `test/accuracy` > 0.97'"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort by a column, largest first (default: newest first)")
    parser.add_argument("--ascending", action="store_true", help="sort smallest first")
    parser.add_argument("--logs", type=Path, default=Path("lightning_logs"), help="(default: lightning_logs)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--delete", action="store_true", help="delete the listed runs, after asking")
    action.add_argument(
        "--archive", type=Path, metavar="FOLDER", help="move the listed runs here, after asking; --logs lists them"
    )
    return parser.parse_args(arguments)
