"""The prompt tokens that a prefix cache without an end would find."""

from collections.abc import Iterable

import numpy as np

from autotune.data.prompts import MadeUp
from autotune.data.samples import Samples
from autotune.measure.backend import RequestTiming

BLOCK = 16  # tokens; vLLM's usual size


def begun_before(requests: Iterable[RequestTiming], samples: Samples, block_size: int = BLOCK) -> int:
    """The prompt tokens, in whole blocks, with which an earlier prompt of these requests began: at least so many.

    It is known of traces with ids of their pieces, and of a conversation's earlier turns.
    """
    sent = sorted(requests, key=lambda request: request.issued)
    if isinstance(samples.prompts, MadeUp) and len(samples.prompts.ids):
        common = samples.prompts.begun_before(np.array([request.sample for request in sent]))
    else:
        last: dict[int, int] = {}  # the prompt of each conversation's last turn
        common = np.zeros(len(sent), dtype=np.int64)
        for number, request in enumerate(sent):
            if request.session >= 0:
                common[number] = last.get(request.session, 0)
                last[request.session] = request.prompt_tokens
    most = np.array([request.prompt_tokens - 1 for request in sent])  # a prompt's last token is always computed
    return int((np.minimum(common, most) // block_size * block_size).sum())
