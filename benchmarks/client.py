"""What our client costs and adds, on a server that streams canned tokens (null_server.py), beside other clients'.

    python benchmarks/client.py cost       tokens/s for each core that the client has: ours, vllm bench serve, guidellm
    python benchmarks/client.py latency    500 requests/s on one core: how late they are sent, what we add to TTFT
    python benchmarks/client.py flight     10,000 requests in flight: failures, memory
    python benchmarks/client.py queue      13,368 requests at once: connections, failures
    python benchmarks/client.py answers    tokens/s for each core with the answers' token ids kept, and without, in turn
    python benchmarks/client.py turns      500 turns/s of conversations, with the answers in their prompts: how late
    python benchmarks/client.py            all of them
    python benchmarks/client.py run SAMPLES FOLDER     one run of ours, as FOLDER/run.json has it

Each prints what it found and exits with 1 if a target is missed. Server and client have a core each.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from null_server import MODEL

from autotune.config.schema import Answers, Kind, ScenarioConfig, Stop
from autotune.data.models import build_shape
from autotune.data.samples import Samples
from autotune.live.load_generator import LoadGenerator, RunSpec
from autotune.measure import loadgen_log
from autotune.measure.backend import RequestTiming
from autotune.system.files import read_rows

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("AUTOTUNE_CACHE", Path.home() / ".cache" / "autotune")) / "benchmarks"
SERVER_CORE, *_, CLIENT_CORE = 2 * sorted(os.sched_getaffinity(0))  # one core where this file is a client
PROMPT = 64  # tokens
# vllm bench serve without the console script, which needs a distribution called vllm.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
GUIDELLM = "guidellm==0.8.*"


class NullServer:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as answer:
            return json.load(answer)


@contextmanager
def null_server(**options: float) -> Iterator[NullServer]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(ROOT / "benchmarks/null_server.py"), "--port", str(port), *words]
    process = subprocess.Popen(["taskset", "-c", str(SERVER_CORE), *command])
    server = NullServer(port)
    try:
        while not answers(port):
            assert process.poll() is None
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def client(command: list[str], folder: Path, while_running: Callable[[psutil.Process], None]) -> None:
    """Run a client on its core, and call `while_running` with its process ten times a second."""
    log = folder / "client.log"
    with log.open("w") as output:
        process = psutil.Popen(
            ["taskset", "-c", str(CLIENT_CORE), *command],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        while process.poll() is None:
            while_running(process)
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)[:200]}: exit code {process.returncode}\n{log.read_text()[-2000:]}")


def tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def cpu_s(process: psutil.Process) -> float:
    """User and system time of a process and all that it started, seconds."""
    total = 0.0
    for one in tree(process):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def ours(
    folder: Path,
    server: NullServer,
    requests: int,
    output_tokens: int,
    connections: int = RunSpec.connections,
    keep_answers: bool = False,
    **scenario: Any,
) -> list[str]:
    """The command that sends `requests` by LoadGen, one for each sample."""
    # Each prompt begins with its own number, by which the server's times are found.
    prompts = [np.arange(number, number + PROMPT, dtype=np.int32) for number in range(requests)]
    samples = Samples("s", "c", prompts, np.full(requests, output_tokens, np.int32), True, folder / "samples.npz")
    samples.save()
    common = {"name": "s", "kind": Kind.Offline, "min_duration_s": 0.0, "warmup_requests": 0, "stop": Stop.never}
    asked = ScenarioConfig(**{**common, "min_queries": requests, "max_queries": requests, **scenario})
    spec = RunSpec(
        folder, server.url, MODEL, asked, 600.0, connections=connections, keep_answers=keep_answers, has_metrics=False
    )
    spec.save(folder / "run.json")
    return [sys.executable, __file__, "run", str(samples.path), str(folder)]


def run(samples: Path, folder: Path) -> None:
    with LoadGenerator(Samples.load(samples), folder / "clients.log") as load:
        load.begin(RunSpec.load(folder / "run.json"))
        if load.wait(600.0):
            sys.exit(load.last_line())


def vllm_bench(folder: Path, server: NullServer, requests: int, output_tokens: int, streams: int) -> list[str]:
    return [
        *(sys.executable, "-c", VLLM_BENCH, "--base-url", server.url, "--model", MODEL),
        *("--tokenizer", str(shape(folder)), "--dataset-name", "random", "--ignore-eos", "--disable-tqdm"),
        *("--random-input-len", str(PROMPT), "--random-output-len", str(output_tokens)),
        *("--num-prompts", str(requests), "--max-concurrency", str(streams)),
    ]


def guidellm(folder: Path, server: NullServer, requests: int, output_tokens: int, streams: int) -> list[str]:
    home = CACHE / GUIDELLM.partition("=")[0]
    program = home / "bin/guidellm"
    if not program.exists():
        print(f"installing {GUIDELLM} in {home}", flush=True)
        subprocess.run(["uv", "venv", "-q", "--allow-existing", str(home)], check=True)
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(home / "bin/python"), GUIDELLM], check=True)
    return [
        *(str(program), "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={server.url},model={MODEL},request_format=/v1/completions"),
        *("--tokenizer", f"kind=hf_auto,model={shape(folder)}"),
        *("--profile", f"kind=concurrent,streams={streams}", "--constraint", f"kind=max_requests,count={requests}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={output_tokens}"),
        *("--output", f"kind=json,path={folder / 'guidellm.json'}"),
    ]


def shape(folder: Path) -> Path:
    """A model's folder with a tokenizer."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        build_shape(model, vocab_size=512)
    return model


def cost(requests: int = 2000, output_tokens: int = 128, streams: int = 256, step_ms: float = 10.0) -> bool:
    offer(requests, output_tokens, streams, step_ms)
    rates = {}
    for name in ("ours", "vllm bench serve", "guidellm"):

        def command(folder: Path, server: NullServer, name: str = name) -> list[str]:
            if name == "ours":
                return ours(folder, server, requests, output_tokens)
            make = vllm_bench if name.startswith("vllm") else guidellm
            return make(folder, server, requests, output_tokens, streams)

        rates[name] = rate(name, command, requests, output_tokens, streams, step_ms)
    ratio = rates["ours"] / max(rates["vllm bench serve"], rates["guidellm"])
    return verdict(f"ours is {ratio:.1f} times the better of the two", ratio >= 3, "at least 3 times")


def answers_kept(requests: int = 2000, output_tokens: int = 128, streams: int = 256, step_ms: float = 10.0) -> bool:
    offer(requests, output_tokens, streams, step_ms)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for keep in 3 * (False, True):

        def command(folder: Path, server: NullServer, keep: bool = keep) -> list[str]:
            return ours(folder, server, requests, output_tokens, keep_answers=keep)

        name = "ids kept" if keep else "ids not kept"
        rates[keep].append(rate(name, command, requests, output_tokens, streams, step_ms))
    ratio = float(np.median(rates[False]) / np.median(rates[True]))
    return verdict(f"a token costs {ratio:.2f} times as much with its id kept", ratio <= 2, "at most twice")


def offer(requests: int, output_tokens: int, streams: int, step_ms: float) -> None:
    print(
        f"{requests} requests of {PROMPT} + {output_tokens} tokens, {streams} streams at a time, one token each in "
        f"{step_ms:g} ms: {streams / step_ms * 1e3:,.0f} tokens/s offered\n"
        f"{'':18}tokens/s for a core   tokens/s   client's CPU   null server's CPU"
    )


def rate(
    name: str,
    command: Callable[[Path, NullServer], list[str]],
    requests: int,
    output_tokens: int,
    streams: int,
    step_ms: float,
) -> float:
    """Tokens/s that a client takes for each core that it has."""
    seen: list[tuple[dict[str, float], float]] = []
    total = requests * output_tokens
    with tempfile.TemporaryDirectory() as scratch, null_server(slots=streams, step_ms=step_ms) as server:

        def look(process: psutil.Process) -> None:
            stats = server.get("stats")
            if 0.1 * total < stats["tokens"] < 0.9 * total:  # without its start and its report
                seen.append((stats, cpu_s(process)))

        client(command(Path(scratch), server), Path(scratch), look)
        finished = server.get("stats")["finished"]
        assert requests <= finished <= requests + 2, f"{name}: {finished} of {requests} requests"
    (first, used), (last, used_then) = seen[0], seen[-1]
    tokens, seconds = last["tokens"] - first["tokens"], last["at"] - first["at"]
    for_a_core = tokens / (used_then - used)
    print(
        f"{name:18}{for_a_core:19,.0f}{tokens / seconds:11,.0f}{(used_then - used) / seconds:14.0%}"
        f"{(last['cpu_s'] - first['cpu_s']) / seconds:19.0%}",
        flush=True,
    )
    return float(for_a_core)


def queue(requests: int = 13_368) -> bool:
    with tempfile.TemporaryDirectory() as scratch, null_server(slots=512, step_ms=5) as server:
        folder = Path(scratch)
        client(ours(folder, server, requests, 4), folder, lambda _: None)
        report = json.loads((folder / "client.json").read_text())
        completed = len(read_rows(folder / "requests.csv", RequestTiming))
        most = server.get("stats")["most_connections"]
    print(
        f"{requests:,} requests at once: {completed:,} completed, {report['failed']} failed; {most:,} connections at "
        f"most, {report['figures']['client_waiting']:,.0f} requests waited for one"
    )
    reached = completed == requests and not report["failed"] and most <= RunSpec.connections
    return verdict("all at once", reached, f"none lost, at most {RunSpec.connections:,} connections")


def latency(qps: float = 500.0, seconds: float = 20.0) -> bool:
    queries = int(qps * seconds)
    with tempfile.TemporaryDirectory() as scratch, null_server(slots=1000, step_ms=5) as server:
        folder = Path(scratch)
        limits = {"ttft_ms": 500.0, "tpot_ms": 30.0}
        command = ours(
            folder, server, queries, 4, kind=Kind.Server, qps=qps, min_duration_s=seconds, warmup_requests=16, **limits
        )
        client(command, folder, lambda _: None)
        report = json.loads((folder / "client.json").read_text())
        requests = read_rows(folder / "requests.csv", RequestTiming)
        figures = loadgen_log.read(folder / "mlperf_log_detail.txt").figures
        # The k-th request for a sample, by the time it was issued, is the server's k-th; the warm-up's come first.
        times: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for first_id, received, first_sent in sorted(server.get("requests")[16:], key=lambda request: request[1]):
            times[first_id].append((received, first_sent))
    back = []  # from the server's send to our reading
    whole = []  # TTFT without the server's own share
    for request in sorted(requests, key=lambda request: request.issued):
        received, first_sent = times[request.sample].pop(0)
        back.append(request.first_token - first_sent)
        whole.append(request.ttft - (first_sent - received))
    late = report["figures"]["client_lateness_p99_ms"]
    added = float(np.percentile(back, 99)) * 1e3
    print(
        f"{len(requests):,} requests, Poisson at {qps:g}/s, 4 tokens each, LoadGen and client on one core: "
        f"{report['failed']} failed\n"
        f"LoadGen's schedule to the last byte sent   p99 {late:.2f} ms\n"
        f"server's send to our reading of it          p50 {np.percentile(back, 50) * 1e3:.2f}  p99 {added:.2f} ms\n"
        f"TTFT but for the server's own share         p50 {np.percentile(whole, 50) * 1e3:.2f}  "
        f"p99 {np.percentile(whole, 99) * 1e3:.2f} ms\n"
        f"TTFT as LoadGen has it, all included        p50 {figures['ttft_p50_ms']:.2f}  "
        f"p99 {figures['ttft_p99_ms']:.2f} ms\n"
        f"busiest process {report['figures']['client_cpu']:.0%} of the core, p99 of its loop's lag "
        f"{report['figures']['client_lag_p99_ms']:.2f} ms"
    )
    return verdict("lateness and TTFT that we add", late <= 1 and added <= 1, "p99 of each at most 1 ms")


def flight(requests: int = 10_000) -> bool:
    few = requests // 100
    failed, most = 0, {}
    for count in (few, requests):
        peak = 0
        with tempfile.TemporaryDirectory() as scratch, null_server(slots=requests, step_ms=50, hold=count) as server:
            folder = Path(scratch)

            def look(process: psutil.Process) -> None:
                nonlocal peak
                peak = max(peak, memory(process))

            # As many prompts in both, so that the difference is the requests'.
            command = ours(folder, server, requests, 4, connections=requests, min_queries=count, max_queries=count)
            client(command, folder, look)
            failed += json.loads((folder / "client.json").read_text())["failed"]
            assert server.get("stats")["finished"] == count
        most[count] = peak
        print(f"{count:6,} requests in flight: {peak / 2**20:.0f} MiB in all processes of the client", flush=True)
    each = (most[requests] - most[few]) / (requests - few)
    print(f"{failed} failed, {each / 1e3:.1f} KB for each request")
    return verdict("10,000 in flight", not failed and each <= 20e3, "nothing fails, 20 KB for each beyond its prompt")


def turns(qps: float = 125.0, seconds: float = 20.0, turns: int = 4, added: int = 500) -> bool:
    sessions = int(qps * seconds)
    draw = np.random.default_rng(0)
    prompts = list(draw.integers(1000, 100_000, (sessions * turns, added), dtype=np.int32))
    with tempfile.TemporaryDirectory() as scratch, null_server(slots=1000, step_ms=5) as server:
        folder = Path(scratch)
        samples = Samples(
            *("s", "c", prompts, np.full(len(prompts), 16, np.int32), True, folder / "samples.npz"),
            turns=np.tile(np.arange(turns, dtype=np.int32), sessions),
            continued=True,
        )
        samples.save()
        scenario = ScenarioConfig(
            *("s", Kind.Server, qps),
            answers=Answers.received,
            min_duration_s=seconds,
            min_queries=1,
            warmup_requests=16,
            think_s=1.0,
        )
        RunSpec(folder, server.url, MODEL, scenario, 600.0, keep_answers=True, has_metrics=False).save(
            folder / "run.json"
        )
        client([sys.executable, __file__, "run", str(samples.path), str(folder)], folder, lambda _: None)
        report = json.loads((folder / "client.json").read_text())
        longest = max(request.prompt_tokens for request in read_rows(folder / "requests.csv", RequestTiming))
    late, cpu = (report["figures"][f"client_{name}"] for name in ("lateness_p99_ms", "cpu"))
    print(
        f"{qps:g} conversations/s of {turns} turns of {added} tokens and answers of 16, prompts to {longest:,}: "
        f"{report['failed']} failed\nwhen due to the last byte sent              p99 {late:.2f} ms\n"
        f"busiest process {cpu:.0%} of the core"
    )
    return verdict("lateness of turns", late <= 1 and not report["failed"], "p99 at most 1 ms, nothing fails")


def memory(process: psutil.Process) -> int:
    """Bytes of a process and what it started; shared pages are counted once."""
    total = 0
    for one in tree(process):
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def verdict(what: str, reached: bool, target: str) -> bool:
    print(f"{what}: target ({target}) {'reached' if reached else 'MISSED'}\n", flush=True)
    return reached


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        run(*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "cost": cost,
        "latency": latency,
        "flight": flight,
        "queue": queue,
        "answers": answers_kept,
        "turns": turns,
    }
    parser.add_argument("part", nargs="?", choices=parts)
    given = parser.parse_args()
    chosen = [parts[given.part]] if given.part else list(parts.values())
    reached = [part() for part in chosen]
    if not all(reached):
        sys.exit(1)


if __name__ == "__main__":
    main()
