"""A place for one trial at a time: its GPUs, and a server that may stay on them for the next trial."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from autotune.system.leases import Lease, are_awaited, devices, lease

T = TypeVar("T")


class Slot:
    """Holds what outlives a trial. It is for one trial at a time, and to be closed."""

    def __init__(self, shares: bool = False) -> None:
        """A server may stay for the next trial in one that `shares`."""
        self.shares = shares
        self.server: Any = None  # that a backend keeps here
        self.lease: Lease | None = None  # of the trial that runs
        self._leased_for: tuple[Any, int] | None = None
        self._lease_held, self._server_held = ExitStack(), ExitStack()

    @contextmanager
    def leased(self, gpus: Any, count: int, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Lease `count` of `gpus`, which are given back unless a server stays on them.

        Raises InputError, and what `check` raises while it waits for them.
        """
        if self._leased_for != (gpus, count):
            self.close()
            self.lease = None if gpus is None else self._lease_held.enter_context(lease(devices(gpus), count, check))
            self._leased_for = gpus, count
        try:
            yield
        finally:
            self.make_way()

    def keep(self, serving: AbstractContextManager[T]) -> T:
        """Enter a server's context, which ends with `drop`, and not with the trial."""
        return self._server_held.enter_context(serving)

    def make_way(self) -> None:
        """Give the GPUs back if there is no server on them, or if another trial waits for some."""
        if self.server is None or (self.lease and are_awaited()):
            self.close()

    def drop(self) -> None:
        """End the server that stays here, if any."""
        self.server = None
        self._server_held.close()

    def close(self) -> None:
        self.drop()
        self.lease, self._leased_for = None, None
        self._lease_held.close()
