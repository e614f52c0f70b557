"""Real LoadGen against a server that streams as vLLM does, and sometimes fails."""

import json
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from autotune.config.schema import Kind, ScenarioConfig
from autotune.data.samples import Samples
from autotune.live.client import Clients, MessageKind, bodies
from autotune.live.load_generator import LoadGenerator, RunSpec
from autotune.measure import loadgen_log, metrics, progress
from autotune.measure.backend import RequestTiming
from autotune.system.files import read_rows
from autotune.system.process import GuardedProcess

TOKENS = 4
# The first token of a prompt, and what its request meets.
OK, REFUSED, CUT, SLOW, SILENT, RESET, COLD, KEPT = 5, 1, 2, 3, 4, 6, 8, 9
TTFT_S, TPOT_S = 0.2, 0.03  # of a slow one
CLAIMED_TTFT_S = 0.05


class Streaming(BaseHTTPRequestHandler):
    """/v1/completions in server-sent events, with the faults that a prompt's first token asks for; chats without."""

    received: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    asked_by: ClassVar[list[tuple[str, int]]] = []  # its path, and the client's port
    most: ClassVar[int | None] = None  # tokens after which an answer ends by itself
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/metrics of two engines that say each request's first token took them CLAIMED_TTFT_S."""
        count = sum(path == "/v1/completions" for path, _ in self.received)
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        name = "vllm:time_to_first_token_seconds"
        for engine, share in enumerate((0.25, 0.75)):
            labels = f'{{engine="{engine}",model_name="a {{b}}"}}'
            lines = [f"# TYPE {name} histogram", f'{name}_bucket{{engine="{engine}",le="0.1"}} 3.0']
            lines += [f"{name}_sum{labels} {share * count * CLAIMED_TTFT_S}", f"{name}_count{labels} {share * count}"]
            lines += [f"# TYPE vllm:prefix_cache_{one}_total counter" for one in ("hits", "queries")]
            self.wfile.write("".join(f"{line}\n" for line in lines).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.received.append((self.path, body))
        self.asked_by.append((self.path, self.client_address[1]))
        if self.path == "/reset_prefix_cache":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        prompt = body.get("prompt") or [OK]
        first = prompt[0]
        if first == SILENT:
            time.sleep(1)
        if first == COLD:  # the first three requests are slow, the next three less so
            time.sleep([0.6, 0.3, 0][min(2, (len(self.received) - 1) // 4)])
        self.send_response(500 if first == REFUSED else 200)
        token, ending = b'data: {"choices": [{"text": "x"}]}\n\n', b"data: [DONE]\n\n"
        if chat := "messages" in body:
            token = b'data: {"choices": [{"delta": {"content": "x\\n"}}]}\n\n'
        if body.get("return_token_ids"):
            token = token.replace(b"}]", b', "prompt_token_ids": [%d, 7], "token_ids": [%%d]}]' % first)
        tokens = min(body["max_tokens"], self.most or body["max_tokens"])
        usage = b'data: {"choices": [], "usage": {"prompt_tokens": %d, "completion_tokens": %d}}\n\n' % (
            len(body["messages"] if chat else prompt),
            tokens,
        )
        if first == RESET:
            self.close_connection = True
            self.send_header("Content-Length", "1000000")
        elif first == KEPT:
            self.send_header("Content-Length", str(tokens * len(token) + len(usage + ending)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if first == REFUSED:
            self.wfile.write(b'{"error": "out of blocks"}')
            return
        if chat:
            self.wfile.write(b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n')
        for number in range(tokens):
            if first == SLOW:
                time.sleep(TPOT_S if number else TTFT_S)
            self.wfile.write(token % (100 * first + number) if b"%" in token else token)
        if first not in (CUT, RESET):
            self.wfile.write(usage + ending)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # Offline connects all at once

    def handle_error(self, *_: object) -> None:
        """A client that ends in mid-answer is what some tests are about."""


@contextmanager
def serving() -> Iterator[str]:
    """The URL of a server."""
    server = Server(("127.0.0.1", 0), Streaming)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as found:
        yield found


def sampled(folder: Path, firsts: list[int], lengths: list[int] | None = None, ignore_eos: bool = True) -> Samples:
    """A sample for each of `firsts`, its prompt's first token."""
    prompts = [np.array([first, 7], dtype=np.int32) for first in firsts]
    output_tokens = np.array(lengths or [TOKENS] * len(firsts), dtype=np.int32)
    samples = Samples("s", "c", prompts, output_tokens, ignore_eos, folder / "samples.npz")
    samples.save()
    return samples


def asked(folder: Path, url: str, kind: Kind, **settings: Any) -> RunSpec:
    """A run, with `settings` of a RunSpec or a scenario."""
    folder.mkdir(exist_ok=True)
    names = {field.name for field in fields(RunSpec)}
    scenario = {name: value for name, value in settings.items() if name not in names}
    spec = {"request_timeout_s": 10.0} | {name: value for name, value in settings.items() if name in names}
    # Without a total no run is long enough for the test of its limits, and none is stopped.
    common = {"qps": 200.0, "ttft_ms": 2000.0, "tpot_ms": 100.0, "min_duration_s": 0.0, "min_queries": 20}
    return RunSpec(
        folder,
        url,
        "m",
        ScenarioConfig(**{"name": "s", "kind": kind, **common, "warmup_requests": 0, **scenario}),
        **spec,
    )


@contextmanager
def start(
    folder: Path, url: str, kind: Kind, firsts: list[int], lengths: list[int] | None = None, **settings: Any
) -> Iterator[LoadGenerator]:
    """A run over `firsts`, which has begun."""
    samples = sampled(folder, firsts, lengths, settings.pop("ignore_eos", True))
    with LoadGenerator(samples, folder / "clients.log") as load:
        load.begin(asked(folder, url, kind, **settings))
        yield load


def ended(load: LoadGenerator, folder: Path, code: int = 0) -> str:
    """What the run in `folder` has printed, once it has ended with this exit code."""
    found, log = load.wait(60), (folder / "loadgen.log").read_text()
    assert found == code, log
    return log


def run(folder: Path, *arguments: Any, code: int = 0, **settings: Any) -> str:
    with start(folder, *arguments, **settings) as load:
        return ended(load, folder, code)


def requests_in(folder: Path) -> list[RequestTiming]:
    return read_rows(folder / "requests.csv", RequestTiming)


def report_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "client.json").read_text()))


@dataclass(frozen=True)
class Processes:
    """Those of a LoadGenerator in mid-run."""

    serving: psutil.Process
    clients: list[psutil.Process]
    run: psutil.Process


def processes_of(load: LoadGenerator, folder: Path) -> Processes:
    """The processes that make the run in `folder`, once it has begun."""
    deadline = time.monotonic() + 30
    while not (folder / "mlperf_log_detail.txt").exists():
        assert load.wait(0.02) is None and time.monotonic() < deadline
    serving, *clients, of_run = sorted(started(folder), key=lambda process: process.pid)
    return Processes(serving, clients, of_run)


def started(folder: Path) -> list[psutil.Process]:
    words = ["-m", "autotune.live.loadgen", str(folder / "samples.npz")]
    return [process for process in psutil.Process().children(recursive=True) if process.cmdline()[1:4] == words]


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.Trace])
def test_every_request_is_timed_and_counted(tmp_path: Path, url: str, kind: Kind):
    enough = 64  # SingleStream's early stopping at p90 needs as many
    run(tmp_path, url, kind, [OK] * 30, min_queries=enough)
    requests = requests_in(tmp_path)
    assert len(requests) >= enough
    assert all(r.output_tokens == TOKENS and r.issued <= r.first_token <= r.last_token for r in requests)
    begun = next(entry["time"] for entry in progress.Reader(tmp_path).new() if entry.get("phase") == "run")
    assert abs(begun - time.time() + time.perf_counter() - report_in(tmp_path)["began"]) < 1  # after the warm-up
    if kind is Kind.ClosedLoop:  # LoadGen has none
        assert not (tmp_path / "mlperf_log_detail.txt").exists()
        return
    log = loadgen_log.read(tmp_path / "mlperf_log_detail.txt")
    assert {"tokens_per_s", "samples_per_s"} <= log.figures.keys()
    assert ("ttft_p99_ms" in log.figures) == (kind is not Kind.Offline)
    assert log.verdict == ("INVALID" if kind is Kind.Server else "VALID")
    too_few = ["early stopping: too few queries for p99, or too many over the limit"]
    assert log.reasons == (too_few if kind is Kind.Server else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "words"),
    [
        (REFUSED, "vLLM answered 500: .*out of blocks"),
        (CUT, "vLLM answered 200"),
        (RESET, "request failed: ConnectionError"),
        (SILENT, "request failed: TimeoutError"),
    ],
    ids=["refused", "cut", "reset", "silent"],
)
def test_failed_requests_are_counted_and_the_run_ends(tmp_path: Path, url: str, first: int, words: str):
    run(tmp_path, url, Kind.Server, [OK, first], request_timeout_s=0.5)
    report = report_in(tmp_path)
    assert report["failed"] > 0 and len(report["errors"]) <= 5
    assert report["failed"] + len(requests_in(tmp_path)) >= 20
    assert re.search(words, report["errors"][0])


def test_failing_warmup_ends_the_run_in_one_line(tmp_path: Path, url: str):
    log = run(tmp_path, url, Kind.Offline, [REFUSED], warmup_requests=2, code=1)
    assert log.startswith("vLLM answered 500") and log.count("\n") == 1


@pytest.mark.slow
def test_latencies_are_what_the_server_took(tmp_path: Path, url: str):
    run(tmp_path, url, Kind.SingleStream, [SLOW], lengths=[6], min_queries=3)
    requests = requests_in(tmp_path)
    for request in requests:
        assert TTFT_S <= request.ttft < TTFT_S + 0.1
        # A first token that is read late shortens the rest.
        assert 0.8 * TPOT_S <= request.tpot < TPOT_S + 0.02
    ours = metrics.from_requests(requests, ())
    loadgens = loadgen_log.read(tmp_path / "mlperf_log_detail.txt").figures
    for name in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "latency_p50_ms", "latency_p99_ms", "latency_mean_ms"):
        assert loadgens[name] == pytest.approx(ours[name], rel=0.03)


@pytest.mark.slow
def test_tokens_are_counted_for_each_sample_on_its_own(tmp_path: Path, url: str):
    lengths = [2, 3, 9]
    run(tmp_path, url, Kind.Offline, [OK] * 3, lengths)
    requests = requests_in(tmp_path)
    assert {request.sample for request in requests} == {0, 1, 2}
    assert all(request.output_tokens == lengths[request.sample] for request in requests)
    duration = metrics.from_requests(requests, ())["duration_s"]
    tokens = loadgen_log.read(tmp_path / "mlperf_log_detail.txt").figures["tokens_per_s"] * duration
    assert tokens == pytest.approx(sum(request.output_tokens for request in requests), rel=0.25)


@pytest.mark.parametrize("ignore_eos", [True, False], ids=["reference", "natural"])
def test_request_asks_for_the_sample_and_its_length(tmp_path: Path, url: str, ignore_eos: bool):
    Streaming.received.clear()
    run(tmp_path, url, Kind.SingleStream, [OK], ignore_eos=ignore_eos, min_queries=1)
    exactly = {"min_tokens": TOKENS, "ignore_eos": True} if ignore_eos else {"min_tokens": 1}
    assert (
        "/v1/completions",
        {
            "model": "m",
            "prompt": [OK, 7],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **exactly,
        },
    ) in Streaming.received


@pytest.mark.slow
def test_caches_are_reset_between_warmup_and_run(tmp_path: Path, url: str):
    Streaming.received.clear()
    run(tmp_path, url, Kind.SingleStream, [OK], warmup_requests=3, min_queries=4)
    paths = [path for path, _ in Streaming.received]
    rounds = [paths[at : at + 4] for at in range(0, 4 * paths.count("/reset_prefix_cache"), 4)]
    assert rounds == [["/v1/completions"] * 3 + ["/reset_prefix_cache"]] * len(rounds)
    assert len(paths) == 4 * len(rounds) + len(requests_in(tmp_path))


@pytest.mark.slow
def test_warmup_goes_on_until_it_gets_no_faster(tmp_path: Path, url: str):
    Streaming.received.clear()
    run(tmp_path, url, Kind.SingleStream, [COLD], warmup_requests=3, min_queries=4)
    assert [path for path, _ in Streaming.received].count("/reset_prefix_cache") >= 3


@pytest.mark.slow
def test_server_that_is_warm_is_asked_for_one_round(tmp_path: Path, url: str):
    Streaming.received.clear()
    run(tmp_path, url, Kind.SingleStream, [COLD], warmup_requests=3, warmup_rounds=1, min_queries=4)
    assert [path for path, _ in Streaming.received].count("/reset_prefix_cache") == 1


def test_users_of_a_closed_loop_wait_for_their_answers(tmp_path: Path, url: str):
    settings = {"users": 3, "ramp_s": 0.05, "min_duration_s": 0.5, "min_queries": 4}
    run(tmp_path, url, Kind.ClosedLoop, [SLOW] * 5, **settings)
    requests = requests_in(tmp_path)
    ends = sorted(one.last_token for one in requests)
    begins = sorted(one.issued for one in requests)
    assert len(requests) >= 6 and all(one.prompt_tokens == 2 for one in requests)
    assert all(begin > ends[number] - 1e-6 for number, begin in enumerate(begins[3:]))
    assert begins[-1] - begins[0] < 0.5 + TTFT_S


def test_user_of_a_closed_loop_whose_request_failed_sends_no_more(tmp_path: Path, url: str):
    run(tmp_path, url, Kind.ClosedLoop, [REFUSED], users=2, ramp_s=0.0, min_duration_s=30.0)
    assert report_in(tmp_path)["failed"] == 2


def test_trace_is_sent_at_its_times(tmp_path: Path, url: str):
    samples = replace(sampled(tmp_path, [OK] * 6), arrivals=np.array([0.9, 0.0, 0.3, 0.6, 0.3, 5.0]))
    samples.save()
    with LoadGenerator(samples, tmp_path / "clients.log") as load:
        load.begin(asked(tmp_path, url, Kind.Trace, from_s=0.2, to_s=1.0, scale=2.0))
        ended(load, tmp_path)
    requests = sorted(requests_in(tmp_path), key=lambda one: (one.issued, one.sample))
    assert [one.sample for one in requests] == [2, 4, 3, 0]
    assert np.diff([one.issued for one in requests]) == pytest.approx([0.0, 0.15, 0.15], abs=1e-6)
    report = report_in(tmp_path)
    assert report["failed"] == 0 and 0 < report["figures"]["client_lateness_p99_ms"] < 500


@pytest.mark.slow
def test_run_that_can_pass_no_more_is_stopped(tmp_path: Path, url: str):
    run(tmp_path, url, Kind.Server, [SLOW], ttft_ms=TTFT_S * 1e3 / 2, min_queries=500, total=500)
    report = report_in(tmp_path)
    assert report["stopped"]
    assert 0 < len(requests_in(tmp_path)) < 500


@pytest.mark.slow
def test_error_of_our_own_ends_the_process_though_loadgens_thread_goes_on(tmp_path: Path, url: str):
    (tmp_path / "requests.csv").mkdir()
    hopeless: dict[str, Any] = {"ttft_ms": TTFT_S * 1e3 / 2, "min_queries": 10_000, "total": 500}
    assert "IsADirectoryError" in run(tmp_path, url, Kind.Server, [SLOW], code=1, **hopeless)


def test_broken_limit_makes_the_run_invalid(tmp_path: Path, url: str):
    run(tmp_path, url, Kind.Server, [SLOW], ttft_ms=TTFT_S * 1e3 / 2)
    log = loadgen_log.read(tmp_path / "mlperf_log_detail.txt")
    assert log.verdict == "INVALID" and "p99 of TTFT or TPOT is over its limit" in log.reasons


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Kind.Offline, Kind.Server])
def test_client_processes_share_the_requests(tmp_path: Path, url: str, kind: Kind):
    run(tmp_path, url, kind, [OK] * 30, min_queries=64, client_processes=3, warmup_requests=4)
    assert len(requests_in(tmp_path)) >= 64
    report = report_in(tmp_path)
    assert report["failed"] == 0 and len(report["processes"]) == 3
    assert all(process["cpu_s"] > 0 for process in report["processes"])


@pytest.mark.slow
def test_run_audits_its_client(tmp_path: Path, url: str):
    run(tmp_path, url, Kind.Server, [SLOW], qps=50)
    report = report_in(tmp_path)
    figures = report["figures"]
    assert 0 < figures["client_lateness_p99_ms"] < 1000 and 0 <= figures["client_lag_p99_ms"] < 1000
    assert 0 < figures["client_cpu"] < 0.9 and figures["client_unsent_bytes"] == 0
    loadgens = loadgen_log.read(tmp_path / "mlperf_log_detail.txt").figures["ttft_mean_ms"]
    client, frontend = figures["client_ttft_added_mean_ms"], figures["frontend_ttft_mean_ms"]
    assert client + frontend == pytest.approx(loadgens - 1e3 * CLAIMED_TTFT_S, abs=0.01)
    slow_ms = 1e3 * (TTFT_S - CLAIMED_TTFT_S)  # the server's, though it doesn't say so
    assert 0 < client < 100 and frontend >= slow_ms
    assert report["reasons"] == []


@pytest.mark.slow
def test_client_that_stands_still_is_the_reason(tmp_path: Path, url: str):
    judged: dict[str, Any] = {"qps": 50, "min_queries": 100, "ttft_ms": 1000, "client_ttft_share": 0.1}
    with start(tmp_path, url, Kind.Server, [OK], **judged) as load:
        (client,) = processes_of(load, tmp_path).clients
        client.suspend()
        time.sleep(0.5)
        client.resume()
        ended(load, tmp_path)
    report = report_in(tmp_path)
    late = next(reason for reason in report["reasons"] if "client_lateness_p99_ms" in reason)
    assert re.match(r"client: client_lateness_p99_ms=\d+ is over 100 \(backend.client_ttft_share=0.1", late)


ENDLESS: dict[str, Any] = {"qps": 50, "min_queries": 100_000, "client_processes": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "code", "last_line"),
    [("client", 1, "a client process ended in mid-run"), ("run", 137, "see"), ("serving", 137, "see")],
)
def test_death_of_a_process_ends_the_run_and_the_next_one_gets_new_ones(
    tmp_path: Path, url: str, killed: str, code: int, last_line: str
):
    with start(tmp_path, url, Kind.Server, [OK], **ENDLESS) as load:
        before = processes_of(load, tmp_path)
        {"client": before.clients[0], "run": before.run, "serving": before.serving}[killed].kill()
        assert load.wait(10) == code and load.last_line().startswith(last_line)
        _, alive = psutil.wait_procs([before.run, *before.clients], timeout=5)
        assert len(before.clients) == 2 and not alive
        load.begin(asked(tmp_path / "next", url, Kind.Server))
        assert ended(load, tmp_path / "next") == ""


def test_death_before_a_run_is_heard_of_ends_it(tmp_path: Path, url: str):
    with start(tmp_path, url, Kind.Server, [OK]) as load:
        while not started(tmp_path):
            assert load.wait(0.02) is None
        started(tmp_path)[0].kill()  # while it still imports
        assert load.wait(10) == 137


@pytest.mark.slow
def test_cancelled_run_ends_at_once_and_the_next_one_is_none_the_wiser(tmp_path: Path, url: str):
    with start(tmp_path, url, Kind.Server, [SILENT, OK], **ENDLESS) as load:
        before = processes_of(load, tmp_path)
        began = time.monotonic()
        load.cancel()
        assert time.monotonic() - began < 1
        assert before.serving.is_running() and not any(one.is_running() for one in (before.run, *before.clients))
        load.begin(asked(tmp_path / "next", url, Kind.Server))
        assert ended(load, tmp_path / "next") == ""
        assert len(requests_in(tmp_path / "next")) == 20
        load.cancel()  # there is nothing to end
        load.begin(asked(tmp_path / "last", url, Kind.Server))
        assert ended(load, tmp_path / "last") == ""


@pytest.mark.slow
def test_audit_config_in_the_working_folder_changes_nothing(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.config").write_text("*.*.min_query_count = 3\n*.*.max_query_count = 3\n")
    folder = tmp_path / "trial"
    folder.mkdir()
    run(folder, url, Kind.Server, [OK] * 30, min_queries=20)
    assert len(requests_in(folder)) == 20


@pytest.mark.slow
def test_next_run_has_the_clients_of_one_that_was_stopped(tmp_path: Path, url: str):
    hopeless: dict[str, Any] = {"ttft_ms": TTFT_S * 1e3 / 2, "min_queries": 500, "total": 500, "client_processes": 2}
    with start(tmp_path, url, Kind.Server, [SLOW, OK], **hopeless) as load:
        clients = processes_of(load, tmp_path).clients
        assert ended(load, tmp_path) == ""
        assert report_in(tmp_path)["stopped"]
        for kind in (Kind.Offline, Kind.Server, Kind.SingleStream, Kind.ClosedLoop):
            load.begin(asked(tmp_path / kind.name, url, kind, client_processes=2))
            assert ended(load, tmp_path / kind.name) == ""
            requests = requests_in(tmp_path / kind.name)
            assert len(requests) == 20 and all(request.output_tokens == TOKENS for request in requests)
        assert len(clients) == 2 and all(client.is_running() for client in clients)


def test_next_run_has_the_connections_of_the_last_one_but_for_another_server(tmp_path: Path, url: str):
    ports: list[set[int]] = []
    Streaming.asked_by.clear()
    with start(tmp_path, url, Kind.SingleStream, [KEPT]) as load, serving() as other:
        for number, server in enumerate([url, url, other]):
            if number:
                load.begin(asked(tmp_path / str(number), server, Kind.SingleStream))
            assert ended(load, tmp_path / str(number or ".")) == ""
            ports.append({port for path, port in Streaming.asked_by if path == "/v1/completions"})
            Streaming.asked_by.clear()
    assert ports[0] == ports[1] != ports[2] and [len(of_run) for of_run in ports] == [1, 1, 1]


@pytest.mark.parametrize(("kind", "mode"), [(Kind.Server, 1), (Kind.Offline, 1), (Kind.Server, 2)])
def test_answers_reach_loadgen_as_token_ids(tmp_path: Path, url: str, kind: Kind, mode: int):
    """LoadGen's log of answers has them all in accuracy mode (1), and a share in performance mode (2) for a test."""
    (tmp_path / "audit.config").write_text(f"*.*.mode = {mode}\n*.*.accuracy_log_sampling_target = 20\n")
    firsts = list(range(10, 40))
    run(tmp_path, url, kind, firsts, keep_answers=True, client_processes=2, ttft_ms=None, min_queries=64)
    answers = json.loads((tmp_path / "mlperf_log_accuracy.json").read_text())
    assert {answer["qsl_idx"] for answer in answers} == set(range(30)) if mode == 1 else answers
    for answer in answers:
        ids = [100 * firsts[answer["qsl_idx"]] + number for number in range(TOKENS)]
        assert np.frombuffer(bytes.fromhex(answer["data"]), np.int32).tolist() == ids
        assert answer["token_count"] == TOKENS
        if kind is Kind.Server:
            assert np.frombuffer(bytes.fromhex(answer["token_data"]), np.int32).tolist() == ids[:1]


def test_answers_wait_in_the_client_while_nobody_reads_them(tmp_path: Path, url: str):
    count, tokens = 40, 3000
    samples = sampled(tmp_path, [OK], [tokens])
    spec = asked(tmp_path, url, Kind.Offline, keep_answers=True, connections=2)
    clients = Clients(spec, bodies(samples), samples)
    clients.begin(first_tokens=True)
    clients.send([(number, 0, -1) for number in range(count)])
    time.sleep(0.5)
    clients.send([(count, 0, -1)])  # the client still takes it
    ended = 0
    for batch in clients.messages():
        for message in batch:
            if message.kind == MessageKind.DONE:
                ended += 1
                ids = np.frombuffer(message.data, np.int32)
                assert ids.tolist() == list(range(100 * OK, 100 * OK + tokens))
        if ended == count + 1:
            clients.finish()
    clients.close()


@pytest.mark.slow
def test_more_requests_at_once_than_connections_are_all_answered(tmp_path: Path):
    """MLPerf's Offline: connections for all would pass a server's queue of them, or the limit of open files."""
    count = 13_368
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).parent.parent / "benchmarks/null_server.py"
    with GuardedProcess(
        [sys.executable, str(script), "--port", str(port), "--slots", "512"], tmp_path / "log", {}, 1.0
    ):
        deadline = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        at_once = {"min_queries": count, "has_metrics": False, "client_processes": 2, "request_timeout_s": 60.0}
        run(tmp_path, f"http://127.0.0.1:{port}", Kind.Offline, [OK] * 8, **at_once)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as answer:
            stats = json.load(answer)
    report = report_in(tmp_path)
    assert report["failed"] == 0 and len(requests_in(tmp_path)) == count
    assert stats["most_connections"] <= RunSpec.connections and report["figures"]["client_waiting"] > 0
