"""dataset=synthetic makes the lengths and shares that were asked for; the example file is of the same text."""

import hashlib
import re
from pathlib import Path
from statistics import mean, median

import pytest
from tokenizers import Tokenizer

from autotune.data.synthetic import HEAD, news

DATASETS = Path(__file__).parents[1] / "datasets"
FIELDS = {
    **{"count": 400, "seed": 0, "prompt_tokens": 150, "prompt_sigma": 0.4, "prompt_bounds": (60, 300)},
    **{"output_tokens": 20, "output_deviation": 5, "output_bounds": (10, 30)},
}


def made(tokenizer: Tokenizer, field: str, **fields: object) -> list[list[int]]:
    return [record[field] for record in news(tokenizer, **{**FIELDS, **fields})]


def lengths(tokenizer: Tokenizer, field: str, **fields: object) -> list[int]:
    return list(map(len, made(tokenizer, field, **fields)))


def prompts(tokenizer: Tokenizer, share: float, **fields: object) -> list[list[int]]:
    return made(tokenizer, "tok_input", shared_prefix=share, **{"count": 40, **fields})


def distinct(texts: list[list[int]]) -> int:
    return len(set(map(tuple, texts)))


def test_same_seed_makes_the_same_records(tokenizer: Tokenizer):
    few = FIELDS | {"count": 5, "shared_prefix": 0.9}
    first, again, other = (list(news(tokenizer, **few | {"seed": seed})) for seed in (1, 1, 2))
    assert first == again
    assert first[0]["tok_input"][:50] != other[0]["tok_input"][:50]  # the prefix is the seed's, too


def test_lengths_scatter_around_their_targets(tokenizer: Tokenizer):
    assert median(lengths(tokenizer, "tok_input")) == pytest.approx(150, rel=0.05)
    assert mean(lengths(tokenizer, "tok_output")) == pytest.approx(20, rel=0.05)


def test_lengths_reach_their_bounds_and_no_further(tokenizer: Tokenizer):
    prompts = lengths(tokenizer, "tok_input", prompt_sigma=2)
    outputs = lengths(tokenizer, "tok_output", output_deviation=50)
    assert (min(prompts), max(prompts)) == (60, 300)
    assert (min(outputs), max(outputs)) == (10, 30)


def test_without_scatter_every_length_is_the_target(tokenizer: Tokenizer):
    assert set(lengths(tokenizer, "tok_input", prompt_sigma=0)) == {150}
    assert set(lengths(tokenizer, "tok_output", output_deviation=0)) == {20}


def test_text_of_a_record_encodes_to_its_token_ids(tokenizer: Tokenizer):
    for record in news(tokenizer, **FIELDS | {"count": 5}):
        prompt = record["instruction"].replace("{input}", record["input"])
        assert tokenizer.encode(prompt).ids == record["tok_input"]
        assert tokenizer.encode(record["output"]).ids == record["tok_output"]


@pytest.mark.parametrize("share", [0.25, 0.6, 0.8])
def test_share_of_every_prompt_is_the_same_text(tokenizer: Tokenizer, share: float):
    shared = [prompt[: round(share * len(prompt))] for prompt in prompts(tokenizer, share)]
    longest = max(shared, key=len)
    assert all(longest[: len(one)] == one for one in shared)


def test_what_is_not_shared_is_each_prompts_own(tokenizer: Tokenizer):
    assert distinct([prompt[len(HEAD) :] for prompt in prompts(tokenizer, 0.0)]) == 40
    half = prompts(tokenizer, 0.5, prompt_sigma=0)
    assert distinct([prompt[:75] for prompt in half]) == 1 and distinct([prompt[75:] for prompt in half]) == 40
    assert distinct(prompts(tokenizer, 1, prompt_sigma=0)) == 1


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_share_changes_no_length_and_no_output(tokenizer: Tokenizer, share: float):
    few = FIELDS | {"count": 40}
    without, shared = (list(news(tokenizer, **few, shared_prefix=value)) for value in (0.0, share))
    assert [len(record["tok_input"]) for record in shared] == [len(record["tok_input"]) for record in without]
    assert [record["output"] for record in shared] == [record["output"] for record in without]


def test_example_file_is_what_its_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    readme, example = (DATASETS / "README.md").read_text(), (DATASETS / "news_small.jsonl").read_bytes()
    program = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert program
    monkeypatch.chdir(tmp_path)
    exec(program[1], {})
    assert Path("news_small.jsonl").read_bytes() == example and len(example) <= 60_000
    assert hashlib.sha256(example).hexdigest() in readme and f"{len(example):,} bytes" in readme
