"""A server that stays for several trials: for each its engine is changed, which takes a second, and not started again.

It starts with the most that the study asks for (backend.bounds). vLLM's own code tells whether a trial's flags differ
from that in nothing but what can be changed, and the engine says what is active then; else the trial gets a fresh one.
With backend.hot=same nothing is changed: a server as any other stays for trials of the same flags.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from autotune.config.redact import redact
from autotune.config.schema import Hot, Kind, LiveConfig, ScenarioConfig
from autotune.data.models import Model
from autotune.errors import BehindError, MeasureError, StartError, StoppedError
from autotune.live import key, recording
from autotune.live.gate import CHANGE
from autotune.live.installed_vllm import InstalledVllm
from autotune.live.server import Server, serve
from autotune.measure import progress
from autotune.measure.result import Result
from autotune.measure.slot import Slot
from autotune.system.files import write_whole

log = logging.getLogger(__name__)

# A run after a server's first trial, which is made again, on the same flags, after every CHECKED_EVERY changes.
REFERENCE = ScenarioConfig(name="reference", kind=Kind.Offline, min_queries=64, min_duration_s=0.0)
CHECKED_EVERY = 10
DRIFT = 0.1  # share by which the reference may become slower or faster …
RUNS = 3  # … in all of so many runs
GROWTH = 1.25  # factor by which the memory of its processes may grow
CHANGE_S = 60.0  # for a change, and for the requests of a trial that was stopped to end before it
POLL_S = 0.1


class ChangeError(MeasureError):
    """The server was not changed."""


class UnprovenError(ChangeError):
    """The server can't be changed, or did not become what it should: this vLLM is another than those that are known."""


@dataclass
class Shared:
    """A server that stays in a slot."""

    server: Server
    flags: dict[str, Any]  # with which it started
    trial: str  # that started it
    first: dict[str, Any] = field(default_factory=dict)  # that trial's flags, which the reference runs with
    changes: int = 0
    kv_tokens: int | None = None  # of the KV cache, since the last change
    log_at: int = 0  # bytes of its log that are earlier trials'
    start: dict[str, float] = field(default_factory=dict)  # seconds of what the last trial waited for, by part
    reference: tuple[float, int] | None = None  # requests/s of REFERENCE, bytes of memory
    checked: int = 0  # changes at the last check
    since: list[Path] = field(default_factory=list)  # folders of the trials since then

    @property
    def served(self) -> Server:
        told = f"shared: started by {self.trial}, changed {self.changes} times"
        return replace(self.server, start=self.start, kv_tokens=self.kv_tokens, told=told)

    def memory(self) -> int:
        """Bytes that its processes hold."""
        held = 0
        for process in psutil.Process(self.server.process.session).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                held += process.memory_info().rss
        return held


@dataclass(frozen=True)
class Sharing:
    """A trial, and what it needs to share the server in its slot."""

    config: LiveConfig
    vllm: InstalledVllm
    model: Model
    folder: Path  # the trial's
    slot: Slot
    rate: Callable[[Server], float]  # makes the run REFERENCE on a server: requests/s

    @contextmanager
    def serving(self, args: Mapping[str, Any]) -> Iterator[Server]:
        """Serve the model with `args`, by the slot's server if it can be changed to that. Raises StartError."""
        stays = False
        try:
            shared = None
            if self.slot.shares and self.config.hot is Hot.same:
                shared = self.kept(args)
            elif self.slot.shares and self.config.hot is Hot.auto and self.config.bounds is not None:
                shared = self.changed(args)
            if shared is None:
                self.slot.drop()
                with self._serve(args, "vllm.log") as server:
                    yield server
                return
            try:
                yield shared.served
                stays = True
            except (StoppedError, BehindError):  # the next change waits for the requests that are left
                stays = self.config.hot is Hot.auto
                raise
            finally:
                logged = shared.server.log.read_bytes()  # the trial's own part of it goes to its vllm.log
                write_whole(self.folder / "vllm.log", redact(logged[shared.log_at :].decode(errors="replace")))
                shared.log_at = len(logged)
                shared.since.append(self.folder)
        finally:
            if not stays:
                self.slot.drop()

    def _serve(
        self, args: Mapping[str, Any], log: str, changeable: bool = False, check: Callable[[], None] | None = None
    ) -> AbstractContextManager[Server]:
        given = (self.config, self.vllm, self.model, args, self.folder / log, self.slot.lease)
        return serve(*given, changeable=changeable, check=check or self._check_goes_on)

    def _check_goes_on(self) -> None:
        progress.check(self.folder)

    def kept(self, args: Mapping[str, Any]) -> Shared:
        """The slot's server if it runs and has the flags `args`, or a new one that stays there."""
        shared: Shared | None = self.slot.server
        if shared and shared.flags == args and shared.server.process.exit_code() is None:
            recording.forget(shared.server.scratch)
            write_whole(self.folder / "command.json", (shared.server.log.parent / "command.json").read_text())
            shared.start = {}
            return shared
        self.slot.drop()
        server = self.slot.keep(self._serve(args, "server.log"))
        shared = Shared(server, dict(args), self.folder.name, kv_tokens=server.kv_tokens, start=server.start)
        self.slot.server = shared
        return shared

    def changed(self, args: Mapping[str, Any]) -> Shared | None:
        """The slot's server, or a new one that stays there, changed to the flags `args`; None if it can't be."""
        shared: Shared | None = self.slot.server
        began = time.monotonic()
        runs = shared is not None and shared.server.process.exit_code() is None
        if shared and runs and self._is_as_it_was(shared) and self._try(shared, args):
            shared.start = {"change": time.monotonic() - began}
            log.info("changed the vLLM that %s started; its log: %s", shared.trial, shared.server.log)
            return shared
        self.slot.drop()
        return self._started(args) if self.slot.shares else None

    def _started(self, args: Mapping[str, Any]) -> Shared | None:
        flags = {**args, **{name: most(args.get(name), bound) for name, bound in (self.config.bounds or {}).items()}}
        # It starts beside the question whether it can be changed, for which a probe imports vLLM.
        with ThreadPoolExecutor() as pool:
            plan = pool.submit(self.vllm.change, self.model.folder, flags, args)

            def check() -> None:
                self._check_goes_on()
                if plan.done() and (refusal := plan.result()["refusal"]):
                    raise ChangeError(refusal)

            try:
                server = self.slot.keep(self._serve(flags, "server.log", changeable=True, check=check))
            except (ChangeError, StartError) as error:
                self.slot.shares = False
                how = "" if isinstance(error, ChangeError) else "with the most of what is swept, "
                log.warning("trials share no server: %s%s", how, error)
                return None
        self.slot.server = shared = Shared(server, flags, self.folder.name, dict(args))
        began = time.monotonic()
        if not self._try(shared, args):
            self.slot.shares = False  # not even the server that was started for this trial can serve it
            return None
        shared.start = {**server.start, "change": time.monotonic() - began}
        return shared

    def _is_as_it_was(self, shared: Shared) -> bool:
        """Make the reference run if that is due; False, and the trials since then are marked, if it has changed."""
        if shared.reference and shared.changes < shared.checked + CHECKED_EVERY:
            return True
        if not self._try(shared, shared.first):
            return False
        try:
            if first := shared.reference is None:  # its first trial's runs have warmed the server up
                shared.reference = self.rate(shared.served), shared.memory()
            rate, memory = shared.reference
            drift, growth = (0.0, 1.0) if first else (self._drift(shared, rate), shared.memory() / memory)
        except (MeasureError, psutil.Error) as error:  # no fault of this trial
            log.warning("another server, as the shared one fails: %s", error)
            return False
        if abs(drift) <= DRIFT and growth <= GROWTH:
            shared.checked = shared.changes
            shared.since.clear()
            return True
        what = f"serves {drift:+.0%} requests/s" if abs(drift) > DRIFT else f"holds {growth:.1f} times its memory"
        log.warning("another server: the shared one %s; its last %d trials are marked", what, len(shared.since))
        for folder in shared.since:
            if result := Result.find(folder):
                result.facts["server"] = f"{result.facts.get('server', 'shared')}; afterwards it {what}"
                result.save(folder)
        return False

    def _drift(self, shared: Shared, rate: float) -> float:
        """The share by which the reference is off `rate`, as the closest of up to RUNS runs has it."""
        off: list[float] = []
        while not off or (abs(off[-1]) > DRIFT and len(off) < RUNS):
            off.append(self.rate(shared.served) / rate - 1)
        return min(off, key=abs)

    def _try(self, shared: Shared, args: Mapping[str, Any]) -> bool:
        """Change the server; False, and a line that says why, if it can't become what it should, or did not."""
        plan = self.vllm.change(self.model.folder, shared.flags, args)
        if plan["refusal"]:
            log.info("another server: %s", plan["refusal"])
            return False
        try:
            active = change(shared.server, plan, self.folder)
        except (ChangeError, OSError) as error:
            log.warning("a fresh server, as the shared one was not changed: %s", error)
            self.slot.shares = not isinstance(error, UnprovenError)
            return False
        shared.changes += 1
        shared.kv_tokens = active["kv_tokens"]
        told = {"command": shared.server.command, "changes": plan["changes"], "active": active}
        write_whole(self.folder / "command.json", json.dumps(redact(told), indent=1))
        return True


def most(value: Any, bound: Any) -> Any:
    """The larger of a flag's value and its bound; the bound where the value is vLLM's default."""
    return bound if value is None else max(value, bound)


def change(server: Server, plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Change the engine of an idle server, and return what it reads back.

    Raises ChangeError if that is not what `plan` expects, OSError if the server does not answer.
    """
    deadline = time.monotonic() + CHANGE_S
    body = json.dumps(plan["changes"]).encode()
    while True:
        active: dict[str, Any] = json.loads(key.asked(server.url, CHANGE, CHANGE_S, "POST", body))
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
