"""One LoadGen run, in a process of its own: a second run in one process would not read its settings again. Its requests
go out from other processes (client.py), so that no answer that is read keeps LoadGen's thread from its schedule.

    python -m autotune.live.loadgen SAMPLES FOLDER

gets the samples ready while vLLM starts, waits for FOLDER/run.json, and writes LoadGen's logs, `requests.csv` and
`client.json` to the folder that it names.
"""

import array
import dataclasses
import gc
import itertools
import json
import math
import os
import resource
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlperf_loadgen as lg
import numpy as np

from autotune.config.schema import Kind, Limit, Stop
from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.live import audit, loadgen_log, metrics_page
from autotune.live.client import Clients, Notice, Notices, bodies, requests
from autotune.live.messages import ClientReport, Run
from autotune.measure import progress
from autotune.measure.backend import RequestTiming
from autotune.measure.early_stopping import Watch
from autotune.measure.metrics import within
from autotune.system.files import write_rows

NO_LIMIT_MS = 3_600_000.0
POLL_S = 0.02
PUBLISH_S = 2.0
SETTLED = 0.9  # of the fastest round so far: a round that saves less has nothing more to warm up
SWITCH_S = 5e-4  # most that LoadGen's thread waits for the one that hears the clients


class Sut:
    """LoadGen's system under test: hands each query to a client process, and each answer back to LoadGen."""

    def __init__(self, clients: Clients, run: Run) -> None:
        self.decided = False  # nothing more to wait for
        self._watch = Watch(run.total, Limit(run.ttft_ms, run.tpot_ms).in_seconds(), run.over_share)
        self._stop = Stop(run.stop)
        self.completed: list[RequestTiming] = []
        self.failures: list[str] = []
        self.issued: list[float] = []  # by request number, as `sent`
        self.sent: list[float] = []  # 0 until its answer has ended
        self._queries: list[lg.QuerySample] = []
        self._clients = clients
        self._first_token = run.kind != Kind.Offline.value
        self._buffer = array.array("B", bytes(8))  # LoadGen copies it; performance runs never look inside
        self._address, self._size = self._buffer.buffer_info()

    def issue(self, queries: list[lg.QuerySample]) -> None:
        """Called on LoadGen's thread, which an error would take down and the process with it."""
        if self.decided:
            return
        issued = time.perf_counter()
        number = len(self.issued)
        self.issued += [issued] * len(queries)
        self.sent += [0.0] * len(queries)
        self._queries += queries
        try:
            self._clients.send([(number + offset, query.index) for offset, query in enumerate(queries)])
        except OSError:
            if not self.decided:  # else the clients have been let go
                raise

    def flush(self) -> None:
        """Nothing is held back."""

    def hear(self, notices: Sequence[Notice]) -> None:
        """Tell LoadGen, which takes the time of it, then keep what the run is judged by."""
        begun = [notice for notice in notices if notice.kind == Notices.FIRST_TOKEN or not notice.first]
        ended = [notice for notice in notices if notice.kind != Notices.FIRST_TOKEN]
        if self._first_token and begun:
            lg.FirstTokenComplete([self._response(notice, 0) for notice in begun])
        if ended:
            lg.QuerySamplesComplete([self._response(notice, self._tokens(notice)) for notice in ended])
        for notice in ended:
            issued, sample = self.issued[notice.number], self._queries[notice.number].index
            self.sent[notice.number] = notice.sent
            if notice.kind == Notices.DONE:
                timing = RequestTiming(sample, issued, notice.first, notice.last, notice.amount)
                self.completed.append(timing)
                self._watch.add(timing.ttft, timing.tpot)
            else:
                self.failures.append(notice.text)
        self.decided = self._watch.ends_run(self._stop)

    @staticmethod
    def _tokens(notice: Notice) -> int:
        # LoadGen must end, so a failed request is completed, too; the run is invalid anyway.
        return notice.amount if notice.kind == Notices.DONE else 2

    def _response(self, notice: Notice, tokens: int) -> lg.QuerySampleResponse:
        return lg.QuerySampleResponse(self._queries[notice.number].id, self._address, self._size, tokens)


def settings(run: Run) -> lg.TestSettings:
    """LoadGen's settings for `run`; its times are ms, its token limits ns."""
    found = lg.TestSettings()
    found.scenario = getattr(lg.TestScenario, run.kind)
    found.mode = lg.TestMode.PerformanceOnly
    found.use_token_latencies = True
    found.ttft_latency = int((run.ttft_ms or NO_LIMIT_MS) * 1e6)
    found.tpot_latency = int((run.tpot_ms or NO_LIMIT_MS) * 1e6)
    found.server_target_qps = run.qps
    found.server_target_latency_percentile = 0.99
    found.offline_expected_qps = run.qps
    found.min_duration_ms = int(run.min_duration_s * 1e3)
    found.max_duration_ms = int(run.max_duration_s * 1e3)
    found.min_query_count = run.min_queries
    found.max_query_count = run.max_queries
    found.qsl_rng_seed = found.sample_index_rng_seed = found.schedule_rng_seed = run.seed
    return found


def measure(run: Run, bodies: Sequence[bytes]) -> None:
    """Warm up, run LoadGen, write down what it and the client processes saw."""
    folder = Path(run.folder)
    ready = requests(run.url, run.model, bodies)
    clients = Clients(run.client_processes, run.url, ready, run.request_timeout_s, run.kind != Kind.Offline.value)
    del ready  # the client processes have it
    notices = clients.notices()
    started = time.perf_counter()
    warm_up(clients, notices, run, len(bodies))
    before = metrics_page.ttft(run.url)
    warm, warm_cpu = time.perf_counter(), time.process_time()
    clients.begin()
    sut = Sut(clients, run)
    threading.Thread(target=publish, args=(sut, clients, run, folder), daemon=True).start()
    test = ThreadPoolExecutor(1).submit(start_test, sut, settings(run), len(bodies), folder)
    test.add_done_callback(lambda _: clients.finish())
    for batch in notices:
        sut.hear(batch)
        if sut.decided:
            break
    stopped = not test.done()
    if stopped:
        clients.finish()
        for _ in notices:
            """Only their reports are of interest now."""
    else:
        test.result()
    run_s, own_cpu_s = time.perf_counter() - warm, time.process_time() - warm_cpu
    write_rows(folder / "requests.csv", RequestTiming, sut.completed)
    reports = list(clients.reports.values())
    sent = list(sut.sent)  # LoadGen's thread may still add to both, to this one last
    figures = audit.figures(reports, own_cpu_s, run_s, audit.lateness(run, sut.issued[: len(sent)], sent))
    server_s, count = np.subtract(metrics_page.ttft(run.url), before)
    if count and sut.completed and not stopped:  # else vLLM has begun requests that we have no time of
        figures["client_ttft_added_mean_ms"] = ttft_mean_ms(sut, folder) - 1e3 * float(server_s / count)
    report = ClientReport(
        failed=len(sut.failures),
        errors=sut.failures[:5],
        began=warm,
        warmup_s=warm - started,
        run_s=run_s,
        stopped=stopped,
        processes=[dataclasses.asdict(report) for report in reports],
        figures=figures,
        reasons=audit.reasons(run, figures),
    )
    (folder / "client.json").write_text(json.dumps(dataclasses.asdict(report), indent=1))
    if stopped:
        os._exit(0)  # LoadGen's thread can't be ended


def ttft_mean_ms(sut: Sut, folder: Path) -> float:
    """LoadGen's, or our own in the scenario where it has none."""
    loadgens = loadgen_log.read(folder / "mlperf_log_detail.txt").figures.get("ttft_mean_ms")
    return loadgens or 1e3 * sum(timing.ttft for timing in sut.completed) / len(sut.completed)


def warm_up(clients: Clients, notices: Iterator[list[Notice]], run: Run, samples: int) -> None:
    """The same requests at once, until they take no less time than before; caches are empty then.

    Raises MeasureError for the first request that fails.
    """
    if not run.warmup_requests:
        reset_caches(run.url)
    fastest = math.inf
    for _ in range(run.warmup_rounds if run.warmup_requests else 0):
        began, left = time.perf_counter(), run.warmup_requests
        clients.send([(number, number % samples) for number in range(left)])
        while left:
            for notice in next(notices):
                if notice.kind == Notices.FAILED:
                    raise MeasureError(notice.text)
                left -= notice.kind == Notices.DONE
        took = time.perf_counter() - began
        reset_caches(run.url)
        if took > SETTLED * fastest:
            break
        fastest = took


def reset_caches(url: str) -> None:
    """Forget the prefixes seen so far. Raises MeasureError if vLLM refuses."""
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/reset_prefix_cache", method="POST"), timeout=60).close()
    except OSError as error:
        raise MeasureError(f"vLLM's answer to /reset_prefix_cache: {error}") from None


def publish(sut: Sut, clients: Clients, run: Run, folder: Path) -> None:
    """Every few seconds, the rates so far; what completed is counted once."""
    began, before = time.perf_counter(), clients.generated
    limits = Limit(run.ttft_ms, run.tpot_ms).in_seconds()
    counted = good = 0
    for step in itertools.count():
        time.sleep(PUBLISH_S)
        completed = len(sut.completed)
        for timing in sut.completed[counted:completed]:
            good += within(timing, limits)
        counted = completed
        elapsed = time.perf_counter() - began
        found = {"tokens_per_s": clients.generated - before, "samples_per_s": counted, "goodput_per_s": good}
        rates = {name: count / elapsed for name, count in found.items()}
        progress.publish(folder, step, {**rates, "completed": counted, "over_limit": counted - good})


def start_test(sut: Sut, test_settings: lg.TestSettings, samples: int, folder: Path) -> None:
    """Run LoadGen to its end; its logs go to `folder`."""
    log = lg.LogSettings()
    log.log_output.outdir = str(folder)
    log.log_output.copy_summary_to_stdout = False
    log.enable_trace = False
    library = lg.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
    system = lg.ConstructSUT(sut.issue, sut.flush)
    lg.StartTestWithLogSettings(system, library, test_settings, log)
    lg.DestroySUT(system)
    lg.DestroyQSL(library)


def main() -> None:
    samples, folder = map(Path, sys.argv[1:])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one connection a request in flight
    ready = bodies(Samples.load(samples))
    while not (folder / "run.json").exists():
        time.sleep(POLL_S)
    run = Run(**json.loads((folder / "run.json").read_text()))
    gc.freeze()
    gc.disable()  # nothing here is cyclic, and a collection stops all for as long as there are objects
    sys.setswitchinterval(SWITCH_S)
    try:
        measure(run, ready)
    except MeasureError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # LoadGen's thread can't be ended, and would be waited for
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
