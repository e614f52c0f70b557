"""Prompts of which only the lengths are known, and which pieces they share: made when they are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class Lengths(NamedTuple):
    """A request whose texts are not known."""

    at_s: float | None
    prompt_tokens: int
    output_tokens: int
    ids: Sequence[int]  # of the prompt's pieces: equal ids, equal tokens
    piece_tokens: int  # of each piece


@dataclass(eq=False)
class MadeUp(Sequence[Tokens]):
    """Prompts of chosen lengths, the same each time.

    The first `ids` of a prompt are pieces of `piece_tokens` tokens, which are the same wherever they stand. Pieces with
    other ids, and what has none, differ from the first few tokens on, so that nothing else is found in a prefix cache.
    """

    lengths: NDArray[np.int64]  # tokens of each prompt
    ids: NDArray[np.int64]  # of all prompts' pieces, one prompt after another; 0, 1, 2, …
    ends: NDArray[np.int64]  # of each prompt's in `ids`
    piece_tokens: int
    text: Tokens  # they are made of

    def __post_init__(self) -> None:
        self._alphabet, self._twice = np.unique(self.text), np.concatenate([self.text, self.text])
        names = 2 * max(len(self), int(self.ids.max(initial=0)) + 1)
        digits = next(digits for digits in range(1, 64) if len(self._alphabet) ** digits >= names)
        self._powers = len(self._alphabet) ** np.arange(digits)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        left, pieces = int(self.lengths[index]), []
        for one in self._ids(index):
            pieces.append(self._piece(2 * one + 1, min(left, self.piece_tokens)))
            left -= len(pieces[-1])
        return np.concatenate([*pieces, self._piece(2 * index, left)])

    def begun_before(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens with which each of these prompts begins as an earlier one of them does, by the ids of its pieces."""
        seen: set[int] = set()
        common = []
        for index in order.tolist():
            ids = self._ids(index)
            common.append(next((place for place, one in enumerate(ids) if one not in seen), len(ids)))
            seen.update(ids)
        return np.asarray(np.minimum(np.array(common) * self.piece_tokens, self.lengths[order]))

    def _ids(self, index: int) -> list[int]:
        return list(self.ids[self.ends[index - 1] if index else 0 : self.ends[index]].tolist())

    def _piece(self, name: int, tokens: int) -> Tokens:
        """So many tokens, the first of which spell the number `name`; what follows begins anywhere in the text."""
        spelled = self._alphabet[name // self._powers % len(self._alphabet)]
        begin, whole = name * 7919 % len(self.text), len(self.text)
        rest = self._twice[begin : begin + min(tokens, whole)]
        return np.asarray(np.concatenate([spelled, np.resize(rest, tokens) if tokens > whole else rest])[:tokens])
