"""Keys of the trials' servers, each made of the server's URL and a secret that only this study's processes know."""

import hmac
import os
import secrets
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

GATE = Path(__file__).with_name("gate.py")
FLAGS = ["--middleware", "autotune_gate.Gate"]  # of `vllm serve`
SECRET = "AUTOTUNE_SECRET"

_secret = os.environ.get(SECRET) or secrets.token_hex(32)


def environment() -> dict[str, str]:
    """Environment of a process that talks to servers of this one."""
    return {SECRET: _secret}


def gated(url: str, folder: Path, python_path: str) -> dict[str, str]:
    """The environment of the server at `url` with FLAGS, beside `python_path`; the middleware is copied to `folder`."""
    shutil.copyfile(GATE, folder / "autotune_gate.py")
    return {"AUTOTUNE_KEY": _key(url), "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), python_path]))}


def header(url: str) -> str:
    """The line of an HTTP request that shows the key of the server at `url`."""
    return f"Authorization: Bearer {_key(url)}"


def asked(server: str, path: str, timeout_s: float, method: str = "GET", body: bytes | None = None) -> bytes:
    """The body of the answer of the server at the URL `server`. Raises OSError, also for a status other than 2xx."""
    name, _, value = header(server).partition(": ")
    headers = {name: value, "Content-Type": "application/json"}
    request = urllib.request.Request(server + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except HTTPException as error:  # it died in mid-answer, or is no server of HTTP
        raise OSError(f"{type(error).__name__}: {error}") from None


def _key(url: str) -> str:
    return hmac.digest(_secret.encode(), url.encode(), "sha256").hex()
