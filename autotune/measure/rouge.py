"""ROUGE of answers, as language/llama3.1-8b/evaluation.py of mlcommons/inference b66003e1 computes it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from statistics import fmean

from autotune.data.models import Model
from autotune.errors import InputError
from autotune.system.files import read_json

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LENGTH = "gen_len"  # characters
SCORES = (*NAMES, LENGTH)
# What transformers' clean_up_tokenization takes out, for tokenizers whose configuration asks for it.
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def check() -> None:
    """Raise InputError if what scores answers is not there."""
    if not all(map(find_spec, ("nltk", "rouge_score"))):
        raise InputError("scores need the extra `mlperf`: uv pip install -e '.[mlperf]'")


def splitter() -> Callable[[str], list[str]]:
    """The function that finds a text's sentences: NLTK's. Raises InputError if it, or its data, is not there."""
    check()
    import nltk

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
    rows = by_text(answers, references, sentences)
    figures = {name: round(fmean(row[name] for row in rows), 4) for name in NAMES}
    return {**figures, LENGTH: int(sum(row[LENGTH] for row in rows)), "gen_num": len(rows)}


def by_text(
    answers: Sequence[str], references: Sequence[str], sentences: Callable[[str], list[str]] | None
) -> list[dict[str, float]]:
    """F measures in percent, and the length in characters, of each answer; without `sentences` what needs none."""
    from rouge_score.rouge_scorer import RougeScorer

    logging.getLogger("absl").setLevel(logging.WARNING)  # it tells which tokenizer it uses
    scorer = RougeScorer(list(NAMES if sentences else NAMES[:-1]), use_stemmer=True)
    rows = []
    for pair in zip(references, answers, strict=True):
        wanted, made = ("\n".join(sentences(text.strip())) if sentences else text for text in pair)
        row = {name: score.fmeasure * 100 for name, score in scorer.score(wanted, made).items()}
        rows.append(row | ({LENGTH: float(len(made))} if sentences else {}))
    return rows


def texts(answers: Iterable[list[int]], model: Model) -> list[str]:
    """The texts of answers, as `model`'s tokenizer reads them."""
    found: list[str] = model.tokenizer().decode_batch(list(answers), skip_special_tokens=True)
    file = (model.tokenizer_folder or model.folder) / "tokenizer_config.json"
    cleans = file.exists() and read_json(file).get("clean_up_tokenization_spaces") is True
    return [cleaned(text) for text in found] if cleans else found


def cleaned(text: str) -> str:
    """`text` without the spaces that a tokenizer put before punctuation."""
    for spaced in SPACED:
        text = text.replace(spaced, spaced.strip())
    return text
