"""The image, the compose file and the monitoring: checked as far as that goes without a container engine."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from scone.cache.memory_budget import MemoryBudget
from scone.cache.recycled_config import RecycledConfig
from scone.cache.recycled_store import RecycledStore
from scone.model_store.fgram_set import FGramSet
from scone.server.engine.step_clock import StepClock
from scone.server.metrics import ServerMetrics
from scone.server.recycled_metrics import RecycledCollector
from scone.server.served_table import ServedTable
from scone.server.step_metrics import StepCollector
from scone.server.table_metrics import TableCollector

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DASHBOARDS = sorted((DOCKER / "grafana/dashboards").glob("*.json"))


def tool(name: str) -> str:
    """A program beside this Python or on PATH; the test is skipped without it."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed (make {name})")
    return found


def check(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=DOCKER / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Every PromQL expression of the dashboards, with Grafana's variables filled in."""
    found = [
        target["expr"]
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", [])
    ]
    assert found
    return [expr.replace("$instance", ".*").replace("$__rate_interval", "1m") for expr in found]


def test_dockerfile_lint() -> None:
    check(tool("hadolint"), "--config", DOCKER / ".hadolint.yaml", DOCKER / "Dockerfile")


def test_image_runs_unprivileged_and_gets_signals() -> None:
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "\nUSER 2000:0\n" in last_stage
    assert '\nENTRYPOINT ["scone"]\n' in last_stage
    assert "\nSTOPSIGNAL SIGTERM\n" in last_stage
    assert "g++" not in last_stage


def test_image_holds_every_floor_and_the_pinned_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floors = set(project["tool"]["setuptools"]["package-dir"].values())
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert floors <= sources
    ignored = (ROOT / ".dockerignore").read_text().split()
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert not [s for s in sources if not any(fnmatch(s, pattern) for pattern in allowed)]
    (pinned,) = re.findall(r"^TORCH\s*:= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"\nARG TORCH={pinned}\n" in DOCKERFILE


def compose(name: str) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        """Compose's own tag `!reset` stands for an absent value."""

    Loader.add_constructor("!reset", lambda loader, node: None)
    loaded: dict[str, Any] = yaml.load((DOCKER / name).read_text(), Loader)
    return loaded


def test_compose_mounts_what_exists_and_prometheus_finds_the_server() -> None:
    services = compose("compose.yaml")["services"]
    mounts = [v.split(":")[0] for s in services.values() for v in s["volumes"] if v.startswith("./")]
    assert mounts
    assert not [m for m in mounts if not (DOCKER / m).exists()]
    assert services["scone"]["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
    assert all(v.endswith(":ro") for v in services["scone"]["volumes"])
    targets = {v.split(":")[-2] for v in services["scone"]["volumes"]}
    environment = services["scone"]["environment"]
    assert {environment["SCONE_MODEL"].split("${")[0].rstrip("/"), environment["SCONE_TABLE"]} == targets
    scrape = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    host, port = scrape["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert f"SCONE_PORT={port} " in DOCKERFILE
    assert set(compose("compose.cpu.yaml")["services"]) <= set(services)


def test_dashboards_use_the_provisioned_source() -> None:
    provisioning = DOCKER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/scone.yaml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in compose("compose.yaml")["services"]["grafana"]["volumes"]
    for path in DASHBOARDS:
        panels = [p for p in json.loads(path.read_text())["panels"] if p["type"] != "row"]
        assert {p["datasource"]["uid"] for p in panels} == {source["uid"]}


def test_every_metric_named_is_exported(zipf_fgrams: FGramSet, write_table: Any, tmp_path: Path) -> None:
    metrics = ServerMetrics()
    served = ServedTable(write_table(tmp_path / "table", zipf_fgrams))
    metrics.registry.register(TableCollector(served))
    metrics.registry.register(StepCollector(StepClock()))
    with RecycledStore.open(None, RecycledConfig(), MemoryBudget(0)) as store:
        metrics.registry.register(RecycledCollector(store))
        page = metrics.exposition()[0].decode()
    served.close()
    exported = set(re.findall(r"^# TYPE (\w+) ", page, re.MULTILINE))
    exported |= {name + end for name in exported for end in ("_bucket", "_sum", "_count")}
    alerts = (DOCKER / "prometheus/alerts.yml").read_text()
    named = {
        name for text in (*expressions(), alerts) for name in re.findall(r"\b(?:scone|process)_\w+", text)
    }
    assert len(named) > 30
    assert sorted(named - exported) == []


def test_prometheus_configuration_and_alerts() -> None:
    promtool = tool("promtool")
    check(promtool, "check", "config", "prometheus.yml")
    check(promtool, "test", "rules", "alerts_test.yml")


def test_every_alert_is_tested_or_trivial() -> None:
    groups = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())["groups"]
    tested = (DOCKER / "prometheus/alerts_test.yml").read_text()
    untested = {r["alert"] for g in groups for r in g["rules"] if f"alertname: {r['alert']}" not in tested}
    assert untested == {"SconeSlowFirstToken", "SconeKVCacheFull"}  # one comparison each


def test_dashboard_expressions_parse(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": expr} for i, expr in enumerate(expressions())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    check(tool("promtool"), "check", "rules", path)


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1), (None, 1)])
def test_healthcheck(status: int | None, exit_code: int) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" and status else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        port = server.server_port
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.handle_request, daemon=True).start()
        command = [sys.executable, str(DOCKER / "healthcheck.py")]
        done = subprocess.run(command, env={**os.environ, "SCONE_PORT": str(port)}, capture_output=True)
    assert done.returncode == exit_code
