"""Samples: a data set as token ids and output lengths, checked record by record."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from autotune.config.schema import DatasetConfig, Output
from autotune.data.models import Model
from autotune.errors import InputError
from autotune.system.files import draft_of

Record = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Requests: `prompts[i]` is the prompt of request i as token ids, `output_tokens[i]` the most that it generates."""

    name: str
    checksum: str  # sha256 of all token ids and lengths
    prompts: list[NDArray[np.int32]]
    output_tokens: NDArray[np.int32]
    ignore_eos: bool  # generate exactly `output_tokens`
    path: Path  # their file in the cache

    def __len__(self) -> int:
        return len(self.prompts)

    def check_fits(self, max_model_len: int) -> None:
        """Raise InputError for the first sample longer than `max_model_len` tokens."""
        for i, prompt in enumerate(self.prompts):
            total = len(prompt) + int(self.output_tokens[i])
            if total > max_model_len:
                raise InputError(
                    f"dataset {self.name}, record {i + 1}: {len(prompt)} prompt + {self.output_tokens[i]} output "
                    f"tokens exceed max_model_len={max_model_len}; raise engine.args.max_model_len, lower "
                    f"dataset.max_output_tokens or leave the record out"
                )

    def save(self) -> None:
        with draft_of(self.path) as draft, draft.open("wb") as file:
            np.savez(
                file,
                name=self.name,
                checksum=self.checksum,
                tokens=np.concatenate(self.prompts),
                lengths=np.array([len(prompt) for prompt in self.prompts]),
                output_tokens=self.output_tokens,
                ignore_eos=self.ignore_eos,
            )

    @classmethod
    def load(cls, path: Path) -> "Samples":
        body = np.load(path)
        return cls(
            name=str(body["name"]),
            checksum=str(body["checksum"]),
            prompts=np.split(body["tokens"], np.cumsum(body["lengths"])[:-1]),
            output_tokens=body["output_tokens"],
            ignore_eos=bool(body["ignore_eos"]),
            path=path,
        )


def prepare(
    config: DatasetConfig, model: Model, cache_dir: Path, make: Callable[..., Iterable[Record]] | None
) -> Samples:
    """The samples of `config` as token ids of `model`; made once, then cached on disk.

    If the data set has a path, the records are read from there, unless `config.records` has a `path` and so reads the
    file itself. Else `make(tokenizer=…)` yields them; it is given `model=…`, too, if it takes that. Raises InputError.
    """
    if config.count is not None and config.count < 1:
        raise InputError(f"dataset.count={config.count}: write 1 or more, or null for all records")
    key = hashlib.sha256(OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    if config.path:
        try:
            key.update(Path(config.path).expanduser().read_bytes())
        except OSError as error:
            raise InputError(f"dataset.path={config.path}: {error.strerror or error}") from None
    key.update((model.folder / "config.json").read_bytes())
    for file in sorted([*model.folder.glob("tokenizer*"), *model.folder.glob("chat_template*")]):
        key.update(file.read_bytes())
    path = cache_dir / "samples" / f"{config.name}-{key.hexdigest()[:16]}.npz"
    if not path.exists():
        tokenizer = model.tokenizer()
        if config.path and "path" not in (config.records or {}):
            records: Iterable[Record] = read_records(Path(config.path).expanduser())
        elif make:
            takes_model = "model" in inspect.signature(make).parameters
            records = make(tokenizer=tokenizer, model=model) if takes_model else make(tokenizer=tokenizer)
        else:
            raise InputError("no data set: write dataset=cnn_shaped (see --help) or dataset.path=<JSON or JSONL>")
        _samples(config, records, tokenizer, path).save()
    return _loaded(path)


@functools.lru_cache(maxsize=4)
def _loaded(path: Path) -> Samples:
    return Samples.load(path)  # its name holds a hash of all that it is made from


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file of JSON or JSON lines. Raises InputError, naming the record."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, byte {error.start + 1}: not UTF-8 text; write JSON or JSON lines") from None
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        return
    for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, record {number}: not JSON ({error.msg})") from None


def _samples(config: DatasetConfig, records: Iterable[Record], tokenizer: Tokenizer, path: Path) -> Samples:
    source = config.path or config.name
    prompts, lengths = [], []
    for number, record in enumerate(records, 1):
        where = f"dataset {source}, record {number}"
        prompts.append(np.array(_prompt(record, tokenizer, where), dtype=np.int32))
        lengths.append(_output_length(record, config, tokenizer, where))
        if number == config.count:
            break
    if not prompts:
        raise InputError(f"dataset {source}: no records")
    if config.count and len(prompts) < config.count:
        raise InputError(f"dataset {source}: {len(prompts)} records, fewer than dataset.count={config.count}")
    output_tokens = np.array(lengths, dtype=np.int32)
    digest = hashlib.sha256(output_tokens.tobytes())
    for prompt in prompts:
        digest.update(prompt.tobytes())
    return Samples(
        name=source,
        checksum=digest.hexdigest(),
        prompts=prompts,
        output_tokens=output_tokens,
        ignore_eos=config.output is Output.reference,
        path=path,
    )


def _prompt(record: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: {type(record).__name__} instead of an object with `input` or `tok_input`")
    ids = record.get("tok_input")
    if ids is None:
        ids = encode(_prompt_text(record, where), tokenizer)
    vocabulary = tokenizer.get_vocab_size()
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise InputError(f"{where}: `tok_input` must be a list of token ids below the vocabulary's {vocabulary}")
    if not ids:
        raise InputError(f"{where}: the prompt is empty")
    return ids


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt; a text that begins with the token which `tokenizer` would put first gets no second one."""
    added = tokenizer.encode("").ids
    templated = bool(added) and text.startswith(tokenizer.id_to_token(added[0]) or "\0")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not templated).ids
    return ids


def _prompt_text(record: Record, where: str) -> str:
    text, instruction = record.get("input"), record.get("instruction") or ""
    if isinstance(instruction, dict):  # MLPerf's own file: {"llama": "… {input} …"}
        instruction = next(iter(instruction.values()), "")
    if not isinstance(text, str) or not isinstance(instruction, str):
        raise InputError(f"{where}: no prompt; give `input` (text) or `tok_input` (token ids)")
    if "{input}" in instruction:
        return instruction.replace("{input}", text)
    return f"{instruction}\n\n{text}" if instruction else text


def _output_length(record: Record, config: DatasetConfig, tokenizer: Tokenizer, where: str) -> int:
    """Number of tokens to generate: the length of the reference output, within the configured bounds."""
    if config.output is Output.natural:
        return config.max_output_tokens
    output = record.get("tok_output") or record.get("output")
    if isinstance(output, list) and output:
        if not all(type(token) is int for token in output):
            raise InputError(f"{where}: `output` must be a text, and `tok_output` a list of token ids")
        length = len(output)
    elif isinstance(output, str) and output:
        length = len(tokenizer.encode(output, add_special_tokens=False).ids)
    else:
        raise InputError(f"{where}: no `output` to take the length from; give one, or set dataset.output=natural")
    return min(max(length, config.min_output_tokens), config.max_output_tokens)
