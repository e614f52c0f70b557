"""dataset=synthetic's shared prefix, and the example file made from the same text."""

import hashlib
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from autotune.data.synthetic import HEAD, news
from autotune.errors import InputError

DATASETS = Path(__file__).parents[1] / "datasets"
FIELDS = {
    "count": 40,
    "prompt_tokens": 150,
    "prompt_sigma": 0.5,
    "prompt_bounds": (60, 400),
    "output_tokens": 20,
    "output_deviation": 5,
    "output_bounds": (4, 40),
    "seed": 3,
}


def prompts(tokenizer: Tokenizer, **fields: object) -> list[list[int]]:
    return [record["tok_input"] for record in news(tokenizer, **{**FIELDS, **fields})]


def test_without_a_share_the_records_are_what_they_were(tokenizer: Tokenizer) -> None:
    assert list(news(tokenizer, **FIELDS, shared_prefix=0.0)) == list(news(tokenizer, **FIELDS))
    assert len({tuple(prompt[len(HEAD) :]) for prompt in prompts(tokenizer)}) == FIELDS["count"]


@pytest.mark.parametrize("share", [0.25, 0.6, 0.8])
def test_the_share_of_every_prompt_is_the_same_text(tokenizer: Tokenizer, share: float) -> None:
    made = prompts(tokenizer, shared_prefix=share)
    longest = max(made, key=len)
    for prompt in made:
        shared = round(share * len(prompt))
        assert prompt[:shared] == longest[:shared]


def test_what_is_not_shared_is_each_prompts_own(tokenizer: Tokenizer) -> None:
    made = prompts(tokenizer, shared_prefix=0.5, prompt_sigma=0)
    assert len({len(prompt) for prompt in made}) == 1
    assert len({tuple(prompt[:75]) for prompt in made}) == 1
    assert len({tuple(prompt[75:]) for prompt in made}) == len(made)


def test_a_share_of_one_leaves_one_prompt_for_each_length(tokenizer: Tokenizer) -> None:
    assert len({tuple(prompt) for prompt in prompts(tokenizer, shared_prefix=1, prompt_sigma=0)}) == 1


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_share_changes_no_length_and_no_output(tokenizer: Tokenizer, share: float) -> None:
    without, shared = (list(news(tokenizer, **FIELDS, shared_prefix=value)) for value in (0.0, share))
    assert [len(record["tok_input"]) for record in shared] == [len(record["tok_input"]) for record in without]
    assert [record["output"] for record in shared] == [record["output"] for record in without]


def test_the_prefix_is_the_seeds(tokenizer: Tokenizer) -> None:
    first, again, other = (prompts(tokenizer, shared_prefix=0.9, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first[0][:50] != other[0][:50]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(tokenizer: Tokenizer, share: float) -> None:
    with pytest.raises(InputError, match="shared_prefix"):
        prompts(tokenizer, shared_prefix=share)


def test_the_example_file_is_what_its_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (DATASETS / "README.md").read_text()
    example = (DATASETS / "news_small.jsonl").read_bytes()
    program = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert program
    monkeypatch.chdir(tmp_path)
    exec(program[1], {})
    assert Path("news_small.jsonl").read_bytes() == example
    assert hashlib.sha256(example).hexdigest() in readme
    assert f"{len(example):,} bytes" in readme
    assert len(example) <= 60_000
