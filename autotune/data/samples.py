"""Samples: a data set as token ids and output lengths, checked record by record."""

import functools
import hashlib
import inspect
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from autotune.config.schema import Answers, DatasetConfig, Output
from autotune.data import sessions
from autotune.data.models import Model
from autotune.data.prompts import Lengths, MadeUp, Tokens
from autotune.data.records import TIME, Record, count_field, digest, number_field, read_records, text_field
from autotune.data.synthetic import made_up_text
from autotune.errors import InputError
from autotune.system.files import draft_of, expanded

# Fields that may hold a prompt, what goes before it, an answer, its number of tokens; the first that is given counts.
PROMPTS = ("input", "prompt", "question", "text")
INSTRUCTIONS = ("instruction", "system_prompt", "system")
ANSWERS = ("output", "completion", "response", "answer")
COUNTS = ("output_tokens", "output_tokens_count", "completion_tokens_count", "completion_tokens")
FORMAT = b"2"  # of the files in the cache
TEXT_TOKENS = 1 << 14  # of the text that prompts are made of where only their lengths are known
CONVERSATIONS = ("conversations", "conversation", "messages", "prompt")


@dataclass(frozen=True)
class Samples:
    """Requests: `prompts[i]` is the prompt of request i as token ids, `output_tokens[i]` the most that it generates."""

    name: str
    checksum: str  # sha256 of all token ids and lengths
    prompts: Sequence[Tokens]
    output_tokens: NDArray[np.int32]
    ignore_eos: bool  # generate exactly `output_tokens`
    path: Path  # their file in the cache
    min_tokens: int = 1  # of an answer, before the model may end it
    arrivals: NDArray[np.float64] | None = None  # seconds since the earliest, if they are a trace; in any order
    turns: NDArray[np.int32] | None = None  # each one's number in its conversation, from 0; None: there are none
    messages: Sequence[str] | None = None  # JSON lists: what the chat endpoint gets in place of the prompts
    continued: bool = False  # the prompt of a later turn is what it adds to the last one's prompt and its answer

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def prompt_tokens(self) -> NDArray[np.int64]:
        """The length of each prompt."""
        if isinstance(self.prompts, MadeUp):
            return self.prompts.lengths
        return np.array([len(prompt) for prompt in self.prompts])

    @cached_property
    def continues(self) -> NDArray[np.bool_]:
        """True for each sample that the next one is a later turn of."""
        if self.turns is None:
            return np.zeros(len(self), dtype=bool)
        return np.append(self.turns[1:] > 0, False)

    def kept(self, sample: int, tokens: int) -> int:
        """The tokens of an answer that the next turn's prompt holds: the chat template writes its end of sequence."""
        return tokens - (not self.ignore_eos and tokens < self.output_tokens[sample])

    @cached_property
    def least_prompts(self) -> NDArray[np.int64]:
        """The length of each prompt with the conversation so far, at least: answers may end by themselves at once."""
        if not self.continued:
            return self.prompt_tokens
        assert self.turns is not None
        answers = self.output_tokens * self.ignore_eos
        ends = np.cumsum(self.prompt_tokens + answers)
        first = np.maximum.accumulate(np.where(self.turns == 0, np.arange(len(self)), 0))
        before = ends[first] - self.prompt_tokens[first] - answers[first]
        return np.asarray(ends - answers - before)

    def check_fits(self, max_model_len: int, shortening: Sequence[str] = ()) -> None:
        """Raise InputError for the first sample longer than `max_model_len` tokens; `shortening`: fields that help."""
        too_long = np.flatnonzero(self.least_prompts + self.output_tokens > max_model_len)
        if too_long.size:
            first = int(too_long[0])
            instead = f"write a smaller {' or '.join(shortening)}" if shortening else "leave the record out"
            raise InputError(
                f"dataset {self.name}, record {first + 1}: {self.least_prompts[first]} prompt + "
                f"{self.output_tokens[first]} output tokens exceed max_model_len={max_model_len}; raise "
                f"engine.args.max_model_len, lower dataset.max_output_tokens or {instead}"
            )

    def check_vocabulary(self, size: int) -> None:
        """Raise InputError for the first sample with a token id that a model of `size` tokens does not have."""
        texts = [self.prompts.text] if isinstance(self.prompts, MadeUp) else self.prompts
        for number, prompt in enumerate(texts, 1):
            if prompt.max() >= size:
                raise InputError(
                    f"dataset {self.name}, record {number}: token id {prompt.max()}, and the model has {size} tokens; "
                    f"set engine.args.tokenizer to the model's own"
                )

    def save(self) -> None:
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        del body["path"], body["prompts"]
        if isinstance(self.prompts, MadeUp):
            body |= {field.name: getattr(self.prompts, field.name) for field in fields(MadeUp)}
        else:
            body |= {"tokens": np.concatenate(self.prompts), "lengths": self.prompt_tokens}
        if self.messages is not None:
            body["messages"] = _lines(self.messages)
        with draft_of(self.path) as draft, draft.open("wb") as file:
            np.savez(file, **{name: value for name, value in body.items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> "Samples":
        columns = np.load(path)
        body = {name: value if value.ndim else value.item() for name, value in columns.items()}
        if "text" in body:
            prompts: Sequence[Tokens] = MadeUp(*(body.pop(field.name) for field in fields(MadeUp)))
        else:
            prompts = np.split(body.pop("tokens"), np.cumsum(body.pop("lengths"))[:-1])
        if "messages" in body:
            body["messages"] = body["messages"].tobytes().decode().split("\n")
        return cls(path=path, prompts=prompts, **body)


def prepare(
    config: DatasetConfig,
    model: Model,
    cache_dir: Path,
    make: Callable[..., Iterable[Record]] | None,
    answers: Answers = Answers.none,
    chat: bool = False,
) -> Samples:
    """The samples of `config` as token ids of `model`; made once, then cached on disk.

    If the data set has a path, the records are read from there, unless `config.records` has a `path` and so reads the
    file itself. Else `make(tokenizer=…)` yields them; it is given `model=…` and `sessions=…` (whether turns are
    wanted), too, if it takes them. `answers` are those that later turns of conversations hold; for `chat` these are
    messages, too. Raises InputError.
    """
    key = hashlib.sha256(FORMAT + OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    key.update(answers.name.encode() + b"chat" * chat)
    if config.path:
        key.update(digest(expanded(config.path)))
    key.update(model.fingerprint())
    path = cache_dir / "samples" / f"{config.name}-{key.hexdigest()[:16]}.npz"
    if not path.exists():
        tokenizer = model.tokenizer()
        records = _records(config, model, tokenizer, make, answers is not Answers.none)
        _samples(config, records, tokenizer, path, answers, chat).save()
    return _loaded(path)


def references(config: DatasetConfig, model: Model, make: Callable[..., Iterable[Record]] | None) -> list[str]:
    """The text that each record of `config` has for an answer. Raises InputError for one without."""
    texts: list[str] = []
    for number, record in enumerate(_records(config, model, model.tokenizer(), make, sessions=False), 1):
        if record is None:  # it is left out
            continue
        where = f"dataset {config.path or config.name}, record {number}"
        text = _first_text(record, ANSWERS, where) if isinstance(record, dict) else ""
        if not text:
            raise InputError(f"{where}: no text of a reference, to score answers with; give one in `output`")
        texts.append(text)
        if len(texts) == config.count:
            break
    return texts


def _records(
    config: DatasetConfig,
    model: Model,
    tokenizer: Tokenizer,
    make: Callable[..., Iterable[Record]] | None,
    sessions: bool,
) -> Iterable[Record]:
    if config.path and "path" not in (config.records or {}):
        return read_records(expanded(config.path))
    if not make:
        raise InputError("no data set: write dataset=cnn_shaped (see --help) or dataset.path=<file>")
    offered = {"tokenizer": tokenizer, "model": model, "sessions": sessions}
    taken = offered.keys() & inspect.signature(make).parameters.keys()
    return make(**{name: offered[name] for name in taken})


@functools.lru_cache(maxsize=4)
def _loaded(path: Path) -> Samples:
    return Samples.load(path)  # its name holds a hash of all that it is made from


class _Rows:
    """The records' contents as columns of numbers, which take a tenth of the memory that objects do."""

    def __init__(self, config: DatasetConfig, tokenizer: Tokenizer, chat: bool) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._messages: list[str] | None = [] if chat else None
        self._tokens, self._lengths, self._outputs = array("i"), array("q"), array("q")
        self._ids, self._ends, self._times = array("q"), array("q"), array("d")
        self._turns = array("i")
        self._made_up = False  # the prompts are to be
        self._piece_tokens = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, record: Any, where: str) -> None:
        """Take in a record. Raises InputError if anything is wrong with it, or it is of another kind than the first."""
        made_up = isinstance(record, Lengths)
        if made_up:
            length, wanted, at_s = record.prompt_tokens, record.output_tokens, record.at_s
            self._ids.extend(record.ids)
            self._piece_tokens = record.piece_tokens
            self._ends.append(len(self._ids))
            output = min(max(wanted, self._config.min_output_tokens), self._config.max_output_tokens)
        else:
            prompt = _prompt(record, self._tokenizer, where)
            self._tokens.extend(prompt)
            length, at_s = len(prompt), number_field(record, TIME, where)
            output = _output_length(record, self._config, self._tokenizer, where)
            if sessions.TURN in record:
                self._turns.append(record[sessions.TURN])
            if self._messages is not None:
                self._messages.append(_messages(record, where))
        if len(self) and made_up != self._made_up:
            raise InputError(f"{where}: texts and mere lengths in one file; write one of them in all records")
        if len(self) and (at_s is None) == bool(self._times):
            raise InputError(f"{where}: `{TIME}` in some records and not in others; write it in all of them")
        self._made_up = made_up
        self._lengths.append(length)
        self._outputs.append(output)
        if at_s is not None:
            self._times.append(at_s)

    def samples(self, name: str, path: Path, answers: Answers) -> Samples:
        """The samples that were added; later turns of conversations hold these `answers`."""
        lengths, times, turns = np.array(self._lengths), np.array(self._times), np.array(self._turns, dtype=np.int32)
        output_tokens, tokens = np.array(self._outputs, dtype=np.int32), np.array(self._tokens, dtype=np.int32)
        columns: list[NDArray[Any]] = [output_tokens, tokens, times, turns]
        if self._made_up:
            text = np.array(made_up_text(self._tokenizer, TEXT_TOKENS), dtype=np.int32)
            ids, ends = np.unique(np.array(self._ids), return_inverse=True)[1], np.array(self._ends)
            prompts: Sequence[Tokens] = MadeUp(lengths, ids, ends, self._piece_tokens, text)
            columns += [lengths, ids, ends, text]
        else:
            prompts = np.split(tokens, np.cumsum(lengths)[:-1])
        if self._messages is not None:
            columns.append(_lines(self._messages))
        digest = hashlib.sha256()
        for column in columns:
            digest.update(column.data)
        return Samples(
            name=name,
            checksum=digest.hexdigest(),
            prompts=prompts,
            output_tokens=output_tokens,
            ignore_eos=self._config.output is Output.reference,
            min_tokens=self._config.min_output_tokens,
            path=path,
            arrivals=times - times.min() if len(times) else None,
            turns=turns if len(turns) else None,
            messages=self._messages,
            continued=answers is Answers.received,
        )


def _samples(
    config: DatasetConfig, records: Iterable[Any], tokenizer: Tokenizer, path: Path, answers: Answers, chat: bool
) -> Samples:
    source, count = config.path or config.name, config.count
    if answers is not Answers.none:
        records, count = sessions.taken(records, count, answers is Answers.recorded, source), None
    rows = _Rows(config, tokenizer, chat)
    for number, record in enumerate(records, 1):
        if record is not None:  # else it is left out
            rows.add(record, f"dataset {source}, record {number}")
        if len(rows) == count:
            break
    if not len(rows):
        raise InputError(f"dataset {source}: no records")
    if count and len(rows) < count:
        raise InputError(f"dataset {source}: {len(rows)} records, fewer than dataset.count={count}")
    found = rows.samples(source, path, answers)
    if found.turns is not None and answers is Answers.none:
        raise InputError(f"dataset {source}: turns of conversations; write scenario=sessions")
    return found


def _prompt(record: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: {type(record).__name__} instead of an object with `input` or `prompt`")
    name = "prompt" if _is_list_of_ids(record.get("prompt")) else "tok_input"
    if (ids := record.get(name)) is None:
        ids = encode(_prompt_text(record, where), tokenizer)
    if ids == []:
        raise InputError(f"{where}: the prompt is empty")
    vocabulary = tokenizer.get_vocab_size()
    if not _is_list_of_ids(ids) or not 0 <= min(ids) <= max(ids) < vocabulary:
        raise InputError(f"{where}: `{name}` must be a list of token ids below the vocabulary's {vocabulary}")
    return ids


def _messages(record: Record, where: str) -> str:
    messages = record[sessions.MESSAGES]
    instead = "leave the record out, or write scenario.endpoint=completions"
    if "tools" in record or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        raise InputError(f"{where}: tools, and scenario.endpoint=chat sends texts only; {instead}")
    if not messages:
        raise InputError(f"{where}: an answer right after another; {instead}")
    return json.dumps(messages)


def _lines(texts: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\n".join(texts).encode(), dtype=np.uint8)


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt; a text that begins with the token which `tokenizer` would put first gets no second one."""
    added = tokenizer.encode("").ids
    templated = bool(added) and text.startswith(tokenizer.id_to_token(added[0]) or "\0")
    return list(tokenizer.encode(text, add_special_tokens=not templated).ids)


def _prompt_text(record: Record, where: str) -> str:
    if isinstance(first := record.get("instruction"), dict):  # MLPerf's own file: {"llama": "… {input} …"}
        record = {**record, "instruction": next(iter(first.values()), None)}
    instruction, text = (_first_text(record, names, where) for names in (INSTRUCTIONS, PROMPTS))
    if not (text or instruction) or (not text and "{input}" in instruction):
        raise InputError(f"{where}: no prompt among {', '.join(map(str, record)) or 'no fields'}; {_advice(record)}")
    if "{input}" in instruction:
        return instruction.replace("{input}", text)
    return "\n\n".join(part for part in (instruction, text) if part)


def _first_text(record: Record, names: Sequence[str], where: str) -> str:
    texts = (text_field(record, name, where) or "" for name in names)
    return next(filter(None, texts), "")


def _advice(record: Record) -> str:
    if any(isinstance(record.get(name), list) for name in CONVERSATIONS):
        return "it is a conversation: write dataset=sharegpt"
    return "give `input` or `prompt` (text), or `tok_input` (token ids)"


def _output_length(record: Record, config: DatasetConfig, tokenizer: Tokenizer, where: str) -> int:
    """Number of tokens to generate: the length of the reference output, within the configured bounds."""
    if config.output is Output.natural:
        return config.max_output_tokens
    length = _token_count(record, where) or len(
        tokenizer.encode(_first_text(record, ANSWERS, where), add_special_tokens=False).ids
    )
    if not length:
        raise InputError(
            f"{where}: no `output` to take the length from; give one, or `output_tokens` (how many), "
            f"or set dataset.output=natural"
        )
    return min(max(length, config.min_output_tokens), config.max_output_tokens)


def _token_count(record: Record, where: str) -> int | None:
    """Length of the output where the record says it in tokens: as their ids or as their number."""
    for name in ("tok_output", "output"):
        if _is_list_of_ids(record.get(name)):
            return len(record[name])
    if record.get("tok_output"):
        raise InputError(f"{where}: `tok_output` must be a list of token ids")
    name = next((name for name in COUNTS if record.get(name) is not None), "")
    return count_field(record, name, where, least=1) if name else None
