"""vLLM's KV cache: the blocks of tokens that requests refer to, and what prefix caching finds in them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Prefix = Sequence[Hashable] | Callable[[], Sequence[Hashable]]


@dataclass(slots=True, eq=False)
class Block:
    """A full block that is cached, or several in a row: it can be found by its key."""

    key: Hashable
    ref_count: int = 1


class BlockTable:
    """A request's blocks. `prefix` has a key for each cached block of its prompt; equal keys mean equal beginnings."""

    def __init__(self, prefix: Prefix = ()) -> None:
        self._prefix = prefix
        self.count = 0  # of them
        self.cached: list[Block] = []  # the first of them

    @cached_property
    def prefix(self) -> Sequence[Hashable]:
        """The keys, made when they are first looked for: many requests may wait until then."""
        return self._prefix() if callable(self._prefix) else self._prefix

    def key(self, index: int) -> Hashable:
        """The key of block `index`; generated tokens have a key of this request's own, for after a preemption."""
        return self.prefix[index] if index < len(self.prefix) else (self, index)


class KvCache:
    """`blocks` blocks of `block_size` tokens; with `caching`, full blocks stay cached until their memory is needed.

    They are found and evicted `span` at a time: vLLM's are single ones, which takes long to simulate for long prompts.
    """

    def __init__(self, blocks: int, block_size: int, caching: bool = False, span: int = 1) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.caching = caching
        self.span = span
        self.cached_size = span * block_size  # tokens of a cached block
        self.hits = 0  # tokens found so far
        self.evicted = 0  # blocks
        self._blank = blocks  # free and not cached
        self._cached: dict[Hashable, list[Block]] = {}  # several of one key: computed at the same time
        self._unused: OrderedDict[Block, None] = OrderedDict()  # cached blocks without a reference, oldest first

    @property
    def free_blocks(self) -> int:
        return self._blank + len(self._unused) * self.span

    def needs(self, tokens: int) -> int:
        """Blocks for `tokens` tokens."""
        return -(-tokens // self.block_size)

    def find(self, table: BlockTable, length: int) -> list[Block]:
        """The longest cached beginning of a request of `length` tokens, whose last token is always computed anew."""
        prefix: list[Block] = []
        if self.caching:
            for index in range((length - 1) // self.cached_size):
                blocks = self._cached.get(table.key(index))
                if not blocks:
                    break
                prefix.append(blocks[0])
        return prefix

    def fits(self, tokens: int, prefix: Sequence[Block] = (), watermark: int = 0) -> bool:
        """True if blocks for `tokens` tokens, of which `prefix` is cached, leave `watermark` blocks free."""
        unused = sum(not block.ref_count for block in prefix)
        return self.needs(tokens) + (unused - len(prefix)) * self.span + watermark <= self.free_blocks

    def allocate_cached(self, table: BlockTable, prefix: Sequence[Block]) -> None:
        """Add the blocks that `find` found to `table`."""
        for block in prefix:
            block.ref_count += 1
            self._unused.pop(block, None)
        table.cached.extend(prefix)
        table.count += len(prefix) * self.span
        self.hits += len(prefix) * self.cached_size

    def allocate(self, table: BlockTable, tokens: int) -> bool:
        """Let `table` have blocks for `tokens` tokens in all; False, and nothing changes, if too few are free."""
        more = self.needs(tokens) - table.count
        if more > self.free_blocks:
            return False
        while more > self._blank:
            self._evict_oldest()
        if more > 0:
            self._blank -= more
            table.count += more
        self._cache_full_blocks(table, tokens)
        return True

    def free(self, table: BlockTable, tokens: int) -> None:
        """Free all blocks of `table`. Its first `tokens` tokens stay cached; the last of them are evicted first."""
        self._cache_full_blocks(table, tokens)
        for block in reversed(table.cached):
            block.ref_count -= 1
            if not block.ref_count:
                self._unused[block] = None
        self._blank += table.count - len(table.cached) * self.span
        table.count = 0
        table.cached = []

    def _cache_full_blocks(self, table: BlockTable, tokens: int) -> None:
        if self.caching:
            for index in range(len(table.cached), tokens // self.cached_size):
                block = Block(table.key(index))
                self._cached.setdefault(block.key, []).append(block)
                table.cached.append(block)

    def _evict_oldest(self) -> None:
        block, _none = self._unused.popitem(last=False)
        blocks = self._cached[block.key]
        blocks.remove(block)
        if not blocks:
            del self._cached[block.key]
        self._blank += self.span
        self.evicted += self.span


def prefix_keys(prompt: NDArray[np.int32], block_size: int) -> list[int]:
    """A key for each full block of `prompt` (1-D token ids), which stands for all tokens up to the block's end."""
    keys: list[int] = []
    for end in range(block_size, len(prompt) + 1, block_size):
        keys.append(hash((keys[-1] if keys else 0, prompt[end - block_size : end].tobytes())))
    return keys
