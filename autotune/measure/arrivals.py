"""LoadGen's schedule: the time and the sample of each query, from LoadGen's own random numbers.

A simulated run so sends exactly what the real one sends.

LoadGen (loadgen.cc, GenerateLoadableSets and GenerateQueries, 6.0.17) draws from std::mt19937 through GNU's
libstdc++, whose shuffle and distributions are written out here. With equal issue, which MLPerf asks for, it goes
through the samples in one random order after the other, and ends with one of them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from autotune.config.schema import Kind, ScenarioConfig

Draw = Callable[[], int]  # the next 32 random bits
OFFLINE_SLACK, SINGLE_STREAM_SLACK = 1.1, 2.0  # test_settings_internal.cc, kSlack
WORD = 1 << 32


def issues(scenario: ScenarioConfig, samples: int) -> Iterator[tuple[float, int]]:
    """Yield LoadGen's queries in order: seconds since the first, and the index of one of `samples` samples.

    Offline issues all at 0. SingleStream's times are 0, too: it issues a query when the last one has been answered, and
    the caller stops after `least_queries` and scenario.min_duration_s. So does a closed loop, in the same order.
    """
    loading, order, _ = scenario.loadgen_seeds
    loaded = _shuffled(list(range(samples)), _draws(loading))
    if scenario.kind is Kind.Offline:
        yield from ((0.0, sample) for sample in _offline(scenario, loaded, _draws(order)))
        return
    chosen = _chosen(scenario, loaded, _draws(order))
    times = server_times(scenario) if scenario.kind is Kind.Server else itertools.repeat(0.0)
    least, last_s = least_queries(scenario, samples), 0.0
    for count, time_s in enumerate(times):
        if scenario.kind is Kind.Server and count >= least:
            if last_s >= scenario.min_duration_s:
                return
            least += samples if scenario.equal_issue else 1
        yield time_s, next(chosen)
        last_s = time_s


def least_queries(scenario: ScenarioConfig, samples: int) -> int:
    """The number of queries that LoadGen issues at least, whatever time they take; Offline: that it issues."""
    count = scenario.min_queries
    if scenario.kind is Kind.Offline:
        count = max(count, int(OFFLINE_SLACK * scenario.min_duration_s * scenario.qps))
    elif scenario.kind is Kind.SingleStream and scenario.equal_issue:
        count = max(count, int(SINGLE_STREAM_SLACK * scenario.min_duration_s * scenario.qps)) + 1
    return math.ceil(count / samples) * samples if scenario.equal_issue else count


def _offline(scenario: ScenarioConfig, loaded: Sequence[int], draw: Draw) -> Iterator[int]:
    count = least_queries(scenario, len(loaded))
    if scenario.equal_issue:
        _unused(len(loaded), 1, draw)
    for first in range(0, count, len(loaded)):
        once = list(loaded)
        yield from (_shuffled(once, draw) if scenario.equal_issue else once[: count - first])


def _chosen(scenario: ScenarioConfig, loaded: Sequence[int], draw: Draw) -> Iterator[int]:
    """Yield the samples of single queries, without end."""
    samples, least = len(loaded), scenario.min_queries
    if scenario.kind is Kind.SingleStream:
        least = least_queries(scenario, samples)
    orders = math.ceil(least / samples)
    if not scenario.equal_issue:
        _unused(samples, orders, draw)
        while True:
            yield loaded[_below(samples, draw)]
    _unused(samples, 0, draw)
    order, issued = list(range(samples)), []
    for _ in range(orders):
        issued += _shuffled(order, draw)
    yield from (loaded[position] for position in itertools.cycle(issued))


def _unused(samples: int, orders: int, draw: Draw) -> None:
    """Draw what LoadGen does before it begins and does not use: the order of accuracy mode, and `orders` others."""
    for _ in range(1 + orders):
        _shuffled(list(range(samples)), draw)


def server_times(scenario: ScenarioConfig) -> Iterator[float]:
    """Yield, without end, the times at which LoadGen's Server scenario issues its queries: seconds since the first."""
    gaps = _draws(scenario.loadgen_seeds[2])
    time_s = 0.0
    while True:
        yield time_s
        time_s += int(-math.log(1 - _canonical(gaps)) / scenario.qps * 1e9) / 1e9  # whole nanoseconds


def _draws(seed: int) -> Draw:
    generator = np.random.MT19937()
    seeded: Any = np.random.RandomState(seed % WORD).get_state(legacy=False)  # as std::mt19937 seeds itself
    generator.state = seeded

    def words() -> Iterator[int]:
        while True:
            yield from generator.random_raw(4096).tolist()

    return words().__next__


def _below(limit: int, draw: Draw) -> int:
    """std::uniform_int_distribution over 0 … limit - 1 (Lemire's multiplication method)."""
    product = draw() * limit
    if product % WORD < limit:
        least = (WORD - limit) % limit
        while product % WORD < least:
            product = draw() * limit
    return product // WORD


def _canonical(draw: Draw) -> float:
    """std::generate_canonical: a double in [0, 1) from two words, the low one first."""
    low = draw()
    return (low + draw() * WORD) / float(WORD * WORD)


def _shuffled(order: list[int], draw: Draw) -> list[int]:
    """`order` after std::shuffle, which takes two positions from each draw."""
    count, at = len(order), 1
    if count % 2 == 0:
        other = _below(2, draw)
        order[1], order[other] = order[other], order[1]
        at = 2
    while at < count:
        first, second = divmod(_below((at + 1) * (at + 2), draw), at + 2)
        order[at], order[first] = order[first], order[at]
        order[at + 1], order[second] = order[second], order[at + 1]
        at += 2
    return order
