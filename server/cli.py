"""The `scone` command. Exit codes: 0 done, 1 failed (one line says why), 2 usage."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from scone.kernels.errors import SconeError
from scone.server import commands
from scone.server.errors import SettingError
from scone.server.settings import Command, add_arguments, resolve


def load_commands() -> dict[str, Command]:
    """Every `COMMAND` found in `scone.server.commands`, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    loaded = [importlib.import_module(f"{commands.__name__}.{name}").COMMAND for name in names]
    return {command.name: command for command in loaded}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv`, runs one command, returns its exit code."""
    verbs = load_commands()
    parser = argparse.ArgumentParser(prog="scone", description="Serve SCONE language models.")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for command in verbs.values():
        add_arguments(
            subparsers.add_parser(command.name, help=command.help, description=command.help), command.settings
        )
    arguments = vars(parser.parse_args(argv))
    command = verbs[arguments.pop("verb")]
    try:
        return command.run(resolve(command.settings, arguments))
    except SettingError as error:
        print(f"scone {command.name}: {error}", file=sys.stderr)
        return 2
    except SconeError as error:
        print(f"scone {command.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"scone {command.name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
