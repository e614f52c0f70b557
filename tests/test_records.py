"""What users have as data: every form loads as the same requests, or is refused by file, record and field."""

import bz2
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from autotune.config.schema import DatasetConfig, Output
from autotune.data import samples, sharegpt
from autotune.data.models import Model
from autotune.errors import InputError

RECORDS = [{"prompt": "naïve 😀", "output_tokens": 10}, {"prompt": "bye", "output_tokens": 5}]
LINES = "\n".join(json.dumps(record) for record in RECORDS)


def as_csv(delimiter: str) -> str:
    file = io.StringIO()
    table = csv.DictWriter(file, ["prompt", "output_tokens"], delimiter=delimiter)
    table.writeheader()
    table.writerows(RECORDS)
    return file.getvalue()


def as_parquet(records: list[dict[str, Any]] = RECORDS, **schema: pyarrow.DataType) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(records, pyarrow.schema(schema) if schema else None)
    parquet.write_table(table, file)
    return file.getvalue()


FAR_DAY = as_parquet([{"prompt": "a", "day": 1 << 30}], prompt=pyarrow.string(), day=pyarrow.date32())


ZSTD = pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True)
FORMS: dict[str, tuple[str, str | bytes]] = {
    "JSON lines": ("d.jsonl", LINES),
    "CRLF and blank lines": ("d.jsonl", "\r\n" + LINES.replace("\n", "\r\n\r\n") + "\r\n"),
    "a list": ("d.json", json.dumps(RECORDS, indent=1)),
    "objects over several lines": ("d.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS)),
    "a list by name": ("d.json", json.dumps({"version": 1, "data": RECORDS})),
    "OpenAI's batch": ("d.jsonl", "\n".join(json.dumps({"custom_id": "1", "body": record}) for record in RECORDS)),
    "a BOM": ("d.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "UTF-16": ("d.jsonl", LINES.encode("utf-16")),
    "UTF-16 without a BOM": ("d.jsonl", LINES.encode("utf-16-le")),
    "gz": ("d.jsonl.gz", gzip.compress(LINES.encode())),
    "gz of several members": ("d.gz", b"".join(gzip.compress(f"{line}\n".encode()) for line in LINES.split("\n"))),
    "bz2": ("d.jsonl.bz2", bz2.compress(LINES.encode())),
    "zst": ("d.jsonl.zst", ZSTD),
    "zst under another name": ("d.jsonl", ZSTD),
    "CSV": ("d.csv", as_csv(",")),
    "TSV with a BOM": ("d.tsv", b"\xef\xbb\xbf" + as_csv("\t").encode()),
    "CSV as gz": ("d.csv.gz", gzip.compress(as_csv(",").encode())),
    "Parquet": ("d.parquet", as_parquet()),
}


def load(model: Model, name: str, body: str | bytes, chat: bool = False, **settings: Any) -> samples.Samples:
    path = model.folder.parent / name
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    config = DatasetConfig(name="d", path=str(path), records={"path": str(path)} if chat else None, **settings)

    def make(tokenizer: Any, model: Model) -> Any:
        return sharegpt.records(tokenizer, str(path), output=config.output, model=model)

    return samples.prepare(config, model, model.folder.parent / "cache", make if chat else None)


def prompts(model: Model, found: samples.Samples) -> list[str]:
    tokenizer = model.tokenizer()
    return [tokenizer.decode(prompt.tolist()) for prompt in found.prompts]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_as_the_same_requests(model: Model, form: str) -> None:
    found = load(model, *FORMS[form])
    assert prompts(model, found) == ["naïve 😀", "bye"] and found.output_tokens.tolist() == [10, 5]


@pytest.mark.parametrize(
    ("record", "prompt", "tokens"),
    [
        ({"prompt": "Hi", "prompt_tokens_count": 2, "output_tokens_count": 7}, "Hi", 7),
        ({"prompt": "Hi", "output": "four", "output_tokens": 9}, "Hi", 9),
        ({"prompt": "Hi", "completion_tokens": "12"}, "Hi", 12),
        ({"prompt": "Hi", "output_tokens": 6.0}, "Hi", 6),
        ({"prompt": [39, 72], "completion": "four"}, "H%", 4),
        ({"instruction": "Say", "output": "four"}, "Say", 4),
        ({"instruction": "Say:", "input": "text", "output": "four"}, "Say:\n\ntext", 4),
        ({"instruction": {"llama": "Say {input}!"}, "input": "text", "output": "four"}, "Say text!", 4),
        ({"instruction": "Say", "input": "", "output": "four"}, "Say", 4),
        ({"system_prompt": "Be brief.", "question": "Why?", "response": "So."}, "Be brief.\n\nWhy?", 3),
        ({"text": "a\0b", "tok_output": [1, 2, 3]}, "a\0b", 3),
    ],
)
def test_what_users_call_a_prompt_and_its_answer(model: Model, record: Any, prompt: str, tokens: int) -> None:
    found = load(model, "d.jsonl", json.dumps(record))
    assert found.output_tokens.tolist() == [tokens]
    if "prompt" not in record or isinstance(record["prompt"], str):
        assert prompts(model, found) == [prompt]


def lines(*records: Any) -> str:
    return "\n".join(json.dumps(record) for record in records)


GOOD = {"prompt": "a", "output": "bb"}


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("d.jsonl", "\n \r\n\n", "d.jsonl: no records"),
        ("d.json", '{"data": []}', "d.json: no records"),
        ("d.jsonl", lines(GOOD) + '\n{"prompt": "a\\ud800"}', "record 2: `prompt`, character 2: half of a surrogate"),
        ("d.jsonl", lines(GOOD, {"prompt": "a", "output": "\udfff"}), "record 2: `output`, character 1: half of a"),
        ("d.jsonl", '{"prompt": "a", "output_tokens": ' + "9" * 5000 + "}", "record 1: not JSON (Exceeds the limit"),
        ("d.jsonl", lines(GOOD) + "\n" + "[" * 100_000, "record 2: not JSON (maximum recursion depth"),
        ("d.jsonl", '[["a", "b"]]', "record 1: list instead of an object"),
        ("d.jsonl", lines(GOOD).replace("a", "\0"), "record 1: not JSON (Invalid control character"),
        ("d.jsonl", '{"prompt": "é"}'.encode("latin-1"), "d.jsonl, line 1, byte 13: not utf-8 text; write JSON"),
        ("d.jsonl", ZSTD[:-5], "d.jsonl: broken zstd file (Truncated"),
        ("d.gz", gzip.compress(b"{}", mtime=0)[:-3], "d.gz: broken gzip file (Truncated"),
        ("d.parquet", as_parquet()[:-20], "d.parquet: not a readable Parquet file"),
        (
            "d.parquet",
            as_parquet([{"prompt": b"\xff", "output": "b"}]),
            "record 1: `prompt` must be a text, and is byte",
        ),
        ("d.parquet", FAR_DAY, "d.parquet: not a readable Parquet file (days=1073741824; must have magnitude"),
        ("d.jsonl", lines(GOOD, None, GOOD), "record 2: null instead of an object; leave it out"),
        ("d.jsonl", lines(GOOD, [], GOOD), "record 2: [] instead of an object; leave it out"),
        ("d.jsonl", lines([], GOOD), "record 1: [] instead of an object; leave it out"),
        ("d.csv", "prompt,output\na,b,c\n", "d.csv, record 1: more cells than the header has names"),
        ("d.csv", 'prompt,output\n"a,b\n', "d.csv, line 1: not CSV (unexpected end of data)"),
        ("d.csv", "prompt;output\na;b\n", "record 1: no prompt among prompt;output; give `input` or `prompt`"),
        ("d.csv", "prompt,output\na,\n", "record 1: no `output` to take the length from; give one, or"),
        ("d.jsonl", lines(GOOD, {"prompt": "a", "output": ["b"]}), "record 2: `output` must be a text, and is list"),
        ("d.jsonl", lines(GOOD, {"output": "b"}), "record 2: no prompt among output"),
        ("d.json", '[{"input": "a"', "record 1: not JSON (Expecting"),
        (
            "d.jsonl",
            lines(GOOD, {"prompt": "a", "output_tokens": 0}),
            "record 2: `output_tokens` must be a whole number",
        ),
        ("d.jsonl", lines({"prompt": "a", "output_tokens": True}), "record 1: `output_tokens` must be a whole number"),
        ("d.jsonl", lines({"prompt": "a", "tok_output": "abc"}), "record 1: `tok_output` must be a list of token ids"),
        ("d.jsonl", lines({"prompt": ["a", "b"]}), "record 1: `prompt` must be a text, and is list"),
        ("d.jsonl", lines({"instruction": "Say {input}", "output": "b"}), "record 1: no prompt among instruction"),
        (
            "d.jsonl",
            lines({"body": {"messages": []}}),
            "record 1: no prompt among messages; it is a conversation: write",
        ),
    ],
)
def test_what_can_not_be_read_is_named_by_file_record_and_field(
    model: Model, name: str, body: str | bytes, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(model, name, body)
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "/nowhere", "a\0b", "~nobody-at-all/x"])
def test_what_is_no_file_is_named(model: Model, tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match=r"dataset\.path="):
        samples.prepare(DatasetConfig(name="d", path=path), model, tmp_path, None)


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = '{"name": "add", "arguments": {"a": 1}}'
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "2"}


def chat(*messages: Any, **fields: Any) -> str:
    return json.dumps({"messages": messages, **fields})


@pytest.mark.parametrize(
    ("body", "prompt", "answers"),
    [
        (chat({"role": "developer", "content": "Be brief."}, USER, ANSWER), "System: Be brief.\nUser: Hi", ["Hello"]),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "Hi"}, "you"]}, ANSWER),
            "User: Hi\nyou",
            ["Hello"],
        ),
        (chat(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}), "User: Hi", [CALLED]),
        (chat(USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, ANSWER), "User: Hi", [CALLED, "Hello"]),
        (chat(USER, {"role": "assistant", "function_call": CALL["function"]}), "User: Hi", [CALLED]),
        (chat(USER, ANSWER, tools=[CALL["function"]]), f"Tools: {json.dumps([CALL['function']])}\nUser: Hi", ["Hello"]),
        (json.dumps({"prompt": [USER], "completion": [ANSWER]}), "User: Hi", ["Hello"]),
        (json.dumps({"data": [{"messages": [USER, ANSWER]}]}), "User: Hi", ["Hello"]),
    ],
)
def test_conversations_with_parts_and_tools(model: Model, body: str, prompt: str, answers: list[str]) -> None:
    found = load(model, "d.jsonl", body, chat=True)
    assert prompts(model, found)[0] == f"{prompt}\nAssistant:"
    assert found.output_tokens.tolist() == [len(answer) for answer in answers]


def test_conversations_in_parquet_have_null_where_a_turn_lacks_a_field(model: Model) -> None:
    body = as_parquet(
        [{"messages": [USER | {"name": "Ann"}, {"role": "assistant", "content": None, "name": "x"}, USER, ANSWER]}]
    )
    with pytest.raises(InputError, match="record 1, turn 2: no text"):
        load(model, "d.parquet", body, chat=True)
    found = load(model, "d.parquet", as_parquet([{"messages": [USER | {"name": "Ann"}, ANSWER]}]), chat=True)
    assert found.output_tokens.tolist() == [len("Hello")]


@pytest.mark.parametrize("body", [chat(USER), json.dumps({"custom_id": "1", "body": {"messages": [USER]}})])
def test_a_question_without_an_answer_is_a_request_if_the_model_ends_it(model: Model, body: str) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl: no answer to a question; .* dataset\.output=natural"):
        load(model, "d.jsonl", body, chat=True)
    found = load(model, "d.jsonl", body, chat=True, output=Output.natural, max_output_tokens=9)
    assert (prompts(model, found), found.output_tokens.tolist()) == (["User: Hi\nAssistant:"], [9])


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "turn 1, `content`: a part of type image_url"),
        ({"role": "user", "content": [5]}, "turn 1, `content`: a part of type int"),
        ({"role": "user", "content": None}, "turn 1: no text"),
        ({"role": "user", "content": "\ud800"}, "turn 1: `content`, character 1: half of a surrogate pair"),
        ({"role": "assistant", "tool_calls": 5}, "turn 1: `tool_calls` must be OpenAI's"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}, "turn 1, `arguments`: not JSON"),
    ],
)
def test_a_turn_that_can_not_be_sent_is_named(model: Model, turn: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(model, "d.jsonl", chat(turn, ANSWER), chat=True)
    assert f"record 1, {message}" in str(caught.value)


def test_half_a_surrogate_in_a_call_of_a_tool_is_named(model: Model) -> None:
    call = {"function": {"name": "\ud800", "arguments": "{}"}}
    body = chat(USER, {"role": "assistant", "tool_calls": [call]}, RESULT, ANSWER)
    with pytest.raises(InputError, match=r"record 1: `output`, character .*: half of a surrogate pair"):
        load(model, "d.jsonl", body, chat=True)
