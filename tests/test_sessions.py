"""scenario=sessions: conversations whose prompts hold the answers, from the data set to the prefix cache."""

import itertools
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.config.command_line import compose
from autotune.config.schema import Answers, DatasetConfig, Kind, ScenarioConfig
from autotune.data import sharegpt
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.data.samples import prepare as prepare_samples_of
from autotune.data.sessions import TURN, conversations, taken
from autotune.errors import InputError
from autotune.live.load_generator import LoadGenerator
from autotune.measure import metrics
from autotune.measure.backend import RequestTiming
from autotune.measure.prepare import prepare, prepare_samples
from autotune.measure.slot import Slot
from autotune.measure.traffic import Ask, Sessions, Traffic
from autotune.measure.traffic import figures as traffic_figures
from autotune.sim.backend import SimBackend, simulate
from autotune.sim.cost import Cost
from autotune.sim.flags import resolve
from autotune.sim.shape import Shape
from autotune.system.files import read_rows
from tests.conftest import Main
from tests.studies import configured
from tests.test_loadgen import OK, REFUSED, TOKENS, Streaming, asked, serving
from tests.test_sharegpt import TEMPLATE, chat

MADE_UP: dict[str, Any] = {
    **{"count": 20, "turns": 3, "turns_deviation": 1, "turns_bounds": (1, 5), "system_tokens": 10, "seed": 3},
    **{"first_tokens": 30, "later_tokens": 8, "sigma": 0.5, "bounds": (4, 100)},
    **{"output_tokens": 12, "output_deviation": 3, "output_bounds": (2, 30)},
}


def sampled(lengths: list[list[tuple[int, int]]], path: Path = Path(), **fields: Any) -> Samples:
    """Conversations of made-up turns, each given as what it adds to the prompt and how many tokens are generated."""
    turns = [(number, *turn) for one in lengths for number, turn in enumerate(one)]
    draw = np.random.default_rng(0)
    return Samples(
        **{
            **{"name": "s", "checksum": "c", "ignore_eos": True, "path": path, "continued": True},
            "prompts": [draw.integers(10, 500, added, dtype=np.int32) for _, added, _ in turns],
            "output_tokens": np.array([output for *_, output in turns], dtype=np.int32),
            "turns": np.array([number for number, *_ in turns], dtype=np.int32),
            **fields,
        }
    )


def scenario(kind: Kind = Kind.Server, **fields: Any) -> ScenarioConfig:
    common = {"qps": 1.0, "min_duration_s": 0.0, "min_queries": 1, "answers": Answers.received, "ramp_s": 0.0}
    return ScenarioConfig("sessions", kind, **{**common, **fields})


def test_made_up_conversations_share_their_beginning_and_have_the_lengths_that_were_asked_for(model: Model):
    records = list(conversations(model.tokenizer(), **MADE_UP))
    firsts = [record for record in records if record[TURN] == 0]
    assert len(firsts) == 20 and max(record[TURN] for record in records) in (3, 4)
    assert len({tuple(record["tok_input"][:10]) for record in firsts}) == 1
    assert all(14 <= len(record["tok_input"]) <= 110 for record in firsts)
    assert all(2 <= len(record["tok_output"]) <= 30 for record in records)
    assert records == list(conversations(model.tokenizer(), **MADE_UP))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("turns", 0, "turns=0: write a number from 1 to 1,000"),
        ("turns_bounds", (3, 2), r"turns_bounds=\[3,2\]: write the lower one first"),
        ("system_tokens", -1, "system_tokens=-1: write a number from 0"),
        ("sigma", math.inf, "sigma=inf: write a number from 0 to 10"),
    ],
)
def test_impossible_conversations_are_refused(model: Model, field: str, value: Any, words: str):
    with pytest.raises(InputError, match=f"dataset.records.{words}"):
        next(conversations(model.tokenizer(), **{**MADE_UP, field: value}))


@pytest.mark.parametrize("template", [TEMPLATE, ""])
def test_later_turn_adds_what_the_chat_template_has_after_the_answer(model: Model, tmp_path: Path, template: str):
    if template:
        (model.folder / "chat_template.jinja").write_text(template)
    hello = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello")]
    said = [*hello, ("tool", "x"), ("human", "Bye"), ("gpt", "Ciao")]
    (tmp_path / "chats.json").write_text(json.dumps([chat(*said), chat(*said[1:3])]))
    tokenizer, path = model.tokenizer(), str(tmp_path / "chats.json")
    turns = list(sharegpt.records(tokenizer, path, model=model, sessions=True))
    assert [turn[TURN] for turn in turns] == [0, 1, 0]
    later = "[tool]x[user]Bye[assistant]" if template else "\nTool: x\nUser: Bye\nAssistant:"
    assert tokenizer.decode(turns[1]["tok_input"], skip_special_tokens=False) == later
    whole = list(sharegpt.records(tokenizer, path, model=model))
    assert turns[0]["tok_input"] == whole[0]["tok_input"]
    if template:
        joined = list(taken(turns, None, recorded=True, source="s"))
        assert [turn["tok_input"] for turn in joined] == [record["tok_input"] for record in whole]


def test_conversation_ends_before_the_turn_that_is_too_long(model: Model, tmp_path: Path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([chat(*[("human", "Hi"), ("gpt", "Hello")] * 4)]))
    found = list(sharegpt.records(model.tokenizer(), str(path), model=model, sessions=True, max_prompt_tokens=60))
    prompts = [len(turn["tok_input"]) for turn in taken(found, None, recorded=True, source="s")]
    assert len(prompts) == 2 and prompts[-1] <= 60
    with pytest.raises(InputError, match=r"all 4 prompts are longer than .*max_prompt_tokens=3; raise it"):
        list(sharegpt.records(model.tokenizer(), str(path), model=model, sessions=True, max_prompt_tokens=3))


def test_template_that_drops_answers_is_refused(model: Model, tmp_path: Path):
    (model.folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([chat(*[("human", "Hi"), ("gpt", "Hello")] * 2)]))
    with pytest.raises(InputError, match="record 1: the model's chat template has an earlier answer 0 times"):
        list(sharegpt.records(model.tokenizer(), str(path), model=model, sessions=True))


def test_conversation_that_can_not_fit_is_refused():
    samples = sampled([[(10, 3), (5, 4), (2, 1)], [(7, 2), (1, 1)]])
    assert samples.least_prompts.tolist() == [10, 18, 24, 7, 10]
    samples.check_fits(25)
    with pytest.raises(InputError, match=r"record 3: 24 prompt \+ 1 output tokens exceed .*smaller dataset.records.x$"):
        samples.check_fits(24, ["dataset.records.x"])
    natural = replace(samples, ignore_eos=False)  # answers may be shorter
    natural.check_fits(19)
    with pytest.raises(InputError, match=r"record 2: 15 prompt \+ 4 output"):
        natural.check_fits(18)


def test_conversation_ends_before_a_turn_that_has_no_room():
    samples = sampled([[(10, 8), (5, 8), (5, 8), (1, 8)]] * 2, ignore_eos=False)
    for kind, total in ((Kind.Server, 8), (Kind.ClosedLoop, None)):
        source = Sessions(scenario(kind, min_queries=8, users=1), samples, 0, 1, room=31)
        asks, traffic = [], Traffic(source)
        assert source.total == total
        while traffic.next_s < math.inf:
            number, ask = traffic.take()
            asks.append(ask.sample % 4)
            traffic.answered(number, 0.0, said=4 if ask.session == 0 else 2)
        # Without the ends of sequence: 10 + 3 + 5 + 3 + 5 + 8 are too many, and 10 + 1 + 5 + 1 + 5 + 1 + 1 + 8.
        if kind is Kind.Server:
            assert sorted(asks) == [0, 0, 1, 1, 2] and source.total == 5
        assert source.cut >= 2 and traffic.ended and traffic_figures([source]) == {"sessions_cut": source.cut}


def as_chat(model: Model, records: list[dict[str, Any]], answers: Answers = Answers.received) -> Samples:
    config = DatasetConfig(name="d", max_output_tokens=99)
    return prepare_samples_of(config, model, model.folder.parent / "cache", lambda: records, answers, chat=True)


def test_messages_are_the_turns_of_the_data_set(model: Model, tmp_path: Path):
    hello = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hel\nlo")]
    (tmp_path / "chats.json").write_text(json.dumps([chat(*hello, ("human", "Naïve?"), ("gpt", "Ciao")), chat(*hello)]))
    records = list(sharegpt.records(model.tokenizer(), str(tmp_path / "chats.json"), model=model, sessions=True))
    found = as_chat(model, records)
    asked = [[("system", "Be brief."), ("user", "Hi")], [("user", "Naïve?")]]
    messages = [[{"role": role, "content": text} for role, text in turn] for turn in asked]
    assert found.messages and [json.loads(turn) for turn in found.messages] == [*messages, messages[0]]
    assert found.turns is not None and found.turns.tolist() == [0, 1, 0] and found.continued
    recorded = as_chat(model, records, Answers.recorded)
    assert recorded.messages and json.loads(recorded.messages[1]) == [
        *(*messages[0], {"role": "assistant", "content": "Hel\nlo"}, *messages[1]),
    ]
    assert recorded.checksum != found.checksum


def test_made_up_messages_have_the_text_of_their_tokens(model: Model):
    tokenizer, records = model.tokenizer(), list(conversations(model.tokenizer(), **MADE_UP))
    found = as_chat(model, records)
    assert found.messages and len(found.messages) == len(records)
    for turn, record in zip(found.messages, records, strict=True):
        text = "".join(message["content"] for message in json.loads(turn))
        assert tokenizer.encode(text, add_special_tokens=False).ids == record["tok_input"]
    assert [message["role"] for message in json.loads(found.messages[0])] == ["system", "user"]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([("human", "Hi"), ("gpt", "Hello"), ("tool", "x"), ("human", "Bye"), ("gpt", "Ciao")], "record 2: tools"),
        ([("human", "Hi"), ("gpt", "Hello"), ("gpt", "Ciao")], "record 2: an answer right after another"),
    ],
)
def test_conversation_that_is_no_chat_of_texts_is_refused(
    model: Model, tmp_path: Path, turns: list[tuple[str, str]], words: str
):
    (tmp_path / "chats.json").write_text(json.dumps([chat(*turns)]))
    records = list(sharegpt.records(model.tokenizer(), str(tmp_path / "chats.json"), model=model, sessions=True))
    with pytest.raises(InputError, match=rf"{words}.*; leave the record out, or write scenario.endpoint=completions"):
        as_chat(model, records)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dataset=cnn_small"], "no conversations; write dataset=sharegpt with dataset.path, or"),
        (["scenario=custom", "dataset=sessions"], "turns of conversations; write scenario=sessions"),
        (["dataset=sessions", "dataset.count=300"], "256 conversations, fewer than dataset.count=300"),
        (["dataset=sessions", "engine.args.max_model_len=512"], "exceed max_model_len=512"),
        (["dataset=sessions", "scenario.max_queries=200"], "max_queries=200: conversations are finished"),
        (["scenario=custom", "scenario.think_s=2"], "scenario.think_s=2: for scenario=sessions only"),
        (["scenario=trace", "scenario.answers=recorded"], "scenario.answers: a trace has no turns"),
        (["dataset=sessions", "scenario.answers=all"], "scenario.answers"),
        (["dataset=sessions", "scenario.endpoint=http"], "scenario.endpoint"),
        (["dataset=sessions", "scenario.endpoint=chat"], "endpoint=chat: a simulation has no chat endpoint"),
        (["scenario=custom", "scenario.endpoint=chat"], "endpoint=chat: for scenario=sessions only"),
        (["dataset=sessions", "scenario.think_s=-1"], "scenario.think_s"),
    ],
)
def test_conversations_that_can_not_be_had_are_refused_in_one_line(main: Main, arguments: list[str], words: str):
    scenario = [] if any(one.startswith("scenario=") for one in arguments) else ["scenario=sessions"]
    done = main("model=tiny", "backend=sim", "backend/device=cpu", "tracking=none", *scenario, *arguments)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_model_without_a_chat_template_is_refused_before_vllm_starts(main: Main):
    done = main("model=tiny", "scenario=sessions", "dataset=sessions", "scenario.endpoint=chat", "tracking=none")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "has no chat template; set engine.args.chat_template=<file>, or write" in done.stderr


def test_conversations_come_one_by_one_and_their_turns_after_pauses():
    samples = sampled([[(4, 2)] * 3, [(4, 2)], [(4, 2)] * 2])
    source = Sessions(scenario(min_queries=6, think_s=2.0), samples, 0, 1)
    begun = list(source.first())
    assert source.total == 6 and sorted(ask.sample for ask in begun) == [0, 3, 4]
    assert [ask.session for ask in begun] == [0, 1, 2] and begun[0].at_s == 0.0 < begun[1].at_s < begun[2].at_s
    long = next(ask for ask in begun if ask.sample == 0)
    second = source.after(long, 7, 10.0)
    assert second and second.sample == 1 and second.follows == 7 and second.session == long.session
    assert second.at_s > 10.0 and second == Sessions(scenario(think_s=2.0), samples, 0, 1).after(long, 7, 10.0)
    last = source.after(second, 8, 20.0)
    assert last and source.after(last, 9, 30.0) is None


def test_users_have_one_conversation_after_another_until_the_run_is_long_enough():
    samples = sampled([[(4, 2)] * 2, [(4, 2)] * 2])
    limits = {"users": 2, "min_queries": 5, "min_duration_s": 3.0}
    traffic = Traffic(Sessions(scenario(Kind.ClosedLoop, **limits), samples, 0, 1))
    asks: list[Ask] = []
    for now in range(10):
        taken_now = [traffic.take() for _ in range(2 if traffic.next_s < math.inf else 0)]
        asks += [ask for _, ask in taken_now]
        for number, _ in taken_now:
            traffic.answered(number, float(now))
    assert traffic.ended and len(asks) == 8 and {ask.session for ask in asks} == {0, 1, 2, 3}
    assert [ask.sample % 2 for ask in asks] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("block_size", [32, 64])
def test_simulated_turn_finds_the_blocks_of_the_last_ones_prompt_and_answer(block_size: int):
    lengths = [[(100, 30), (20, 13), (1, 40), (60, 2)], [(17, 16), (31, 33)], [(64, 33), (5, 5)]]
    samples = sampled(lengths)
    words = ["model=tiny", "scenario=custom", "backend=sim", "backend/device=cpu"]
    config = configured(*words, f"engine.args.block_size={block_size}")
    prepared = prepare(config)
    assert isinstance(prepared.backend, SimBackend)
    device, shape = prepared.backend.config.device, Shape.of(prepared.model.config)
    cost = Cost(device, shape, resolve(prepared.args, device, shape))
    run = simulate(cost, scenario(Kind.SingleStream, min_queries=8), samples)
    by_session: defaultdict[int, list[RequestTiming]] = defaultdict(list)
    for one in run.requests:
        by_session[one.session].append(one)
    expected = 0
    for turns in by_session.values():
        for last, one in itertools.pairwise(turns):
            assert one.prompt_tokens == last.prompt_tokens + last.output_tokens + samples.prompt_tokens[one.sample]
            computed = last.prompt_tokens + last.output_tokens - 1  # the last token that it generated is not
            expected += min(computed, one.prompt_tokens - 1) // block_size * block_size
    assert run.figures["prefix_hit_tokens"] == expected > 0
    assert run.figures["prefix_query_tokens"] == sum(one.prompt_tokens for one in run.requests)


def ran(samples: Samples, **settings: Any) -> dict[str, Any]:
    """Have LoadGenerator send all turns of `samples` beside their file; returns client.json."""
    samples.save()
    folder = samples.path.parent
    everything = {"answers": Answers.received, "keep_answers": True, "min_queries": len(samples), "total": len(samples)}
    with serving() as url, LoadGenerator(samples, folder / "clients.log") as load:
        load.begin(asked(folder, url, Kind.Server, **{**everything, **settings}))
        assert load.wait(60) == 0, load.last_line()
    return dict(json.loads((folder / "client.json").read_text()))


def sent(prompt: list[int]) -> list[list[int]]:
    """The prompts that the server has had, of those that begin with `prompt`."""
    bodies = [body["prompt"] for path, body in Streaming.received if path == "/v1/completions"]
    return [found for found in bodies if found[: len(prompt)] == prompt]


@pytest.mark.parametrize(("processes", "ignore_eos"), [(1, True), (3, True), (1, False)])
def test_prompts_hold_the_answers_that_were_received(tmp_path: Path, processes: int, ignore_eos: bool):
    Streaming.received.clear()
    samples = sampled([[(2, TOKENS)] * 3] * 4, tmp_path / "samples.npz", ignore_eos=ignore_eos)
    for first in range(0, 12, 3):
        samples.prompts[first][0] = OK + 20 + first
    if not ignore_eos:  # each answer ends by itself: its last token is the end of sequence
        samples = replace(samples, output_tokens=samples.output_tokens + 1)
        Streaming.most = TOKENS
    ran(samples, client_processes=processes, think_s=0.01)
    Streaming.most = None
    requests = read_rows(tmp_path / "requests.csv", RequestTiming)
    assert len(requests) == 12 and len({one.session for one in requests}) == 4
    kept = TOKENS if ignore_eos else TOKENS - 1
    for first in range(0, 12, 3):
        prompt: list[int] = []
        for turn in range(3):
            prompt += samples.prompts[first + turn].tolist()
            assert prompt in sent(prompt)
            assert [one.prompt_tokens for one in requests if one.sample == first + turn] == [len(prompt)]
            prompt += [100 * prompt[0] + number for number in range(kept)]


@pytest.mark.parametrize("answers", [Answers.received, Answers.recorded])
def test_messages_hold_the_answers_that_were_received(tmp_path: Path, answers: Answers):
    Streaming.received.clear()
    turns = [[{"role": "user", "content": f'{number}: "messages": [1], ]}}'}] for number in range(6)]
    fields = {"messages": [json.dumps(turn) for turn in turns], "continued": answers is Answers.received}
    samples = sampled([[(2, TOKENS)] * 3] * 2, tmp_path / "samples.npz", **fields)
    keep = answers is Answers.received
    ran(samples, answers=answers, keep_answers=keep, client_processes=2)
    bodies = [body for path, body in Streaming.received if path == "/v1/chat/completions"]
    assert len(bodies) == 6 and not any("prompt" in body or "return_token_ids" in body for body in bodies)
    assert all(body["min_tokens"] == body["max_tokens"] == TOKENS for body in bodies)
    requests = {one.sample: one for one in read_rows(tmp_path / "requests.csv", RequestTiming)}
    answer = {"role": "assistant", "content": "x\n" * TOKENS}
    for first in (0, 3):
        for number in range(first, first + 3):
            earlier = [message for turn in turns[first:number] for message in (*turn, answer)] if keep else []
            assert [*earlier, *turns[number]] in [body["messages"] for body in bodies]
            assert requests[number].prompt_tokens == len(earlier) + 1 and requests[number].output_tokens == TOKENS


def test_conversation_that_has_no_room_left_is_cut_and_counted(tmp_path: Path):
    samples = sampled([[(2, 9)] * 3] * 2, tmp_path / "samples.npz", ignore_eos=False)
    samples.prompts[0][0] = samples.prompts[3][0] = OK
    assert ran(samples, max_model_len=22)["figures"]["sessions_cut"] == 2
    assert sorted(one.sample for one in read_rows(tmp_path / "requests.csv", RequestTiming)) == [0, 1, 3, 4]


def test_failed_turn_ends_its_conversation(tmp_path: Path):
    samples = sampled([[(2, TOKENS)] * 3] * 2, tmp_path / "samples.npz")
    samples.prompts[0][0], samples.prompts[3][0] = REFUSED, OK
    assert ran(samples)["failed"] == 1
    requests = read_rows(tmp_path / "requests.csv", RequestTiming)
    assert sorted(one.sample for one in requests) == [3, 4, 5]
    figures = metrics.of_sessions(requests, samples)
    assert figures["sessions"] == figures["sessions_completed"] == 1


def test_latencies_are_told_by_turn():
    samples = sampled([[(2, 2)] * 12])
    requests = [RequestTiming(turn, turn, turn + 0.1 * (turn + 1), turn + 2, 2, 9, 0) for turn in range(12)]
    figures = metrics.of_sessions(requests, samples)
    assert figures["turn1_ttft_p99_ms"] == pytest.approx(100) and figures["turn2_ttft_p50_ms"] == pytest.approx(200)
    assert figures["turn10_ttft_p99.9_ms"] == pytest.approx(1200)  # with the eleventh and the twelfth
    assert "turn11_ttft_p99_ms" not in figures and figures["sessions_completed"] == 1


@pytest.mark.slow
def test_simulated_conversations_find_as_many_tokens_as_vllm_does(tmp_path: Path):
    common = [
        *("model=tiny", "scenario=sessions", "dataset=sessions", "dataset.count=40", "scenario.warmup_requests=0"),
        *("scenario.qps=10", "scenario.think_s=0.2", "scenario.min_duration_s=0", "scenario.min_queries=150"),
    ]
    found: dict[str, float] = {}
    for name in ("engine.args.enforce_eager=true", "backend=sim"):
        config = compose([*common, name, *(["backend/device=cpu"] if name == "backend=sim" else [])])[0]
        prepared, folder = prepare(config), tmp_path / name
        samples = prepare_samples(config, prepared)
        folder.mkdir()
        with prepared.backend.start(prepared.model, prepared.args, samples, folder, Slot()) as engine:
            run = engine.run(config.scenario, folder)
        assert not run.failed
        found[name] = run.figures["prefix_hit_tokens"]
    live, sim = found.values()
    assert live > 0 and sim == pytest.approx(live, rel=0.01)


@pytest.mark.slow
def test_chat_sends_what_vllm_has_said_through_its_own_template(tmp_path: Path):
    asks = ("Tell me of the sea. " * 20, "And of the [sky], naïve one?")
    turns = [turn for ask in asks for turn in (("human", ask), ("gpt", "It is wide and blue, and never still. " * 6))]
    (tmp_path / "chats.json").write_text(json.dumps([chat(*turns)]))
    config = compose(
        [
            *("model=smollm2", "scenario=sessions", "dataset=sharegpt", f"dataset.path={tmp_path / 'chats.json'}"),
            *("scenario.endpoint=chat", "scenario.warmup_requests=0", "scenario.min_duration_s=0"),
            *("scenario.min_queries=2", "scenario.think_s=0.1", "engine.args.enforce_eager=true"),
            *("engine.args.block_size=32", "engine.args.max_model_len=1024"),
        ]
    )[0]
    prepared = prepare(config)
    samples = prepare_samples(config, prepared)
    with prepared.backend.start(prepared.model, prepared.args, samples, tmp_path, Slot()) as engine:
        run = engine.run(config.scenario, tmp_path)
    assert not run.failed
    first, second = run.requests
    assert [first.output_tokens, second.output_tokens] == samples.output_tokens.tolist()
    # What vLLM makes of the messages is what autotune takes for the template's text; its cache knows the answer.
    after = first.prompt_tokens + first.output_tokens
    assert [first.prompt_tokens, second.prompt_tokens - after] == samples.prompt_tokens.tolist()
    assert run.figures["prefix_hit_tokens"] == (after - 1) // 32 * 32 > first.prompt_tokens
