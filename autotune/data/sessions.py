"""Conversations, turn by turn: made-up ones, and what their prompts hold.

A record of a turn has TURN, its number from 0, and in `tok_input` what it adds: the first one's whole prompt, later
what comes after the last answer. So each prompt begins with the very tokens of the last one and its answer. MESSAGES
are what it adds as texts, for vLLM's chat endpoint; `output` is the answer's.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

from autotune.data.synthetic import MOST, check_bounds, check_numbers, clipped, text
from autotune.errors import InputError

MOST_TURNS = 1000
TURN, MESSAGES = "_turn", "_messages"


def conversations(
    tokenizer: Tokenizer,
    count: int,
    turns: float,
    turns_deviation: float,
    turns_bounds: tuple[int, int],
    system_tokens: int,
    first_tokens: float,
    later_tokens: float,
    sigma: float,
    bounds: tuple[int, int],
    output_tokens: float,
    output_deviation: float,
    output_bounds: tuple[int, int],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield the turns of made-up conversations, whose lengths are exact numbers of tokens. Raises InputError."""
    check_numbers(
        ("count", count, 1, MOST),
        ("turns", turns, 1, MOST_TURNS),
        ("turns_deviation", turns_deviation, 0, MOST_TURNS),
        ("system_tokens", system_tokens, 0, MOST),
        ("first_tokens", first_tokens, 1, MOST),
        ("later_tokens", later_tokens, 1, MOST),
        ("sigma", sigma, 0, 10),
        ("output_tokens", output_tokens, 1, MOST),
        ("output_deviation", output_deviation, 0, MOST),
    )
    check_bounds(("turns_bounds", turns_bounds), ("bounds", bounds), ("output_bounds", output_bounds))
    draw = random.Random(seed)
    system = text(tokenizer, random.Random(f"system {seed}"), system_tokens)
    rules = [{"role": "system", "content": tokenizer.decode(system)}] if system else []
    for _ in range(count):
        for turn in range(clipped(draw.normalvariate(turns, turns_deviation), turns_bounds)):
            median = later_tokens if turn else first_tokens
            added = text(tokenizer, draw, clipped(median * draw.lognormvariate(0, sigma), bounds))
            output = clipped(draw.normalvariate(output_tokens, output_deviation), output_bounds)
            said = text(tokenizer, draw, output)
            asks = [{"role": "user", "content": tokenizer.decode(added)}]
            yield {
                TURN: turn,
                "tok_input": added if turn else system + added,
                MESSAGES: asks if turn else [*rules, *asks],
                "tok_output": said,
                "output": tokenizer.decode(said),
            }


def taken(records: Iterable[Any], count: int | None, recorded: bool, source: str) -> Iterator[dict[str, Any]]:
    """Yield the turns of the first `count` conversations among `records`; None is all.

    If the answers are the `recorded` ones, a turn has its whole prompt. Raises InputError for records that are no
    turns, and for too few conversations.
    """
    found, history, told = 0, list[int](), list[Any]()
    for record in records:
        if not isinstance(record, dict) or TURN not in record:
            instead = "write dataset=sharegpt with dataset.path, or dataset=sessions without"
            raise InputError(f"dataset {source}: no conversations; {instead}")
        if record[TURN] == 0:
            if found == count:
                return
            found, history, told = found + 1, [], []
        if recorded:
            history += record["tok_input"]
            told += record[MESSAGES]
            yield {**record, "tok_input": list(history), MESSAGES: list(told)}
            history += record["tok_output"]
            told.append({"role": "assistant", "content": record["output"]})
        else:
            yield record
    if count and found < count:
        raise InputError(f"dataset {source}: {found} conversations, fewer than dataset.count={count}")
