"""The search for the highest load, against servers whose highest load is known."""

import math
import random
from collections.abc import Callable

import pytest

from autotune.config.schema import LoadSearch
from autotune.measure.max_qps import search

TRUE_QPS = 30.0
FULL_S = 60.0


class Server:
    """Holds TRUE_QPS, but for a noise that short runs have more of."""

    def __init__(self, noise: float = 0.0, seed: int = 0, true_qps: float = TRUE_QPS) -> None:
        self.seconds = 0.0
        self.runs: list[tuple[float, float, bool, bool]] = []
        self._random, self._noise, self._true = random.Random(seed), noise, true_qps

    def holds(self, qps: float, seconds: float, full: bool) -> bool:
        held = qps * (1 + self._random.gauss(0, self._noise * math.sqrt(FULL_S / seconds))) < self._true
        self.runs.append((qps, seconds, full, held))
        return held


def test_bracket_closes_to_the_precision_with_both_ends_in_full_length():
    server = Server()
    found = search(server.holds, 40.0, FULL_S, LoadSearch(precision=0.02))
    assert found.certified and found.failing
    assert found.certified < TRUE_QPS <= found.failing <= 1.021 * found.certified
    full = {(qps, held) for qps, _, is_full, held in server.runs if is_full}
    assert {(found.certified, True), (found.failing, False)} <= full
    assert [seconds for _, seconds, is_full, _ in server.runs if not is_full] == sorted(
        seconds for _, seconds, is_full, _ in server.runs if not is_full
    )


@pytest.mark.parametrize("burst_qps", [31.0, 45.0, 300.0])
def test_burst_may_be_far_off(burst_qps: float):
    found = search(Server().holds, burst_qps, FULL_S, LoadSearch())
    assert found.certified and found.certified == pytest.approx(TRUE_QPS, rel=LoadSearch.precision)


@pytest.mark.parametrize("start_qps", [15.0, 29.9, 31.0, 60.0])
def test_search_from_a_load_that_is_about_known_makes_whole_runs_only(start_qps: float):
    server = Server()
    found = search(server.holds, 0.0, FULL_S, LoadSearch(start_qps=start_qps))
    assert found.certified and found.failing
    assert found.certified < TRUE_QPS <= found.failing <= 1.041 * found.certified
    assert all(full for _, _, full, _ in server.runs)
    assert len(server.runs) == len({qps for qps, _, _, _ in server.runs})


def test_search_costs_a_few_runs_of_full_length():
    servers = [Server(0.05, seed) for seed in range(50)]
    for server in servers:
        search(server.holds, 40.0, FULL_S, LoadSearch())
    seconds = [sum(seconds for _, seconds, _, _ in server.runs) for server in servers]
    assert sum(seconds) / len(seconds) < 6 * FULL_S


def test_noise_of_short_runs_moves_the_bracket_and_not_the_outcome():
    found = [search(Server(0.02, seed).holds, 40.0, FULL_S, LoadSearch()).certified for seed in range(50)]
    assert all(qps is not None and abs(qps / TRUE_QPS - 1) < 0.08 for qps in found)


def test_bracket_that_short_runs_got_wrong_is_left():
    """Short runs hold any load, long ones show the truth."""

    def holds(qps: float, seconds: float, full: bool) -> bool:
        return qps < (TRUE_QPS if full else 40)

    found = search(holds, 45.0, FULL_S, LoadSearch())
    assert found.certified and TRUE_QPS / 1.05 < found.certified < TRUE_QPS


@pytest.mark.parametrize("holds", [lambda *_: False, lambda *_: True], ids=["nothing", "everything"])
def test_search_ends_where_there_is_no_bracket(holds: Callable[[float, float, bool], bool]):
    found = search(holds, 45.0, FULL_S, LoadSearch(max_runs=12))
    assert found.certified is None or found.failing is None


@pytest.mark.parametrize("true", [1, 2, 7, 90])
@pytest.mark.parametrize("most", [1.0, 10.0, 200.0])
def test_users_are_whole_numbers(true: int, most: float):
    tried = []

    def holds(users: float, seconds: float, full: bool) -> bool:
        tried.append(users)
        return users <= true

    found = search(holds, most, FULL_S, LoadSearch(precision=0.01), whole=True)
    assert (found.certified, found.failing) == (true, true + 1)
    assert all(users == int(users) >= 1 for users in tried)
