"""What people outside rely on is there: package doors, the verbs of the command line, their settings."""

import importlib
import re
from pathlib import Path

import pytest

from scone.server.cli import load_commands, main

ROOT = Path(__file__).parent.parent
VERBS = {"build", "check-config", "collect-env", "count", "eval", "inspect", "serve", "train", "verify"}


def test_the_cache_exports_what_it_says() -> None:
    cache = importlib.import_module("scone.cache")
    assert "FGramTable" in cache.__all__
    assert not [name for name in cache.__all__ if not hasattr(cache, name)]


def test_the_table_is_the_door_of_the_cache() -> None:
    from scone.cache import FGramTable

    public = {name for name in vars(FGramTable) if not name.startswith("_")}
    assert {"open", "close", "match", "match_last", "rows", "read_into", "check_model"} <= public


def test_verbs() -> None:
    assert set(load_commands()) >= VERBS


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_names_every_setting(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for setting in load_commands()[verb].settings:
        assert setting.help
        assert (setting.name.upper() if setting.positional else setting.flag) in shown


def test_settings_in_files_exist() -> None:
    """Each SCONE_* variable of image, compose file and documents is a setting of a verb or of the build."""
    known = {s.variable for command in load_commands().values() for s in command.settings}
    known |= {"SCONE_CONFIG", "SCONE_MAIN_MODEL"} | set(
        re.findall(r"SCONE_[A-Z_]+", (ROOT / "setup.py").read_text())
    )
    files = [*(ROOT / "docker").glob("*"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = {
        (name, path.name)
        for path in files
        if path.is_file()
        for name in re.findall(r"SCONE_[A-Z_]+", path.read_text())
    }
    assert named
    assert not [use for use in named if use[0] not in known]
