"""One LoadGen run, in a process of its own: a second run in one process would not read its settings again.

    python -m autotune.live.loadgen SAMPLES FOLDER

gets the samples ready while vLLM starts, waits for FOLDER/run.json, and writes LoadGen's logs, `requests.csv` and
`client.json` to the folder that it names.
"""

import array
import asyncio
import csv
import dataclasses
import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlperf_loadgen as lg
import uvloop

from autotune import progress
from autotune.backend import RequestTiming
from autotune.early_stopping import Watch
from autotune.errors import MeasureError
from autotune.live.client import Client, bodies
from autotune.live.run import ClientReport, Run
from autotune.metrics import within
from autotune.samples import Samples
from autotune.schema import Kind, Stop

NO_LIMIT_MS = 3_600_000.0
POLL_S = 0.02
PUBLISH_S = 2.0
WARMUP_ROUNDS = 10  # at most
SETTLED = 0.9  # of the fastest round so far: a round that saves less has nothing more to warm up


class Sut:
    """LoadGen's system under test: hands each query to the event loop, and each answer back to LoadGen."""

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop, run: Run) -> None:
        self.decided = asyncio.Event()  # nothing more to wait for
        self._watch = Watch(run.total, limits_s(run), run.over_share)
        self._stop = Stop(run.stop)
        self.completed: list[RequestTiming] = []
        self.failures: list[str] = []
        self._client = client
        self._loop = loop
        self._first_token = run.kind != Kind.Offline.value
        self._tasks: set[asyncio.Task[None]] = set()
        self._buffer = array.array("B", bytes(8))  # LoadGen copies it; performance runs never look inside
        self._address, self._size = self._buffer.buffer_info()

    def issue(self, queries: list[lg.QuerySample]) -> None:
        """Called on LoadGen's thread."""
        issued = time.perf_counter()
        batch = [(query.id, query.index) for query in queries]
        self._loop.call_soon_threadsafe(self._start, batch, issued)

    def flush(self) -> None:
        """Nothing is held back."""

    def _start(self, batch: list[tuple[int, int]], issued: float) -> None:
        for query, sample in batch:
            task = self._loop.create_task(self._answer(query, sample, issued))
            self._tasks.add(task)  # the loop itself keeps only weak references
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, query: int, sample: int, issued: float) -> None:
        begun = False

        def first_token() -> None:
            nonlocal begun
            begun = True
            if self._first_token:
                lg.FirstTokenComplete([lg.QuerySampleResponse(query, self._address, self._size)])

        tokens = 2  # what a failed request is completed with: LoadGen must end, and the run is invalid anyway
        try:
            timing = await self._client.complete(sample, issued, first_token)
            self.completed.append(timing)
            self._watch.add(timing.ttft, timing.tpot)
            if self._watch.ends_run(self._stop):
                self.decided.set()
            tokens = timing.output_tokens
        except MeasureError as error:
            self.failures.append(str(error))
            if not begun:
                first_token()
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query, self._address, self._size, tokens)])


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


def limits_s(run: Run) -> tuple[float | None, float | None]:
    ttft, tpot = (None if limit is None else limit / 1e3 for limit in (run.ttft_ms, run.tpot_ms))
    return ttft, tpot


async def measure(run: Run, requests: Sequence[bytes]) -> None:
    """Warm up, let LoadGen run, write down what was seen; then the process is done for, as LoadGen can't be stopped."""
    loop, folder = asyncio.get_running_loop(), Path(run.folder)
    async with Client(run.url, run.model, requests, run.request_timeout_s) as client:
        started = time.perf_counter()
        await warm_up(client, run.warmup_requests, len(requests))
        warm = time.perf_counter()
        sut = Sut(client, loop, run)
        publishing = loop.create_task(publish(sut, client, run, folder))
        decided = loop.create_task(sut.decided.wait())
        test = loop.create_task(asyncio.to_thread(start_test, sut, settings(run), len(requests), folder))
        await asyncio.wait([test, decided], return_when=asyncio.FIRST_COMPLETED)
        stopped, ended = not test.done(), time.perf_counter()
        publishing.cancel()
        with (folder / "requests.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([field.name for field in dataclasses.fields(RequestTiming)])
            rows.writerows(dataclasses.astuple(timing) for timing in sut.completed)
        failures = sut.failures
        report = ClientReport(len(failures), failures[:5], warm, warm - started, ended - warm, stopped)
        (folder / "client.json").write_text(json.dumps(dataclasses.asdict(report)))
        if stopped:
            os._exit(0)
        test.result()


async def warm_up(client: Client, count: int, samples: int) -> None:
    """The same `count` requests at once, until they take no less time than before; caches are empty then."""
    fastest = math.inf
    for _ in range(WARMUP_ROUNDS if count else 0):
        began = time.perf_counter()
        await asyncio.gather(*(client.complete(i % samples, began) for i in range(count)))
        await client.reset_caches()
        took = time.perf_counter() - began
        if took > SETTLED * fastest:
            break
        fastest = took


async def publish(sut: Sut, client: Client, run: Run, folder: Path) -> None:
    """Every few seconds, the rates so far; what completed is counted once."""
    began, before = time.perf_counter(), client.generated
    counted = good = 0
    for step in itertools.count():
        await asyncio.sleep(PUBLISH_S)
        good += sum(within(timing, limits_s(run)) for timing in sut.completed[counted:])
        counted = len(sut.completed)
        elapsed = time.perf_counter() - began
        found = {"tokens_per_s": client.generated - before, "samples_per_s": counted, "goodput_per_s": good}
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
    requests = bodies(Samples.load(samples))
    while not (folder / "run.json").exists():
        time.sleep(POLL_S)
    run = Run(**json.loads((folder / "run.json").read_text()))
    try:
        uvloop.run(measure(run, requests))
    except MeasureError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
