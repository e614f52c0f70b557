"""ROUGE of answers, as language/llama3.1-8b/evaluation.py of mlcommons/inference b66003e1 computes it."""

import logging
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from autotune.errors import InputError

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# What transformers' clean_up_tokenization takes out, for tokenizers whose configuration asks for it.
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def splitter() -> Callable[[str], list[str]]:
    """The function that finds a text's sentences: NLTK's. Raises InputError if it, or its data, is not there."""
    try:
        import nltk
    except ImportError:
        raise InputError("scores need the extra `mlperf`: uv pip install -e '.[mlperf]'") from None
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise InputError("scores need NLTK's punkt_tab: python -m nltk.downloader punkt_tab") from None
    split: Callable[[str], list[str]] = nltk.sent_tokenize
    return split


def scores(
    answers: Sequence[str], references: Sequence[str], sentences: Callable[[str], list[str]]
) -> dict[str, float]:
    """Mean F measures in percent, and the answers' length in characters."""
    from rouge_score.rouge_scorer import RougeScorer

    logging.getLogger("absl").setLevel(logging.WARNING)  # it tells which tokenizer it uses
    scorer = RougeScorer(list(NAMES), use_stemmer=True)
    made = ["\n".join(sentences(answer.strip())) for answer in answers]
    wanted = ["\n".join(sentences(reference.strip())) for reference in references]
    rows: list[dict[str, Any]] = [scorer.score(*pair) for pair in zip(wanted, made, strict=True)]
    figures = {name: round(fmean(row[name].fmeasure for row in rows) * 100, 4) for name in NAMES}
    return {**figures, "gen_len": sum(map(len, made)), "gen_num": len(made)}


def cleaned(text: str) -> str:
    """`text` without the spaces that a tokenizer put before punctuation."""
    for spaced in SPACED:
        text = text.replace(spaced, spaced.strip())
    return text
