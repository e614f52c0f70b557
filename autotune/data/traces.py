"""Traces: files that say when requests came and how long they were, or what they said."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial

from tokenizers import Tokenizer

from autotune.data.models import Model
from autotune.data.prompts import Lengths
from autotune.data.records import TIME, Record, count_field, number_field, read_records
from autotune.data.sharegpt import Encode, encoder, messages_of
from autotune.errors import InputError
from autotune.system.files import expanded

log = logging.getLogger(__name__)

TEXTS = ("prompt", "messages", "tok_input")
LIMITS = ("max_completion_tokens", "max_tokens")  # of an answer, in OpenAI's requests


@dataclass(frozen=True)
class Form:
    """The fields of a trace that has lengths, but no texts."""

    at: str
    prompt: str
    output: str
    unit_s: float | None  # of the time; None: it is written as date and time
    piece_tokens: int = 512  # of a prompt that one of its `hash_ids` stands for
    mark: str = ""  # a field that tells it from another form


FORMS = {
    "autotune": Form(TIME, "prompt_tokens", "output_tokens", 1.0),
    "Qwen-Bailian": Form("timestamp", "input_length", "output_length", 1.0, 16, "chat_id"),
    "Mooncake": Form("timestamp", "input_length", "output_length", 1e-3),
    "Azure": Form("TIMESTAMP", "ContextTokens", "GeneratedTokens", None),
    "BurstGPT": Form("Timestamp", "Request tokens", "Response tokens", 1.0),
}
KNOWN = f"`at_s`, `prompt_tokens` and `output_tokens`, or a trace of {', '.join([*FORMS][1:])}"


def records(
    tokenizer: Tokenizer,
    path: str | None,
    piece_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    model: Model | None = None,
) -> Iterator[Lengths | Record | None]:
    """Yield the requests of a trace in any of FORMS, or with texts; None for one that is left out.

    A `hash_id` stands for `piece_tokens` tokens; None: as in the form. Those without output tokens failed
    and are left out, as are prompts longer than `max_prompt_tokens`. Raises InputError, naming record and field.
    """
    if path is None:
        raise InputError(f"dataset=trace: no file; write dataset.path=<file> with {KNOWN}")
    if piece_tokens is not None and piece_tokens < 1:
        raise InputError(f"dataset.records.piece_tokens={piece_tokens}: write 1 or more")
    encode, left_out = cache(partial(encoder, tokenizer, model)), Counter[str]()
    form = None
    for number, row in enumerate(read_records(expanded(path)), 1):
        where = f"{path}, record {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: {type(row).__name__} instead of an object with {KNOWN}")
        if number == 1:
            form = _form(row, where)
        if form is None:
            yield _text(row, encode, where)
        elif not (made := _lengths(row, form, piece_tokens or form.piece_tokens, where)).output_tokens:
            left_out["without output tokens: they failed"] += 1
            yield None
        elif max_prompt_tokens is not None and made.prompt_tokens > max_prompt_tokens:
            left_out[f"longer than dataset.records.max_prompt_tokens={max_prompt_tokens}"] += 1
            yield None
        else:
            yield made
    for why, count in left_out.items():
        log.info("%s: %d requests left out, %s", path, count, why)


def _form(row: Record, where: str) -> Form | None:
    """The form of a trace by its first record; None if it has texts. Raises InputError for anything else."""
    if any(row.get(name) is not None for name in TEXTS):
        return None
    forms = [form for form in FORMS.values() if not form.mark or form.mark in row]
    found = next((form for form in forms if {form.at, form.prompt, form.output} & row.keys()), None)
    if found is None:
        raise InputError(
            f"{where}: no trace among {', '.join(map(str, row)) or 'no fields'}; write {KNOWN}, or `prompt`"
        )
    return found


def _lengths(row: Record, form: Form, piece_tokens: int, where: str) -> Lengths:
    at_s = _time(row, form, where)
    output = count_field(row, form.output, where)
    prompt = count_field(row, form.prompt, where)
    if output and not prompt:
        raise InputError(f"{where}: `{form.prompt}` must be 1 or more, and is 0")
    ids = row.get("hash_ids") or ()
    if ids and not (isinstance(ids, list) and all(type(one) is int and abs(one) < 1 << 63 for one in ids)):
        raise InputError(f"{where}: `hash_ids` must be a list of whole numbers")
    if len(ids) > math.ceil(prompt / piece_tokens):
        raise InputError(
            f"{where}: {len(ids)} `hash_ids` of {piece_tokens} tokens each are more than `{form.prompt}`={prompt}; "
            f"write dataset.records.piece_tokens=<tokens that an id stands for>"
        )
    return Lengths(at_s, prompt, output, ids, piece_tokens)


def _time(row: Record, form: Form, where: str) -> float:
    if form.unit_s is not None:
        at_s = number_field(row, form.at, where)
        written = None if at_s is None else at_s * form.unit_s
    else:
        written = _moment(row, form.at, where)
    if written is None:
        raise InputError(f"{where}: no `{form.at}`")
    return written


def _moment(row: Record, name: str, where: str) -> float | None:
    """The date and time in the field `name`, in seconds; None if it is missing."""
    if (written := row.get(name)) is None:
        return None
    try:
        moment = datetime.fromisoformat(written)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        example = "a date and time as 2023-11-16 18:15:46.68"
        raise InputError(f"{where}: `{name}` must be {example}, and is {str(written)[:40]!r}") from None


def _text(row: Record, encode: Callable[[], Encode], where: str) -> Record:
    """A request with a text as any data set has it: OpenAI's messages go through the model's chat template."""
    record = dict(row)
    if limit := next((name for name in LIMITS if row.get(name) is not None), None):
        record.setdefault("output_tokens", count_field(row, limit, where, least=1))
    if row.get("messages") is not None:
        if not (messages := messages_of(row, where)):
            raise InputError(f"{where}: `messages` is empty; write one, or leave the record out")
        record["tok_input"] = encode()(messages, row.get("tools"), where)
    return record
