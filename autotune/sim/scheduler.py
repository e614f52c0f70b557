"""vLLM V1's scheduler: which request gets how many tokens of the next step.

There are no phases: a request has `computed` tokens in the KV cache and needs more. One that only decodes needs one
token a step, so it is counted and not visited until the step in which it needs a block or generates its last token.
First come, first served is priority scheduling with equal priorities. One thing is left out: with priorities, vLLM
keeps a block in the prefix cache whose last token was to be computed in the very step that preempts its request.
"""

import heapq
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from autotune.sim.kv_cache import Holder, KvCache


class Request:
    """`prompt` tokens in, `output` tokens out; times are seconds on the run's clock."""

    __slots__ = (
        *("number", "arrival", "prompt", "output", "priority", "held"),
        *("length", "computed", "generated", "order", "since", "due", "first_token", "last_token"),
    )

    def __init__(
        self,
        number: int,
        prompt: int,
        output: int,
        arrival: float = 0.0,
        prefix: Sequence[Hashable] = (),
        priority: int = 0,
    ) -> None:
        self.number = number  # in order of arrival
        self.arrival = arrival
        self.prompt = prompt
        self.output = output
        self.priority = priority  # the lower goes first
        self.held = Holder(prefix)
        self.length = prompt  # tokens to compute before it decodes: more after a preemption
        self.order = 0  # of admission
        self.due = 0  # the next step that must visit it while it decodes, else 0
        self.since = 0  # while it decodes: the step that found the next two as they are; each step adds one to both
        self.computed = 0
        self.generated = 0
        self.first_token = self.last_token = 0.0

    def __lt__(self, other: "Request") -> bool:
        return (self.priority, self.number) < (other.priority, other.number)


@dataclass
class Batch:
    """One step."""

    chunks: dict[Request, int] = field(default_factory=dict)  # prefills and how many tokens of each
    attended: float = 0.0  # sum over prefilled tokens of the tokens each attends to
    decodes: int = 0  # requests that generate from one token
    context: int = 0  # sum of the decodes' tokens in the KV cache
    first: list[Request] = field(default_factory=list)  # those whose first token it generates
    last: list[Request] = field(default_factory=list)  # those whose last token it generates
    preempted: list[Request] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.decodes + sum(self.chunks.values())


@dataclass(frozen=True)
class Limits:
    """vLLM's flags of the same names. It refuses a `max_num_batched_tokens` below `max_num_seqs`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    watermark_blocks: int = 0


class Scheduler:
    def __init__(self, limits: Limits, cache: KvCache) -> None:
        self.limits = limits
        self.cache = cache
        self.running: dict[Request, None] = {}  # in order of admission
        self.waiting: list[Request] = []  # a heap
        self._prefilling: dict[Request, None] = {}
        self._visits: defaultdict[int, dict[Request, None]] = defaultdict(dict)  # decoding requests by `due`
        self._decoding = 0  # how many there are …
        self._context = 0  # … and their tokens in the KV cache
        self._step = 0
        self._in_flight = 0  # steps with tokens before their `finish`: with vLLM's async scheduling, one
        self._admitted = 0

    def add(self, request: Request) -> None:
        heapq.heappush(self.waiting, request)

    def schedule(self) -> Batch:
        """Decide the next step; requests in its `last` stay in `running` until `finish`."""
        self._step += 1
        batch = Batch()
        alone = len(self.running) + len(self.waiting) == 1
        longest = self.limits.max_num_batched_tokens
        if self.limits.long_prefill_token_threshold and not alone:
            longest = self.limits.long_prefill_token_threshold
        paused = self._continue(batch, longest)
        batch.decodes = self._decoding - len(paused)
        batch.context = self._context - sum(map(self._computed, paused))
        if not batch.preempted:
            self._admit(batch, longest)
        self._advance(batch, paused)
        self._in_flight += batch.tokens > 0
        return batch

    def finish(self, batch: Batch) -> None:
        """Let go of the requests that `batch` completed."""
        self._in_flight -= batch.tokens > 0
        for request in sorted(batch.last, key=lambda r: r.order):
            if request in self.running:
                del self.running[request]
                self.cache.release(request.held, request.computed)

    def _continue(self, batch: Batch, longest: int) -> list[Request]:
        """Give the running requests tokens and blocks; returns the decoding ones that get none."""
        visits = [request for request in self._visits.pop(self._step, ()) if request.due == self._step]
        for request in sorted([*visits, *self._prefilling], key=lambda r: r.order):
            if request not in self.running:  # preempted a moment ago
                continue
            tokens = 1
            if not request.due:
                # Only the last one admitted can want more than is left: the others had theirs before it came.
                left = self.limits.max_num_batched_tokens - self._decoding - sum(batch.chunks.values())
                tokens = min(request.length - request.computed, longest, left)
            while not self.cache.grow(request.held, self._computed(request) + tokens):
                victim = max(self.running)
                self._preempt(victim, batch)
                if victim is request:
                    return [r for r in self.running if r.due and r.order > request.order]
            if not request.due:
                batch.chunks[request] = tokens
            elif self._left(request) == 1:
                batch.last.append(request)
            else:
                self._plan(request)
        return []

    def _admit(self, batch: Batch, longest: int) -> None:
        """Take in waiting requests while there are tokens, seats, and blocks for a whole prompt."""
        budget = self.limits.max_num_batched_tokens - batch.tokens
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            request = self.waiting[0]
            found = self.cache.find(request.held, request.length)
            start = len(found) * self.cache.block_size
            tokens = min(request.length - start, longest)
            if tokens > budget and not self.limits.enable_chunked_prefill:
                return
            tokens = min(tokens, budget)
            if not self.cache.fits(request.length, found, self.limits.watermark_blocks if self.running else 0):
                return
            heapq.heappop(self.waiting)
            self.cache.adopt(request.held, found)
            self.cache.grow(request.held, start + tokens)
            self._admitted += 1
            request.order, request.computed = self._admitted, start
            self.running[request] = self._prefilling[request] = None
            batch.chunks[request] = tokens
            budget -= tokens

    def _advance(self, batch: Batch, paused: list[Request]) -> None:
        """What the step changes: every token that it computes and generates."""
        self._context += batch.decodes
        for request in paused:
            request.since += 1
            request.due += 1
            self._visits[request.due][request] = None
        for request in batch.last:
            self._decoding -= 1
            self._context -= self._computed(request) + 1
            request.generated, request.computed, request.due = request.output, request.prompt + request.output - 1, 0
        for request, tokens in batch.chunks.items():
            batch.attended += tokens * (request.computed + tokens / 2)
            request.computed += tokens
            if request.computed < request.length:
                continue
            del self._prefilling[request]
            request.generated += 1
            if request.generated == 1:
                batch.first.append(request)
            if request.generated == request.output:
                batch.last.append(request)
                continue
            request.since = self._step + 1
            self._decoding += 1
            self._context += request.computed
            self._plan(request)

    def _computed(self, request: Request) -> int:
        return request.computed + (self._step - request.since if request.due else 0)

    def _left(self, request: Request) -> int:
        """Tokens that a decoding request still generates, this step's included."""
        return request.output - request.generated - (self._step - request.since)

    def _plan(self, request: Request) -> None:
        """Visit a decoding request when its blocks are full, or for its last token."""
        full = request.since + self.cache.block_size * request.held.blocks - request.computed
        last = request.since + request.output - request.generated - 1
        request.due = min(full, last)
        self._visits[request.due][request] = None

    def _preempt(self, request: Request, batch: Batch) -> None:
        """Back to the queue, with nothing in the cache: its prompt and what it generated are computed again."""
        del self.running[request]
        batch.preempted.append(request)
        computed = self._computed(request)
        # A token that is still to come from a step in flight is part of no block that can be found.
        self.cache.release(request.held, computed - self._in_flight)
        if request.due:
            self._decoding -= 1
            self._context -= computed
            request.generated += self._step - request.since
            request.due = 0
            if request in batch.last:
                batch.last.remove(request)
        elif request in self._prefilling:
            del self._prefilling[request]
            batch.chunks.pop(request, None)
        if request.generated < request.output:  # else its last token is on its way
            request.length, request.computed = request.prompt + request.generated, 0
            heapq.heappush(self.waiting, request)
