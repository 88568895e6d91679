"""Settings: precedence, YAML, secrets, the generated document, and the command line around them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from scone.server.api.config import ApiConfig
from scone.server.cli import load_commands, main
from scone.server.engine.engine_config import EngineConfig
from scone.server.errors import SettingError
from scone.server.model_device import spare_cache_bytes
from scone.server.serve_settings import SERVE_SETTINGS, api_config, engine_config, model_name
from scone.server.settings import Resolved, Setting, describe, parse_bool, parse_bytes, resolve
from scone.server.settings_document import settings_markdown

ROOT = Path(__file__).parents[2]
SETTINGS = (
    Setting(name="port", kind=int, default=8000, help="port"),
    Setting(name="level", default="info", choices=("debug", "info"), help="level"),
    Setting(name="api_key", many=True, secret=True, help="keys"),
    Setting(name="pages", many=True, help="pages"),
    Setting(name="fast", kind=parse_bool, default=False, help="fast"),
)


def test_precedence(tmp_path: Path) -> None:
    config = tmp_path / "scone.yaml"
    config.write_text("port: 1\nlevel: debug\npages: [a, b]\nfast: true\n")
    environ = {"SCONE_CONFIG": str(config), "SCONE_PORT": "2", "SCONE_PAGES": "c,d"}
    by_file = resolve(SETTINGS, {"config": str(config)}, {})
    assert by_file.values == {"port": 1, "level": "debug", "api_key": None, "pages": ["a", "b"], "fast": True}
    by_environ = resolve(SETTINGS, {}, environ)
    assert (by_environ.port, by_environ.level, by_environ.pages) == (2, "debug", ["c", "d"])
    by_flag = resolve(SETTINGS, {"port": "3"}, environ)
    assert by_flag.port == 3
    assert resolve(SETTINGS, {}, {}).values == {
        "port": 8000,
        "level": "info",
        "api_key": None,
        "pages": None,
        "fast": False,
    }


def test_origins_are_shown_and_secrets_are_not() -> None:
    resolved = resolve(SETTINGS, {"port": "3"}, {"SCONE_API_KEY": "hunter2"})
    shown = describe(SETTINGS, resolved)
    assert "port    = 3  (command line)" in shown
    assert "api_key = ***  (SCONE_API_KEY)" in shown
    assert "hunter2" not in shown
    assert "level   = info  (default)" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1", "unknown key prot, did you mean port"),
        ("entirely_else: 1", "unknown key entirely_else; known are"),
        ("- port", "got a list"),
        ("port: [1, 2]", "port is a list"),
        ("port: x", "bad value for port"),
        ("level: loud", "wanted one of debug, info"),
        ("port: {", "cannot read"),
    ],
)
def test_bad_yaml(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "scone.yaml"
    config.write_text(content)
    with pytest.raises(SettingError, match=message):
        resolve(SETTINGS, {"config": str(config)}, {})


def test_null_in_yaml_is_the_default(tmp_path: Path) -> None:
    config = tmp_path / "scone.yaml"
    config.write_text("port:\nlevel: debug")
    resolved = resolve(SETTINGS, {"config": str(config)}, {})
    assert (resolved.port, resolved.values["level"]) == (8000, "debug")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("1024", 1024),
        ("1KiB", 1024),
        ("1.5 GiB", 3 << 29),
        ("2GB", 2_000_000_000),
        ("3m", 3_000_000),
    ],
)
def test_bytes(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "1 2"])
def test_bad_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="wanted bytes"):
        parse_bytes(text)


def serve_settings(**values: str) -> Resolved:
    return resolve(SERVE_SETTINGS, {"model": "models/tiny.gguf"} | values, {})


def test_every_limit_of_the_server_and_the_engine_is_a_setting() -> None:
    names = {setting.name for setting in SERVE_SETTINGS}
    api = {field.name for field in fields(ApiConfig)} - {"api_keys"}
    engine = {field.name for field in fields(EngineConfig)} - {"num_threads"}  # torch's, by `threads`
    assert api <= names
    assert engine <= names


def test_defaults_are_those_of_the_parts() -> None:
    assert api_config(serve_settings()) == ApiConfig()
    config = engine_config(serve_settings(), max_position=2048, on_cuda=False)
    assert config == EngineConfig(max_model_len=2048)
    assert model_name(serve_settings()) == "tiny"
    assert model_name(serve_settings(served_model_name="other")) == "other"


def test_a_gpu_takes_larger_steps_unless_told_otherwise() -> None:
    config = engine_config(serve_settings(), max_position=2048, on_cuda=True)
    assert config == EngineConfig(max_model_len=2048, max_num_seqs=256, max_num_batched_tokens=2048)
    told = serve_settings(max_num_seqs="4", max_num_batched_tokens="64", kv_cache_bytes="5MB")
    config = engine_config(told, max_position=2048, on_cuda=True)
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.kv_cache_bytes) == (4, 64, 5_000_000)


def test_what_the_cache_may_take_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    device = torch.device("cuda", 0)
    assert spare_cache_bytes(device, 0) == 800
    assert spare_cache_bytes(device, 500) == 400
    with pytest.raises(SettingError, match=r"device_bytes is 1000, wanted less than .* 1000 bytes"):
        spare_cache_bytes(device, 1000)


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who\nalpha\n\n  beta \n")
    assert api_config(serve_settings(api_key_file=str(path))).api_keys == ("alpha", "beta")
    path.write_text("# nobody\n")
    with pytest.raises(SettingError, match="holds no key"):
        api_config(serve_settings(api_key_file=str(path)))
    with pytest.raises(SettingError, match="cannot read"):
        api_config(serve_settings(api_key_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("name", "value"), [("drain_timeout", "-1"), ("stall_timeout", "0"), ("max_prompts", "0")]
)
def test_bad_limits_of_the_server(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=name):
        api_config(serve_settings(**{name: value}))


@pytest.mark.parametrize(("name", "value"), [("max_model_len", "4096"), ("block_size", "0")])
def test_bad_limits_of_the_engine(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=name):
        engine_config(serve_settings(**{name: value}), max_position=2048, on_cuda=False)


def test_settings_document_is_current() -> None:
    expected = settings_markdown(load_commands().values())
    assert (ROOT / "docs/settings.md").read_text() == expected, (
        "run `python -m scone.server.settings_document`"
    )


def test_print_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCONE_API_KEY", "hunter2")
    assert main(["serve", "--model", "x", "--port", "9", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "(command line)" in printed
    assert "(SCONE_API_KEY)" in printed
    assert "hunter2" not in printed


def test_secrets_have_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["serve", "--model", "x", "--api-key", "hunter2"])
    assert exited.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_usage_errors_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve"]) == 2
    assert "--model is missing" in capsys.readouterr().err


def test_collect_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCONE_API_KEY", "hunter2")
    assert main(["collect-env"]) == 0
    printed = capsys.readouterr().out
    assert "torch: 2" in printed
    assert "SCONE_API_KEY" in printed
    assert "hunter2" not in printed


def test_check_config(capsys: pytest.CaptureFixture[str], smollm2_path: Path, tmp_path: Path) -> None:
    arguments = ["check-config", "--model", str(smollm2_path), "--port", "0"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "chat template: yes" in printed
    assert printed.endswith("ok\n")
    assert main([*arguments, "--table", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    assert main([*arguments, "--max-model-len", "999999"]) == 2
