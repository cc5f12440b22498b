"""Help of the commands, stored in JSON: the parsers that generate it take seconds to load."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path


def stored_help(command: str) -> dict[str, dict[str, str]] | None:
    """Return the help texts of a command's options, by title and option; None for a command that loads quickly."""
    path = Path(__file__).with_name(f"{command}.json")
    groups: dict[str, dict[str, str]] | None = json.loads(path.read_text("utf-8")) if path.is_file() else None
    return groups


def print_help(prog: str, description: str | None, groups: Mapping[str, Mapping[str, str]]) -> None:
    """Print the help of a command as wide as the terminal."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        epilog="All options: --help all. Options of a class: --model.network.help MLP. All values: --print_config.",
        add_help=False,
    )
    for title, texts in groups.items():
        group = parser.add_argument_group(title)
        for option, text in texts.items():
            group.add_argument(f"--{option}", metavar="", help=text.replace("%", "%%"))
    parser.print_help()
