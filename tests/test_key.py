"""The key to a trial's server, and the middleware that asks for it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from autotune.live import gate, key

URL = "http://127.0.0.1:1"


def answer(monkeypatch: pytest.MonkeyPatch, folder: Path, header: str, kind: str = "http") -> list[Any]:
    """What a client gets that shows `header`: the messages of the gate, or of the server behind it."""
    monkeypatch.setenv("AUTOTUNE_KEY", key.gated(URL, folder, "")["AUTOTUNE_KEY"])
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await send("answer")

    name, _, value = header.partition(": ")
    scope = {"type": kind, "path": "/health", "headers": [(name.lower().encode(), value.encode())]}
    asyncio.run(gate.Gate(server)(scope, None, send))
    return sent


def test_who_shows_the_key_reaches_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert answer(monkeypatch, tmp_path, key.header(URL)) == ["answer"]
    assert answer(monkeypatch, tmp_path, "", "lifespan") == ["answer"]


@pytest.mark.parametrize(
    "header",
    ["", "Authorization: ", "Authorization: Bearer ", pytest.param(key.header(f"{URL}2"), id="another server's key")],
)
def test_who_shows_none_or_another_servers_is_refused(header: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert answer(monkeypatch, tmp_path, header)[0]["status"] == 401
    assert answer(monkeypatch, tmp_path, header, "websocket") == [{"type": "websocket.close", "code": 1008}]


def test_middleware_is_found_before_the_users_own_modules(tmp_path: Path):
    environment = key.gated(URL, tmp_path, "/own")
    assert environment["PYTHONPATH"] == f"{tmp_path}:/own" and (tmp_path / "autotune_gate.py").exists()
