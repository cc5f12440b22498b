"""``runs``: list all runs."""

import argparse
from pathlib import Path


def main(command: str, description: str, arguments: list[str]) -> None:
    """Run the command. Slow imports wait until the arguments are valid."""
    options = parse(command, description, arguments)

    from mnist_lightning.run import runs
    from mnist_lightning.system.errors import UserError, user_errors

    with user_errors():
        table = runs(options.logs)
        if options.name:
            table = table[[any(Path(name).match(pattern) for pattern in options.name) for name in table["name"]]]
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
                raise UserError(f"--sort {options.sort} is not a column: {', '.join(map(str, table))}.")
            table = table.sort_values(options.sort, ascending=options.ascending)
        if table.empty:
            is_all = not (options.name or options.filter)
            remedy = "yet. Start one: python -m mnist_lightning fit" if is_all else "with this name and filter."
            raise UserError(f"There is no run in {options.logs} {remedy}")
        print(table.to_string(index=False, na_rep="-", float_format="{:.4f}".format))


def parse(command: str, description: str, arguments: list[str]) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(prog=f"python -m mnist_lightning {command}", description=description)
    parser.add_argument("--name", nargs="+", default=[], help="only runs of these names; patterns such as 'cnn*' work")
    parser.add_argument(
        "--filter", help="a condition on the columns, such as 'epochs >= 20 and `test/accuracy` > 0.97'"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort by a column, largest first (default: newest first)")
    parser.add_argument("--ascending", action="store_true", help="sort smallest first")
    parser.add_argument("--logs", type=Path, default=Path("lightning_logs"), help="(default: lightning_logs)")
    return parser.parse_args(arguments)
