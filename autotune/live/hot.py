"""A server that stays for several trials: for each its engine is changed, which takes a second, and not started again.

It starts with the most that the study asks for (backend.bounds). vLLM's own code tells whether a trial's flags differ
from that in nothing but what can be changed, and the engine says what is active then; else the trial gets a fresh one.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.config.redact import redact
from autotune.config.schema import Hot, LiveConfig
from autotune.data.models import Model
from autotune.errors import BehindError, MeasureError, StartError, StoppedError
from autotune.live import key, recording, vllm_log
from autotune.live.gate import CHANGE
from autotune.live.installed_vllm import InstalledVllm
from autotune.live.server import Server, serve
from autotune.measure import progress
from autotune.measure.slot import Slot
from autotune.system.files import write_whole

log = logging.getLogger(__name__)

CHANGE_S = 60.0  # for a change, and for the requests of a trial that was stopped to end before it
POLL_S = 0.1


class ChangeError(MeasureError):
    """The server was not changed."""


class UnprovenError(ChangeError):
    """The server can't be changed, or did not become what it should: this vLLM is another than those that are known."""


@dataclass(frozen=True)
class Served:
    """A server that has the flags of a trial."""

    server: Server
    start: dict[str, float]  # seconds that the trial waited for it, by part
    kv_tokens: int | None  # of its KV cache; None if vLLM has not said
    told: str = "fresh"  # what a result's facts say of it


@dataclass
class Shared:
    """A server that stays in a slot."""

    server: Server
    flags: dict[str, Any]  # with which it started
    trial: str  # that started it
    changes: int = 0
    kv_tokens: int = 0  # of the KV cache, since the last change
    log_at: int = 0  # bytes of its log that are earlier trials'
    start: dict[str, float] = field(default_factory=dict)  # seconds of what the last trial waited for, by part

    @property
    def told(self) -> str:
        """Its description among a result's facts."""
        return f"shared: started by {self.trial}, changed {self.changes} times"


@contextmanager
def serving(
    config: LiveConfig,
    vllm: InstalledVllm,
    model: Model,
    args: Mapping[str, Any],
    folder: Path,
    slot: Slot,
) -> Iterator[Served]:
    """Serve `model` with the flags `args` until the block ends: by the slot's server, if it can be changed to that.

    Raises StartError.
    """
    shared = None
    if slot.shares and config.bounds is not None and config.hot is Hot.auto:
        shared = _changed(config, vllm, model, args, folder, slot)
    if shared is None:
        slot.drop()
        with serve(config, vllm, model, args, folder / "vllm.log", slot.lease) as server:
            yield Served(server, server.start, vllm_log.kv_tokens(server.log))
        return
    stays = False
    try:
        yield Served(shared.server, shared.start, shared.kv_tokens, shared.told)
        stays = True
    except (StoppedError, BehindError):  # the next change waits for the requests that are left
        stays = True
        raise
    finally:
        _keep_log(shared, folder)
        if not stays:
            slot.drop()


def _changed(
    config: LiveConfig,
    vllm: InstalledVllm,
    model: Model,
    args: Mapping[str, Any],
    folder: Path,
    slot: Slot,
) -> Shared | None:
    """The slot's server, or a new one that stays there, changed to the flags `args`; None if it can't be."""
    shared: Shared | None = slot.server
    began = time.monotonic()
    if shared and shared.server.process.exit_code() is None:
        plan = vllm.change(model.folder, shared.flags, args)
        if not plan["refusal"] and _try(shared, plan, folder, slot):
            shared.start = {"change": time.monotonic() - began}
            return shared
        if plan["refusal"]:
            log.info("another server: %s", plan["refusal"])
    slot.drop()
    flags = {**args, **{name: most(args.get(name), bound) for name, bound in (config.bounds or {}).items()}}
    vllm.probe()  # its import of vLLM goes on while the server starts
    try:
        server = slot.keep(serve(config, vllm, model, flags, folder / "server.log", slot.lease, changeable=True))
    except StartError as error:
        slot.shares = False
        log.warning("trials share no server: with the most of what is swept, %s", error)
        return None
    slot.server = shared = Shared(server, flags, folder.name)
    began = time.monotonic()
    plan = vllm.change(model.folder, flags, args)
    if plan["refusal"]:
        slot.shares = False
        log.warning("trials share no server: %s", plan["refusal"])
        return None
    if not _try(shared, plan, folder, slot):
        return None
    shared.start = {**server.start, "change": time.monotonic() - began}
    return shared


def most(value: Any, bound: Any) -> Any:
    """The larger of a flag's value and its bound; the bound where the value is vLLM's default."""
    return bound if value is None else max(value, bound)


def _try(shared: Shared, plan: Mapping[str, Any], folder: Path, slot: Slot) -> bool:
    """Change the server; False, and a line that says why, if it did not become what it should."""
    try:
        active = change(shared.server, plan, folder)
    except (ChangeError, OSError) as error:
        log.warning("a fresh server, as the shared one was not changed: %s", error)
        slot.shares = not isinstance(error, UnprovenError)
        return False
    shared.changes += 1
    shared.kv_tokens = active["kv_tokens"]
    write_whole(
        folder / "command.json",
        json.dumps(redact({"command": shared.server.command, "changes": plan["changes"], "active": active}), indent=1),
    )
    return True


def change(server: Server, plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Change the engine of an idle server, and return what it reads back.

    Raises ChangeError if that is not what `plan` expects, OSError if the server does not answer.
    """
    deadline = time.monotonic() + CHANGE_S
    body = json.dumps(plan["changes"]).encode()
    while True:
        with key.opened(server.url, CHANGE, CHANGE_S, "POST", body) as response:
            active: dict[str, Any] = json.loads(response.read())
        if not active.get("error", "").startswith("not idle") or time.monotonic() > deadline:
            break
        progress.check(folder)
        time.sleep(POLL_S)
    if "error" in active:
        known = active["error"].startswith(("not idle", "ValueError"))
        raise (ChangeError if known else UnprovenError)(active["error"])
    if wrong := [name for name, value in plan["expected"].items() if active.get(name) != value]:
        raise UnprovenError(f"{wrong[0]} is {active.get(wrong[0])}, and not {plan['expected'][wrong[0]]}")
    recording.forget(server.scratch)
    return active


def _keep_log(shared: Shared, folder: Path) -> None:
    """Leave what the server has logged since the last trial in the trial's own vllm.log."""
    text = shared.server.log.read_bytes()
    write_whole(folder / "vllm.log", redact(text[shared.log_at :].decode(errors="replace")))
    shared.log_at = len(text)
