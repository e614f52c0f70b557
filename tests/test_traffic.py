"""Traffic: requests that are known in advance, and those that follow an answer, in the order in which they are due."""

import math
from collections.abc import Iterator

import pytest

from autotune.config.schema import Kind, ScenarioConfig
from autotune.measure.arrivals import issues
from autotune.measure.traffic import Ask, Schedule, Traffic, Users


class Turns:
    """Two conversations, which begin at 0 and 5; each has a second turn 2 s after its first answer."""

    total: int | None = 4

    def first(self) -> Iterator[Ask]:
        yield from (Ask(0.0, 0), Ask(5.0, 10))

    def after(self, ask: Ask, number: int, now: float) -> Ask | None:
        return Ask(now + 2, ask.sample + 1, number) if ask.follows < 0 else None


def test_what_follows_an_answer_is_sent_among_what_is_known():
    traffic = Traffic(Turns())
    assert traffic.take() == (0, Ask(0.0, 0)) and traffic.next_s == 5.0
    traffic.answered(0, 1.5)
    assert traffic.take() == (1, Ask(3.5, 1, follows=0))
    assert traffic.take() == (2, Ask(5.0, 10)) and traffic.next_s == math.inf
    traffic.answered(1, 4.0)
    assert not traffic.ended
    traffic.lost(2)  # its second turn is never sent
    assert traffic.ended and traffic.next_s == math.inf


def test_schedule_is_sent_in_its_order_whatever_is_answered():
    traffic = Traffic(Schedule([0.0, 0.0, 1.0], [7, 3, 5]))
    assert [traffic.take()[1].sample for _ in range(3)] == [7, 3, 5]
    for number in (2, 0, 1):
        assert not traffic.ended
        traffic.answered(number, 9.0)
    assert traffic.ended


@pytest.mark.parametrize("of", [1, 2])
def test_users_begin_on_the_ramp_and_go_on_until_the_run_is_long_enough(of: int):
    scenario = ScenarioConfig("s", Kind.ClosedLoop, users=4, ramp_s=2.0, min_duration_s=3.0, min_queries=6)
    order = [sample for (_, sample), _ in zip(issues(scenario, 9), range(20), strict=False)]
    for at in range(of):
        users, begin_s = Users(scenario, 9, at, of), [0.5 * user for user in range(at, 4, of)]
        first = list(users.first())
        assert [ask.at_s for ask in first] == begin_s and [ask.sample for ask in first] == order[at::of][: len(first)]
        assert users.after(first[0], 0, 2.9) == Ask(2.9, order[at::of][len(first)])
        later = [users.after(first[0], 0, 3.0) for _ in range(6)]
        assert sum(ask is not None for ask in later) == 6 // of - len(first) - 1
