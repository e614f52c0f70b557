"""A middleware that vLLM loads in its own interpreter: whoever does not know the trial's key gets 401, on every route.

vLLM's own key guards only some: not /collective_rpc or /update_weights, which its dev mode offers to all local users.
"""

import hmac
import os
from typing import Any


class Gate:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['AUTOTUNE_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or any(
            name == b"authorization" and hmac.compare_digest(value, self._expected) for name, value in scope["headers"]
        ):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})
