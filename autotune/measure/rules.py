"""MLPerf's rules: what of a configuration breaks them.

From mlcommons/inference_policies ac93e89 (inference_rules.adoc) and mlcommons/inference b66003e1 (submission checker).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any, cast

from omegaconf import OmegaConf

from autotune.config import CONF
from autotune.config.overrides import leaves
from autotune.config.schema import (
    Answers,
    BenchmarkConfig,
    BenchmarkScenario,
    Config,
    DatasetConfig,
    Kind,
    Mode,
    Output,
    Rules,
    ScenarioConfig,
    Stop,
)
from autotune.data import synthetic
from autotune.errors import InputError
from autotune.measure import rouge

CLOSED: Any = OmegaConf.load(CONF / "rules" / "closed.yaml")
SEEDS: list[int] = list(CLOSED.scenario.seeds)  # of the order of loading, that of issuing, the times
LEAST_S = float(CLOSED.scenario.min_duration_s)
RECORDS = CONF / "benchmark"
TESTS: dict[str, dict[str, Any]] = {  # compliance tests: lines of their audit.config, compliance/<test>/audit.config
    "TEST06": {
        "mode": 2,
        "accuracy_log_rng_seed": 720381539243781796,
        "accuracy_log_sampling_target": 100,
        "min_query_count": 100,
        "min_duration": 0,
        "sample_concatenate_permutation": 0,
    }
}
KINDS = {
    "offline": Kind.Offline,
    "server": Kind.Server,
    "interactive": Kind.Server,
    "single_stream": Kind.SingleStream,
}


def check(config: Config, flags: Mapping[str, Any]) -> None:
    """Raise InputError for what breaks the rules of the closed division, and where rules can't hold at all.

    `flags` are vLLM's, as configured.
    """
    if config.rules is Rules.none:
        if config.scenario.mode is not Mode.performance or config.scenario.audit:
            raise InputError("scenario.mode, scenario.audit: only runs by MLPerf's rules have them; write rules=closed")
        return
    benchmark, scenario = config.benchmark, config.scenario
    where = f"rules={config.rules.value}"
    if benchmark.name is None:
        raise InputError(f"{where}: model={config.model.name} is in no benchmark; write benchmark=<one> (--help)")
    if of_scenario(config).loadgen is None:
        has = [name for name in KINDS if getattr(benchmark.scenarios, name).loadgen]
        raise InputError(f"{where}: {benchmark.name} has no scenario={scenario.name}; write {' or '.join(has)}")
    if scenario.audit and scenario.audit not in TESTS.values():
        raise InputError(f"scenario.audit: the settings of no compliance test; {', '.join(TESTS)} is known")
    if scenario.mode is Mode.accuracy and benchmark.lacks:
        raise InputError(f"scenario.mode=accuracy: for {benchmark.name} autotune lacks {'; '.join(benchmark.lacks)}")
    if config.rules is Rules.closed and (broken := deviations(config, flags)):
        raise InputError(f"{where}: {'; '.join(broken)}; follow the rule, or write rules=open")


def asked(benchmark: BenchmarkConfig, name: str, qps: float) -> ScenarioConfig:
    """The scenario `name` of `benchmark` at a rate, as the closed division asks for it (conf/rules/closed.yaml)."""
    official: BenchmarkScenario = getattr(benchmark.scenarios, name)
    return ScenarioConfig(
        name=name,
        kind=KINDS[name],
        qps=qps,
        ttft_ms=official.ttft_ms,
        tpot_ms=official.tpot_ms,
        min_duration_s=LEAST_S,
        min_queries=official.min_queries,
        stop=Stop.never,
        seeds=SEEDS,
        equal_issue=True,
        benchmark=official.loadgen,
        args={"enable_prefix_caching": False},
    )


def of_scenario(config: Config) -> BenchmarkScenario:
    """The part of `config`'s benchmark that its scenario is; without a name if it is none."""
    found: BenchmarkScenario = getattr(config.benchmark.scenarios, config.scenario.name, BenchmarkScenario())
    return found


def check_samples(config: Config, samples: int) -> None:
    """Raise InputError for a data set of so many `samples` where the rules ask for another number."""
    if config.rules is Rules.closed and (broken := _samples(config, samples)):
        raise InputError(f"rules=closed: {broken[0]}; write {config.benchmark.dataset}, or rules=open")


def deviations(config: Config, flags: Mapping[str, Any], samples: int | None = None) -> list[str]:
    """Each key of `config`, and of vLLM's `flags`, that breaks a rule of the closed division, with the rule.

    `samples` is the size of the data set, where it is known.
    """
    if config.rules is Rules.none:
        return []
    verdicts = [*_record(config), *_loadgen(config), *_answers(config), *_server(config, flags)]
    broken = [f"{key}={value}: {rule}" for key, value, holds, rule in verdicts if not holds]
    broken += [f"{config.benchmark.name}: autotune lacks {what}" for what in config.benchmark.lacks]
    return broken if samples is None else broken + _samples(config, samples)


def is_made_up(dataset: DatasetConfig) -> bool:
    """True if the texts of a data set are nobody's."""
    return dataset.path is None and str((dataset.records or {}).get("_target_")).startswith(synthetic.__name__)


def unscorable(config: Config, samples: int) -> str:
    """The reason why a benchmark's bounds say nothing of answers to so many `samples`; empty if they do."""
    benchmark = config.benchmark
    if benchmark.name is None:
        return f"model={config.model.name} is in no benchmark; write benchmark=<one> (--help), or accuracy=rouge"
    lacks = [*benchmark.lacks, *(f"the score {name}" for name in benchmark.scores if name not in rouge.SCORES)]
    if lacks or not benchmark.scores:
        return f"for {benchmark.name} autotune lacks {'; '.join(lacks) or 'scores'}; write accuracy=nll"
    broken = [f"{key}={value}: {rule}" for key, value, holds, rule in _answers(config) if not holds]
    broken += _samples(config, samples)
    return f"{'; '.join(broken)}; follow the rule, or write accuracy=rouge" if broken else ""


def told(config: Config, broken: list[str]) -> list[str]:
    """Lines that tell by whose rules a trial or study ran; `broken` are its deviations."""
    if config.rules is Rules.none:
        return []
    division = f"MLPerf's {config.rules.value} division, {config.benchmark.name} {config.benchmark.round}"
    lines = [f"Run by the rules of {division}. Unverified: MLCommons has not reviewed it."]
    return lines + [f"  deviates from closed: {what}" for what in broken]


Verdict = tuple[str, Any, bool, str]  # a key, its value, whether the rule holds, the rule


def _record(config: Config) -> Iterator[Verdict]:
    """Yield what was changed in the benchmark's record."""
    ours, own = (dict(leaves(asdict(one), "benchmark")) for one in (config.benchmark, _own(config.benchmark.name)))
    for key in sorted(ours.keys() | own.keys()):
        value, right = ours.get(key), own.get(key)
        yield key, value, value == right, f"the record of the benchmark has {right}"


@cache
def _own(name: str | None) -> BenchmarkConfig:
    """The record of benchmark `name` that autotune comes with; an empty one if it has none."""
    found: list[Any] = [OmegaConf.load(path) for path in RECORDS.glob("*.yaml")]
    body: Any = next((one for one in found if one.name == name), {})
    record: Any = OmegaConf.to_object(OmegaConf.merge(BenchmarkConfig, body))
    return cast(BenchmarkConfig, record)


def _loadgen(config: Config) -> Iterator[Verdict]:
    scenario, official = config.scenario, of_scenario(config)
    kind = KINDS[scenario.name]
    yield "scenario.kind", scenario.kind.value, scenario.kind is kind, f"LoadGen sends {scenario.name}'s requests"
    alone = scenario.answers is Answers.none
    yield "scenario.answers", scenario.answers.value, alone, "LoadGen sends the requests, each on its own"
    own, wanted = scenario.benchmark, official.loadgen
    yield "scenario.benchmark", own, own == wanted, f"LoadGen's settings are those of {wanted} in its mlperf.conf"
    yield "scenario.seeds", scenario.seeds, scenario.seeds == SEEDS, "LoadGen's seeds are MLPerf's"
    equal = scenario.equal_issue
    yield "scenario.equal_issue", equal, equal, "each sample is issued equally often (sample_concatenate_permutation)"
    long = scenario.min_duration_s >= LEAST_S
    yield "scenario.min_duration_s", f"{scenario.min_duration_s:g}", long, f"a run lasts {LEAST_S:g} s or more"
    many = scenario.min_queries >= official.min_queries
    yield "scenario.min_queries", scenario.min_queries, many, f"a run has {official.min_queries} queries or more"
    for name in ("max_duration_s", "max_queries"):
        value = getattr(scenario, name)
        yield f"scenario.{name}", f"{value:g}", value == 0, "a run goes to its end"
    yield "scenario.stop", scenario.stop.value, scenario.stop is Stop.never, "a run goes to its end"
    for name in ("ttft_ms", "tpot_ms"):
        value, limit = getattr(scenario, name), getattr(official, name)
        yield f"scenario.{name}", value, kind is not Kind.Server or value == limit, f"the limit is {limit} ms"
    loadgen = version("mlcommons-loadgen")
    known = config.benchmark.loadgen
    yield "LoadGen", loadgen, loadgen in known, f"{config.benchmark.round} takes {' or '.join(known) or 'none'}"


def _answers(config: Config) -> Iterator[Verdict]:
    dataset, benchmark = config.dataset, config.benchmark
    length = benchmark.accuracy if config.scenario.mode is Mode.accuracy else benchmark.performance
    natural = dataset.output is Output.natural
    yield "dataset.output", dataset.output.value, natural, "the model itself ends an answer"
    for end in ("max", "min"):
        value, right = getattr(dataset, f"{end}_output_tokens"), getattr(length, f"{end}_tokens")
        yield f"dataset.{end}_output_tokens", value, value == right, f"an answer has {end}. {right} tokens"
    yield "dataset.count", dataset.count, dataset.count is None, f"all {benchmark.samples} samples are used"
    yield "dataset", dataset.name, not is_made_up(dataset), f"the samples are those of {benchmark.dataset}"


def _samples(config: Config, samples: int) -> list[str]:
    benchmark = config.benchmark
    wanted = benchmark.samples
    if config.scenario.mode is Mode.accuracy:
        wanted = benchmark.accuracy_samples or wanted
    return [] if samples == wanted else [f"dataset={config.dataset.name}: {samples} samples instead of {wanted}"]


def _server(config: Config, flags: Mapping[str, Any]) -> Iterator[Verdict]:
    caching, draft = flags.get("enable_prefix_caching"), flags.get("speculative_config")
    yield "engine.args.enable_prefix_caching", caching, caching is False, "nothing is kept from one query to the next"
    without = draft is None or config.scenario.name in config.benchmark.speculation
    random = flags.get("load_format")
    yield "engine.args.load_format", random, random != "dummy", "the weights are the benchmark's, and not random"
    yield "engine.args.speculative_config", draft, without, f"{config.benchmark.name} allows no speculative decoding"
