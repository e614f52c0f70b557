"""The tables of docs/benchmarks/gpus.md, h100.md and two-gpus.md, from the data beside this file:

python -m benchmarks.h100.tables          # print them
python -m benchmarks.h100.tables --write  # put them into the pages, each below its `<!-- name -->`
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import yaml
from scipy.stats import kendalltau

from autotune.config.command_line import compose
from autotune.config.schema import HOST, Device
from autotune.measure.metrics import mean_and_interval
from autotune.measure.paired import paired_difference
from autotune.measure.result import Result
from autotune.results import figures, sections, summary
from autotune.results.study import BASELINE, FRESH
from autotune.results.submission import Run, objections
from autotune.results.verdict import change
from autotune.search.simulate import estimate, simulation
from autotune.sim import calibrate
from benchmarks.recorder import said

HERE = Path(__file__).parent
ONE, TWO = HERE / "data/one-gpu", HERE / "data/two-gpus"
PAGES = [HERE.parents[1] / "docs/benchmarks" / name for name in ("gpus.md", "h100.md", "two-gpus.md")]
BEFORE = ONE / "before.yaml"  # conf/backend/device/h100.yaml as it was when it was fitted to datasets/calibration alone
# What the devices are fitted to since, the H100 beside that; of the other studies they say what they had not seen.
FIT = (
    "host-1/interactive-closed",
    "host-4/interactive-closed",
    "host-5/interactive-grid",
    "host-5/interactive-open",
    "host-5/offline-open",
    "host-6/interactive-random",
    "host-6/interactive-grid",
    "host-6/offline-closed",
    "host-6/offline-open",
)
H100, H200 = "host-[1-578]", "host-6"
ARMS = {
    "closed": "the simulation's two best, then TPE",
    "random": "random search",
    "grid": "vLLM's own grid (`auto_tune.sh`)",
}
EDGE = ONE / "host-5/interactive-closed"  # repeats of the best of host 4's study
VERIFIED = ONE / "host-7/interactive-closed"  # of the best of host 6's
PLANNED = 4  # repeats of them; the time was enough for one more
OPEN = ONE / "host-8/interactive-open"  # of the best under open rules, of host 7
MIXTURE = "host-12/moe-twin"
MIXTURE_AGAIN = "host-14/moe-twin"
MIXTURE_ARMS = {
    "host-13/moe-tpe": "TPE",
    "host-13/moe-random": "random search",
    "host-13/moe-twin": "the twin, before it was mended, after its defaults",
    "host-14/moe-tpe": "TPE",
    MIXTURE_AGAIN: "the twin",
}
TWELVE = ONE / "host-15/llama-twelve"
SIDES = ("alone", "together")
RATIOS = {
    "step_ms": "mean step",
    "tpot_mean_ms": "mean TPOT",
    "tpot_p99_ms": "p99 TPOT",
    "ttft_mean_ms": "mean TTFT",
    "ttft_p99_ms": "p99 TTFT",
}
PHASES = ("start", "warmup", "run", "stop", "other")
Row = Sequence[str]


def read(file: Path) -> Result:
    return Result.of(json.loads(file.read_text()))


def study(folder: Path) -> dict[str, Result]:
    """Its trials, in the order in which they ended; none where it was not measured."""
    found = {file.stem: read(file) for file in folder.glob("*.json") if file.stem != "verify"}
    return dict(sorted(found.items(), key=lambda item: item[1].ended_at))


def measured(pattern: str, hosts: str = H100) -> list[tuple[str, str, str, Result]]:
    """Host, study, trial and result of each trial on one GPU whose study is named so, by host and in order of time."""
    return [
        (folder.parent.name, folder.name, trial, result)
        for folder in sorted(ONE.glob(f"{hosts}/{pattern}"))
        for trial, result in study(folder).items()
    ]


def host(name: str) -> str:
    return name.removeprefix("host-")


def markdown(head: Row, rows: Iterable[Row]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def changed(result: Result) -> str:
    flags = {name.removeprefix("engine.args."): value for name, value in result.params.items()}
    return ", ".join(f"{name}={value}" for name, value in flags.items()) or "vLLM's defaults"


def bound(result: Result) -> str:
    return result.bound if result.complete else f"failed: {result.reason}"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def interactive(hosts: str = H100) -> str:
    head = ("host", "study", "trial", "what differs from the defaults", "max QPS", "fails at", "by its", "p99 TTFT, ms",
            "p99 TPOT, ms", "GPU busy", "engine time, s")  # fmt: skip
    rows = []
    for where, name, trial, result in measured("interactive-*", hosts):
        figures = result.metrics
        rows.append(
            (
                *(host(where), name.removeprefix("interactive-"), trial, changed(result)),
                *(number(figures.get(metric), 2) for metric in ("max_qps", "failing_qps")),
                broken(result),
                number(figures.get("ttft_p99_ms"), 0),
                number(figures.get("tpot_p99_ms"), 1),
                f"{figures.get('gpu_utilization', 0):.0%}",
                number(result.engine_s, 0),
            )
        )
    return markdown(head, rows)


def long_prompts() -> str:
    """Trials of a study of long prompts, whose trials shared a server."""
    return by_twin("host-10/long-twin", {"goodput_per_s": "goodput, queries/s"})


def mixture() -> str:
    """Trials of a study of a mixture of experts, whose trials shared a server."""
    return by_twin(MIXTURE, {"max_qps": "max QPS", "failing_qps": "fails at"})


def mixture_again() -> str:
    """The same with the twin as mended, on another host; it began with an H200's device, fitted to a dense model."""
    return by_twin(MIXTURE_AGAIN, {"max_qps": "max QPS", "failing_qps": "fails at"})


def by_twin(folder: str, objective: dict[str, str]) -> str:
    """Each trial of a study with sampler=twin, what the twin expected of it, and what came."""
    head = ("trial", "server", "what differs from the defaults", "expected", *objective.values(), "p99 TTFT, ms",
            "p99 TPOT, ms", "mean step, ms", "start, s", "engine time, s")  # fmt: skip
    digits = {**dict.fromkeys(objective, 2), "ttft_p99_ms": 0, "tpot_p99_ms": 1, "step_ms": 1}
    rows = []
    for name, result in study(ONE / folder).items():
        shown = [number(result.metrics.get(metric), places) for metric, places in digits.items()]
        shown[0] = shown[0] or ending(result)
        expected = number(result.expected["values"][0], 2) if result.expected.get("values") else ""
        took = [number(seconds, 0) for seconds in (result.phases.get("start"), result.engine_s)]
        server = "fresh" if name.startswith((BASELINE, FRESH)) else "shared"
        rows.append((name, server, changed(result), expected, *shown, *took))
    foreseen = [one for one in study(ONE / folder).values() if one.complete and one.expected.get("values")]
    return markdown(head, rows) + f"\n\nWhat was expected and what came: {sections.agreement(foreseen, 0)}"


def ending(result: Result) -> str:
    """Why a trial has no value."""
    return f"less than {result.runs[0].qps:.2f}" if result.state == "pruned" else f"failed: {result.reason}"


def shared_against_fresh() -> str:
    """Ratios of shared servers' metrics to fresh ones', pair by pair, with the 95 % interval."""
    folder = ONE / "host-12/llama-pairs"
    numbers = sorted({file.stem.split("-")[1] for file in folder.glob("shared-*.json")})
    pairs = {
        number: [(read(file), read(folder / file.name.replace("shared", "fresh")))
                 for file in sorted(folder.glob(f"shared-{number}-*.json"))]
        for number in numbers
    }  # fmt: skip
    names = [changed_by_hand(some[0][0]) for some in pairs.values()]
    graphs = [pair for some, name in zip(pairs.values(), names, strict=True) for pair in some if "=768" not in name]
    rows = [*zip(names, pairs.values(), strict=True), ("all but that with steps of 768 tokens", graphs)]
    table = [(name, str(len(some)), *(ratio(some, metric) for metric in RATIOS)) for name, some in rows]
    return markdown(("configuration", "pairs", *RATIOS.values()), table)


def twelve_shared() -> str:
    """Seconds of twelve configurations on a shared server and on fresh ones, and the ratios of the twelve pairs."""
    trials = study(TWELVE)
    kinds = {kind: [one for name, one in trials.items() if name.startswith(kind)] for kind in ("shared", "fresh")}
    rows = []
    for kind, some in kinds.items():
        phases = [sum(one.phases.get(phase, 0.0) for one in some) for phase in PHASES]
        first = max(some, key=lambda one: one.phases["start"])
        seconds = (first.phases["start"], *phases, sum(one.engine_s for one in some))
        rows.append((kind, str(len(some)), *(number(one, 0) for one in seconds)))
    took = [sum(one.engine_s for one in some) for some in kinds.values()]
    pairs = [
        (one, trials[name.replace("shared", "fresh")]) for name, one in trials.items() if name.startswith("shared")
    ]
    ratios = ", ".join(f"{what} {ratio(pairs, metric)}" for metric, what in RATIOS.items())
    table = markdown(("server", "trials", "longest start", *PHASES, "all"), rows)
    return (
        f"{table}\n\nShared to fresh: {took[0] / took[1]:.1%} of the engine time; of the {len(pairs)} pairs, {ratios}."
    )


def by_rules() -> str:
    """Runs by MLPerf's rules, and what autotune's own check of a submission has against LoadGen's log of each."""
    rows = []
    for file in sorted(ONE.glob("host-*/by-rules/*.json")):
        result = read(file)
        config, _, _ = compose(result.overrides)
        run = Run(file.with_suffix(""), result)
        against = list(objections(run, config.benchmark, config.scenario.name, "performance"))
        figures = [number(result.metrics[name], 2) for name in ("samples_per_s", "ttft_p99_ms", "tpot_p99_ms")]
        length = number(result.metrics["output_tokens"] / result.metrics["requests"], 2)
        told = (result.verdict, f"{result.metrics['requests']:,.0f}", number(result.metrics["duration_s"]))
        rows.append((config.scenario.name, *told, *figures, length, "; ".join(against) or "nothing"))
    head = ("scenario", "LoadGen", "samples", "seconds", "samples/s", "p99 TTFT, ms", "p99 TPOT, ms")
    return markdown((*head, "tokens an answer", "against it"), rows)


def changed_by_hand(result: Result) -> str:
    """The flags of a trial that no study proposed."""
    words = [word.removeprefix("engine.args.") for word in result.overrides if word.startswith("engine.args.")]
    return ", ".join(word for word in words if not word.startswith("gpu_memory"))


def ratio(pairs: Sequence[tuple[Result, Result]], metric: str) -> str:
    logs = [math.log(one.metrics[metric] / other.metrics[metric]) for one, other in pairs]
    middle, interval = mean_and_interval(logs)
    low, high = (math.exp(end) for end in interval or (middle, middle))
    return f"{math.exp(middle):.3f} ({low:.3f} to {high:.3f})"


def interactive_h200() -> str:
    return interactive(H200)


def broken(result: Result) -> str:
    """The limit that the load above the certified one broke; why there is none."""
    failed = [run.reasons[0] for run in result.runs if run.qps == result.metrics.get("failing_qps") and run.reasons]
    return failed[-1].split()[0] if failed else result.reason


def bursts() -> str:
    """100 prompts at once: while a queue stands every step is full, and whoever generates gets a token a step."""
    head = ("host", "what differs from the defaults", "p99 TPOT, ms", "samples/s", "max QPS then")
    rows = []
    for where, name, _, result in measured("interactive-*"):
        flags = changed(result) + (" (forked)" if name.endswith("fork") else "")
        for run in result.runs:
            if run.role == "burst":
                shown = [number(run.metrics[metric]) for metric in ("tpot_p99_ms", "samples_per_s")]
                rows.append((host(where), flags, *shown, number(result.metrics["max_qps"])))
    return markdown(head, rows)


def forked() -> str:
    """The same server under the same load, its engine's process started one way and the other, in order of time."""
    metrics = {"ttft_p50_ms": "TTFT, median", "ttft_p99_ms": "p99", "tpot_p50_ms": "TPOT, median", "tpot_p99_ms": "p99"}
    rows = []
    for where in ("host-4", H200):
        for name, result in study(ONE / where / "trials").items():
            figures, busy = result.metrics, f"{result.metrics['gpu_utilization']:.0%}"
            way = "fork" if name.endswith("fork") else "spawn, vLLM's default"
            shown = [number(figures[metric], 0) for metric in metrics]
            rows.append((host(where), way, *shown, number(figures["step_ms"]), busy))
    return markdown(("host", "process", *metrics.values(), "a step", "GPU busy"), rows)


def offline() -> str:
    head = ("host", "study", "trial", "what differs from the defaults", "samples/s", "tokens/s", "J/token", "bound by")
    rows = []
    for where, name, trial, result in measured("offline-*", "host-*"):
        digits = {"samples_per_s": 2, "tokens_per_s": 0, "gpu_j_per_token": 3}
        shown = [number(result.metrics.get(metric), places) for metric, places in digits.items()]
        rows.append((host(where), name.removeprefix("offline-"), trial, changed(result), *shown, bound(result)))
    return markdown(head, rows)


def arms() -> str:
    """What each way of searching had found when its engine time was spent, against the defaults on its own GPU."""
    head = ("way", "trials", "engine time, min", "its defaults", "best max QPS", "gain", "found after, min", "best")
    rows = []
    for name, way in ARMS.items():
        found = study(ONE / H200 / f"interactive-{name}")
        defaults, (used, best, after, flags) = found[BASELINE].values[0], search(found)
        shown = [number(used / 60), number(defaults, 2), number(best, 2), f"{best / defaults - 1:+.0%}"]
        rows.append((way, str(len(found) - 1), *shown, number(after / 60), flags))
    return markdown(head, rows)


def search(found: Mapping[str, Result]) -> tuple[float, float, float, str]:
    """Engine time of a study's trials in turn, s, its best value, when it was found, s, and what differs then."""
    used = after = best = 0.0
    flags = ""
    for trial, result in found.items():
        used += result.engine_s
        if trial != BASELINE and result.feasible and result.complete and result.values[0] > best:
            best, after, flags = result.values[0], used, changed(result)
    return used, best, after, flags


def mixture_arms() -> str:
    """The same of a mixture of experts, whose trials shared servers."""
    head = (
        "host",
        "way",
        "trials that ran",
        "of them left early",
        "engine time, min",
        "best max QPS",
        "found after, min",
        "best",
    )
    rows = []
    for place, way in MIXTURE_ARMS.items():
        host, _ = place.removeprefix("host-").split("/")
        ran = {trial: one for trial, one in study(ONE / place).items() if one.ran and FRESH not in trial}
        left = sum(one.state == "pruned" for one in ran.values())
        used, best, after, flags = search(ran)
        times = number(used / 60), number(best, 2), number(after / 60)
        rows.append((host, way, str(len(ran)), str(left), *times, flags))
    return markdown(head, rows)


def mixture_steps() -> str:
    """What a step of the mixture consists of, with vLLM's defaults and with the best configuration: means, ms."""
    steps = json.loads((ONE / f"{MIXTURE}-steps.json").read_text())
    shares = [steps[trial][kind] for kind in ("prefill", "decode") for trial in steps]
    head = ("", *(f"{kind}, {which}" for kind in ("with prefill", "decode only") for which in ("defaults", "best")))
    rows: list[Row] = [("tokens computed", *(number(share["tokens"] / share["steps"], 0) for share in shares))]
    for part, (words, _) in figures.PARTS.items():
        rows.append((words, *(number(1e3 * share["parts"][part] / share["steps"], 1) for share in shares)))
    total = (sum(share["parts"].values()) / share["steps"] for share in shares)
    return markdown(head, [*rows, ("all", *(number(1e3 * one, 1) for one in total))])


def recording() -> str:
    """What the recorder takes of a decode step: turns of a second with it and without, in turn, on one server."""
    return f"Recording takes {said(json.loads((ONE / 'host-13/recorder.json').read_text()))}."


def foretold() -> str:
    """The same searches, simulated on LoadGen's own schedule: with the H100's constants, and as fitted since."""
    devices = [unfitted_h200(), calibrate.start_device(["backend/device=h200"])]
    trials = [trial for name in (*ARMS, "open") for trial in measured(f"interactive-{name}", H200)]
    rows: list[Row] = []
    real: list[float] = []
    said: list[list[float]] = [[], []]  # by device
    for _, name, trial, result in trials:
        for loads, device in zip(said, devices, strict=True):
            loads.append(searched_again(result, device))
        real.append(result.values[0])
        errors = [f"{loads[-1]:.2f} ({loads[-1] / real[-1] - 1:+.0%})" for loads in said]
        fitted = "yes" if f"{H200}/{name}" in FIT else ""
        rows.append((name.removeprefix("interactive-"), trial, changed(result), number(real[-1], 2), *errors, fitted))
    head = (
        "study",
        "trial",
        "what differs from the defaults",
        "max QPS",
        "with the H100's constants",
        "fitted",
        "in the fit",
    )
    ranks = " and ".join(f"{kendalltau(real, loads).statistic:.2f}" for loads in said)
    return markdown(head, rows) + f"\n\nKendall's τ between simulated and measured: {ranks}."


def unfitted_h200() -> Device:
    """An H200 before anything was measured on one: an H100 with its memory."""
    fitted, h100 = calibrate.start_device(["backend/device=h200"]), calibrate.start_device([])
    return replace(h100, name=fitted.name, memory_gib=fitted.memory_gib, bandwidth_gbs=fitted.bandwidth_gbs)


def verified() -> str:
    theirs, mine = (loads[:PLANNED] for loads in held(VERIFIED).values())
    planned = change(paired_difference(mine, theirs, confidence=0.95, comparisons=1), mean(theirs))
    first = f"After the first {PLANNED}, which were planned: {planned}."
    return f"{repeats(VERIFIED)}\n\n{first}\n\n{summary.verified(VERIFIED)}"


def verified_open() -> str:
    return repeats(OPEN)  # one block ended, which is too little for a verdict


def verified_edge() -> str:
    return f"{repeats(EDGE)}\n\n{summary.verified(EDGE)}"


def repeats(folder: Path) -> str:
    """Each repeat of the defaults and of the best, and what the simulation makes of it: same schedule, same search."""
    loads = held(folder)
    gains = [mine / theirs - 1 for theirs, mine in zip(*loads.values(), strict=True)]
    rows = [(name, *map(number, measured_loads)) for name, measured_loads in loads.items()]
    rows.append(("gain", *(f"{gain:+.0%}" for gain in gains)))
    for slower in (1.0, 1.1):
        said = "simulated" if slower == 1 else f"simulated, host {slower - 1:.0%} slower"
        for name, repeated in repeated_of(folder).items():
            again = [searched_again(one, slower_host(slower)) for one in repeated]
            rows.append((f"{name}, {said}", *map(number, again)))
    return markdown(("queries/s", *(f"repeat {at + 1}" for at in range(len(gains)))), rows)


def held(folder: Path) -> dict[str, list[float]]:
    """The load that each repeat of the defaults and of the best held, queries/s, by block."""
    return {name: [one.metrics["max_qps"] for one in repeated] for name, repeated in repeated_of(folder).items()}


def repeated_of(folder: Path) -> dict[str, list[Result]]:
    names = (BASELINE, "trial-0")
    return {name: [read(file) for file in sorted(folder.glob(f"verify/{name}-*.json"))] for name in names}


def searched_again(measured: Result, device: Device) -> float:
    """The highest load, queries/s, that the simulation of a measured search finds on `device`."""
    config, _, _ = compose([*calibrate.kept(measured.overrides), "backend=sim"])
    config.backend["device"] = device
    return estimate(simulation(config, config.backend), {}).metrics["max_qps"]


def slower_host(factor: float) -> Device:
    """An H100 whose host takes so many times as long as fitted."""
    device = calibrate.start_device([])
    return replace(device, **{name: factor * getattr(device, name) for name in HOST})


def headline() -> str:
    defaults, best = map(mean, held(VERIFIED).values())
    said = summary.verified(VERIFIED).partition(";")[0]
    theirs, mine, _ = gained(MIXTURE, best_of_mixture(), "queries/s")
    others = " and ".join(f"{search(study(ONE / place))[1]:.1f}" for place in ("host-13/moe-tpe", MIXTURE_AGAIN))
    return (
        f"**Within MLPerf's Interactive limits an H100 serves {best:.1f} queries/s of Llama-3.1-8B's shape, and "
        f"{defaults:.1f} with vLLM's defaults, both in bf16: “{said}.” A mixture of experts, Qwen3-30B-A3B's shape, "
        f"goes from {theirs} to {mine} on an H200; that was measured once. Studies on two other hosts found {others}.**"
    )


def best_of_mixture() -> float:
    """What the best two held, each once on a fresh server: they differ in sequences that are never reached."""
    return mean(study(ONE / MIXTURE)[f"{FRESH}{name}"].values[0] for name in ("trial-2", "trial-3"))


def results() -> str:
    """What a study's best held against vLLM's defaults, the surest first."""
    theirs, mine = held(VERIFIED).values()
    difference = change(paired_difference(mine, theirs, confidence=0.95, comparisons=1), mean(theirs))
    plain, fp8 = (loads[0] for loads in held(OPEN).values())
    rows = [
        ("llama8b, Interactive", "H100", "bf16", f"{mean(theirs):.1f}", f"{mean(mine):.1f} queries/s", difference,
         f"{len(mine)} interleaved repeats on fresh servers, 95 % confidence"),
        ("qwen3_30b_a3b, 500 and 30 ms", "H200", "bf16",
         *gained(MIXTURE, best_of_mixture(), "queries/s"),
         "the mean of the best two, the same in effect, once each on fresh servers"),
        ("llama8b, 4,000 tokens in, 300 out, 3 s and 30 ms", "H200", "bf16",
         *gained("host-10/long-twin", study(ONE / "host-10/long-twin")[f"{FRESH}trial-1"].values[0], "good queries/s"),
         "once on a shared server, once on a fresh one"),
        ("llama8b, Interactive", "H100", "fp8", f"{plain:.1f}", f"{fp8:.1f} queries/s", f"{fp8 / plain - 1:+.0%}",
         "one pair of repeats; what fp8 does to answers was not looked at: random weights"),
        ("llama8b, Offline", "H100", "fp8", *offline_gain("host-5/offline-open", "trial-0"), "once each, on two hosts"),
        ("llama8b, Offline", "H100", "bf16", *offline_gain("host-4/offline-closed", "trial-0"), "once each"),
    ]  # fmt: skip
    head = (
        "model's shape, load, limits on TTFT and TPOT",
        "GPU",
        "numbers",
        "vLLM's defaults",
        "best",
        "gain",
        "how sure",
    )
    return markdown(head, rows)


def gained(folder: str, best: float, unit: str) -> Row:
    """What the defaults of a study hold, its `best`, and the gain."""
    defaults = study(ONE / folder)[BASELINE].values[0]
    return number(defaults), f"{number(best)} {unit}", f"{best / defaults - 1:+.0%}"


def offline_gain(folder: str, trial: str) -> Row:
    defaults = read(ONE / "host-4/offline-closed/baseline.json").metrics["tokens_per_s"]
    best = read(ONE / folder / f"{trial}.json").metrics["tokens_per_s"]
    return number(defaults, 0), f"{number(best, 0)} tokens/s", f"{best / defaults - 1:+.0%}"


def trial_seconds() -> str:
    """Mean seconds of a trial by phase, fresh and on a shared server, of the pairs and of the mixture's study."""
    pairs, mixture = study(ONE / "host-12/llama-pairs"), study(ONE / MIXTURE)
    groups = {
        "llama8b, fresh server": [one for name, one in pairs.items() if name.startswith("fresh")],
        "llama8b, changed server": [one for name, one in pairs.items() if name.startswith("shared")],
        "qwen3_30b_a3b, fresh server": [one for name, one in mixture.items() if name.startswith(FRESH)],
        "qwen3_30b_a3b, changed server": [one for one in mixture.values() if one.complete and one.shared_server],
    }
    rows = []
    for name, trials in groups.items():
        if name.endswith("changed server"):
            trials = [one for one in trials if list(one.start) == ["change"]]  # else it started the server
        phases = [number(mean(one.phases.get(phase, 0.0) for one in trials)) for phase in PHASES]
        rows.append((name, str(len(trials)), *phases, number(mean(one.engine_s for one in trials), 0)))
    return markdown(("", "trials", *PHASES, "all"), rows)


def predicted() -> str:
    """The highest load that the simulation expects, searched as run.sh does, on hosts that take longer than fitted."""
    words = ["model=llama8b_dummy", "backend=sim", "scenario=interactive", "objective=max_qps"]
    words += ["scenario.min_duration_s=20", "scenario.search.certify_queries=662"]
    flags = ("max_num_batched_tokens", "max_num_seqs", "long_prefill_token_threshold", "max_cudagraph_capture_size")
    servers = {
        "vLLM's defaults": (),
        "1,024 tokens, 129 sequences, prompts split at 512 (host 4's trial-0)": (1024, 129, 512),
        "1,024 tokens, 128 sequences (host 5's grid)": (1024, 128),
        "512 tokens, 256 sequences (host 5's grid)": (512, 256),
        "768 tokens, 256 sequences, graphs up to 1,024": (768, 256, 0, 1024),
        "1,024 tokens, 256 sequences, graphs up to 1,024": (1024, 256, 0, 1024),
    }
    found: dict[str, list[str]] = {name: [] for name in servers}
    for slower in (1.0, 1.05, 1.1, 1.15):
        config, _, _ = compose(words)
        config.backend["device"] = slower_host(slower)
        server = simulation(config, config.backend)
        for name, values in servers.items():
            args = {f"engine.args.{flag}": value for flag, value in zip(flags, values, strict=False)}
            found[name].append(number(estimate(server, args).metrics["max_qps"]))
    head = ("queries/s", "host as fitted", "5 % slower", "10 %", "15 %")
    return markdown(head, [(name, *loads) for name, loads in found.items()])


def searches() -> str:
    """Every run of each search on the first host, in order."""
    head = ("trial", "run", "queries/s", "s", "queries", "p99 TTFT, ms", "p99 TPOT, ms", "LoadGen")
    rows = []
    for trial, result in study(ONE / "host-1/interactive-closed").items():
        for run in result.runs:
            shown = [number(run.metrics[name], 0) for name in ("duration_s", "requests", "ttft_p99_ms")]
            said = run.verdict + (f": {run.reasons[0]}" if run.reasons else "")
            load = "all at once" if run.role == "burst" else number(run.qps, 2)
            rows.append((trial, run.role, load, *shown, number(run.metrics["tpot_p99_ms"]), said))
    return markdown(head, rows)


def simulated() -> str:
    """How far the H100, as it was and as it is fitted now, is from what was measured."""
    devices = [Device(**yaml.safe_load(BEFORE.read_text())), calibrate.start_device([])]
    return errors_of(H100, ("before", "now"), devices)


def simulated_h200() -> str:
    """The same of the H200."""
    devices = [unfitted_h200(), calibrate.start_device(["backend/device=h200"])]
    return errors_of(H200, ("H100's constants", "fitted"), devices)


def errors_of(hosts: str, names: Row, devices: Sequence[Device]) -> str:
    metrics = {"samples_per_s": "samples/s", "ttft_p99_ms": "p99 TTFT", "tpot_p99_ms": "p99 TPOT"}
    head = ("host, trial", "run", "in the fit", *(f"{name}, {of}" for of in names for name in metrics.values()))
    rows = []
    for file in sorted(ONE.glob(f"{hosts}/*/**/*.json")):
        cases = calibrate.read(file, str(file.relative_to(ONE).with_suffix("")))
        cases = cases[:1] + cases[1:][-1:]  # of a search: its burst, and the last load that was certified
        found = [calibrate.errors(cases, device) for device in devices]
        for case in cases:
            trial, _, run = case.name.partition(" ")
            errors = [
                f"{one[case.name][name]:+.0%}" if name in one[case.name] else "" for one in found for name in metrics
            ]
            rows.append((host(trial), run, "yes" if str(file.parent.relative_to(ONE)) in FIT else "", *errors))
    return markdown(head, rows)


def starts() -> str:
    return starts_of("interactive-closed")


def forked_starts() -> str:
    return starts_of("trials")


def starts_of(pattern: str) -> str:
    trials = measured(pattern, "host-*")
    return start_table([(f"host {host(where)}, {trial}", result) for where, _, trial, result in trials])


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
        *(
            headline,
            interactive,
            interactive_h200,
            verified,
            verified_open,
            verified_edge,
            bursts,
            forked,
            predicted,
            offline,
            simulated,
            simulated_h200,
            searches,
            starts,
            forked_starts,
            arms,
            foretold,
            long_prompts,
            mixture,
            mixture_arms,
            mixture_again,
            mixture_steps,
            recording,
            results,
            trial_seconds,
            shared_against_fresh,
            twelve_shared,
            by_rules,
        ),
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
