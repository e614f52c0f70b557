"""Real LoadGen against a server that streams as vLLM does, and sometimes fails."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from autotune.live import loadgen_log
from autotune.live.backend import read_requests
from autotune.samples import Samples

TOKENS = 4


class Streaming(BaseHTTPRequestHandler):
    """/v1/completions in server-sent events; a prompt that begins with token 1 gets a 500, with 2 half a stream."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/reset_prefix_cache":
            self.send_response(200)
            self.end_headers()
            return
        first = json.loads(body)["prompt"][0]
        self.send_response(500 if first == 1 else 200)
        self.end_headers()
        if first == 1:
            self.wfile.write(b'{"error": "out of blocks"}')
            return
        for _ in range(TOKENS):
            self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        if first != 2:
            self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % TOKENS)
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    ThreadingHTTPServer.request_queue_size = 128  # Offline connects all at once
    server = ThreadingHTTPServer(("127.0.0.1", 0), Streaming)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(folder: Path, url: str, kind: str, firsts: list[int], **settings: float) -> "subprocess.CompletedProcess[str]":
    """LoadGen over one sample for each of `firsts`, its prompt's first token."""
    prompts = [np.array([first, 7], dtype=np.int32) for first in firsts]
    samples = folder / "samples.npz"
    Samples("s", "c", prompts, np.full(len(firsts), TOKENS, np.int32), ignore_eos=True).save(samples)
    spec = {
        "url": url,
        "model": "m",
        "kind": kind,
        "qps": 50,
        "ttft_ms": 2000,
        "tpot_ms": 100,
        "min_duration_s": 0,
        "max_duration_s": 0,
        "min_queries": 20,
        "max_queries": 0,
        "warmup_requests": 0,
        "seed": 1,
        "request_timeout_s": 10,
        **settings,
    }
    (folder / "run.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "autotune.live.loadgen", str(samples), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", ["Offline", "Server", "SingleStream"])
def test_every_request_is_timed_and_counted(tmp_path: Path, url: str, kind: str):
    enough = 64  # SingleStream's early stopping at p90 needs as many
    done = run(tmp_path, url, kind, [5] * 30, min_queries=enough)
    assert done.returncode == 0, done.stderr
    requests = read_requests(tmp_path / "requests.csv")
    assert len(requests) >= enough
    assert all(r.output_tokens == TOKENS and r.issued <= r.first_token <= r.last_token for r in requests)
    log = loadgen_log.read(tmp_path / "mlperf_log_detail.txt")
    assert {"tokens_per_s", "samples_per_s"} <= log.figures.keys()
    assert ("ttft_p99_ms" in log.figures) == (kind != "Offline")
    assert log.verdict == ("INVALID" if kind == "Server" else "VALID")
    assert log.reasons == (["early stopping: too few queries for p99, or too many over the limit"] * (kind == "Server"))


@pytest.mark.parametrize(("first", "words"), [(1, "vLLM answered 500: .*out of blocks"), (2, "vLLM answered 200")])
def test_failed_requests_are_counted_and_the_run_ends(tmp_path: Path, url: str, first: int, words: str):
    done = run(tmp_path, url, "Server", [5, first])
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "client.json").read_text())
    assert report["failed"] > 0 and report["failed"] + len(read_requests(tmp_path / "requests.csv")) >= 20
    assert re.search(words, report["errors"][0])


def test_failing_warmup_ends_the_run_in_one_line(tmp_path: Path, url: str):
    done = run(tmp_path, url, "Offline", [1], warmup_requests=2)
    assert done.returncode == 1 and done.stderr.startswith("vLLM answered 500") and done.stderr.count("\n") == 1
