"""A trace of a million requests, at 500 requests/s, on a server that streams canned tokens (null_server.py).

    python benchmarks/traces.py [SECONDS]

Prints how long it takes to read, when the first request is sent, how late those of the first SECONDS (20) are, and the
most memory of a process; exits with 1 if a target is missed. Server and client have a core each.
"""

import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import client
import psutil
from client import MODEL, null_server, shape, tree, verdict

from autotune.config.schema import DatasetConfig, Kind, ScenarioConfig, Stop
from autotune.data import samples, traces
from autotune.data.models import Model
from autotune.live.load_generator import RunSpec
from autotune.measure.backend import RequestTiming
from autotune.system.files import read_rows

COUNT, QPS = 1_000_000, 500.0
MOST_MB, FIRST_S, LATE_MS = 500, 10.0, 1.0


def write(path: Path) -> None:
    """A trace in Mooncake's form: prompts of 500 tokens on average, with ids, and 4 tokens out."""
    draw, at_ms = random.Random(0), 0.0
    with path.open("w") as file:
        for _ in range(COUNT):
            at_ms += 1e3 * draw.expovariate(QPS)
            tokens = draw.randint(10, 1000)
            ids = [draw.randrange(200_000) for _ in range(-(-tokens // 512))]
            row = {"timestamp": at_ms, "input_length": tokens, "output_length": 4, "hash_ids": ids}
            file.write(json.dumps(row) + "\n")


def most_mb(process: psutil.Process) -> float:
    """The most memory that any one process below this one has had, MB."""
    found = [0]
    for one in tree(process):
        with suppress(OSError, psutil.NoSuchProcess):
            status = Path(f"/proc/{one.pid}/status").read_text().splitlines()
            found += [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return max(found) / 1024


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    with tempfile.TemporaryDirectory() as scratch, null_server(slots=1000, step_ms=5) as server:
        folder, peaks = Path(scratch), [0.0]
        write(folder / "trace.jsonl")
        fields = {"path": str(folder / "trace.jsonl"), "piece_tokens": 512}
        config = DatasetConfig("trace", fields["path"], fields, min_output_tokens=1, max_output_tokens=1000)
        began = time.perf_counter()
        model = Model(MODEL, None, shape(folder))
        loaded = samples.prepare(config, model, folder, partial(traces.records, **fields))
        read_s = time.perf_counter() - began
        peaks.append(most_mb(psutil.Process()))
        asked = ScenarioConfig("s", Kind.Trace, to_s=seconds, warmup_requests=16, stop=Stop.never)
        RunSpec(folder, server.url, MODEL, asked, 600.0, has_metrics=False).save(folder / "run.json")
        began = time.perf_counter()
        command = [sys.executable, client.__file__, "run", str(loaded.path), str(folder)]
        client.client(command, folder, lambda process: peaks.append(most_mb(process)))
        requests = read_rows(folder / "requests.csv", RequestTiming)
        report = json.loads((folder / "client.json").read_text())
    first_s = min(request.issued for request in requests) - began
    late = report["figures"]["client_lateness_p99_ms"]
    print(
        f"{len(loaded):,} requests, read in {read_s:.1f} s; the first was sent {first_s:.1f} s later\n"
        f"{len(requests):,} of them sent in {seconds:g} s, {report['failed']} failed: p99 {late:.2f} ms late\n"
        f"{max(peaks):.0f} MB at most in a process"
    )
    reached = late <= LATE_MS and read_s + first_s <= FIRST_S and max(peaks) <= MOST_MB and not report["failed"]
    target = f"at most {LATE_MS:g} ms, {FIRST_S:g} s from the file to the first request, {MOST_MB} MB"
    sys.exit(not verdict("a million requests", reached, target))


if __name__ == "__main__":
    main()
