"""A model's shape, as far as its cost depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.errors import InputError

FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
STATE = ("mamba", "ssm", "rwkv", "linear_", "conv_")  # how fields of layers without attention begin
# Models whose layers have two matrices after the attention, not three.
NOT_GATED = (
    *("bloom", "codegen", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "nemotron", "opt", "phi", "starcoder2"),
)
# What families call the number of experts, and of those that a token is multiplied with.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk")
OF_EXPERTS = ("moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts", "first_k_dense_replace")
LATENT = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")  # of DeepSeek's heads
BYTES = {"fp8": 1.0, "fbgemm_fp8": 1.0, "mxfp4": 17 / 32, "bitsandbytes": 0.5}  # of a quantised weight


@dataclass(frozen=True)
class Shape:
    """A decoder, dense or with experts, as its config.json describes it: counts of parameters, heads and tokens."""

    hidden: int
    layers: int
    heads: int
    head_size: int
    vocab: int
    tied: bool  # the output layer is the embedding
    max_len: int  # of prompt and output, tokens
    linear: int  # parameters of all layers' matrices that every token is multiplied with
    width: int  # of the activations within a layer's MLP, for one token
    kv_values: int  # that one layer caches of one token
    expert: int = 0  # parameters of one expert, of all layers
    experts: int = 0
    experts_per_token: int = 0
    weight_bytes: float = 2.0  # of a parameter in a layer, as the checkpoint has it

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """The shape in a config.json. Raises InputError for a model that is no decoder of a known kind."""
        try:
            return cls._of(config)
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a text in a number's place
            raise InputError(f"the model's config.json is broken ({str(error)[:200]}); get the model again") from None

    @classmethod
    def _of(cls, config: Mapping[str, Any]) -> "Shape":
        if why := _unlike(config):
            raise InputError(
                f"backend=sim knows decoders, and this model is none that it knows ({why}); use backend=live"
            )
        hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_size = config.get("head_dim") or hidden // heads
        attention, kv_values = _attention(config, hidden, heads, kv_heads, head_size)
        linear, width, expert, experts, per_token = _mlp(config, hidden, layers)
        quantised = config.get("quantization_config") or {}
        of_method = BYTES.get(str(quantised.get("quant_method")), 2.0)
        return cls(
            hidden=hidden,
            layers=layers,
            heads=heads,
            head_size=head_size,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            max_len=_longest(config),
            linear=linear + layers * attention,
            width=width,
            kv_values=kv_values,
            expert=expert,
            experts=experts,
            experts_per_token=per_token,
            weight_bytes=quantised["bits"] / 8 if isinstance(quantised.get("bits"), int) else of_method,
        )

    @property
    def active(self) -> int:
        """Parameters of all layers' matrices with which one token is multiplied."""
        return self.linear + self.expert * self.experts_per_token

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.hidden * self.vocab

    def touched(self, tokens: Any) -> Any:
        """Share of the experts that `tokens` tokens (a number or an array) need, if each takes its own at random."""
        return 1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens if self.experts else 0.0 * tokens


def _attention(config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_size: int) -> tuple[int, int]:
    """Parameters of one layer's attention, and values that it caches of one token."""
    if not (latent := config.get("kv_lora_rank")):
        return hidden * head_size * 2 * (heads + kv_heads), 2 * kv_heads * head_size
    rotated, unrotated, value = (config[name] for name in LATENT)  # DeepSeek's caches one latent vector
    queries, kv_values = config.get("q_lora_rank"), latent + rotated
    query = (queries or hidden) * heads * (rotated + unrotated) + hidden * (queries or 0)
    return query + hidden * kv_values + latent * heads * (unrotated + value) + heads * value * hidden, kv_values


def _mlp(config: Mapping[str, Any], hidden: int, layers: int) -> tuple[int, int, int, int, int]:
    """Parameters for all tokens, an MLP's width; parameters of an expert, experts, and those that a token takes."""
    wide = config.get("intermediate_size") or 0
    experts, per_token = _first(config, EXPERTS), _first(config, EXPERTS_PER_TOKEN)
    if not experts or not per_token:
        return layers * 3 * hidden * wide, wide, 0, 0, 0
    dense = min(layers, config.get("first_k_dense_replace") or 0)
    sparse, narrow = layers - dense, config.get("moe_intermediate_size") or wide
    shared = config.get("shared_expert_intermediate_size") or narrow * (config.get("n_shared_experts") or 0)
    linear = dense * 3 * hidden * wide + sparse * hidden * (3 * shared + experts)
    width = (dense * wide + sparse * (per_token * narrow + shared)) // layers
    return linear, width, sparse * 3 * hidden * narrow, experts, per_token


def _unlike(config: Mapping[str, Any]) -> str:
    """The reason why the model of a config.json is none that Shape describes; empty if it is one."""
    sparse = _first(config, EXPERTS)
    if any("expert" in name for name in config) and not (sparse and _first(config, EXPERTS_PER_TOKEN)):
        return "config.json does not say how many experts it has, and how many of a token"
    of_mlp, of_heads = () if sparse else ("intermediate_size",), LATENT if config.get("kv_lora_rank") else ()
    needed = (*FIELDS, *of_mlp, *of_heads)
    for name in (*needed, *OPTIONAL, *OF_EXPERTS):
        size: Any = config.get(name)
        if size is None and name in needed:
            return f"config.json has no {name}"
        if not isinstance(size or 0, int) or (name in FIELDS and size < 1):
            return f"config.json has {name}={size!r}"
    heads = config["num_attention_heads"]
    if heads % (kv_heads := config.get("num_key_value_heads") or heads) or heads > config["hidden_size"]:
        return f"config.json has {heads} heads, {kv_heads} for keys and values, hidden_size={config['hidden_size']}"
    kind, architecture = config.get("model_type"), str(config.get("architectures"))
    layers = str(config.get("layer_types"))
    if "linear" in layers or any(name.startswith(STATE) for name in config):
        return "some of its layers keep a state, and no KV cache"
    if "ForCausalLM" not in architecture or config.get("is_encoder_decoder"):
        return f"config.json has architectures={architecture}, where …ForCausalLM is one"
    return f"{kind} has layers without a gate" if kind in NOT_GATED else ""


def _longest(config: Mapping[str, Any]) -> int:
    """The most tokens of prompt and output: what config.json has, times the factor of a RoPE that vLLM scales by it."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic")
    return int((config.get("max_position_embeddings") or 4096) * (rope.get("factor") or 1 if scaled else 1))


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)
