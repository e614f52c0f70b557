"""Redaction: secrets never reach a file, a log or MLflow."""

import re
from typing import Any

SECRET_NAME = re.compile(r"(^|[._-])(token|key|secret|password|passwd|pwd|credentials?)$", re.IGNORECASE)
URL_SECRET = re.compile(r"(\w+://)(?:([^/\s:@]*):[^/\s]+|[^/\s]+)@")
HIDDEN = "***"


def redact(value: Any, name: str = "") -> Any:
    """`value` without passwords in URLs and without the values of secrets, told by name (`hf_token`, `API_KEY`)."""
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if SECRET_NAME.search(name) and value:
        return HIDDEN
    key, equals, _ = value.partition("=")
    if equals and SECRET_NAME.search(key):  # an override: backend.env.HF_TOKEN=…
        return f"{key}={HIDDEN}"
    return URL_SECRET.sub(lambda url: f"{url[1]}{f'{url[2]}:' if url[2] is not None else ''}{HIDDEN}@", value)
