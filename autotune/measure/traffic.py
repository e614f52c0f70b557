"""Traffic: who sends which sample when. One picture of it drives autotune's own client and the simulated one.

A source knows the requests that wait for no answer, and those that an answer brings about. `Traffic` has both in order.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.config.schema import MOST_QUERIES, Kind, ScenarioConfig
from autotune.data.samples import Samples
from autotune.errors import InputError
from autotune.measure.arrivals import OFFLINE_SLACK, issues, least_queries, server_times
from autotune.measure.early_stopping import FEWEST

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Ask(NamedTuple):
    """A request to be sent."""

    at_s: float  # since the run began
    sample: int
    follows: int = -1  # the number of the request whose answer its prompt continues; -1: none
    session: int = -1  # the number of its conversation in the run; -1: none
    said: int = 0  # the tokens of its answer, once it has one


class Source:
    """The requests of a run."""

    total: int | None = None  # None: it depends on the answers

    def first(self) -> Iterator[Ask]:
        """Yield the asks that wait for no answer, in order of time."""
        raise NotImplementedError

    def after(self, ask: Ask, number: int, now: float) -> Ask | None:
        """The ask that the answer to `ask` brings about, which came `now`; `number` is the request's. None: none."""
        return None


class Schedule(Source):
    """Requests whose `times`, in order, and `samples` are known in advance."""

    def __init__(self, times: Sequence[float] | Floats, samples: Sequence[int] | Indices) -> None:
        self.total, self._times, self._samples = len(times), times, samples

    def first(self) -> Iterator[Ask]:
        return (Ask(float(at_s), int(sample)) for at_s, sample in zip(self._times, self._samples, strict=True))


class Users(Source):
    """Every `of`-th user of a closed loop: each begins on the ramp, and goes on when its last request is answered.

    One whose request fails sends no more. Nobody sends another request once the run is long enough.
    """

    def __init__(self, scenario: ScenarioConfig, samples: int, at: int, of: int) -> None:
        self._begin = ramp(scenario, at, of)
        self._order = (sample for _, sample in itertools.islice(issues(scenario, samples), at, None, of))
        self._least, self._least_s = least_queries(scenario, samples) / of, scenario.min_duration_s
        self._asked = 0

    def first(self) -> Iterator[Ask]:
        """Yield the first request of each user."""
        for begin_s in self._begin:
            if ask := self._next(begin_s):
                yield ask

    def after(self, ask: Ask, number: int, now: float) -> Ask | None:
        """The next request of the user whose last one was `ask`."""
        return self._next(now)

    def _next(self, at_s: float) -> Ask | None:
        if self._asked >= self._least and at_s >= self._least_s:
            return None
        self._asked += 1
        return Ask(at_s, next(self._order))


class Sessions(Source):
    """Every `of`-th conversation, a turn of which is due when the last one has been answered, after a pause to think.

    They come in a shuffled order, none again before all have come. As a Server's they begin at Poisson times until the
    run is long enough, and all are finished; as Offline's they begin at once, and nobody pauses. In a closed loop each
    user has one after another, and asks no more once the run is long enough. A conversation ends before a turn that
    does not fit `room` tokens with the longest answer.
    """

    def __init__(self, scenario: ScenarioConfig, samples: Samples, at: int, of: int, room: int | None = None) -> None:
        assert samples.turns is not None
        self.cut = 0  # conversations that ended for want of room
        self._samples, self._room, self._so_far = samples, room if samples.continued else None, dict[int, int]()
        self._scenario, self._continues, self._at, self._of = scenario, samples.continues, at, of
        self._firsts = np.flatnonzero(samples.turns == 0)
        self._turns = np.diff(np.append(self._firsts, len(samples)))
        self._order = itertools.islice(self._shuffled(), at, None, of)
        self._closed = scenario.kind in (Kind.SingleStream, Kind.ClosedLoop)
        self._asked = 0
        self._begin: list[Ask] = []
        if not self._closed:
            self._begin, self.total = self._arrivals()

    def first(self) -> Iterator[Ask]:
        """Yield the first turn of each conversation, or of each user's first one."""
        if not self._closed:
            yield from self._begin
            return
        for begin_s in ramp(self._scenario, self._at, self._of):
            if ask := self._started(begin_s):
                yield ask

    def after(self, ask: Ask, number: int, now: float) -> Ask | None:
        """The conversation's next turn; in a closed loop, after its last one, the user's next conversation."""
        at_s = now + self._pause_s(ask)
        if not self._continues[ask.sample] or not self._fits(ask):
            return self._started(at_s) if self._closed else None
        if self._closed and self._is_long_enough(at_s):
            return None
        self._asked += 1
        return Ask(at_s, ask.sample + 1, number, ask.session)

    def _fits(self, ask: Ask) -> bool:
        """Count the tokens of the conversation so far, and tell if its next turn fits."""
        if self._room is None:
            return True
        samples, turn = self._samples, ask.sample + 1
        so_far = self._so_far.pop(ask.session, 0) + int(samples.prompt_tokens[ask.sample])
        so_far += samples.kept(ask.sample, ask.said)
        if so_far + samples.prompt_tokens[turn] + samples.output_tokens[turn] <= self._room:
            self._so_far[ask.session] = so_far
            return True
        self.cut += 1
        if self.total is not None:
            self.total -= next(left for left in itertools.count(1) if not self._continues[ask.sample + left])
        return False

    def _started(self, at_s: float) -> Ask | None:
        if self._is_long_enough(at_s):
            return None
        self._asked += 1
        session, index = next(self._order)
        return Ask(at_s, int(self._firsts[index]), session=session)

    def _is_long_enough(self, at_s: float) -> bool:
        return self._asked >= self._scenario.min_queries / self._of and at_s >= self._scenario.min_duration_s

    def _pause_s(self, ask: Ask) -> float:
        mean_s = 0.0 if self._scenario.kind is Kind.Offline else self._scenario.think_s
        # Each turn has a draw of its own: the same in whatever order answers come.
        draw = random.Random(f"{self._scenario.seed} {ask.session} {ask.sample}")
        return draw.expovariate(1 / mean_s) if mean_s else 0.0

    def _shuffled(self) -> Iterator[tuple[int, int]]:
        """Yield the conversations' numbers in the run and their indices, without end."""
        draw, count = np.random.default_rng(self._scenario.seed), len(self._firsts)
        orders = (draw.permutation(count).tolist() for _ in itertools.count())
        return enumerate(itertools.chain.from_iterable(orders))

    def _arrivals(self) -> tuple[list[Ask], int]:
        """The first turns that are due at a known time, and the number of turns of their conversations."""
        scenario, begun, turns, mine, last_s = self._scenario, [], 0, 0, 0.0
        times = server_times(scenario) if scenario.kind is Kind.Server else itertools.repeat(0.0)
        for at_s, (session, index) in zip(times, self._shuffled(), strict=False):
            if turns >= scenario.min_queries and (last_s >= scenario.min_duration_s or scenario.kind is Kind.Offline):
                break
            turns, last_s = turns + int(self._turns[index]), at_s
            if session % self._of == self._at:
                mine += int(self._turns[index])
                begun.append(Ask(at_s, int(self._firsts[index]), session=session))
        return begun, mine


def figures(sources: Sequence[Source]) -> dict[str, float]:
    """Figures of requests that were not made, named as in result.json."""
    found = [source.cut for source in sources if isinstance(source, Sessions)]
    return {"sessions_cut": float(sum(found))} if found else {}


def ramp(scenario: ScenarioConfig, at: int, of: int) -> list[float]:
    """The times at which every `of`-th user of a closed loop begins."""
    users = scenario.users if scenario.kind is Kind.ClosedLoop else 1  # SingleStream has one
    return [scenario.ramp_s * user / users for user in range(at, users, of)]


def source(scenario: ScenarioConfig, samples: Samples, at: int = 0, of: int = 1, room: int | None = None) -> Source:
    """The requests to server `at` of `of` that share a run; `room`: the most tokens of a prompt and its answer."""
    if samples.turns is not None:
        return Sessions(scenario, samples, at, of, room)
    if scenario.kind in (Kind.SingleStream, Kind.ClosedLoop):
        return Users(scenario, len(samples), at, of)
    if scenario.kind is Kind.Trace:
        times, recorded = window(scenario, samples)
        return Schedule(times[at::of], recorded[at::of])
    pairs = list(itertools.islice(issues(scenario, len(samples)), at, None, of))
    return Schedule([at_s for at_s, _ in pairs], [sample for _, sample in pairs])


def window(scenario: ScenarioConfig, samples: Samples) -> tuple[Floats, Indices]:
    """The part of a trace that a run of `scenario` sends: times since the run began, in order, and the samples."""
    arrivals = samples.arrivals
    assert arrivals is not None  # `check` has seen to it
    order = np.argsort(arrivals, kind="stable")
    times = arrivals[order]
    first, last = np.searchsorted(times, [scenario.from_s, math.inf if scenario.to_s is None else scenario.to_s])
    times = (times[first:last] - scenario.from_s) / scenario.scale
    count = scenario.max_queries or len(times)
    if scenario.max_duration_s:
        count = min(count, int(np.searchsorted(times, scenario.max_duration_s)))
    return times[:count], order[first:last][:count]


def planned(scenario: ScenarioConfig) -> int:
    """The number of queries of a run of `scenario`: the least where requests wait for answers, the most of a trace."""
    if scenario.kind is Kind.Trace:
        return MOST_QUERIES
    rate = {Kind.Offline: OFFLINE_SLACK * scenario.qps, Kind.Server: scenario.qps}.get(scenario.kind, 0.0)
    return max(scenario.min_queries, int(rate * scenario.min_duration_s))


def check(scenario: ScenarioConfig, samples: Samples, searches: bool) -> None:
    """Raise InputError where a run of `scenario` could send nothing, or too much, of `samples`."""
    if scenario.kind is not Kind.Trace:
        return
    if samples.arrivals is None:
        raise InputError(
            f"dataset {samples.name}: its requests have no times, which scenario=trace sends them at; write `at_s` "
            f"(seconds) into each record, or load=rate (Poisson arrivals at scenario.qps)"
        )
    count = len(window(scenario, samples)[0])
    part = f"scenario.from_s={scenario.from_s:g}, scenario.to_s={scenario.to_s}"
    if not count:
        raise InputError(
            f"{part}: no request of {samples.name}, which lasts {samples.arrivals.max():.6g} s, is in there"
        )
    if count > MOST_QUERIES:
        raise InputError(f"{part}: {count} requests in one run; write a window with at most {MOST_QUERIES}")
    if searches and count < FEWEST:
        raise InputError(f"{part}: {count} requests, and the test of a limit at p99 takes {FEWEST}; widen the window")


class Traffic:
    """The requests of a source in the order in which they are due, numbered from 0."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._first = source.first()
        self._coming: list[tuple[Ask, bool]] = []  # a heap; of `first` it holds one at a time, marked True
        self._unanswered: dict[int, Ask] = {}
        self._count = itertools.count()
        self._look_ahead()

    @property
    def next_s(self) -> float:
        """The time at which the next request is due, since the run began; infinite while none is."""
        return self._coming[0][0].at_s if self._coming else math.inf

    @property
    def ended(self) -> bool:
        return not self._coming and not self._unanswered

    def take(self) -> tuple[int, Ask]:
        """The number of the next request, and what to ask."""
        ask, known = heapq.heappop(self._coming)
        if known:
            self._look_ahead()
        number = next(self._count)
        self._unanswered[number] = ask
        return number, ask

    def answered(self, number: int, now: float, said: int = 0) -> Ask:
        """Let what follows an answer, which came `now` with `said` tokens, be due; returns what was asked."""
        ask = self._unanswered.pop(number)._replace(said=said)
        if following := self._source.after(ask, number, now):
            heapq.heappush(self._coming, (following, False))
        return ask

    def lost(self, number: int) -> None:
        """Give up a request that has failed: nothing follows it."""
        del self._unanswered[number]

    def _look_ahead(self) -> None:
        if ask := next(self._first, None):
            heapq.heappush(self._coming, (ask, True))
