"""Loopback addresses: vLLM, LoadGen and a local MLflow are never reached through a proxy."""

import os

ADDRESSES = ("127.0.0.1", "localhost", "::1")


def keep_off_proxies() -> None:
    """Except this machine from the proxies of the environment, for this process and those that it starts."""
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name for name in excepted.split(",") if name]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*names, *ADDRESSES]))
