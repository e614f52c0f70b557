"""dataset=sharegpt: conversations of a user's file become one request an answer."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from autotune.config.schema import DatasetConfig
from autotune.data import samples, sharegpt
from autotune.data.models import Model
from autotune.errors import InputError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*conversations: Any) -> str:
        path = tmp_path / "chats.json"
        path.write_text(json.dumps(conversations))
        return str(path)

    return write


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}


TWO_TURNS = chat(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Farewell"))


def made(model: Model, path: str, **fields: Any) -> list[tuple[str, str]]:
    """Prompt and output of each record, as text."""
    tokenizer = model.tokenizer()
    found = sharegpt.records(tokenizer, path, model=model, **fields)
    return [(tokenizer.decode(record["tok_input"], skip_special_tokens=False), record["output"]) for record in found]


def test_every_answer_is_a_request_with_all_that_came_before(model: Model, write: Write) -> None:
    assert made(model, write(TWO_TURNS)) == [
        ("System: Be brief.\nUser: Hi\nAssistant:", "Hello"),
        ("System: Be brief.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:", "Farewell"),
    ]


def test_the_first_answers_alone_on_request(model: Model, write: Write) -> None:
    other = chat(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))
    assert [output for _, output in made(model, write(TWO_TURNS, other), turns="first")] == ["Hello", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_models_chat_template_makes_the_prompt(model: Model, write: Write, place: str) -> None:
    if place == "chat_template.jinja":
        (model.folder / place).write_text(TEMPLATE)
    else:
        names = json.loads((model.folder / place).read_text())
        (model.folder / place).write_text(json.dumps({**names, "chat_template": TEMPLATE}))
    assert made(model, write(TWO_TURNS))[1] == (
        "<s>[system]Be brief.[user]Hi[assistant]Hello[user]Bye[assistant]",
        "Farewell",
    )


@pytest.mark.slow  # transformers takes seconds to import
def test_a_conversation_that_the_template_refuses_is_named(model: Model, write: Write) -> None:
    (model.folder / "chat_template.jinja").write_text(STRICT)
    path = write(chat(("human", "Hi"), ("gpt", "Hello")), TWO_TURNS)
    with pytest.raises(InputError, match=r"chats\.json, record 2: .*no system role.*leave the record out"):
        made(model, path)


def test_answers_to_no_one_and_empty_ones_are_no_requests(model: Model, write: Write) -> None:
    path = write(
        chat(),
        chat(("human", "Anyone?")),
        chat(("gpt", "Unasked"), ("human", "Hi"), ("gpt", ""), ("human", "Hi?"), ("gpt", "Hello")),
    )
    assert [output for _, output in made(model, path)] == ["Hello"]


def test_prompts_over_the_limit_are_left_out_and_counted(
    model: Model, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(TWO_TURNS)
    limit = len("System: Be brief.\nUser: Hi\nAssistant:")  # one token a byte
    with caplog.at_level("INFO"):
        assert [output for _, output in made(model, path, max_prompt_tokens=limit)] == ["Hello"]
    assert "1 prompts longer than dataset.records.max_prompt_tokens" in caplog.text


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("text", "record 2: no conversation; write"),
        ({"text": "Hi"}, "record 2: no conversation; write"),
        ({"conversations": "Hi"}, "record 2: no conversation; write"),
        ({"conversations": ["Hi"]}, "record 2, turn 1: not an object"),
        (
            chat(("human", "Hi"), ("robot", "Hello")),
            "record 2, turn 2: from 'robot'; write one of system, developer, human",
        ),
        ({"conversations": [{"value": "Hi"}]}, "record 2, turn 1: from None"),
        ({"messages": [], "tools": 3}, "record 2: `tools` must be OpenAI's: a list of objects"),
        ({"conversations": [{"from": "human"}]}, "record 2, turn 1: no text; write `value`"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "record 2, turn 1: no text"),
    ],
)
def test_a_broken_record_is_named_with_what_to_write(model: Model, write: Write, broken: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        made(model, write(TWO_TURNS, broken))
    assert message in str(caught.value)
    assert "chats.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_questions_without_an_answer_are_counted(model: Model, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert len(made(model, write(chat(("user", "Hi"), ("gpt", "Hello"), ("user", "And?"))))) == 1
    assert "1 conversations end with a question" in caplog.text


def test_without_a_file_the_error_says_how_to_give_one(model: Model) -> None:
    with pytest.raises(InputError, match=r"dataset\.path="):
        list(sharegpt.records(model.tokenizer(), None))


def test_turns_is_all_or_first(model: Model, write: Write) -> None:
    with pytest.raises(InputError, match=r"dataset\.records\.turns=last: write all or first"):
        made(model, write(TWO_TURNS), turns="last")


def configured(path: str | None, **fields: Any) -> DatasetConfig:
    """conf/dataset/sharegpt.yaml with `path`, as a trial sees it."""
    dataset = OmegaConf.merge(
        OmegaConf.structured(DatasetConfig),
        OmegaConf.load(Path(__file__).parents[1] / "conf" / "dataset" / "sharegpt.yaml"),
        {"path": path, **fields},
    )
    typed = OmegaConf.to_object(OmegaConf.create({"dataset": dataset}).dataset)
    assert isinstance(typed, DatasetConfig)
    return typed


def prepared(dataset: DatasetConfig, model: Model, cache: Path) -> samples.Samples:
    fields = {key: value for key, value in dataset.records.items() if key != "_target_"}
    return samples.prepare(dataset, model, cache, partial(sharegpt.records, **fields))


def test_its_configuration_prepares_samples_from_the_given_file(model: Model, write: Write, tmp_path: Path) -> None:
    found = prepared(configured(write(TWO_TURNS)), model, tmp_path)
    assert found.output_tokens.tolist() == [len("Hello"), len("Farewell")]
    assert len(prepared(configured(write(TWO_TURNS), count=1), model, tmp_path)) == 1


@pytest.mark.slow  # transformers takes seconds to import
def test_another_chat_template_makes_other_samples(model: Model, write: Write, tmp_path: Path) -> None:
    dataset = configured(write(TWO_TURNS))
    before = prepared(dataset, model, tmp_path)
    (model.folder / "chat_template.jinja").write_text(TEMPLATE)
    assert prepared(dataset, model, tmp_path).checksum != before.checksum


def test_a_given_file_still_wins_over_records_that_read_none(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"input": "line\u2028separated", "output": "abc"}\n')

    def unwanted(**_: Any) -> list[Any]:
        raise AssertionError

    dataset = DatasetConfig(name="cnn_shaped", path=str(path), records={"count": 3})
    found = samples.prepare(dataset, model, tmp_path, unwanted)
    assert found.output_tokens.tolist() == [3]
