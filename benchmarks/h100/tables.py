"""The tables of docs/benchmarks/h100.md and two-gpus.md, from the data beside this file:

python benchmarks/h100/tables.py          # print them
python benchmarks/h100/tables.py --write  # put them into the pages, each below its `<!-- name -->`
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from autotune.result import Result
from autotune.sim import calibrate

HERE = Path(__file__).parent
ONE, TWO = HERE / "data/one-gpu", HERE / "data/two-gpus"
PAGES = [HERE.parents[1] / "docs/benchmarks" / name for name in ("h100.md", "two-gpus.md")]
ARMS = ("interactive-closed", "interactive-random", "interactive-grid")
FORKED = ("interactive-closed-fork", "interactive-1024-fork", "interactive-768-fork")
INTERACTIVE = (ARMS[0], *FORKED, "interactive-open", *ARMS[1:])
OFFLINE = ("offline-closed", "offline-open")
SIDES = ("alone", "together")
PHASES = ("start", "warmup", "run", "stop", "other")
Row = Sequence[str]


def read(file: Path) -> Result:
    return Result.of(json.loads(file.read_text()))


def study(folder: Path) -> dict[str, Result]:
    """Its trials, in the order in which they ended; none where it was not measured."""
    found = {file.stem: read(file) for file in folder.glob("*.json") if file.stem != "verify"}
    return dict(sorted(found.items(), key=lambda item: item[1].ended_at))


def markdown(head: Row, rows: Iterable[Row]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def changed(result: Result) -> str:
    flags = {name.removeprefix("engine.args."): value for name, value in result.params.items()}
    return ", ".join(f"{name}={value}" for name, value in flags.items()) or "vLLM's defaults"


def bound(result: Result) -> str:
    return result.bound if result.complete else f"failed: {result.reason}"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def interactive() -> str:
    head = ("study", "trial", "what differs from the defaults", "max QPS", "fails at", "by its", "p99 TTFT, ms",
            "p99 TPOT, ms", "of the burst", "tokens/s", "GPU busy", "runs", "engine time, s")  # fmt: skip
    rows = []
    for name in INTERACTIVE:
        for trial, result in study(ONE / name).items():
            figures = result.metrics
            rows.append(
                (
                    *(name, trial, changed(result)),
                    *(number(figures.get(metric), 2) for metric in ("max_qps", "failing_qps")),
                    broken(result),
                    number(figures.get("ttft_p99_ms"), 0),
                    number(figures.get("tpot_p99_ms"), 1),
                    number(next((run.metrics["tpot_p99_ms"] for run in result.runs if run.role == "burst"), None)),
                    number(figures.get("tokens_per_s"), 0),
                    f"{figures.get('gpu_utilization', 0):.0%}",
                    *(str(len(result.runs)), number(result.engine_s, 0)),
                )
            )
    return markdown(head, rows)


def broken(result: Result) -> str:
    """The limit that the load above the certified one broke; why there is none."""
    failed = [run.reasons[0] for run in result.runs if run.qps == result.metrics.get("failing_qps") and run.reasons]
    return failed[-1].split()[0] if failed else result.reason


def offline() -> str:
    head = ("study", "trial", "what differs from the defaults", "samples/s", "tokens/s", "J/token", "bound by")
    rows = []
    for name in OFFLINE:
        for trial, result in study(ONE / name).items():
            digits = {"samples_per_s": 2, "tokens_per_s": 0, "gpu_j_per_token": 3}
            shown = [number(result.metrics.get(metric), places) for metric, places in digits.items()]
            rows.append((name, trial, changed(result), *shown, bound(result)))
    return markdown(head, rows)


def arms() -> str:
    """What each way of searching had found when it had used the engine time of the first."""
    head = ("way", "trials", "engine time, min", "best max QPS", "after, min")
    budget = sum(result.engine_s for trial, result in study(ONE / ARMS[0]).items() if trial != "baseline")
    rows = []
    for name in ARMS:
        used, best, after, count = 0.0, 0.0, 0.0, 0
        for trial, result in study(ONE / name).items():
            if trial == "baseline" or used >= budget:
                continue
            used, count = used + result.engine_s, count + 1
            if result.feasible and result.values[0] > best:
                best, after = result.values[0], used
        rows.append((name, str(count), number(used / 60), number(best, 2), number(after / 60)))
    return markdown(head, rows)


def verified() -> str:
    verdict = json.loads((ONE / ARMS[0] / "verify.json").read_text())
    rows = [
        (row["name"], *(number(value, 2) for value in row["values"]), number(row["mean"], 2)) for row in verdict["rows"]
    ]
    blocks = [f"block {at + 1}" for at in range(verdict["n"])]
    return markdown(("", *blocks, "mean"), rows) + f"\n\n{verdict['line']}"


def headline() -> str:
    found = []
    for name in (ARMS[0], FORKED[0]):
        baseline, trial = (study(ONE / name)[one].metrics["max_qps"] for one in ("baseline", "trial-0"))
        found.append(f"{baseline:.1f} → {trial:.1f} queries/s ({trial / baseline - 1:+.0%})")
    flags = changed(study(ONE / ARMS[0])["trial-0"])
    gains = f"{found[0]} on one host, {found[1]} on another"
    return f"**Within MLPerf's Interactive limits, vLLM's defaults → `{flags}`: {gains}.**"


def searches() -> str:
    """Every run of each search, in order."""
    head = ("trial", "run", "queries/s", "s", "queries", "p99 TTFT, ms", "p99 TPOT, ms", "LoadGen")
    rows = []
    for trial, result in study(ONE / ARMS[0]).items():
        for run in result.runs:
            shown = [number(run.metrics[name], 0) for name in ("duration_s", "requests", "ttft_p99_ms")]
            said = run.verdict + (f": {run.reasons[0]}" if run.reasons else "")
            load = "all at once" if run.role == "burst" else number(run.qps, 2)
            rows.append((trial, run.role, load, *shown, number(run.metrics["tpot_p99_ms"]), said))
    return markdown(head, rows)


def simulated() -> str:
    """What the simulation, fitted to other trials before, says of the same runs."""
    metrics = ("samples_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")
    rows = []
    for name in (ARMS[0], *FORKED):
        cases = [case for file in sorted((ONE / name).glob("*.json")) for case in calibrate.read(file)]
        for run, found in calibrate.errors(cases, calibrate.start_device([])).items():
            rows.append((name, run, *(f"{found[metric]:+.1%}" if metric in found else "" for metric in metrics)))
    return markdown(("study", "run", "samples/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99"), rows)


def starts() -> str:
    return start_table(list(study(ONE / ARMS[0]).items()))


def forked_starts() -> str:
    return start_table(list(study(ONE / "trials").items()))


def start_table(trials: Sequence[tuple[str, Result]]) -> str:
    """Seconds of each trial by phase, its start by part."""
    parts = list(dict.fromkeys(part for _, result in trials for part in result.start))
    rows = []
    for name, result in trials:
        phases = [number(result.phases[phase], 0) for phase in PHASES]
        rows.append((name, *(number(result.start.get(part), 0) for part in parts), *phases))
    return markdown(("", *parts, *(f"**{phase}**" for phase in PHASES)), rows)


def side_by_side() -> str:
    alone, together = ({changed(result): result for result in study(TWO / name).values()} for name in SIDES)
    rates = {key: [side[key].metrics["tokens_per_s"] for side in (alone, together)] for key in alone}
    wall = [max(one.ended_at for one in side.values()) - min(one.started_at for one in side.values())
            for side in (alone, together)]  # fmt: skip
    rows = [
        (name, *(f"{rates[key][at]:,.0f} tokens/s" for key in rates), number(wall[at])) for at, name in enumerate(SIDES)
    ]
    apart = max(abs(second / first - 1) for first, second in rates.values())
    faster = f"{wall[0] / wall[1]:.2f} times as fast, where 1.8 was the target"
    table = markdown(("", *rates, "first start to last end, s"), rows)
    return f"{table}\n\n{faster}; the values are within {apart:.1%} of each other."


def side_by_side_starts() -> str:
    trials = [(name, result) for name in SIDES for result in study(TWO / name).values()]
    return start_table([(f"{name}, {changed(result)}", result) for name, result in trials])


def beside_a_failure() -> str:
    other, trial = read(TWO / "trials/out-of-memory.json"), read(TWO / "parallelism/baseline.json")
    ends = {
        "out of memory": (other, f"{other.reason[:118]} …"),
        "vLLM's defaults": (trial, f"{trial.metrics['tokens_per_s']:,.0f} tokens/s"),
    }
    rows = [(name, said, number(one.ended_at - one.started_at, 0)) for name, (one, said) in ends.items()]
    return markdown(("trial", "what became of it", "s"), rows)


def tensor_parallel() -> str:
    trial = read(TWO / "trials/tensor-parallel.json")
    rates = [number(trial.metrics[name], 0) for name in ("tokens_per_s", "tokens_per_s_per_gpu")]
    return markdown(("GPUs", "tokens/s", "for each"), [(trial.facts["leased_gpus"], *rates)])


def killed() -> str:
    return "```\n" + (TWO / "killed.txt").read_text() + "```"


TABLES: dict[str, Callable[[], str]] = {
    table.__name__.replace("_", "-"): table
    for table in (
        *(headline, interactive, searches, simulated, starts, forked_starts, offline, arms, verified),
        *(side_by_side, side_by_side_starts, beside_a_failure, tensor_parallel, killed),
    )
}


def filled(page: str) -> str:
    """`page` with each table that it names as the data has it."""
    named = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return named.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    for page in PAGES:
        text = filled(page.read_text())
        if write:
            page.write_text(text)
        else:
            print(text)


if __name__ == "__main__":
    main()
