"""Records of chosen lengths in MLPerf's format, of made-up text that is the same for the same seed."""

import random
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from autotune.errors import InputError

MOST = 1_000_000  # records, and tokens of one
HEAD, TAIL = "Summarize:\n", "\nSummary:"

WHO = "the council|a ferry captain|two engineers|the museum|a young goalkeeper|the harbour union|a retired judge"
DID = "announced|delayed|defended|questioned|welcomed|rebuilt|measured|cancelled|photographed|sold"
WHAT = "the new tram line|a record harvest|the winter timetable|an old lighthouse|the city budget|a rare comet"
WHERE = "near the northern bridge|at the central market|in a crowded hall|outside the old mill|on the east coast"
WHEN = "on Monday|after weeks of rain|before the vote|at dawn|late last year|during the festival"
WHY = "because costs had doubled|although few expected it|while neighbours watched|as the season began"


def news(
    tokenizer: Tokenizer,
    count: int,
    prompt_tokens: float,
    prompt_sigma: float,
    prompt_bounds: tuple[int, int],
    output_tokens: float,
    output_deviation: float,
    output_bounds: tuple[int, int],
    seed: int,
    shared_prefix: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Yield `count` records: prompt lengths are lognormal around their median, output lengths normal around their mean.

    Lengths are exact numbers of tokens of `tokenizer`, clipped to their bounds. The share `shared_prefix` (0 to 1) of
    each prompt, from its start and at most up to TAIL, is the same text in all prompts of a seed, as a system prompt
    would be; it changes no length. Raises InputError.
    """
    check_numbers(
        ("count", count, 1, MOST),
        ("prompt_tokens", prompt_tokens, 1, MOST),
        ("prompt_sigma", prompt_sigma, 0, 10),
        ("output_tokens", output_tokens, 1, MOST),
        ("output_deviation", output_deviation, 0, MOST),
        ("shared_prefix", shared_prefix, 0, 1),
    )
    check_bounds(("prompt_bounds", prompt_bounds), ("output_bounds", output_bounds))
    draw = random.Random(seed)
    head = tokenizer.encode(HEAD).ids
    tail = tokenizer.encode(TAIL, add_special_tokens=False).ids
    prefix = text(tokenizer, random.Random(f"prefix {seed}"), round(shared_prefix * prompt_bounds[1]))
    for _ in range(count):
        length = clipped(prompt_tokens * draw.lognormvariate(0, prompt_sigma), prompt_bounds)
        room = max(1, length - len(head) - len(tail))
        shared = min(max(0, round(shared_prefix * length) - len(head)), room)  # `head` is shared already
        body = prefix[:shared] + text(tokenizer, draw, room)[shared:]
        output = text(tokenizer, draw, clipped(draw.normalvariate(output_tokens, output_deviation), output_bounds))
        yield {
            "instruction": HEAD + "{input}" + TAIL,
            "input": tokenizer.decode(body),
            "tok_input": head + body + tail,
            "output": tokenizer.decode(output),
            "tok_output": output,
        }


def check_numbers(*given: tuple[str, float, float, float]) -> None:
    """Raise InputError for an argument, given with its name and its bounds, that is outside them."""
    for name, value, least, most in given:
        if not least <= value <= most:
            raise InputError(f"dataset.records.{name}={value}: write a number from {least} to {most:,}")


def check_bounds(*given: tuple[str, tuple[int, int]]) -> None:
    """Raise InputError for bounds, given with their name, that are none."""
    for name, (low, high) in given:
        if not 1 <= low <= high <= MOST:
            raise InputError(f"dataset.records.{name}=[{low},{high}]: write the lower one first, from 1 to {MOST:,}")


def clipped(value: float, bounds: tuple[int, int]) -> int:
    """The whole number within `bounds` that is closest to `value`."""
    return int(min(max(round(value), bounds[0]), bounds[1]))


def made_up_text(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """So many tokens of made-up news, always the same."""
    return text(tokenizer, random.Random(0), tokens)


def text(tokenizer: Tokenizer, draw: random.Random, tokens: int) -> list[int]:
    """Exactly `tokens` token ids of made-up news; as each word is at least one token, as many words are enough."""
    words: list[str] = []
    while len(words) < tokens:
        parts = [draw.choice(part.split("|")) for part in (WHO, DID, WHAT, WHERE, WHEN, WHY)]
        words += f"{' '.join(parts).capitalize()} for {draw.randrange(2, 9000)} visitors.".split()
    ids: list[int] = tokenizer.encode(" ".join(words), add_special_tokens=False).ids
    return ids[:tokens]
