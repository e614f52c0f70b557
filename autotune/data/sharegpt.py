"""Conversations in ShareGPT's or OpenAI's JSON: each answer is a request, and all that came before it the prompt."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer

from autotune.config.schema import Output
from autotune.data.models import Model
from autotune.data.records import read_records, text_field
from autotune.data.samples import CONVERSATIONS
from autotune.data.sessions import MESSAGES, TURN
from autotune.errors import InputError
from autotune.system.files import expanded
from autotune.text import one_line

log = logging.getLogger(__name__)

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
ANSWER = "@answer@"  # stands for one in a conversation's text
EXAMPLE = '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}'

Message = dict[str, Any]  # `role`: system, user, assistant or tool; `content`; what tools need, in OpenAI's form
Encode = Callable[..., list[int]]  # token ids of messages and tools, and where they are written


def records(
    tokenizer: Tokenizer,
    path: str | None,
    turns: str = "all",
    max_prompt_tokens: int | None = None,
    output: Output | str = Output.reference,
    model: Model | None = None,
    sessions: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each answer, or for the first one of each conversation.

    Its `tok_input` is the conversation up to the answer, through `model`'s chat template if it has one; with
    `sessions`, records are turns, as sessions.py has them. Answers without a question, empty answers, and those with a
    prompt longer than `max_prompt_tokens` are left out. A question at the end has no answer: it is a request if
    `output` is natural, else left out. Raises InputError, naming the record.
    """
    if path is None:
        raise InputError(f"dataset=sharegpt: no file; write dataset.path=<JSON list of {EXAMPLE}>")
    if turns not in ("all", "first"):
        raise InputError(f"dataset.records.turns={turns}: write all or first")
    encode = encoder(tokenizer, model)
    too_long = unanswered = found = 0
    for number, record in enumerate(read_records(expanded(path)), 1):
        where = f"{path}, record {number}"
        messages = messages_of(record, where)
        tools = _parsed(record.get("tools"), f"{where}, `tools`")
        if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise InputError(f"{where}: `tools` must be OpenAI's: a list of objects")
        ends = _answered(messages)
        if messages and messages[-1]["role"] in ("user", "tool"):
            ends += [len(messages)] if Output(output) is Output.natural else []
            unanswered += Output(output) is Output.reference
        ends, before = ends[: 1 if turns == "first" else None], 0
        for turn, end in enumerate(ends):
            said = _said(messages[end]) if end < len(messages) else ""
            added = encode(messages[:end], tools, where, ends[turn - 1] if sessions and turn else None)
            if max_prompt_tokens is not None and before + len(added) > max_prompt_tokens:
                too_long += len(ends) - turn  # later ones are longer
                break
            found += 1
            record = {"tok_input": added, "output": said}
            if sessions:
                record |= {TURN: turn, "tok_output": tokenizer.encode(said, add_special_tokens=False).ids}
                record[MESSAGES] = messages[ends[turn - 1] + 1 if turn else 0 : end]
                if tools and not turn:
                    record["tools"] = tools
                before += len(added) + len(record["tok_output"])
            yield record
    _tell(path, found, unanswered, too_long, f"dataset.records.max_prompt_tokens={max_prompt_tokens}")


def _tell(path: str, found: int, unanswered: int, too_long: int, limit: str) -> None:
    """Tell what was left out of the file. Raises InputError if that is all of it."""
    if too_long and not found:
        raise InputError(f"{path}: all {too_long} prompts are longer than {limit}; raise it")
    if unanswered and not found:
        raise InputError(f"{path}: no answer to a question; give some, or set dataset.output=natural")
    if unanswered:
        log.info("%s: %d conversations end with a question; it has no answer, and is left out", path, unanswered)
    if too_long:
        log.info("%s: %d prompts longer than %s left out", path, too_long, limit)


def _answered(messages: list[Message]) -> list[int]:
    """Indices of the answers that follow a question and have a text."""
    roles = [message["role"] for message in messages]
    return [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i] and _said(messages[i])]


def messages_of(record: Any, where: str) -> list[Message]:
    turns = None
    if isinstance(record, dict):
        turns = next((record[name] for name in CONVERSATIONS if record.get(name) is not None), None)
        if turns is record.get("prompt") and isinstance(turns, list) and isinstance(record.get("completion"), list):
            turns = [*turns, *record["completion"]]
    if not isinstance(turns, list):
        raise InputError(f"{where}: no conversation; write {EXAMPLE}, or `messages` with `role` and `content`")
    return [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where}: not an object; write {EXAMPLE}")
    role = turn.get("from") or turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: from {role!r}; write one of {', '.join(ROLES)}")
    name = "value" if turn.get("value") is not None else "content"
    if isinstance(turn.get(name), list):
        text: str | None = "\n".join(_part(part, f"{where}, `{name}`") for part in turn[name])
    else:
        text = text_field(turn, name, where)
    calls = _calls(turn, where)
    if text is None and not calls:
        raise InputError(f"{where}: no text; write `value` (with `from`) or `content` (with `role`)")
    tools = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    return {"role": ROLES[role], "content": text or "", **({"tool_calls": calls} if calls else {}), **tools}


def _part(part: Any, where: str) -> str:
    """The text of a part of OpenAI's `content`."""
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    if not isinstance(part, dict) or "text" not in str(part.get("type", "text")):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise InputError(f"{where}: a part of type {kind}; only text can be sent")
    text = text_field(part, "text", where)
    if text is None:
        raise InputError(f"{where.rpartition(',')[0]}: no text in a part of `content`; write `text`")
    return text


def _calls(turn: Message, where: str) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's form, their arguments as objects: vLLM gives them so to templates, too."""
    old = turn.get("function_call")
    try:
        calls = turn.get("tool_calls") or ([{"type": "function", "function": old}] if old else [])
        functions = [dict(call["function"]) for call in calls]
    except (LookupError, TypeError, ValueError):
        raise InputError(f"{where}: `tool_calls` must be OpenAI's: a list with a `function` in each") from None
    parsed = [{**one, "arguments": _parsed(one.get("arguments"), f"{where}, `arguments`")} for one in functions]
    return [{**call, "function": function} for call, function in zip(calls, parsed, strict=True)]


def _parsed(value: Any, where: str) -> Any:
    """`value`, or what it is as JSON where it is a text."""
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None


def _said(message: Message) -> str:
    """The text of an answer; a call of a tool counts as its JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(text for text in (message["content"], *calls) if text)


def encoder(tokenizer: Tokenizer, model: Model | None) -> Encode:
    """A function that turns a conversation and its tools into the prompt for its next answer, as token ids.

    Given the index of an earlier answer, it returns those of what comes after that answer only.
    """
    chat = model.chat() if model else None

    def text_of(messages: list[Message], tools: Any, where: str) -> str:
        if chat is None:
            return _checked(_as_lines(messages, tools), where)
        try:
            text = chat.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and many refuse some orders of roles
            reason = one_line(error)
            problem = f"the model's chat template refuses it ({reason})"
            raise InputError(f"{where}: {problem}; leave the record out") from None
        return _checked(text, where)

    def encode(messages: list[Message], tools: Any, where: str, after: int | None = None) -> list[int]:
        if after is None:  # a template has added the special tokens
            return list(tokenizer.encode(text_of(messages, tools, where), add_special_tokens=chat is None).ids)
        answer = {"role": "assistant", "content": ANSWER}
        parts = text_of([*messages[:after], answer, *messages[after + 1 :]], tools, where).split(ANSWER)
        if len(parts) != 2:
            problem = f"the model's chat template has an earlier answer {len(parts) - 1} times"
            raise InputError(f"{where}: {problem}; leave the record out, or write dataset.records.turns=first")
        return list(tokenizer.encode(parts[1], add_special_tokens=False).ids)

    return encode


def _checked(text: str, where: str) -> str:
    return text_field({"conversation": text}, "conversation", where) or ""


def _as_lines(messages: list[Message], tools: Any) -> str:
    lines = [f"{message['role'].capitalize()}: {_said(message)}" for message in messages]
    offered = [f"Tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    return "\n".join([*offered, *lines, "Assistant:"])
