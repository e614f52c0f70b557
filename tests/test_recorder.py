"""Recorder of an engine's steps: what it writes, that it disturbs nothing, and how the trial reads it."""

import importlib.metadata
import logging
import sys
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autotune.live import recorder, recording
from autotune.measure import steps
from autotune.measure.backend import Recording


def step(new: dict[str, tuple[int, int]], others: dict[str, tuple[int, int, int]], *resumed: str) -> Any:
    """A SchedulerOutput: for each new request its tokens and those computed; for the others those generated, too."""
    tokens = {name: have[0] for name, have in (new | others).items()}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=have[1]) for name, have in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(others),
            resumed_req_ids=set(resumed),
            num_computed_tokens=[have[1] for have in others.values()],
            num_output_tokens=[have[2] for have in others.values()],
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


# What a scheduler may decide, and what is in it: decodes, context, chunks, prefill tokens, attended.
NOTHING = step({}, {})
DECIDED = [
    (step({"a": (100, 0)}, {}), (0, 0, 1, 100, 5050)),
    (step({"b": (50, 16)}, {"a": (1, 100, 1)}), (1, 100, 1, 50, 50 * 16 + 1275)),
    (step({}, {"a": (1, 101, 2), "b": (1, 66, 1)}), (2, 167, 0, 0, 0)),
    (step({}, {"a": (1, 102, 3), "b": (30, 67, 0)}), (1, 102, 1, 30, 30 * 67 + 465)),  # b: a chunk that goes on
    (step({}, {"a": (1, 103, 4), "b": (1, 97, 0)}), (1, 103, 1, 1, 98)),  # b: a chunk of one token
    (step({"c": (1, 0)}, {"a": (7, 0, 5)}, "a"), (0, 0, 2, 8, 1 + 28)),  # c: a prompt of one token
    (step({}, {"a": (1, 96, 5), "c": (1, 1, 1)}, "a"), (1, 1, 1, 1, 97)),
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A scheduler as vLLM makes it, with the plugin loaded as vLLM loads it; it decides DECIDED."""

    class Scheduler:
        def __init__(self) -> None:
            self.coming = deque(output for output, _ in DECIDED)
            self.running, self.waiting, self.calls = ["a", "b"], ["x"], list[Any]()

        def schedule(self, throttle_prefills: bool = False) -> Any:
            self.calls.append(throttle_prefills)
            return self.coming.popleft()

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            if model_runner_output == "broken":
                raise RuntimeError("vLLM's own")
            return {0: model_runner_output}

    class SchedulerConfig:
        def get_scheduler_cls(self) -> Any:
            return type("AsyncScheduler", (Scheduler,), {})

    config = ModuleType("vllm.config")
    config.SchedulerConfig = SchedulerConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    for name, value in recording.installed(tmp_path, {}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(tmp_path)
    (plugin,) = (
        one for one in importlib.metadata.entry_points(group="vllm.general_plugins") if one.name == recording.PLUGIN
    )
    monkeypatch.delitem(sys.modules, recording.PLUGIN, raising=False)
    plugin.load()()
    yield SchedulerConfig().get_scheduler_cls()()
    sys.modules.pop(recording.PLUGIN)


def test_rows_say_what_was_in_each_step_and_when(made: Any, tmp_path: Path):
    begun = recorder.clock()
    for _ in DECIDED:
        made.update_from_output(made.schedule(), "output")
    assert len(recording.read(tmp_path, None).rows) == 0  # they are still in memory
    made.running, made.coming = [], deque([DECIDED[0][0]])
    made.update_from_output(made.schedule(), "output")  # the engine is idle now
    rows = recording.read(tmp_path, 4096).rows
    assert [tuple(row[4:9]) for row in rows] == [contents for _, contents in [*DECIDED, DECIDED[0]]]
    assert [tuple(row[9:]) for row in rows] == [(2, 1)] * len(DECIDED) + [(0, 1)]
    times = rows[:, :4].ravel()
    assert begun <= times[0] and (np.diff(times) >= 0).all() and times[-1] <= recorder.clock()


def test_results_may_come_after_the_next_step_was_scheduled(made: Any, tmp_path: Path):
    first, second = made.schedule(), made.schedule()
    made.update_from_output(first, "output")
    made.running = []
    made.update_from_output(second, "output")
    (one, other) = recording.read(tmp_path, None).rows
    assert tuple(one[4:9]) == DECIDED[0][1] and tuple(other[4:9]) == DECIDED[1][1]
    assert one[1] <= other[0] < other[1] <= one[2] <= one[3] <= other[2]


def test_rows_are_written_every_second(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plugin = sys.modules[recording.PLUGIN]
    times = iter(np.arange(0.0, 100.0, 0.2))
    monkeypatch.setattr(plugin, "clock", lambda: next(times) + 1e6)
    written = []
    for _ in range(3):  # each takes 0.8 s; the first one comes long after the recorder was made
        made.update_from_output(made.schedule(), "output")
        written.append(len(recording.read(tmp_path, None).rows))
    assert written == [1, 1, 3]


def test_scheduler_gets_and_returns_what_it_would_without_a_recorder(made: Any):
    outputs = list(made.coming)
    assert made.schedule(True) is outputs[0] and made.schedule(throttle_prefills=True) is outputs[1]
    assert made.schedule() is outputs[2] and made.calls == [True, True, False]
    assert made.update_from_output(outputs[0], model_runner_output="output") == {0: "output"}
    with pytest.raises(RuntimeError, match="vLLM's own"):
        made.update_from_output(outputs[1], "broken")


def test_step_without_tokens_is_none(made: Any, tmp_path: Path):
    made.running, made.coming = [], deque([NOTHING, DECIDED[0][0]])
    made.update_from_output(made.schedule(), "output")
    made.update_from_output(made.schedule(), "output")
    assert len(recording.read(tmp_path, None).rows) == 1


def test_error_of_the_recorder_takes_it_out_and_leaves_the_reason(made: Any, tmp_path: Path):
    strange = SimpleNamespace(total_num_scheduled_tokens=1)
    made.coming.insert(1, strange)
    first = made.schedule()
    assert made.schedule() is strange  # and nothing is raised
    assert made.update_from_output(first, "output") == {0: "output"}
    assert made.schedule() is DECIDED[1][0]
    assert not hasattr(type(made).schedule, "__wrapped__")
    found = recording.read(tmp_path, None)
    assert "AttributeError" in found.missing and "num_scheduled_tokens" in found.missing


def test_recording_ends_at_its_limit(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[recording.PLUGIN], "MOST", 2)
    made.running = []
    for _ in range(4):
        made.update_from_output(made.schedule(), "output")
    found = recording.read(tmp_path, None)
    assert len(found.rows) == 2 and "2 steps are recorded of one trial" in found.missing


def test_vllm_without_the_scheduler_that_is_known_starts_as_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "vllm.config", ModuleType("vllm.config"))
    monkeypatch.setenv(recorder.FOLDER, recording.installed(tmp_path, {})[recorder.FOLDER])
    recorder.install()
    assert "SchedulerConfig" in recording.read(tmp_path, None).missing


def test_plugin_that_was_not_loaded_is_said(tmp_path: Path):
    recording.installed(tmp_path, {})
    assert recording.read(tmp_path, None).missing == "vLLM loaded no plugin"


@pytest.mark.parametrize(
    ("own", "set_to"),
    [({}, None), ({"VLLM_PLUGINS": ""}, "autotune_steps"), ({"VLLM_PLUGINS": "mine"}, "mine,autotune_steps")],
)
def test_users_list_of_plugins_is_kept(
    own: dict[str, str], set_to: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert recording.installed(tmp_path, own).get("VLLM_PLUGINS") == set_to


def test_engine_with_the_most_steps_is_read_and_a_row_that_is_being_written_is_left_out(tmp_path: Path):
    recording.installed(tmp_path, {})
    row = recorder.ROW.pack(*range(11))
    (recording.steps_folder(tmp_path) / "1.rows").write_bytes(row)
    (recording.steps_folder(tmp_path) / "2.rows").write_bytes(3 * row + row[:-1])
    found = recording.read(tmp_path, 7)
    assert found.rows.tolist() == [list(map(float, range(11)))] * 3 and found.kv_tokens == 7 and not found.missing


def some(count: int) -> np.ndarray[Any, Any]:
    return np.arange(count * len(steps.COLUMNS), dtype=float).reshape(count, len(steps.COLUMNS))


def test_steps_are_kept_with_flags_model_and_kv_tokens_and_without_secrets(tmp_path: Path):
    args = {"max_num_seqs": 8, "api_key": "secret-1234"}
    assert steps.keep(Recording(some(1000), 4096), args, {"layers": 2}, tmp_path) == "1,000 steps"
    found = steps.read(tmp_path / steps.NAME, "s")
    assert (found.table == some(1000)).all() and found.kv_tokens == 4096 and found.model == {"layers": 2}
    assert found.args["max_num_seqs"] == 8 and "secret-1234" not in str(found.args)


@pytest.mark.parametrize(
    ("recorded", "fact", "said"),
    [
        (Recording(some(1000), missing="a\nreason"), "1,000 steps (a reason)", "ends early: a reason"),
        (Recording(some(0), missing="a reason"), "0 steps (a reason)", "is missing: a reason"),
        (Recording(some(1)), "1 steps (the engine made 1 steps)", "is missing: the engine made 1 steps"),
    ],
)
def test_what_is_missing_is_one_line(
    recorded: Recording, fact: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert steps.keep(recorded, {}, {}, tmp_path) == fact
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{tmp_path / steps.NAME} {said}"
    ]
    assert (tmp_path / steps.NAME).exists() == (len(recorded.rows) >= steps.FEWEST)


def test_full_disk_is_said_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: steps.Steps, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steps.Steps, "save", full)
    assert "No space left on device" in steps.keep(Recording(some(9)), {}, {}, tmp_path)
    assert not (tmp_path / steps.NAME).exists()
