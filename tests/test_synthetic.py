"""The lengths that dataset=synthetic and its kin ask for are the lengths that are made."""

from statistics import mean, median

import pytest
from tokenizers import Tokenizer

from autotune.data.synthetic import news

FIELDS = {
    "count": 400,
    "prompt_tokens": 150,
    "prompt_sigma": 0.4,
    "prompt_bounds": (60, 300),
    "output_tokens": 20,
    "output_deviation": 5,
    "output_bounds": (10, 30),
    "seed": 0,
}


def lengths(tokenizer: Tokenizer, field: str, **fields: object) -> list[int]:
    return [len(record[field]) for record in news(tokenizer, **{**FIELDS, **fields})]


def test_same_seed_makes_the_same_records(tokenizer: Tokenizer):
    first, again, other = (list(news(tokenizer, **FIELDS | {"count": 5, "seed": seed})) for seed in (1, 1, 2))
    assert first == again
    assert first != other


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
