"""A model's shape, as far as its cost depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.errors import InputError

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Shape:
    """A dense decoder, as its config.json describes it: counts of parameters, heads and tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool  # the output layer is the embedding
    max_len: int  # of prompt and output, tokens

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """The shape in a config.json. Raises InputError for a model that is not a dense decoder."""
        missing = [name for name in FIELDS if not isinstance(config.get(name), int)]
        if missing or any("expert" in name for name in config):
            why = f"config.json has no {missing[0]}" if missing else "it has experts"
            raise InputError(f"backend=sim knows dense decoders, and this model is none ({why}); use backend=live")
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            max_len=config.get("max_position_embeddings", 4096),
        )

    @property
    def linear(self) -> int:
        """Parameters of all layers' matrices, with which each token is multiplied."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.hidden * self.vocab
