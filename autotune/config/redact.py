"""Redaction: secrets never reach a file, a log, the terminal or MLflow.

Secret is what has a secret's name (NAME, or one of the user's `secrets=[…]`), in a field, JSON, words, a URL or a text,
and what looks like a key of a service (KEY). What was hidden once is hidden wherever it appears later.
"""

import html
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote, unquote

HIDDEN = "***"
USERS = "secrets"  # the field that lists more names
NAME = (
    r"(?i:[\w-]*(?:password|passwd|passphrase|pgpass|secret|credential|api[_-]?key|access[_-]?key|private[_-]?key)[\w-]*"
    r"|(?:[\w-]*[_-])?(?<!per_)(?:token|key|pwd|pass|pat|sas|auth|authorization|cookie|jwt))|[\w-]*[a-z](?:Token|Key)"
)
KEY = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AKIA\w{16}"
    r"|AIza[\w-]{30,}|nvapi-[\w-]{16,}|eyJ[\w-]+\.[\w-]+\.[\w-]+)|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*"
)
URL = re.compile(r"""(\w[\w+.-]{0,30}://)([^\s:/@"'<>]*)(?::([^\s"'<>]*))?@""")
PORT = re.compile(r"\d{1,5}(?=[/?#])")
BEARER = re.compile(r"""(?i)(authorization["']?\s*[:=]\s*["']?(?:bearer|basic)\s+|\bbearer\s+)([^\s"',]{8,})""")
VALUE = r"""\\+"(?:(?!\\+").)*\\+"|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^\s,;&"'{}\[\]()<>=\\][^\s,;&"'{}\[\]()<>]*"""
NOTHING = {"", HIDDEN, "null", "none", "true", "false", "value", "…", "bearer", "basic"}
PLAIN = re.compile(r".{0,5}|[a-z]{0,15}|[A-Z]{0,15}|[\d.]*|\$.*", re.DOTALL)  # found in a text by chance

_names: set[str] = set()
_hidden: set[str] = set()


class Deployable(str):
    """A text to deploy, made of files without secrets, in which `HF_TOKEN: ${HF_TOKEN}` is meant as it stands."""


def redact(value: Any, name: str = "") -> Any:
    """`value` of the field `name` (a dotted path) without its secrets."""
    if isinstance(value, dict):
        return {key: redact(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if name == USERS:
            return list(value)
        flags = [word.lstrip("-") if word.startswith("-") else "" for word in ["", *map(str, value)]]
        return [redact(item, flag if is_secret(flag) else name) for flag, item in zip(flags, value, strict=False)]
    if is_secret(name) and value is not None and str(value).lower() not in NOTHING:
        return _hide(str(value))
    return _text(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Tell whether a field of this dotted path holds a secret, or lies below one that does."""
    if not name or name == USERS:
        return False
    named = any(name.lower() == own or name.lower().endswith(f".{own}") for own in _names)
    return named or any(re.fullmatch(NAME, part) for part in name.split("."))


def add_names(names: Iterable[str]) -> None:
    """Count these names of fields and variables as secret, too."""
    _names.update(name.lower() for name in names)


def install(words: Iterable[str] = ()) -> None:
    """From here on this process prints and logs no secret of its environment and of `words`, its command line."""
    for word in words:
        if word.startswith(f"{USERS}="):
            add_names(re.findall(r"[\w.-]+", word.partition("=")[2]))
    for name, value in [*os.environ.items(), *(("", word) for word in words)]:
        if name not in ("PWD", "OLDPWD"):
            redact(value, name)
    logging.setLogRecordFactory(_record)
    sys.stdout, sys.stderr = (one if isinstance(one, _Stream) else _Stream(one) for one in (sys.stdout, sys.stderr))


def _record(*arguments: Any, **more: Any) -> logging.LogRecord:
    record = logging.LogRecord(*arguments, **more)
    try:
        record.msg, record.args = _text(record.getMessage()), None
        if record.exc_info and record.exc_info[1]:
            record.exc_text = _text("".join(traceback.format_exception(record.exc_info[1])).rstrip())
    except (TypeError, ValueError):  # a mistake in the call, which logging tells of itself
        pass
    return record


class _Stream:
    """A text stream that writes no secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _text(text: str) -> str:
    if len(text) < 4:
        return text
    if isinstance(text, Deployable):
        return KEY.sub(HIDDEN, _without_hidden(text))
    if text.lstrip()[:1] in ("{", "["):
        try:
            hidden = redact(body := json.loads(text))
            return text if hidden == body else json.dumps(hidden)
        except (ValueError, RecursionError):  # no JSON, or nested too deep
            pass
    key, equals, value = text.partition("=")
    if equals and value and re.fullmatch(r"[+~]*[\w./@:-]+", key) and is_secret(key.lstrip("+~")):  # an override
        return f"{key}={value if value.lower() in NOTHING else _hide(value)}"
    text = URL.sub(_in_url, _without_hidden(text))
    quoted, *others = _of_names(frozenset(_names))
    text = quoted.sub(lambda found: f"{found[1]}{found[2]}={_hide(found[3])}{found[1]}", text)
    for pattern in (BEARER, *others):
        text = pattern.sub(lambda found: found[1] + _hide_quoted(found[2]), text)
    return KEY.sub(lambda found: _hide(found[0]), text)


def _without_hidden(text: str) -> str:
    return _of_hidden(len(_hidden)).sub(HIDDEN, text) if _hidden else text


@lru_cache(1)
def _of_hidden(count: int) -> re.Pattern[str]:
    """Every value that was hidden so far, of which there are `count`."""
    return re.compile("|".join(map(re.escape, sorted(_hidden, key=len, reverse=True))))


@lru_cache(1)
def _of_names(names: frozenset[str]) -> tuple[re.Pattern[str], ...]:
    """Secrets in a text: 'TOKEN=…' in quotes, then TOKEN=… and "token": …, {token: …}, --token …"""
    own = "".join(rf"|(?i:{re.escape(name)})" for name in sorted(names))
    name = rf"(?<![\w-])(?!{USERS}=)(?:{NAME}{own})"
    return (
        re.compile(rf"""(["'])((?:[\w-]+\.)*{name})=((?:\\.|(?!\1).)+)\1"""),
        re.compile(rf"""({name}(?:\\*["']?\s?=\s?|\\*["']\s*:\s*|:(?=[\w"'\\])))({VALUE})"""),
        re.compile(rf"(?m)((?:^[^\S\n]*|[{{,]\s*){name}:\s+)({VALUE})"),
        re.compile(rf"(--?{name}\s+(?!-))({VALUE})"),
    )


def _in_url(found: re.Match[str]) -> str:
    scheme, user, password = found.groups()
    if password is None:
        return f"{scheme}{_hide(user)}@" if user else found[0]
    if PORT.match(password) and ("." in user or user == "localhost"):
        return found[0]  # http://127.0.0.1:5000/a@b
    return f"{scheme}{user}:{_hide(password)}@"


def _hide_quoted(value: str) -> str:
    bare = value.strip("\\\"'")
    if bare.lower() in NOTHING:
        return value
    return value.replace(bare, _hide(bare))


def _hide(value: str) -> str:
    """HIDDEN; `value` is remembered in each form in which it may appear again, unless that may be by chance."""
    for one in {value, unquote(value), value.strip("\"'")}:
        forms = {one, json.dumps(one)[1:-1], json.dumps(one, ensure_ascii=False)[1:-1], repr(one)[1:-1]}
        forms |= {quote(one), quote(one, safe=""), html.escape(one), shlex.quote(one), one.replace("'", "\\'")}
        _hidden.update(form for form in forms if not PLAIN.fullmatch(form))
    return HIDDEN
