"""The twin: constants of a real server, learned from the steps that it recorded (datasets/steps)."""

import lzma
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from autotune.config import bounds
from autotune.config.schema import Device
from autotune.errors import InputError
from autotune.measure import steps
from autotune.search.simulate import estimate, on_twin, simulation
from autotune.sim import from_steps
from autotune.sim.cost import Cost, Pace
from autotune.sim.flags import Flags, resolve
from autotune.sim.scheduler import Batch, Request
from autotune.sim.shape import Shape
from autotune.sim.twin import Twin, errors, fit
from tests.studies import configured

PAGE = Path(__file__).parent.parent / "docs/simulator.md"
RECORDED = Path(__file__).parent.parent / "datasets/steps"
QWEN3_30B_A3B = configured("model=qwen3_30b_a3b", "scenario=offline").model.shape


def recorded(name: str) -> steps.Steps:
    return steps.read(RECORDED / f"{name}.parquet", name)


def prior_of(name: str = "h200") -> Device:
    found: Device = Device(**configured("model=tiny", "backend=sim", f"backend/device={name}").backend["device"])
    return found


@cache
def twin_of(name: str, prior: str = "h200") -> Twin:
    """The twin of a recorded server, by default with the right device as its prior; a fit takes seconds."""
    known = recorded(name)
    assert known.model
    return fit([known], prior_of(prior), Shape.of(known.model))


def worst(fitted: str, other: str, prior: str = "h200") -> float:
    """The largest error of a kind of step, where the twin of one server tells the steps of another."""
    return max(found.error for found in errors(twin_of(fitted, prior), recorded(other)))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 4096, 8192])
def test_steps_of_another_configuration_are_told_within_10_percent(tokens: int):
    assert worst("qwen3moe-host9-defaults", f"qwen3moe-host9-{tokens}") <= 0.10


def device_of(name: str) -> tuple[Device, Flags]:
    """The device that is fitted to a recorded server, with the flags of that one."""
    twin = twin_of(name)
    flags = resolve(recorded(name).args, twin.device, twin.shape)
    device = twin.as_device(flags)
    bounds.check(device, "device")
    return device, flags


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama8b-defaults", "llama8b-512"])
def test_device_takes_as_long_as_the_twin_for_steps_of_a_dense_model(name: str):
    (device, flags), twin = device_of(name), twin_of(name)
    for tokens in (512, 2048, 8192):
        batch = Batch()
        batch.prefill(Request(0, tokens, 2), tokens)
        of_device, of_twin = (cost.step(batch).gpu_s for cost in (Cost(device, twin.shape, flags), twin.cost(flags)))
        assert of_device == pytest.approx(of_twin, rel=0.12)


@pytest.mark.slow
def test_device_that_is_fitted_to_a_mixture_of_experts_is_within_bounds_and_says_that_it_is_cut():
    device_of("qwen3moe-defaults")
    said = from_steps.report([recorded("qwen3moe-defaults")], [], prior_of(), None)
    assert "A device can't hold what this model showed" in said


@pytest.mark.slow
def test_draws_differ_where_no_step_has_shown_a_constant():
    twin = twin_of("llama8b-512")  # no step of it was without a graph
    drawn = np.array([np.log(twin.draw(seed).factors / twin.factors) for seed in range(50)])
    spread = dict(zip(["weights_s", "launch_s"], drawn.std(axis=0)[[1, -2]], strict=True))
    assert spread["launch_s"] > 0.4 > 0.25 > spread["weights_s"]
    assert "a step that no CUDA graph holds" in twin.unseen


def test_launches_that_no_step_has_shown_vary_as_the_others_but_are_not_as_fast():
    factor = Pace(pieces=(0.5, 0.7)).factors()
    assert sorted(factor(True, False) for _ in range(2)) == [0.5, 0.7]
    assert sorted(factor(True, True) for _ in range(2)) == pytest.approx([0.5 / 0.6, 0.7 / 0.6])


HELD = "scenario=interactive scenario.ttft_ms=500 scenario.tpot_ms=30 objective=max_qps scenario.min_duration_s=20"
SEARCHED = "scenario.search.certify_queries=662 scenario.search.first_s=5 scenario.search.burst=100"
NAMES = ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold", "max_cudagraph_capture_size")
OF_512 = (256, 512, 0, 512)


def loads(model: str, values: tuple[int, ...], twins: list[Twin | None], prior: str = "h200") -> list[float]:
    """The highest load on each of `twins`, searched as the recorded servers were; None is the device alone."""
    config = configured(f"model={model}", "backend=sim", f"backend/device={prior}", *HELD.split(), *SEARCHED.split())
    of_device = simulation(config, config.backend)
    params = {f"engine.args.{name}": value for name, value in zip(NAMES, values, strict=False)}
    simulations = [on_twin(of_device, one) if one else of_device for one in twins]
    return [estimate(one, params).metrics["max_qps"] for one in simulations]


@pytest.mark.slow
def test_loads_on_the_page_are_those_of_the_recorded_steps():
    dense, experts = "llama8b", "qwen3_30b_a3b"
    rows = [
        (dense, "llama8b-defaults", (), 25.17),
        (dense, "llama8b-512", OF_512, 29.40),
        (dense, "llama8b-defaults", OF_512, 29.40),
        (dense, "llama8b-512", (), 25.17),
        (experts, "qwen3moe-defaults", (), 9.74),
    ]
    computed = []
    for model, name, values, held in rows:
        twin = twin_of(name)
        paces = [replace(twin.pace, seed=seed, pauses=()) for seed in range(4)]
        found = loads(model, values, [replace(twin, pace=pace) for pace in paces])
        computed.append((float(np.median(found)), min(found), max(found), 100 * (np.median(found) / held - 1)))
    row = r"\| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \| ([+-][\d.]+) % \|"
    told = [tuple(map(float, found)) for found in re.findall(row, PAGE.read_text())]
    assert np.array(told) == pytest.approx(np.array(computed), abs=0.06)


# Of Qwen3-30B-A3B's shape on two hosts: the server whose steps the twin learns, and what others held, in queries/s.
HOSTS = {
    "qwen3moe-host9-defaults": {
        (): 6.83,
        (22, 1024, 1024, 2048): 13.82,
        (113, 4096, 1024, 2048): 19.34,
        (137, 8192, 512, 2048): 24.94,
    },
    "qwen3moe-host14-2048": {
        (589, 2048, 1024, 2048): 29.15,
        (238, 1024, 0, 1024): 30.13,
        (243, 1024, 512, 1024): 28.97,
        (141, 2048, 0, 1024): 14.32,
        (871, 8192, 512, 1024): 12.89,
        (89, 4096, 1024, 1024): 11.63,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_loads_of_servers_that_it_has_not_seen_are_within_the_draws_and_as_the_page_says(name: str):
    """Pauses of up to 1.5 s decide what is certified, and launches of which no step has shown one."""
    twin = twin_of(name)
    for values, held in HOSTS[name].items():
        (of_device,) = loads("qwen3_30b_a3b", values, [None])
        found = loads("qwen3_30b_a3b", values, [twin.draw(seed) for seed in range(1, 13)])
        assert min(found) <= held <= max(found)
        told = f"| {held:.1f} | {of_device:.1f} | {min(found):.1f}, {np.median(found):.1f}, {max(found):.1f} |"
        assert told in PAGE.read_text()


# Conversations with a shared beginning, prefix caching on, of which chat13 and chat20 were recorded; at each load what
# was measured: mean step, ms; requests that run, on average; TPOT p50 and p99, TTFT p50, ms.
CHAT = """scenario=sessions objective=goodput scenario.ttft_ms=500 scenario.tpot_ms=30 scenario.think_s=3
    scenario.min_duration_s=45 scenario.stop=never dataset=sessions dataset.records.count=1024
    dataset.records.system_tokens=1000 dataset.records.first_tokens=400 dataset.records.later_tokens=150
    dataset.records.output_tokens=150 engine.args.max_model_len=8192"""
FIGURES = ("step_ms", "running_mean", "tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms")
CHATS = {13: (11.49, 77.43, 20.30, 25.03, 84.63), 20: (19.76, 251.54, 47.88, 78.64, 172.25)}


@pytest.mark.slow
@pytest.mark.parametrize("load", CHATS)
def test_chat_at_a_load_that_it_has_not_seen_is_as_the_page_says(load: int):
    """Learned from 13 conversations/s: TPOT within 15 % at 20, while TTFT lacks what vLLM's API server adds to it."""
    config = configured("model=llama8b", "backend=sim", "backend/device=h200", f"scenario.qps={load}", *CHAT.split())
    found = estimate(on_twin(simulation(config, config.backend), twin_of("llama8b-chat13")), {}).metrics
    figures = [found[name] for name in FIGURES]
    assert figures[2:4] == pytest.approx(CHATS[load][2:4], rel=0.15)
    assert worst("llama8b-chat13", f"llama8b-chat{load}") <= 0.07
    told = " | ".join(f"{was:.1f}, {said:.1f}" for was, said in zip(CHATS[load], figures, strict=True))
    assert f"| {told} |" in PAGE.read_text()


def test_mixture_of_experts_has_the_parameters_that_its_name_says():
    shape = Shape.of(QWEN3_30B_A3B)
    both_ends = 2 * shape.embedding
    assert (shape.linear + shape.expert * shape.experts + both_ends) / 1e9 == pytest.approx(30.5, rel=0.01)
    assert (shape.active + both_ends) / 1e9 == pytest.approx(3.3, rel=0.02)
    assert shape.touched(1) == pytest.approx(8 / 128) and shape.touched(4096) == pytest.approx(1.0)


def test_recording_is_what_was_saved(tmp_path: Path):
    table = np.arange(4.0 * len(steps.COLUMNS)).reshape(4, -1)
    written = steps.Steps("t", table, {"max_num_seqs": 4}, {"hidden_size": 8}, 1000)
    written.save(tmp_path / steps.NAME)
    (read,) = steps.read_all([str(tmp_path)])
    assert (read.table == table).all()
    assert (read.args, read.model, read.kv_tokens) == (written.args, written.model, written.kv_tokens)


@pytest.mark.slow
def test_steps_of_a_server_that_nothing_is_known_of_are_fitted_and_predicted():
    """As lines of a CSV are: neither the model nor vLLM's flags stand in them."""
    fitted, other = (steps.Steps(name, recorded(name).table[:2000]) for name in ("llama8b-defaults", "llama8b-512"))
    said = from_steps.report([fitted], [other], prior_of(), None)
    assert "Which model was served is not recorded" in said and "a guess" in said
    assert "name: H200" in said


@pytest.mark.slow
def test_steps_of_which_no_model_is_told_are_taken_for_those_of_the_same_one():
    known = recorded("llama8b-512")
    said = from_steps.report([known], [steps.Steps("bare", known.table[:2000])], prior_of(), None)
    assert "bare (graphs up to" in said and "Which model was served is not recorded" not in said


def test_flags_that_are_none_are_named():
    known = recorded("llama8b-512")
    with pytest.raises(InputError, match=r"bad: .*; write its flags as vLLM takes them: max_num_seqs=256"):
        from_steps.report([steps.Steps("bad", known.table, {"max_num_seqs": "x"}, known.model)], [], prior_of(), None)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["h200", "h100", "a100", "l40s"])
def test_steps_of_one_server_make_up_for_a_device_that_is_wrong(prior: str):
    """A row of the page's table: an H200 with Llama-8B that is taken for another GPU."""
    off = worst("llama8b-defaults", "llama8b-512", prior)
    (alone,) = loads("llama8b", OF_512, [None], prior)
    twin = twin_of("llama8b-defaults", prior)
    found = loads("llama8b", OF_512, [twin.draw(seed) for seed in range(1, 7)], prior)
    row = f"| {prior} | {alone:.1f} | {off:.1%} | {min(found):.1f}, {np.median(found):.1f}, {max(found):.1f} |"
    assert row.replace("%", " %") in PAGE.read_text()


@pytest.mark.slow
def test_errors_on_the_page_are_those_of_the_recorded_steps_and_small():
    own = max(worst(name, name) for name in ("llama8b-defaults", "llama8b-512", "qwen3moe-defaults"))
    others = [worst("llama8b-defaults", "llama8b-512"), worst("llama8b-512", "llama8b-defaults")]
    assert own <= 0.03 and max(others) <= 0.10
    rows = re.search(r"\| median error of a step's time.*?\n\n", PAGE.read_text(), re.DOTALL)
    assert rows
    told = [float(value) / 100 for value in re.findall(r"([\d.]+) % \|", rows[0])]
    assert told == pytest.approx([own, *others], abs=0.0006)


STEPS = "1,2,3,4,1,9,0,0,0,1,0\n" * 3  # lines of steps.COLUMNS
BROKEN = "steps back in time, without a token or with negative or endless counts"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "1,2,3\n4,5,6\n", "2 steps with 3 columns"),
        ("a.csv", "", "not a file of recorded steps|0 steps"),
        ("a.parquet", "nothing", "not a file of recorded steps"),
        ("a.csv.xz", "nothing", "not a file of recorded steps"),
        ("a.csv.xz", lzma.compress(b"1,2,3\n" * 1000)[:-30], "not a file of recorded steps"),
        ("a.csv", STEPS.replace("1,9,", "0,9,"), BROKEN),
        ("a.csv", STEPS.replace(",9,", ",-9,"), BROKEN),
        ("a.csv", STEPS.replace(",9,", ",1e18,"), BROKEN),
        ("a.csv", STEPS.replace("2,3,4", "4,3,2"), BROKEN),
        ("a.csv", STEPS + STEPS.replace("1,2,3,4", "0,2,3,4"), BROKEN),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_file_that_holds_no_steps_is_named(tmp_path: Path, name: str, content: str | bytes, words: str):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"{name}: .*({words})"):
        steps.read_all([str(tmp_path / name)])
    with pytest.raises(InputError, match=r"no steps\.parquet below it"):
        steps.read_all([str(tmp_path)])
