"""The README's commands, run as they stand there but for sizes, places and the port."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent

# The same commands on less: a few files of the library, few f-grams, one small training step.
SMALLER = {
    '"$LIBRARY/*.py"': '"$LIBRARY/a*.py"',
    '"$LIBRARY/[a-s]*.py"': '"$LIBRARY/argparse.py"',
    '"$LIBRARY/[t-z]*.py"': '"$LIBRARY/ast.py"',
    "--top 100000": "--top 300",
    "--steps 400": "--steps 1 --batch-size 1 --seq-len 32 --heldout-tokens 64 --num-layers 1",
}

pytestmark = pytest.mark.skipif(
    not (BIN / "scone").exists(), reason="the scone command is not installed beside this Python (make test)"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block_with(command: str) -> str:
    """The one block that runs `command`."""
    (found,) = [block for block in blocks("sh") if re.search(command, block, re.MULTILINE)]
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def here(block: str, data: Path, model: Path, port: int) -> str:
    """The block with this test's folder, model, port and environment in place of the README's."""
    installed = f"{sys.prefix}/.run"  # not to be remade: the test runs on what is installed
    places = {
        "data/models/SmolLM2-135M-Instruct.Q4_1.gguf": str(model.resolve()),
        "data/": f"{data}/",
        ". .venv/bin/activate": f"PATH={BIN}:$PATH",
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "make serve": f"exec make serve VENV={sys.prefix} --old-file={installed} PORT={port}",
    }
    return re.sub("|".join(map(re.escape, places)), lambda place: places[place.group()], block)


def run(script: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """A data folder in which the block of the own corpus has been run."""
    data = tmp_path_factory.mktemp("data")
    script = block_with("^scone build")
    for full, small in SMALLER.items():
        assert full in script, f"{full} is no longer in the README"
        script = script.replace(full, small)
    run(here(script, data, smollm2_path, port=0))
    return data


@contextmanager
def serving(script: str, port: int, **environment: str) -> Iterator[None]:
    """The server that `script` starts, from its first /ready to a clean end on SIGTERM."""
    process = subprocess.Popen(
        ["bash", "-euc", script], cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        wait_until_ready(port, process)
        yield
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(port: int, process: subprocess.Popen[bytes], timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended while it started"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"not ready after {timeout_seconds:g} s")


def test_every_sh_block_is_run_by_a_test() -> None:
    tested = [
        "^make serve$",
        "^curl .*/v1/completions",
        "^curl .*/v1/tables",
        "^scone build",
        "MODEL=data/library",
    ]
    assert sorted(blocks("sh")) == sorted(block_with(command) for command in tested)
    assert len(README.splitlines()) < 200


def test_start_and_curl(data: Path, smollm2_path: Path) -> None:
    port = free_port()
    script = here(block_with("^make serve$"), data, smollm2_path, port)
    # the demo's own table takes minutes to build: the small one stands in for it
    with serving(script, port, MODEL=f"{data}/library-model", TABLE=f"{data}/tables/library"):
        answer = run(here(block_with("^curl .*/v1/completions"), data, smollm2_path, port))
        assert '"text_completion"' in answer
        answers = run(here(block_with("^curl .*/v1/tables"), data, smollm2_path, port))
        assert '"matched_len"' in answers
        assert "scone_fgram_lookups_total" in answers


def test_serve_your_own(data: Path, smollm2_path: Path) -> None:
    port = free_port()
    script = here(block_with("MODEL=data/library"), data, smollm2_path, port)
    with serving(script, port):
        pass


def test_python_blocks(data: Path) -> None:
    for block in blocks("python"):
        exec(block.replace("data/", f"{data}/"), {})


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
