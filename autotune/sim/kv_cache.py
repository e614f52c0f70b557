"""vLLM's KV cache: blocks of tokens that requests hold, and what prefix caching finds in them."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


class Block:
    """A full one that can be found."""

    __slots__ = ("holders", "key")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.holders = 1


class Holder:
    """What a request holds of the cache."""

    __slots__ = ("blocks", "full", "prefix")

    def __init__(self, prefix: Sequence[Hashable] = ()) -> None:
        self.prefix = prefix  # a key for each full block of the prompt; equal keys mean an equal beginning
        self.blocks = 0
        self.full: list[Block] = []  # the first of them, which can be found

    def key(self, index: int) -> Hashable:
        """The key of its block `index`; what it generates, it alone finds again, after a preemption."""
        return self.prefix[index] if index < len(self.prefix) else (self, index)


class KvCache:
    """`blocks` blocks of `block_size` tokens; with `caching`, full ones stay findable until they are needed."""

    def __init__(self, blocks: int, block_size: int, caching: bool = False) -> None:
        self.block_size = block_size
        self.caching = caching
        self.total = blocks
        self.hits = 0  # tokens that were found
        self._blank = blocks
        self._findable: dict[Hashable, list[Block]] = {}  # several of one key: computed at the same time
        self._unused: OrderedDict[Block, None] = OrderedDict()  # findable blocks without a holder, oldest first

    @property
    def free(self) -> int:
        return self._blank + len(self._unused)

    def needs(self, tokens: int) -> int:
        """Blocks for `tokens` tokens."""
        return -(-tokens // self.block_size)

    def find(self, holder: Holder, length: int) -> list[Block]:
        """The longest findable beginning of a request of `length` tokens, whose last is always computed anew."""
        found: list[Block] = []
        if self.caching:
            for index in range((length - 1) // self.block_size):
                blocks = self._findable.get(holder.key(index))
                if not blocks:
                    break
                found.append(blocks[0])
        return found

    def fits(self, tokens: int, found: Sequence[Block] = (), watermark: int = 0) -> bool:
        """Whether `tokens` tokens, of which `found` are there already, leave `watermark` blocks free."""
        taken = sum(not block.holders for block in found)
        return self.needs(tokens) - len(found) + taken + watermark <= self.free

    def adopt(self, holder: Holder, found: Sequence[Block]) -> None:
        """Hold the blocks that `find` found."""
        for block in found:
            block.holders += 1
            self._unused.pop(block, None)
        holder.full.extend(found)
        holder.blocks += len(found)
        self.hits += len(found) * self.block_size

    def grow(self, holder: Holder, tokens: int) -> bool:
        """Hold blocks for `tokens` tokens in all; False, and nothing is taken, if too few are free."""
        more = self.needs(tokens) - holder.blocks
        if more > self.free:
            return False
        while more > self._blank:
            self._forget_oldest()
        if more > 0:
            self._blank -= more
            holder.blocks += more
        self._remember(holder, tokens)
        return True

    def release(self, holder: Holder, tokens: int) -> None:
        """Hold nothing; its first `tokens` tokens can be found until they are forgotten, from their end on."""
        self._remember(holder, tokens)
        for block in reversed(holder.full):
            block.holders -= 1
            if not block.holders:
                self._unused[block] = None
        self._blank += holder.blocks - len(holder.full)
        holder.blocks = 0
        holder.full = []

    def _remember(self, holder: Holder, tokens: int) -> None:
        if self.caching:
            for index in range(len(holder.full), tokens // self.block_size):
                block = Block(holder.key(index))
                self._findable.setdefault(block.key, []).append(block)
                holder.full.append(block)

    def _forget_oldest(self) -> None:
        block, _none = self._unused.popitem(last=False)
        blocks = self._findable[block.key]
        blocks.remove(block)
        if not blocks:
            del self._findable[block.key]
        self._blank += 1


def prefix_keys(prompt: NDArray[np.int32], block_size: int) -> list[int]:
    """A key for each full block of `prompt` (1-D token ids), which stands for all tokens up to its end."""
    keys: list[int] = []
    for end in range(block_size, len(prompt) + 1, block_size):
        keys.append(hash((keys[-1] if keys else 0, prompt[end - block_size : end].tobytes())))
    return keys
