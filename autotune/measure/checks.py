"""Checks of what does not go together: loads that can't be sent, searches that find nothing, metrics no run has."""

import re
from difflib import get_close_matches

from autotune.config import schema
from autotune.config.schema import MOST_QUERIES, Answers, Config, Endpoint, Kind, ObjectiveConfig, ScenarioConfig
from autotune.errors import InputError
from autotune.measure import early_stopping, metrics, objective, traffic
from autotune.measure.backend import RequestTiming
from autotune.measure.limits import limits_of

# Metrics that depend on what could be observed of the server, the GPU and the client.
OBSERVED = re.compile(
    r"(gpu|client)_|((running|waiting)_mean|kv_use_max|preemptions|evicted_blocks|step_ms|tokens_per_step"
    r"|prefix_(hit_share|lost_share|hit_tokens|query_tokens)"
    r"|failing_(qps|concurrency|scale)|queued_tpot_p99_ms|scheduled_samples_per_s"
    r"|turn([1-9]|10)_(ttft|tpot|latency)_(p50|p99|p99\.9)_ms)$"
)
# Kinds of load that lack fields, these fields, and what to write instead.
OWN_FIELDS = (
    ({*Kind} - {Kind.ClosedLoop}, ("users",), "only a closed loop has users; write load=concurrency"),
    ({*Kind} - {Kind.Trace}, ("scale", "from_s", "to_s"), "only a trace has it; write scenario=trace"),
    (
        {Kind.Trace},
        ("qps", "min_duration_s", "min_queries"),
        "a trace has its own; write scenario.scale, or a window: scenario.from_s, scenario.to_s",
    ),
)


def check(config: Config) -> None:
    """Raise InputError for values of which each is allowed, but not beside the others."""
    scenario, dataset = config.scenario, config.dataset
    objective.check(config.objective)
    schema.baselines(config)
    searches = objective.searches(config.objective)
    if searches:
        _check_search(config.objective, scenario)
    _check_load(scenario)
    queries = traffic.planned(scenario)
    if queries > MOST_QUERIES and not searches:
        raise InputError(
            f"scenario.qps={scenario.qps:g}: {queries:.3g} queries in {scenario.min_duration_s:g} s; lower it or "
            f"scenario.min_duration_s, to at most {MOST_QUERIES} queries"
        )
    _check_metrics(config, searches)
    if dataset.min_output_tokens > dataset.max_output_tokens:
        raise InputError(
            f"dataset.min_output_tokens={dataset.min_output_tokens}: write at most "
            f"dataset.max_output_tokens={dataset.max_output_tokens}"
        )


def _check_load(scenario: ScenarioConfig) -> None:
    """Raise InputError for a field that this kind of load lacks, and for a window without a second in it."""
    for kinds, names, instead in OWN_FIELDS:
        for name in names:
            value = getattr(scenario, name)
            if scenario.kind in kinds and value != getattr(ScenarioConfig, name):
                raise InputError(f"scenario.{name}={value:g}: {instead}")
    in_sessions = scenario.answers is not Answers.none
    if in_sessions and scenario.kind is Kind.Trace:
        raise InputError("scenario.answers: a trace has no turns; leave it out, or write scenario=sessions")
    own = ("equal_issue", "benchmark", "seeds")
    if found := [name for name in own if getattr(scenario, name) and not scenario.by_loadgen]:
        raise InputError(f"scenario.{found[0]}: a setting of LoadGen's, which does not send this traffic; leave it out")
    if scenario.endpoint is Endpoint.chat and not in_sessions:
        raise InputError("scenario.endpoint=chat: for scenario=sessions only; leave it out")
    for name in ("max_duration_s", "max_queries") if in_sessions else ("think_s",):
        if value := getattr(scenario, name):
            instead = "conversations are finished; leave it out" if in_sessions else "for scenario=sessions only"
            raise InputError(f"scenario.{name}={value:g}: {instead}")
    if scenario.to_s is not None and scenario.to_s <= scenario.from_s:
        raise InputError(f"scenario.to_s={scenario.to_s:g}: write more than scenario.from_s={scenario.from_s:g}")
    for unit in ("duration_s", "queries"):
        least, most = (getattr(scenario, f"{end}_{unit}") for end in ("min", "max"))
        if 0 < most < least and scenario.kind is not Kind.Trace:
            raise InputError(f"scenario.max_{unit}={most:g}: write scenario.min_{unit}={least:g} or more, or 0")


def _check_search(config: ObjectiveConfig, scenario: ScenarioConfig) -> None:
    wanted = next(name for name in config.metrics if name in objective.HIGHEST)
    found = objective.LOADED.get(scenario.kind)
    if found != wanted and found:
        raise InputError(
            f"objective.metrics: {wanted} is no load of {scenario.kind.value}; write objective={found}, or "
            f"{objective.OFFERED_BY[wanted]}"
        )
    if not found or not limits_of(scenario):
        lacks = "limits; write scenario.ttft_ms=…, tpot_ms=… or latency_ms=…, or scenario=interactive, or a workload"
        lacks = lacks if found else "arrival rate; write scenario=interactive or server, or a workload"
        raise InputError(
            f"objective.metrics: {wanted} is the highest load under limits, and scenario={scenario.name} has no {lacks}"
        )
    if scenario.search.certify_queries < early_stopping.FEWEST:
        raise InputError(
            f"scenario.search.certify_queries={scenario.search.certify_queries}: LoadGen's test passes no run of so "
            f"few queries; write {early_stopping.FEWEST} or more"
        )


def _check_metrics(config: Config, searches: bool) -> None:
    """Raise InputError for a metric of the objective that no run has."""
    scenario = config.scenario
    known = metric_names(scenario, searches) | ({*metrics.PER_MILLION} if config.price_per_gpu_hour else set())
    if costs := [name for name in config.objective.metrics if name in metrics.PER_MILLION and name not in known]:
        raise InputError(f"objective.metrics: {costs[0]} needs price_per_gpu_hour=…")
    if missing := [name for name in config.objective.metrics if name not in known and not OBSERVED.match(name)]:
        close = get_close_matches(missing[0], known, 1)
        hint = f"did you mean {close[0]}" if close else f"a run has {', '.join(sorted(known))}"
        raise InputError(f"objective.metrics: scenario={scenario.name} gives no {missing[0]}; {hint}")


def metric_names(scenario: ScenarioConfig, searches: bool) -> set[str]:
    """The metrics that any run of `scenario` has."""
    names = {"failed_requests", "tokens_per_s_per_gpu"}
    one = RequestTiming(0, 0.0, 1.0, 2.0, 2, 1)
    names |= metrics.from_requests([one], limits_of(scenario), traffic.planned(scenario)).keys()
    if scenario.answers is not Answers.none:
        names |= {"sessions", "sessions_completed", "sessions_cut", "sessions_per_s"}
    if searches:
        highest = objective.LOADED[scenario.kind]
        names |= {highest, f"{highest}_per_gpu"}
    return names
