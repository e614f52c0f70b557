"""A model's shape, as far as its cost depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.errors import InputError

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
STATE = ("mamba", "ssm", "rwkv", "linear_", "conv_")  # how fields of layers without attention begin
# Models whose layers have two matrices after the attention, not three.
NOT_GATED = (
    "bloom",
    "codegen",
    "falcon",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "mpt",
    "nemotron",
    "opt",
    "phi",
    "starcoder2",
)


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
        if why := _unlike(config):
            raise InputError(f"backend=sim knows dense decoders, and this model is none ({why}); use backend=live")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            hidden=hidden,
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            max_len=config.get("max_position_embeddings") or 4096,
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


def _unlike(config: Mapping[str, Any]) -> str:
    """The reason why the model of a config.json is none that Shape describes; empty if it is one."""
    for name in FIELDS:
        if not isinstance(size := config.get(name), int) or size < 1:
            return f"config.json has no {name}" if size is None else f"config.json has {name}={size!r}"
    for name in OPTIONAL:
        if not isinstance(size := config.get(name) or 1, int):
            return f"config.json has {name}={size!r}"
    heads = config["num_attention_heads"]
    if heads % (kv_heads := config.get("num_key_value_heads") or heads) or heads > config["hidden_size"]:
        return f"config.json has {heads} heads, {kv_heads} for keys and values, hidden_size={config['hidden_size']}"
    kind, architecture = config.get("model_type"), str(config.get("architectures"))
    layers = str(config.get("layer_types"))
    if "ForCausalLM" not in architecture or config.get("is_encoder_decoder"):
        return f"config.json has architectures={architecture}, where …ForCausalLM is one"
    if any("expert" in name for name in config):
        return "it has experts"
    if config.get("kv_lora_rank"):
        return "it keeps a compressed KV cache"
    if "linear" in layers or any(name.startswith(STATE) for name in config):
        return "some of its layers keep a state, and no KV cache"
    return f"{kind} has layers without a gate" if kind in NOT_GATED else ""
