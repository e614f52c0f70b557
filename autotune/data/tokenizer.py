"""Tokenizers: a folder's own, its truncation and padding switched off, and its chat template."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from tokenizers import Tokenizer

from autotune.errors import InputError
from autotune.system.files import read_json
from autotune.text import first_line, one_line


def load(folder: Path, trusted: bool = False, mode: str | None = None) -> Tokenizer:
    """The tokenizer in `folder`, without the truncation and padding that its file may ask for.

    Code that comes with it runs only if it is `trusted`; `mode` is vLLM's tokenizer_mode. Raises InputError.
    """
    file = folder / "tokenizer.json"
    if file.exists() and mode != "mistral":
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no class of its own for what it can't read
            raise InputError(f"{file}: no tokenizer ({one_line(error)}); get or make it again") from None
    else:
        loaded = load_transformers(folder, trusted, mode)
        if not getattr(loaded, "backend_tokenizer", None):
            return cast(Tokenizer, PythonTokenizer(loaded))
        tokenizer = loaded.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_transformers(folder: Path, trusted: bool = False, mode: str | None = None) -> Any:
    """The same tokenizer as transformers' own, which knows its chat template. Raises InputError."""
    how = {"mistral_format": True} if mode == "mistral" else {}
    try:
        from transformers import AutoTokenizer  # takes seconds to import

        # Left open, it would ask on the terminal whether it may run what comes with the tokenizer.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, **how)
    except Exception as error:  # whatever the tokenizer's own code raises
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{folder}: its tokenizer is code of its own; set engine.args.trust_remote_code=true if you trust it"
            ) from None
        reason = f"{type(error).__name__}: {first_line(error)[:160]}"
        raise InputError(
            f"{folder}: no tokenizer that can be read ({reason}); get the folder again, "
            f"or set engine.args.tokenizer=<Hub id or folder>"
        ) from None


def has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    named = config.exists() and "chat_template" in read_json(config)
    return named or (folder / "chat_template.jinja").exists()


class PythonTokenizer:
    """A tokenizer that is written in Python, with what autotune needs of `tokenizers.Tokenizer`."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self.decode, self.id_to_token = loaded.decode, loaded.convert_ids_to_tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(ids=self._loaded.encode(text, add_special_tokens=add_special_tokens))

    def get_vocab_size(self) -> int:
        return len(self._loaded)

    def to_str(self) -> str:
        return json.dumps(self._loaded.get_vocab(), sort_keys=True)
