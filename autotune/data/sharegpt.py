"""Conversations in ShareGPT's or OpenAI's JSON: each answer is a request, and all that came before it the prompt."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from autotune.data.models import Model
from autotune.data.samples import read_records
from autotune.errors import InputError

log = logging.getLogger(__name__)

ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
}
EXAMPLE = '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}'

Message = dict[str, str]  # `role`: system, user or assistant; `content`


def records(
    tokenizer: Tokenizer,
    path: str | None,
    turns: str = "all",
    max_prompt_tokens: int | None = None,
    model: Model | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each answer, or for the first one of each conversation.

    Its `tok_input` is the conversation up to the answer, through `model`'s chat template if it has one. Answers without
    a question, empty answers, and those with a prompt longer than `max_prompt_tokens` are left out. Raises InputError,
    naming the record.
    """
    if path is None:
        raise InputError(f"dataset=sharegpt: no file; write dataset.path=<JSON list of {EXAMPLE}>")
    if turns not in ("all", "first"):
        raise InputError(f"dataset.records.turns={turns}: write all or first")
    encode = _encoder(tokenizer, model)
    too_long = unanswered = 0
    for number, conversation in enumerate(read_records(Path(path).expanduser()), 1):
        where = f"{path}, record {number}"
        messages = _messages(conversation, where)
        unanswered += bool(messages) and messages[-1]["role"] == "user"
        for before in _answered(messages)[: 1 if turns == "first" else None]:
            prompt = encode(messages[:before], where)
            if max_prompt_tokens is None or len(prompt) <= max_prompt_tokens:
                yield {"tok_input": prompt, "output": messages[before]["content"]}
            else:
                too_long += 1
    if unanswered:
        log.info("%s: %d conversations end with a question; it has no answer, and is left out", path, unanswered)
    if too_long:
        limit = f"dataset.records.max_prompt_tokens={max_prompt_tokens}"
        log.info("%s: %d prompts longer than %s left out", path, too_long, limit)


def _answered(messages: list[Message]) -> list[int]:
    """Indices of the answers that follow a question and have a text."""
    roles = [message["role"] for message in messages]
    return [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i] and messages[i]["content"]]


def _messages(conversation: Any, where: str) -> list[Message]:
    turns = None
    if isinstance(conversation, dict):
        turns = conversation.get("conversations", conversation.get("messages"))
    if not isinstance(turns, list):
        raise InputError(f"{where}: no conversation; write {EXAMPLE}, or `messages` with `role` and `content`")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InputError(f"{where}, turn {number}: not an object; write {EXAMPLE}")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"{where}, turn {number}: from {role!r}; write one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise InputError(f"{where}, turn {number}: no text; write `value` (with `from`) or `content` (with `role`)")
        messages.append({"role": ROLES[role], "content": text})
    return messages


def _encoder(tokenizer: Tokenizer, model: Model | None) -> Callable[[list[Message], str], list[int]]:
    """A function that turns a conversation into the prompt for its next answer, as token ids."""
    if model is None or not _has_chat_template(model.folder):
        return lambda messages, where: tokenizer.encode(_as_lines(messages)).ids
    from transformers import AutoTokenizer  # takes seconds to import

    chat = AutoTokenizer.from_pretrained(model.folder)

    def encode(messages: list[Message], where: str) -> list[int]:
        try:
            text = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and many refuse some orders of roles
            raise InputError(f"{where}: the model's chat template refuses it ({error}); leave the record out") from None
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids  # the template has added them
        return ids

    return encode


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    named = config.exists() and "chat_template" in json.loads(config.read_text())
    return named or (folder / "chat_template.jinja").exists()


def _as_lines(messages: list[Message]) -> str:
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n".join([*lines, "Assistant:"])
