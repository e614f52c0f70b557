"""A server that trials share: what it is asked, and what happens when it is not what it should be."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autotune.config.command_line import compose
from autotune.config.schema import Hot, LiveConfig
from autotune.data.models import Model
from autotune.errors import MeasureError, StartError, StoppedError
from autotune.live import hot, recording
from autotune.live.server import Server
from autotune.measure.prepare import prepare
from autotune.measure.result import Result
from autotune.measure.slot import Slot

ACTIVE = {"scheduler_config.max_num_seqs": 8, "kv_tokens": 4096}
PLAN = {
    "refusal": "",
    "changes": {"scheduler_config.max_num_seqs": 8},
    "expected": {"scheduler_config.max_num_seqs": 8},
}


class Vllm:
    """The installed vLLM, whose answers to a question for a change are set."""

    plan: dict[str, Any] = PLAN

    def change(self, model: Path, start: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
        return self.plan


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The flags of each server that was started, in this order; each says ACTIVE when it is changed."""
    flags: list[dict[str, Any]] = []

    @contextmanager
    def serve(config: Any, vllm: Any, model: Any, args: Any, log: Path, *_: Any, **how: Any) -> Iterator[Any]:
        for _ in range(10 if "check" in how else 0):  # as long as it starts
            time.sleep(0.001)
            how["check"]()
        flags.append(dict(args))
        log.write_text(f"start {len(flags)}\n")
        (log.parent / "command.json").write_text("{}")
        scratch = log.parent / f"scratch-{len(flags)}"
        recording.steps_folder(scratch).mkdir(parents=True)
        process: Any = SimpleNamespace(exit_code=lambda: None)
        yield Server("", "", process, [], log, scratch, start={"import": 9.0}, kv_tokens=None)
        flags.append({"ended": len(flags)})

    monkeypatch.setattr(hot, "serve", serve)
    monkeypatch.setattr(hot.key, "asked", lambda *_: json.dumps(ACTIVE))
    return flags


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Requests/s of the next runs of the reference; 1 if there are none, and below 0 for one that fails."""
    monkeypatch.setattr(hot.Shared, "memory", lambda _: 2**30)
    return []


@pytest.fixture
def trial(tmp_path: Path, rates: list[float]) -> Callable[..., str]:
    """A trial with flags, in a slot: what it is told of its server."""
    count = iter(range(100))

    def rate(_: Server) -> float:
        if (found := rates.pop(0) if rates else 1.0) < 0:
            raise MeasureError("vLLM ended while it was measured")
        return found

    def run(slot: Slot, vllm: Vllm, error: Exception | None = None, mode: Hot = Hot.auto, **args: Any) -> str:
        folder = tmp_path / f"trial-{next(count)}"
        folder.mkdir()
        config = LiveConfig(_target_="", hot=mode, bounds={"max_num_seqs": 64})
        model: Any = Model("m", None, tmp_path)
        with hot.Sharing(config, cast(Any, vllm), model, folder, slot, rate).serving(args) as server:
            server.log.open("a").write(f"requests of {folder.name}\n")
            if error:
                raise error
        Result("complete", values=[1.0], facts={"server": server.told}).save(folder)  # type: ignore[arg-type]
        return server.told

    return run


def test_trials_share_a_server_that_starts_with_the_most(trial: Callable[..., str], started: list[Any], tmp_path: Path):
    slot = Slot(shares=True)
    told = [trial(slot, Vllm(), max_num_seqs=seqs) for seqs in (8, 16)]
    assert told == [f"shared: started by trial-0, changed {number} times" for number in (1, 3)]
    assert started == [{"max_num_seqs": 64}]
    logs = [(tmp_path / name / "vllm.log").read_text() for name in ("trial-0", "trial-1")]
    assert logs == ["start 1\nrequests of trial-0\n", "requests of trial-1\n"]
    slot.close()
    assert started[-1] == {"ended": 1}


def test_trial_that_asks_for_more_than_the_bounds_starts_a_server_with_that(
    trial: Callable[..., str], started: list[Any]
):
    assert trial(Slot(shares=True), Vllm(), max_num_seqs=100).startswith("shared")
    assert started == [{"max_num_seqs": 100}]


def test_trial_that_a_change_can_not_serve_gets_another_server(trial: Callable[..., str], started: list[Any]):
    slot, vllm = Slot(shares=True), Vllm()
    trial(slot, vllm, max_num_seqs=8)
    vllm.plan = {"refusal": "block_size is 16, and 32 needs a fresh server"}
    assert trial(slot, vllm, max_num_seqs=8, block_size=32) == "fresh"
    assert started == [{"max_num_seqs": 64}, {"ended": 1}, {"max_num_seqs": 8, "block_size": 32}, {"ended": 3}]
    assert not slot.shares  # not even a server with these bounds could become what it is asked for


def test_start_of_a_server_that_could_not_become_what_the_trial_needs_is_ended(
    trial: Callable[..., str], started: list[Any]
):
    slot, vllm = Slot(shares=True), Vllm()
    vllm.plan = {"refusal": "a server of such a model (is_hybrid) can't be changed"}
    assert trial(slot, vllm, max_num_seqs=8) == "fresh" and not slot.shares
    assert started == [{"max_num_seqs": 8}, {"ended": 1}]


def test_start_ends_once_the_study_stops_the_trial(
    trial: Callable[..., str], started: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def stopped(folder: Path) -> None:
        raise StoppedError("stopped by the study")

    monkeypatch.setattr(hot.progress, "check", stopped)
    for slot in (Slot(), Slot(shares=True)):
        with pytest.raises(StoppedError):
            trial(slot, Vllm(), max_num_seqs=8)
    assert not started


def test_server_that_reads_back_something_else_is_not_used(
    trial: Callable[..., str], started: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(ACTIVE, "scheduler_config.max_num_seqs", 64)
    slot = Slot(shares=True)
    assert trial(slot, Vllm(), max_num_seqs=8) == "fresh" and not slot.shares
    assert "scheduler_config.max_num_seqs is 64, and not 8" in caplog.text
    assert [one for one in started if "ended" not in one] == [{"max_num_seqs": 64}, {"max_num_seqs": 8}]


def test_server_stays_after_a_trial_that_the_study_ended_and_not_after_one_that_failed(
    trial: Callable[..., str], started: list[Any]
):
    slot = Slot(shares=True)
    for error, starts in [(StoppedError("pruned"), 1), (StartError("it broke"), 1), (None, 2)]:
        if error:
            with pytest.raises(type(error)):
                trial(slot, Vllm(), error, max_num_seqs=8)
        else:
            trial(slot, Vllm(), max_num_seqs=8)
        assert len([one for one in started if "ended" not in one]) == starts


def test_server_that_drifts_is_replaced_and_the_trials_since_its_last_check_are_marked(
    trial: Callable[..., str], started: list[Any], rates: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    slot = Slot(shares=True)
    # After its first trial; at the first check, of which a run passes; at the second.
    rates += [1.0, 0.7, 1.05, 0.7, 0.8, 0.75]
    told = [trial(slot, Vllm(), max_num_seqs=8) for _ in range(2 * hot.CHECKED_EVERY + 3)]
    numbers = [one.partition(",")[0] for one in told]
    replaced = numbers.index(numbers[-1])
    assert replaced > hot.CHECKED_EVERY and numbers[-1] == f"shared: started by trial-{replaced}"
    facts = [Result.load(tmp_path / f"trial-{number}").facts["server"] for number in range(replaced + 1)]
    marked = [number for number, one in enumerate(facts) if one.endswith("afterwards it serves -20% requests/s")]
    assert marked == list(range(hot.CHECKED_EVERY + 1, replaced))
    assert f"its last {len(marked)} trials are marked" in caplog.text


@pytest.mark.parametrize("after", [1, hot.CHECKED_EVERY + 1])
def test_reference_that_fails_costs_the_server_and_no_trial(
    trial: Callable[..., str], started: list[Any], rates: list[float], after: int
):
    slot = Slot(shares=True)
    rates += [*([1.0] if after > 1 else []), -1.0]
    told = [trial(slot, Vllm(), max_num_seqs=8) for _ in range(after + 1)]
    assert told[-1].startswith(f"shared: started by trial-{after}, ")


def test_server_whose_memory_grows_is_replaced(
    trial: Callable[..., str], started: list[Any], monkeypatch: pytest.MonkeyPatch
):
    held = iter([2**30, 2**31])
    monkeypatch.setattr(hot.Shared, "memory", lambda _: next(held, 2**30))
    slot = Slot(shares=True)
    told = [trial(slot, Vllm(), max_num_seqs=8) for _ in range(hot.CHECKED_EVERY + 2)]
    assert told[-1].startswith(f"shared: started by trial-{hot.CHECKED_EVERY + 1},")


def test_slot_that_shares_nothing_gets_fresh_servers(trial: Callable[..., str], started: list[Any]):
    assert trial(Slot(), Vllm(), max_num_seqs=8) == "fresh" and started == [{"max_num_seqs": 8}, {"ended": 1}]


def test_server_stays_unchanged_for_trials_of_the_same_flags(
    trial: Callable[..., str], started: list[Any], tmp_path: Path
):
    slot = Slot(shares=True)
    told = [trial(slot, Vllm(), mode=Hot.same, max_num_seqs=seqs) for seqs in (8, 8, 16)]
    assert told == [f"shared: started by {name}, changed 0 times" for name in ("trial-0", "trial-0", "trial-2")]
    assert started == [{"max_num_seqs": 8}, {"ended": 1}, {"max_num_seqs": 16}]
    assert (tmp_path / "trial-1" / "vllm.log").read_text() == "requests of trial-1\n"
    assert (tmp_path / "trial-1" / "command.json").exists()
    with pytest.raises(StoppedError):  # requests may be left
        trial(slot, Vllm(), StoppedError("stopped"), mode=Hot.same, max_num_seqs=16)
    assert slot.server is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asynchronous", "names"),
    [("false", ["sequences", "tokens", "blocks", "caching"]), ("true", ["tokens", "blocks"])],
)
def test_changed_engine_makes_the_tokens_and_the_steps_of_a_fresh_one(
    tmp_path: Path, asynchronous: str, names: list[str]
):
    """On real vLLM: the same requests, step by step, for each parameter and with both schedulers."""
    script = Path(__file__).with_name("hot_engines.py")
    tiny = prepare(compose(["model=tiny", "scenario=offline"])[0]).model.folder
    command = [sys.executable, str(script), str(tiny), asynchronous, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    for name in names:
        changed, fresh = made["changed"][name], made["fresh"][name]
        assert not changed["plan"]["refusal"] and "error" not in changed["active"], name
        assert changed["read"] == changed["plan"]["expected"], name
        assert changed["tokens"] == fresh["tokens"] and changed["steps"] == fresh["steps"], name
    kinds = {name: json.dumps(made["fresh"][name]["steps"]) for name in names}
    assert len(set(kinds.values())) == len(names)  # each parameter changes what is in the steps
