import os
import urllib.request

import pytest

from autotune.system.loopback import keep_off_proxies


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_loopback_is_reached_without_the_users_proxy(name: str, monkeypatch: pytest.MonkeyPatch):
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv(name, "internal.example")
    keep_off_proxies()
    assert urllib.request.proxy_bypass("127.0.0.1:8000") and urllib.request.proxy_bypass("localhost")
    assert urllib.request.proxy_bypass("internal.example") and not urllib.request.proxy_bypass("huggingface.co")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
