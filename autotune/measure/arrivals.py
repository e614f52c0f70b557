"""LoadGen's schedule: the time and the sample of each query, from LoadGen's own random numbers.

A simulated run so sends exactly what the real one sends.

LoadGen (loadgen.cc, GenerateLoadableSets and GenerateQueries, 6.0.17) draws from std::mt19937 through GNU's
libstdc++, whose shuffle and distributions are written out here. All three of its seeds are the scenario's.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from autotune.config.schema import Kind, ScenarioConfig

Draw = Callable[[], int]  # the next 32 random bits
OFFLINE_SLACK = 1.1  # test_settings_internal.cc, kSlack
WORD = 1 << 32


def issues(scenario: ScenarioConfig, samples: int) -> Iterator[tuple[float, int]]:
    """Yield LoadGen's queries in order: seconds since the first, and the index of one of `samples` samples.

    Offline issues all at 0. SingleStream's times are 0, too: it issues a query when the last one has been answered, and
    the caller stops after scenario.min_queries and min_duration_s. So does a closed loop, in the same order.
    """
    loaded = _shuffled(samples, _draws(scenario.seed))
    if scenario.kind is Kind.Offline:
        count = max(scenario.min_queries, int(OFFLINE_SLACK * scenario.min_duration_s * scenario.qps))
        yield from ((0.0, loaded[i % samples]) for i in range(count))
        return
    draw = _draws(scenario.seed)
    # By now LoadGen has drawn two other orders from the same generator, which it does not use.
    for _ in range(1 + math.ceil(scenario.min_queries / samples)):
        _shuffled(samples, draw)
    times = server_times(scenario.qps, scenario.seed) if scenario.kind is Kind.Server else itertools.repeat(0.0)
    last_s = 0.0
    for count, time_s in enumerate(times):
        if scenario.kind is Kind.Server and last_s >= scenario.min_duration_s and count >= scenario.min_queries:
            return
        yield time_s, loaded[_below(samples, draw)]
        last_s = time_s


def server_times(qps: float, seed: int) -> Iterator[float]:
    """Yield, without end, the times at which LoadGen's Server scenario issues its queries: seconds since the first."""
    gaps = _draws(seed)
    time_s = 0.0
    while True:
        yield time_s
        time_s += int(-math.log(1 - _canonical(gaps)) / qps * 1e9) / 1e9  # whole nanoseconds


def _draws(seed: int) -> Draw:
    generator = np.random.MT19937()
    seeded: Any = np.random.RandomState(seed).get_state(legacy=False)  # as std::mt19937 seeds itself
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


def _shuffled(count: int, draw: Draw) -> list[int]:
    """std::shuffle of 0 … count - 1, which takes two positions from each draw."""
    order = list(range(count))
    at = 1
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
