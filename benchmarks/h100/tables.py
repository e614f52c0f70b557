"""The tables of docs/benchmarks/h100.md and two-gpus.md, from the data beside this file:

python benchmarks/h100/tables.py          # print them
python benchmarks/h100/tables.py --write  # put them into the pages, each below its `<!-- name -->`
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from autotune.result import Result

DATA = Path(__file__).parent / "data"
PAGES = [Path(__file__).parents[2] / "docs/benchmarks" / name for name in ("h100.md", "two-gpus.md")]
INTERACTIVE = ("interactive-closed", "interactive-open", "interactive-random", "interactive-grid")
OFFLINE = ("offline-closed", "offline-open")
PHASES = ("start", "warmup", "run", "stop")
Row = Sequence[str]


def study(name: str) -> dict[str, Result]:
    """Its trials, in the order in which they ended."""
    found = {}
    for file in (DATA / name).glob("*.json"):
        if file.stem != "verify":
            found[file.stem] = Result.of(json.loads(file.read_text()))
    return dict(sorted(found.items(), key=lambda item: item[1].ended_at))


def engine_s(result: Result) -> float:
    return sum(result.phases.get(phase, 0.0) for phase in PHASES)


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
    head = ("study", "trial", "what differs from the defaults", "max QPS", "fails at", "p99 TTFT, ms", "p99 TPOT, ms",
            "tokens/s", "bound by", "runs", "engine time, s")  # fmt: skip
    rows = []
    for name in INTERACTIVE:
        for trial, result in study(name).items():
            digits = {"max_qps": 2, "failing_qps": 2, "ttft_p99_ms": 0, "tpot_p99_ms": 1, "tokens_per_s": 0}
            shown = [number(result.metrics.get(metric), places) for metric, places in digits.items()]
            failed = [result.reason or "failed"] if not result.complete else [result.bound]
            rows.append(
                (name, trial, changed(result), *shown, *failed, str(len(result.runs)), number(engine_s(result), 0))
            )
    return markdown(head, rows)


def offline() -> str:
    head = ("study", "trial", "what differs from the defaults", "samples/s", "tokens/s", "J/token", "bound by")
    rows = []
    for name in OFFLINE:
        for trial, result in study(name).items():
            digits = {"samples_per_s": 2, "tokens_per_s": 0, "gpu_j_per_token": 3}
            shown = [number(result.metrics.get(metric), places) for metric, places in digits.items()]
            rows.append((name, trial, changed(result), *shown, bound(result)))
    return markdown(head, rows)


def arms() -> str:
    """What each way of searching had found when it had used the engine time of the first."""
    head = ("way", "trials", "engine time, min", "best max QPS", "after, min")
    budget = sum(engine_s(result) for trial, result in study(INTERACTIVE[0]).items() if trial != "baseline")
    rows = []
    for name in (INTERACTIVE[0], *INTERACTIVE[2:]):
        used, best, after, count = 0.0, 0.0, 0.0, 0
        for trial, result in study(name).items():
            if trial == "baseline" or used >= budget:
                continue
            used, count = used + engine_s(result), count + 1
            if result.feasible and result.values[0] > best:
                best, after = result.values[0], used
        rows.append((name, str(count), number(used / 60), number(best, 2), number(after / 60)))
    return markdown(head, rows)


def verified() -> str:
    verdict = json.loads((DATA / INTERACTIVE[0] / "verify.json").read_text())
    rows = [
        (row["name"], *(number(value, 2) for value in row["values"]), number(row["mean"], 2)) for row in verdict["rows"]
    ]
    blocks = [f"block {at + 1}" for at in range(verdict["n"])]
    return markdown(("", *blocks, "mean"), rows) + f"\n\n{verdict['line']}"


def starts() -> str:
    """Seconds of a start by part, of the first one, which compiles, and the median of those that found all compiled."""
    every = [result for name in (*INTERACTIVE, *OFFLINE) for result in study(name).values() if result.complete]
    every.sort(key=lambda result: result.started_at)
    first, warm = every[0], [result for result in every[1:] if result.start.get("compile", 0.0) < 10]
    parts = list(first.start)
    middle = {part: median(result.start.get(part, 0.0) for result in warm) for part in parts}
    middle_phases = {phase: median(result.phases.get(phase, 0.0) for result in every) for phase in PHASES[1:]}
    rows = [
        ("the first", *(number(first.start[part], 0) for part in parts), number(sum(first.start.values()), 0)),
        (f"the median of {len(warm)}", *(number(middle[part], 0) for part in parts), number(sum(middle.values()), 0)),
    ]
    rest = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in middle_phases.items())
    return (
        markdown(("start", *parts, "in all, s"), rows) + f"\n\nThen, by the median of all {len(every)} trials: {rest}."
    )


def side_by_side() -> str:
    head = ("", *(changed(result) for result in study("alone").values()), "first start to last end, s")
    rows = []
    for name in ("alone", "together"):
        found = {changed(result): result for result in study(name).values()}
        wall = max(one.ended_at for one in found.values()) - min(one.started_at for one in found.values())
        rows.append(
            (name, *(f"{found[key].metrics['tokens_per_s']:,.0f} tokens/s" for key in head[1:-1]), number(wall))
        )
    return markdown(head, rows)


def parallelism() -> str:
    head = ("trial", "GPUs", "began after, s", "start, s", "tokens/s", "tokens/s for each GPU")
    trials = sorted(study("parallelism").items(), key=lambda item: item[1].started_at)
    began = trials[0][1].started_at
    rows = []
    for name, result in trials:
        seconds = (result.started_at - began, result.phases.get("start"))
        rates = (result.metrics.get(metric) for metric in ("tokens_per_s", "tokens_per_s_per_gpu"))
        rows.append((name, result.facts.get("leased_gpus", ""), *(number(value, 0) for value in (*seconds, *rates))))
    other = Result.of(json.loads((DATA / "trials/out-of-memory.json").read_text()))
    return markdown(head, rows) + f"\n\nThe trial beside them: {other.state}, `{other.reason}`"


def killed() -> str:
    return "```\n" + (DATA / "killed.txt").read_text() + "```"


TABLES: dict[str, Callable[[], str]] = {
    table.__name__.replace("_", "-"): table
    for table in (interactive, offline, arms, verified, starts, side_by_side, parallelism, killed)
}


def filled(page: str) -> str:
    """`page` with each table that it names as the data has it."""
    return re.sub(
        r"(<!-- ([\w-]+) -->\n)(.*?)(\n<!-- end -->)",
        lambda found: found[1] + TABLES[found[2]]() + found[4],
        page,
        flags=re.S,
    )


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
