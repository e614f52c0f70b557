"""A middleware that vLLM loads in its own interpreter: whoever does not know the trial's key gets 401, on every route.

vLLM's own key guards only some: not /collective_rpc or /update_weights, which its dev mode offers to all local users.
It adds a route to vLLM's, CHANGE, which has the engine changed by hot_engine.py.
"""

import hmac
import json
import os
from typing import Any

CHANGE = "/autotune/change"


class Gate:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['AUTOTUNE_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or any(
            name == b"authorization" and hmac.compare_digest(value, self._expected) for name, value in scope["headers"]
        ):
            if scope["type"] == "http" and scope["path"] == CHANGE:
                await answer(send, 200, await changed(scope["app"], await body(receive)))
            else:
                await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(send, 401)


async def changed(app: Any, changes: bytes) -> bytes:
    """Change the engine; returns what it answers, as JSON."""
    try:
        engine = app.state.engine_client.engine_core
        return json.dumps(await engine.call_utility_async("autotune_change", json.loads(changes))).encode()
    except Exception as error:  # of a vLLM that has another engine; the trial takes a fresh server
        return json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()


async def body(receive: Any) -> bytes:
    message = {"more_body": True}
    content = b""
    while message.get("more_body"):
        message = await receive()
        content += message.get("body", b"")
    return content


async def answer(send: Any, status: int, content: bytes = b"") -> None:
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length]})
    await send({"type": "http.response.body", "body": content})
