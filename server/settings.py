"""Settings of every command, declared once: CLI flag, environment variable, YAML key, default, help.

Precedence: command line > `SCONE_*` environment > YAML file (`--config`) > default.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scone.server.errors import SettingError


def parse_bool(text: str) -> bool:
    """`true/false`, `yes/no`, `on/off`, `1/0`."""
    word = text.strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"got {text!r}, wanted true or false")


def parse_bytes(text: str) -> int:
    """A number of bytes: `1048576`, `64MiB`, `1.5 GB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"got {text!r}, wanted bytes, as in 1048576, 64MiB or 2GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting; `name` in snake case gives `--name-in-kebab`, `SCONE_NAME` and the YAML key.

    Attributes:
        kind: turns the text of a flag or variable into the value; raises ValueError.
        positional: given by place on the command line instead of by flag.
        many: a list (several words on the command line, comma-separated in the environment).
        secret: no flag (it would show in `ps`), only environment and YAML; printed as `***`.
    """

    name: str
    help: str
    kind: Callable[[str], Any] = str
    default: Any = None
    required: bool = False
    positional: bool = False
    many: bool = False
    choices: tuple[str, ...] = ()
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "SCONE_" + self.name.upper()

    def parse(self, text: str, origin: str) -> Any:
        """The value of `text`; raises SettingError naming where it came from."""
        try:
            value = self.kind(text)
        except ValueError as error:
            raise SettingError(f"{origin}: bad value for {self.name}: {error}") from None
        if self.choices and value not in self.choices:
            raise SettingError(f"{origin}: {self.name} is {text!r}, wanted one of {', '.join(self.choices)}")
        return value


@dataclass(frozen=True, slots=True)
class Resolved:
    """Values by name (also as attributes), and where each came from."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask before `values` is there
            raise AttributeError(name)
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One verb: its settings, and what runs it. `run` returns the exit code."""

    name: str
    help: str
    settings: tuple[Setting, ...]
    run: Callable[[Resolved], int]


def add_arguments(parser: argparse.ArgumentParser, settings: Sequence[Setting]) -> None:
    """Declares the settings on `parser`; absent ones stay out of the namespace."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and where it came from, and stop"
    )
    for setting in settings:
        if setting.secret:
            continue
        shown = "" if setting.default is None else f" (default: {setting.default})"
        kwargs: dict[str, Any] = {
            "help": (setting.help + shown).replace("%", "%%"),
            "default": argparse.SUPPRESS,
        }
        if setting.positional:
            kwargs["nargs"] = "*" if setting.many else "?"
            parser.add_argument(setting.name, metavar=setting.name.upper(), **kwargs)
            continue
        if setting.kind is parse_bool:
            kwargs |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
        elif setting.many:
            kwargs["nargs"] = "+"
        elif setting.choices:
            kwargs["metavar"] = "|".join(setting.choices)
        parser.add_argument(setting.flag, dest=setting.name, **kwargs)


def resolve(
    settings: Sequence[Setting], arguments: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> Resolved:
    """Merges command line, environment, YAML and defaults; raises SettingError."""
    from_file = _read_yaml(arguments.get("config") or environ.get("SCONE_CONFIG"), settings)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in settings:
        given = arguments.get(setting.name)
        if given is not None and given != []:
            words = given if isinstance(given, list) else [given]
            origins[setting.name] = "command line"
        elif setting.variable in environ:
            raw = environ[setting.variable]
            words = raw.split(",") if setting.many else [raw]
            origins[setting.name] = setting.variable
        elif from_file.get(setting.name) is not None:
            raw_value = from_file[setting.name]
            words = raw_value if isinstance(raw_value, list) else [raw_value]
            origins[setting.name] = "YAML"
            if not setting.many and len(words) != 1:
                raise SettingError(f"YAML: {setting.name} is a list, wanted one value")
        elif setting.required:
            where = setting.name.upper() if setting.positional else setting.flag
            raise SettingError(f"{where} is missing: give it, or set {setting.variable}: {setting.help}")
        else:
            values[setting.name] = setting.default
            origins[setting.name] = "default"
            continue
        parsed = [setting.parse(str(word), origins[setting.name]) for word in words]
        values[setting.name] = parsed if setting.many else parsed[0]
    return Resolved(values, origins)


def _read_yaml(path: str | None, settings: Sequence[Setting]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingError(f"cannot read settings from {path}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"{path}: got a {type(content).__name__}, wanted keys and values")
    known = [setting.name for setting in settings]
    for key in map(str, content):
        if key not in known:
            similar = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f", did you mean {similar[0]}?" if similar else f"; known are {', '.join(known)}"
            raise SettingError(f"{path}: unknown key {key}{hint}")
    return {str(key): value for key, value in content.items()}


def describe(settings: Sequence[Setting], resolved: Resolved) -> str:
    """One line a setting: name, value, where it came from; secrets as `***`."""
    width = max(len(setting.name) for setting in settings)
    lines = []
    for setting in settings:
        value = resolved.values[setting.name]
        shown = "***" if setting.secret and value else "-" if value is None else value
        lines.append(f"{setting.name:<{width}} = {shown}  ({resolved.origins[setting.name]})")
    return "\n".join(lines)
