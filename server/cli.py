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
from scone.server.settings import Command, add_arguments, describe, resolve
from scone.server.version import version


def load_commands(verb: str | None = None) -> dict[str, Command]:
    """The `COMMAND` of each module in `scone.server.commands`, by name; only `verb`'s if there is one."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    # One verb must not wait for what the others import.
    wanted = (verb or "").replace("-", "_")
    loaded = [
        importlib.import_module(f"{commands.__name__}.{name}").COMMAND
        for name in ([wanted] if wanted in names else names)
    ]
    return {command.name: command for command in loaded}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv`, runs one command, returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbs = load_commands(words[0] if words else None)
    parser = argparse.ArgumentParser(prog="scone", description="Serve SCONE language models.")
    parser.add_argument("--version", action="version", version=version())
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for command in verbs.values():
        add_arguments(
            subparsers.add_parser(
                command.name,
                help=command.help,
                description=command.help,
                # Else --api-key, which does not exist for good reason, would mean --api-key-file.
                allow_abbrev=False,
            ),
            command.settings,
        )
    arguments = vars(parser.parse_args(words))
    command = verbs[arguments.pop("verb")]
    try:
        resolved = resolve(command.settings, arguments)
        if arguments["print_config"]:
            print(describe(command.settings, resolved))
            return 0
        return command.run(resolved)
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
