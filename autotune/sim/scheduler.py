"""vLLM V1's scheduler: it decides how many tokens of each request the next step computes.

There are no phases: a request has `computed` tokens in the KV cache and needs more. A request that decodes needs one
token a step: it is only counted, and visited in the step in which it needs a block or generates its last token. First
come, first served is priority scheduling with equal priorities. One thing is left out: with priorities, vLLM keeps a
block in the prefix cache whose last token was to be computed in the very step that preempts its request.
"""

import heapq
from collections import defaultdict
from dataclasses import InitVar, dataclass, field

from autotune.sim.flags import Flags
from autotune.sim.kv_cache import BlockTable, KvCache, Prefix


@dataclass(slots=True, eq=False)
class Request:
    """`prompt` tokens in, `output` tokens out; times are seconds on the run's clock."""

    number: int  # in order of arrival
    prompt: int
    output: int
    prefix: InitVar[Prefix] = ()
    priority: int = 0  # the lowest is served first
    block_table: BlockTable = field(init=False)
    length: int = field(init=False)  # tokens to compute before it decodes; after a preemption, its generated ones, too
    order: int = 0  # of admission
    due: int = 0  # while it decodes: the next step that must visit it; else 0
    since: int = 0  # while it decodes: the step before which the next two held; each step since adds one to both
    computed: int = 0
    generated: int = 0
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self, prefix: Prefix) -> None:
        self.block_table, self.length = BlockTable(prefix), self.prompt

    def __lt__(self, other: "Request") -> bool:
        return (self.priority, self.number) < (other.priority, other.number)


@dataclass
class Batch:
    """One step's work."""

    chunks: dict[Request, int] = field(default_factory=dict)  # requests in prefill → tokens of each …
    prefilled: int = 0  # … and of all
    attended: float = 0.0  # tokens that each prefilled token attends to, summed
    decodes: int = 0  # requests that generate from one token
    context: int = 0  # the decodes' tokens in the KV cache, summed
    first: list[Request] = field(default_factory=list)  # requests whose first token it generates
    last: list[Request] = field(default_factory=list)  # requests whose last token it generates
    preempted: list[Request] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.decodes + self.prefilled

    def prefill(self, request: Request, tokens: int) -> None:
        self.chunks[request] = tokens
        self.prefilled += tokens


class Scheduler:
    """The scheduler of one engine with vLLM's `flags`, whose requests share `cache`."""

    def __init__(self, flags: Flags, cache: KvCache) -> None:
        self.flags = flags
        self.cache = cache
        self._watermark = int(flags.watermark * (cache.blocks + 1))  # vLLM keeps one block for itself
        self.running: dict[Request, None] = {}  # in order of admission
        self.waiting: list[Request] = []  # a heap
        self._prefilling: dict[Request, None] = {}
        self._visits: defaultdict[int, dict[Request, None]] = defaultdict(dict)  # decoding requests by `due`
        self._decoding = 0  # how many requests decode …
        self._context = 0  # … and their tokens in the KV cache
        self._step = 0
        self._in_flight = 0  # steps with tokens that are not finished: with vLLM's async scheduling, one
        self._admitted = 0
        self.hits = self.queries = 0  # tokens of prompts that were in the prefix cache, and that were looked for

    def add(self, request: Request) -> None:
        heapq.heappush(self.waiting, request)

    def schedule(self) -> Batch:
        """Decide the next step; requests in its `last` stay in `running` until `finish(batch)`."""
        self._step += 1
        batch = Batch()
        requests, longest = len(self.running) + len(self.waiting), self.flags.max_num_batched_tokens
        if (threshold := self.flags.long_prefill_token_threshold) and requests > 1:
            share = longest // requests if self.flags.long_prefill_token_threshold_adaptive else 0
            longest = max(threshold, share)
        paused = self._continue(batch, longest)
        batch.decodes = self._decoding - len(paused)
        batch.context = self._context - sum(map(self._computed, paused))
        if not batch.preempted:
            self._admit(batch, longest)
        self._advance(batch, paused)
        self._in_flight += batch.tokens > 0
        return batch

    def finish(self, batch: Batch) -> None:
        """End the step `batch`: requests that it completed leave, and their blocks are freed."""
        self._in_flight -= batch.tokens > 0
        for request in sorted(batch.last, key=lambda r: r.order):
            if request in self.running:
                del self.running[request]
                self.cache.free(request.block_table, request.computed)

    def _continue(self, batch: Batch, longest: int) -> list[Request]:
        """Schedule the running requests; returns those that decode and get no token."""
        visits = [request for request in self._visits.pop(self._step, ()) if request.due == self._step]
        for request in sorted([*visits, *self._prefilling], key=lambda r: r.order):
            if request not in self.running:  # preempted in this step
                continue
            tokens = 1
            if not request.due:
                # Only the last request admitted can need more than is left: the others had their tokens before it came.
                left = self.flags.max_num_batched_tokens - self._decoding - batch.prefilled
                tokens = min(request.length - request.computed, longest, left)
            while not self.cache.allocate(request.block_table, self._computed(request) + tokens):
                victim = max(self.running)
                self._preempt(victim, batch)
                if victim is request:
                    return [r for r in self.running if r.due and r.order > request.order]
            if not request.due:
                batch.prefill(request, tokens)
            elif self._left(request) == 1:
                batch.last.append(request)
            else:
                self._plan(request)
        return []

    def _admit(self, batch: Batch, longest: int) -> None:
        """Admit waiting requests while the sequences, the step's tokens and the free blocks allow it."""
        budget = self.flags.max_num_batched_tokens - batch.tokens
        most = self.flags.max_num_active_seqs or self.flags.max_num_seqs
        while self.waiting and budget > 0 and len(self.running) < most:
            request = self.waiting[0]
            prefix = self.cache.find(request.block_table, request.length)
            start = len(prefix) * self.cache.cached_size
            tokens = min(request.length - start, longest)
            if tokens > budget and not self.flags.enable_chunked_prefill:
                return
            tokens = min(tokens, budget)
            if not self.cache.fits(request.length, prefix, self._watermark if self.running else 0):
                return
            heapq.heappop(self.waiting)
            self.cache.allocate_cached(request.block_table, prefix)
            self.cache.allocate(request.block_table, start + tokens)
            self._admitted += 1
            if not request.order:  # vLLM counts no request again that was preempted
                self.hits += start
                self.queries += request.length
            request.order, request.computed = self._admitted, start
            self.running[request] = self._prefilling[request] = None
            batch.prefill(request, tokens)
            budget -= tokens

    def _advance(self, batch: Batch, paused: list[Request]) -> None:
        """Count the tokens that the step computes and generates."""
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
        """Tokens that a decoding request has still to generate, this step's included."""
        return request.output - request.generated - (self._step - request.since)

    def _plan(self, request: Request) -> None:
        """Plan the next visit of a decoding request: when its blocks are full, or for its last token."""
        full = request.since + self.cache.block_size * request.block_table.count - request.computed
        last = request.since + request.output - request.generated - 1
        request.due = min(full, last)
        self._visits[request.due][request] = None

    def _preempt(self, request: Request, batch: Batch) -> None:
        """Put `request` back into the queue without blocks: its prompt and generated tokens are computed again."""
        del self.running[request]
        batch.preempted.append(request)
        computed = self._computed(request)
        # A token that a step in flight is still to generate makes no block full.
        self.cache.free(request.block_table, computed - self._in_flight)
        if request.due:
            self._decoding -= 1
            self._context -= computed
            request.generated += self._step - request.since
            request.due = 0
            if request in batch.last:
                batch.last.remove(request)
        elif request in self._prefilling:
            del self._prefilling[request]
            batch.prefilled -= batch.chunks.pop(request, 0)
        if request.generated < request.output:  # else a step in flight generates its last token
            request.length, request.computed = request.prompt + request.generated, 0
            heapq.heappush(self.waiting, request)
