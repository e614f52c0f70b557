"""LoadGen runs over one set of samples, each in a fork of this process: LoadGen reads its settings once in a process.

Client processes (client.py) send the requests, so that reading answers never delays LoadGen's issue thread.

    python -m autotune.live.loadgen SAMPLES DESCRIPTOR

does the imports, prepares the requests, and then serves load_generator.py through the socket DESCRIPTOR: each message
is the folder of a run, whose run.json says what to do. LoadGen's logs, `requests.csv` and `client.json` go to that
folder, and the exit code of the run's process is the answer. STOP ends the run that goes on.
"""

import array
import gc
import itertools
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import mlperf_loadgen as lg
import numpy as np

from autotune.config.schema import Kind, Mode, ScenarioConfig
from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.live import audit, key, metrics_page
from autotune.live.client import Clients, Message, MessageKind, bodies
from autotune.live.issuing import Issuer, Requests
from autotune.live.load_generator import PATH_BYTES, STOP, ClientReport, RunSpec
from autotune.live.metrics_page import Totals
from autotune.measure import loadgen_log, progress, traffic
from autotune.measure.backend import RequestTiming
from autotune.measure.limits import latency_limits, limits_of, within
from autotune.measure.traffic import Ask, Traffic
from autotune.system.files import write_rows
from autotune.system.process import fork

NO_LIMIT_S = 3600.0
PUBLISH_S = 2.0
SETTLED = 0.9  # of the fastest round so far: warm-up ends with a round that took longer than this share of it
NO_ANSWER = bytes(8)  # for LoadGen, where none is kept or a request has failed
ID_BYTES = 4
SEEDS = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")
# Keys of user.conf, in every scenario and in some, and TestSettings' fields; latencies are ms there and ns here.
SAME = ("min_query_count", "max_query_count", "performance_sample_count_override", "sample_concatenate_permutation")
USER_CONF = {"min_duration": "min_duration_ms", "max_duration": "max_duration_ms", **dict(zip(SAME, SAME, strict=True))}
OF_KIND = {
    Kind.Offline: {"target_qps": "offline_expected_qps"},
    Kind.SingleStream: {"target_latency": "single_stream_expected_latency_ns"},
    Kind.Server: {"target_qps": "server_target_qps", "ttft_latency": "ttft_latency", "tpot_latency": "tpot_latency"},
}
RATES = ("target_qps", "target_latency")  # which user.conf always has
SWITCH_S = 5e-4  # the longest that LoadGen's issue thread waits for the thread that reads the clients' messages


class Sut(Requests):
    """LoadGen's system under test: hands each query to a client process, and each answer back to LoadGen."""

    def __init__(self, clients: Clients, spec: RunSpec, samples: int) -> None:
        super().__init__(clients, spec)
        self._spec, self._library = spec, samples
        self._ids: list[int] = []  # LoadGen's
        self._first_token = spec.scenario.kind is not Kind.Offline

    def run(self) -> None:
        """Run LoadGen to its end; its logs go to the run's folder."""
        start_test(self.issue, self._spec.scenario, self._library, self._spec.folder)

    def issue(self, queries: list[lg.QuerySample]) -> None:
        """Send `queries`. LoadGen calls it on its issue thread; an error there ends the process."""
        self._ids += [query.id for query in queries]
        now = time.perf_counter()
        self.send([Ask(now, query.index) for query in queries])

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Pass the clients' messages on to LoadGen, which times them as they come, then record them for ourselves."""
        begun = [message for message in messages if message.kind == MessageKind.FIRST_TOKEN or not message.first]
        if self._first_token and begun:
            self._complete(lg.FirstTokenComplete, [(m.number, answer(m)[:ID_BYTES], 0) for m in begun])
        ended = [message for message in messages if message.kind != MessageKind.FIRST_TOKEN]
        if ended:  # LoadGen waits for every query, so a failed one is completed, too; the run is INVALID anyway
            self._complete(lg.QuerySamplesComplete, [(m.number, answer(m), m.amount or 2) for m in ended])
        super().on_messages(messages)

    def _complete(self, tell: Callable[..., None], answers: Sequence[tuple[int, bytes, int]]) -> None:
        """Call LoadGen's `tell` with requests' numbers, their answers and the numbers of tokens."""
        buffer = array.array("B", b"".join(data for _, data, _ in answers))  # LoadGen copies from it while it is called
        address, _ = buffer.buffer_info()
        responses = []
        for number, data, tokens in answers:
            responses.append(lg.QuerySampleResponse(self._ids[number], address, len(data), tokens))
            address += len(data)
        tell(responses)


def answer(message: Message) -> bytes:
    """The answer to a request, for LoadGen."""
    return NO_ANSWER if message.kind == MessageKind.FAILED else message.data or NO_ANSWER


def start_test(
    issue: Callable[[list[lg.QuerySample]], None], scenario: ScenarioConfig, samples: int, folder: Path
) -> None:
    """Run LoadGen, which calls `issue`, over a library of so many `samples`; its logs and settings go to `folder`.

    Once in a process: LoadGen reads its settings only then.
    """
    log = lg.LogSettings()
    log.log_output.outdir = str(folder)
    log.log_output.copy_summary_to_stdout = False
    log.enable_trace = False
    library = lg.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
    system = lg.ConstructSUT(issue, lambda: None)  # nothing is held back, to be flushed
    # A path of its own, where only a compliance test puts one: LoadGen would obey one in the working folder.
    audit = folder / "audit.config"
    if scenario.audit:
        audit.write_text("".join(f"*.*.{name} = {value}\n" for name, value in scenario.audit.items()))
    made = settings(scenario)
    if scenario.benchmark:
        made = by_benchmark(scenario, made, samples, folder / "user.conf")
    lg.StartTestWithLogSettings(system, library, made, log, str(audit))
    lg.DestroySUT(system)
    lg.DestroyQSL(library)


def by_benchmark(scenario: ScenarioConfig, wanted: lg.TestSettings, samples: int, path: Path) -> lg.TestSettings:
    """LoadGen's own settings for the scenario's benchmark, and those `wanted`.

    `path`, its user.conf, has a line for the rate and for each in which they differ.
    """
    name, kind = scenario.benchmark, scenario.kind.value
    made = lg.TestSettings()
    made.FromConfig("", name, kind, 0)  # its mlperf.conf alone
    wanted.performance_sample_count_override = samples
    keys = {**USER_CONF, **OF_KIND[scenario.kind]}
    lines = []
    for word, field in keys.items():
        if getattr(made, field) != (value := getattr(wanted, field)) or word in RATES:
            lines.append(f"*.{kind}.{word} = {value / 1e6 if word.endswith('latency') else value + 0}\n")
    path.write_text("".join(lines))
    made = lg.TestSettings()
    made.FromConfig(str(path), name, kind)
    for field in ("scenario", "mode", *SEEDS, *keys.values()):  # user.conf can't set some, and has others in whole ms
        setattr(made, field, getattr(wanted, field))
    return made


def settings(scenario: ScenarioConfig) -> lg.TestSettings:
    """LoadGen's settings for `scenario`; LoadGen has durations in ms, limits on token latencies in ns."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario.kind.value)
    accuracy = scenario.mode is Mode.accuracy
    settings.mode = lg.TestMode.AccuracyOnly if accuracy else lg.TestMode.PerformanceOnly
    settings.use_token_latencies = True
    loosest_s = {limit.name: limit.loosest for limit in latency_limits(scenario)}
    settings.ttft_latency = int(min(loosest_s.get("ttft", NO_LIMIT_S), NO_LIMIT_S) * 1e9)
    settings.tpot_latency = int(min(loosest_s.get("tpot", NO_LIMIT_S), NO_LIMIT_S) * 1e9)
    settings.server_target_qps = scenario.qps
    settings.server_target_latency_percentile = 0.99
    settings.offline_expected_qps = scenario.qps
    if scenario.benchmark:  # else LoadGen's 1 ms, as it must not run out of queries
        settings.single_stream_expected_latency_ns = 1e9 / scenario.qps
    settings.min_duration_ms = int(scenario.min_duration_s * 1e3)
    settings.max_duration_ms = int(scenario.max_duration_s * 1e3)
    settings.min_query_count = scenario.min_queries
    settings.max_query_count = scenario.max_queries
    settings.sample_concatenate_permutation = scenario.equal_issue
    for field, seed in zip(SEEDS, scenario.loadgen_seeds, strict=True):
        setattr(settings, field, seed)
    return settings


def measure(spec: RunSpec, clients: Clients, samples: Samples) -> None:
    """Warm up, run LoadGen, and write requests.csv and client.json.

    The process has to be ended after a run that was stopped: LoadGen's issue thread goes on. Raises MeasureError if a
    request of the warm-up fails, a client process dies or vLLM has no metric of TTFT.
    """
    messages = clients.messages()
    started = time.perf_counter()
    warm_up(clients, messages, spec, len(samples))
    before = metrics_page.totals(spec.url) if spec.has_metrics else None
    warm, warm_cpu = time.perf_counter(), time.process_time()
    clients.begin(first_tokens=spec.scenario.kind is not Kind.Offline)
    progress.phase(spec.folder, "run")
    source = None if spec.scenario.by_loadgen else traffic.source(spec.scenario, samples, room=spec.max_model_len)
    sut = Issuer(clients, spec, Traffic(source)) if source else Sut(clients, spec, len(samples))
    threading.Thread(target=publish, args=(sut, clients, spec.scenario, spec.folder), daemon=True).start()
    stopped = run_test(sut, clients, messages)
    run_s, own_cpu_s = time.perf_counter() - warm, time.process_time() - warm_cpu
    write_rows(spec.folder / "requests.csv", RequestTiming, sut.completed)
    reports = list(clients.reports.values())
    sent = sut.sent[:]  # LoadGen's thread may still append to `issued` and then to this
    figures = audit.figures(reports, own_cpu_s, run_s, audit.lateness(spec, sut.issued[: len(sent)], sent))
    figures |= traffic.figures([source]) if source else {}
    if sut.completed:
        waited_ms = 1e3 * sut.waited_s / len(sut.completed)
        figures["client_ttft_added_mean_ms"] = ttft_mean_ms(spec, sut, stopped) - waited_ms
    if before and sut.completed and (after := metrics_page.totals(spec.url)):
        during = Totals(*np.subtract(after, before).tolist())
        figures |= {"prefix_hit_tokens": during.prefix_hit_tokens, "prefix_query_tokens": during.prefix_query_tokens}
        if during.first_tokens and not stopped:  # else vLLM has begun requests that we have no time of
            figures["frontend_ttft_mean_ms"] = waited_ms - 1e3 * during.ttft_s / during.first_tokens
    report = ClientReport(
        failed=len(sut.failures),
        errors=sut.failures[:5],
        began=warm,
        warmup_s=warm - started,
        run_s=run_s,
        stopped=stopped,
        processes=[asdict(report) for report in reports],
        figures=figures,
        reasons=audit.reasons(spec, figures),
    )
    (spec.folder / "client.json").write_text(json.dumps(asdict(report), indent=1))


def run_test(sut: Sut | Issuer, clients: Clients, messages: Iterator[list[Message]]) -> bool:
    """Send the requests of `sut` to the end, or until scenario.stop ends the run; returns whether that stopped it."""
    test = ThreadPoolExecutor(1).submit(sut.run)
    test.add_done_callback(lambda _: clients.finish())
    for batch in messages:
        sut.on_messages(batch)
        if sut.decided:
            break
    stopped = not test.done()
    if stopped:
        clients.finish()
        for _ in messages:
            """Read on until the client processes have reported."""
    else:
        test.result()
    return stopped


def ttft_mean_ms(spec: RunSpec, sut: Requests, stopped: bool) -> float:
    """LoadGen's mean TTFT; ours where it has none: in Offline, of our own traffic, of a run that was stopped."""
    log = spec.folder / "mlperf_log_detail.txt"
    loadgens = loadgen_log.read(log).figures.get("ttft_mean_ms") if log.exists() and not stopped else None
    return loadgens or 1e3 * sum(timing.ttft for timing in sut.completed) / len(sut.completed)


def warm_up(clients: Clients, messages: Iterator[list[Message]], spec: RunSpec, samples: int) -> None:
    """Send the same requests in rounds until one is no faster; empty vLLM's caches. Raises MeasureError."""
    count = spec.scenario.warmup_requests
    rounds = spec.warmup_rounds if count else 0
    if not rounds:
        reset_caches(spec.url)
    fastest = math.inf
    for _ in range(rounds):
        began, left = time.perf_counter(), count
        clients.send([(number, number % samples, -1) for number in range(left)])
        while left:
            for message in next(messages):
                if message.kind == MessageKind.FAILED:
                    raise MeasureError(message.data.decode())
                left -= message.kind == MessageKind.DONE
        took = time.perf_counter() - began
        reset_caches(spec.url)
        if took > SETTLED * fastest:
            break
        fastest = took


def reset_caches(url: str) -> None:
    """Empty vLLM's prefix cache. Raises MeasureError if vLLM refuses."""
    try:
        key.asked(url, "/reset_prefix_cache", timeout_s=60, method="POST")
    except OSError as error:
        raise MeasureError(f"vLLM's answer to /reset_prefix_cache: {error}") from None


def publish(sut: Requests, clients: Clients, scenario: ScenarioConfig, folder: Path) -> None:
    """Publish the run's rates so far every PUBLISH_S, without end."""
    began = time.perf_counter()
    held = limits_of(scenario)
    counted = good = 0
    for step in itertools.count():
        time.sleep(PUBLISH_S)
        completed = len(sut.completed)
        for timing in sut.completed[counted:completed]:  # each is looked at once
            good += within(timing, held)
        counted = completed
        elapsed = time.perf_counter() - began
        counts = {"tokens_per_s": clients.generated, "samples_per_s": counted, "goodput_per_s": good}
        rates = {name: count / elapsed for name, count in counts.items()}
        progress.publish(folder, step, {**rates, "completed": counted, "over_limit": counted - good})


def run(spec: RunSpec, clients: Clients, samples: Samples) -> None:
    """Make one run, as the process that `fork` gives it; what it prints is in loadgen.log."""
    with (spec.folder / "loadgen.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        measure(spec, clients, samples)
    except MeasureError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def serve(trial: socket.socket, samples: Samples, ready: Callable[[int], bytes]) -> None:
    """Make the runs that are asked for through `trial`, one at a time; `ready` has the requests of `samples`.

    The client processes stay for the next run, unless it is for another server, or this one failed.
    """
    asked, clients = None, None
    while message := trial.recv(PATH_BYTES):
        if message == STOP:  # the run had just ended
            continue
        spec = RunSpec.load(Path(os.fsdecode(message)) / "run.json")
        server = (spec.url, spec.model, spec.request_timeout_s)
        asks = (*server, spec.client_processes, spec.connections, spec.keep_answers)
        if clients and asks != asked:
            clients.close()
            clients = None
        clients, asked = clients or Clients(spec, ready, samples), asks
        code = ending(fork(partial(run, spec, clients, samples)), trial)
        if code:
            clients.close()
            clients = None
        trial.send(str(code).encode())
        gc.collect()  # what has been read of this run's run.json


def ending(pid: int, trial: socket.socket) -> int:
    """The exit code of the run's process `pid`, or 128 + the signal that ended it; word from `trial` ends it."""
    running = os.pidfd_open(pid)
    if running not in select.select([running, trial.fileno()], [], [])[0]:
        trial.recv(PATH_BYTES)
        os.kill(pid, signal.SIGKILL)
    os.close(running)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - code if code < 0 else code


def main() -> None:
    path, descriptor = sys.argv[1:]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each request that was sent has a connection
    samples = Samples.load(Path(path))
    ready = bodies(samples)
    gc.freeze()
    gc.disable()  # there are no cycles here, and a collection would stop every thread while it visits all objects
    sys.setswitchinterval(SWITCH_S)
    serve(socket.socket(fileno=int(descriptor)), samples, ready)


if __name__ == "__main__":
    main()
