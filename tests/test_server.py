"""`serve` with a vLLM that ends, hangs, or is not the server that answers; a few lines stand for vLLM here."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from autotune.config.schema import LiveConfig
from autotune.data.models import Model
from autotune.errors import MeasureError, StartError
from autotune.live.installed_vllm import InstalledVllm
from autotune.live.server import serve

ENDS = "import sys; print('ValueError: no memory'); sys.exit(3)"
HANGS = "import time; print('loading', flush=True); time.sleep(60)"
KILLED = "import os; os.kill(os.getpid(), 9)"
# Healthy at once, under the name it was given; ends a second later with an error in its log.
HEALTHY = """
import http.server, json, sys, threading, time
port, name = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--port", "--served-model-name"))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": name}]}).encode())
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep(1)
sys.exit("RuntimeError: the engine died")
"""


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test if it leaves a process behind."""
    before = psutil.Process().children()
    yield
    assert [process for process in psutil.Process().children() if process not in before] == []


def start(folder: Path, code: str, **settings: object):
    vllm = InstalledVllm(sys.executable, "1.0", "2.0", ["-c", code], {})
    config = LiveConfig(**{"start_timeout_s": 20.0, "stop_timeout_s": 1.0, **settings})
    return serve(config, vllm, Model("the/model", "main", folder), {"max_num_seqs": 8}, folder / "vllm.log")


@pytest.fixture
def occupied() -> Iterator[int]:
    """A port where another server answers 200 to everything, with no models."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": []}')

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "settings", "message"),
    [
        (ENDS, {}, r"vLLM did not start \(exit code 3\): ValueError: no memory"),
        (KILLED, {}, r"vLLM did not start \(signal 9\): no error in .*; its last line: \(empty\)"),
        (HANGS, {"start_timeout_s": 1.0}, r"not healthy after 1 s \(backend.start_timeout_s\); .*: loading"),
    ],
    ids=["ends", "is killed", "hangs"],
)
@pytest.mark.usefixtures("nothing_left")
def test_vllm_that_does_not_come_up_is_an_error_and_leaves_nothing(
    tmp_path: Path, code: str, settings: dict[str, object], message: str
):
    with pytest.raises(StartError, match=message), start(tmp_path, code, **settings):
        pass


def test_port_in_use_is_said_before_vllm_starts(tmp_path: Path, occupied: int):
    message = f"backend.port={occupied}: in use by another process"
    with pytest.raises(StartError, match=message), start(tmp_path, HANGS, port=occupied):
        pass
    assert not (tmp_path / "vllm.log").exists()


@pytest.mark.usefixtures("nothing_left")
def test_another_server_on_the_port_is_not_taken_for_ours(
    tmp_path: Path, occupied: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("autotune.live.server._free_port", lambda: occupied)  # lost between the choice and vLLM's bind
    with pytest.raises(StartError, match="another server answers at"), start(tmp_path, HANGS):
        pass


def test_death_of_a_healthy_server_is_noticed_with_its_reason(tmp_path: Path):
    with start(tmp_path, HEALTHY) as server:
        server.check_alive()
        server.process.wait(20)
        with pytest.raises(MeasureError, match=r"while it was measured \(exit code 1\): RuntimeError: the engine died"):
            server.check_alive()


def test_two_servers_have_ports_and_names_of_their_own(tmp_path: Path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with start(folders[0], HEALTHY) as one, start(folders[1], HEALTHY) as other:
        assert one.url != other.url and one.model != other.model


def test_secrets_stay_out_of_the_command_that_is_written_down(tmp_path: Path):
    vllm = InstalledVllm(sys.executable, "1.0", "2.0", ["-c", "pass"], {})
    config = LiveConfig(env={"HF_TOKEN": "hidden"}, stop_timeout_s=1.0)
    args = {"kv_transfer_config": {"api_key": "hidden"}, "max_num_seqs": 8}
    with pytest.raises(StartError), serve(config, vllm, Model("m", None, tmp_path), args, tmp_path / "vllm.log"):
        pass
    written = (tmp_path / "command.json").read_text()
    assert "hidden" not in written and "--max-num-seqs" in written


def test_variables_of_the_user_s_that_decide_how_vllm_runs_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    theirs = {"VLLM_API_KEY": "sk-planted", "VLLM_USE_X": "1", "HF_TOKEN": "hf_planted", "VLLM_Y": "2", "EDITOR": "vi"}
    theirs["VLLM_ENABLE_STARTUP_PLAN"] = "1"
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    shown = ("VLLM_API_KEY", "VLLM_ENABLE_STARTUP_PLAN", "VLLM_USE_X", "VLLM_Y")
    show = f"import os; print(*(os.environ[name] for name in {shown}), sep=',')"
    with pytest.raises(StartError), start(tmp_path, show, env={"VLLM_Y": "3"}):
        pass
    assert (tmp_path / "vllm.log").read_text() == ",0,1,3\n"
    inherited = json.loads((tmp_path / "command.json").read_text())["inherited"]
    assert (inherited["VLLM_USE_X"], inherited["HF_TOKEN"]) == ("1", "***")
    assert not {"VLLM_API_KEY", "VLLM_ENABLE_STARTUP_PLAN", "VLLM_Y", "EDITOR"} & inherited.keys()


def test_exact_command_is_written_before_it_runs(tmp_path: Path):
    with start(tmp_path, HEALTHY) as server:
        command = json.loads((tmp_path / "command.json").read_text())["command"]
    assert command[0] == sys.executable
    assert command[3:] == [
        *("the/model", "--revision", "main", "--host", "127.0.0.1", "--port", server.url.rpartition(":")[2]),
        *("--served-model-name", server.model, "--max-num-seqs", "8", "--middleware", "autotune_gate.Gate"),
    ]


def test_compiled_code_outlives_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keep = 'import getpass, os; open(os.environ["TMPDIR"] + "/torchinductor_" + getpass.getuser() + "/header", "w")'
    for _ in range(2):
        with pytest.raises(StartError), start(tmp_path, keep):
            pass
    assert [file.name for file in tmp_path.glob("torchinductor_*/*")] == ["header"]


def test_scratch_folder_of_vllm_is_removed(tmp_path: Path):
    leave = "import os; print(os.environ['TMPDIR'], flush=True); open(os.environ['TMPDIR'] + '/socket', 'w');"
    with pytest.raises(StartError), start(tmp_path, leave + "exit(1)"):
        pass
    assert not Path((tmp_path / "vllm.log").read_text().strip()).exists()
