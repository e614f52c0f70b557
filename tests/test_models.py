import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from autotune.config.schema import ModelConfig
from autotune.data.models import Model, as_served, build_shape, check_weights, locate
from autotune.errors import InputError


def test_every_token_of_a_built_model_decodes(tmp_path: Path):
    build = partial(build_shape, vocab_size=300, hidden_size=8)
    model = locate(ModelConfig(name="m", build={"vocab_size": 300}), tmp_path, build)
    tokenizer = model.tokenizer()
    assert model.config["hidden_size"] == 8
    assert tokenizer.get_vocab_size() == 300
    assert all(tokenizer.id_to_token(token) is not None for token in range(300))
    assert tokenizer.decode(tokenizer.encode("naïve café").ids) == "naïve café"


def test_model_is_built_once(tmp_path: Path):
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "config.json").write_text("{}")

    for _ in range(2):
        locate(ModelConfig(name="m", build={"a": 1}), tmp_path, build)
    assert len(built) == 1


def test_model_that_another_process_built_meanwhile_is_taken(tmp_path: Path):
    config = ModelConfig(name="m", build={"a": 1})

    def build(folder: Path) -> None:
        (folder / "config.json").write_text('{"by": "me"}')

    def overtaken(folder: Path) -> None:
        locate(config, tmp_path, build)
        (folder / "config.json").write_text('{"by": "the other"}')

    assert locate(config, tmp_path, overtaken).config == {"by": "me"}
    assert len(list((tmp_path / "models").iterdir())) == 1


def test_interrupted_build_leaves_nothing(tmp_path: Path):
    def build(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locate(ModelConfig(name="m", build={}), tmp_path, build)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "no model: write model=smollm2"),
        ("/nowhere", "no model there; a model's folder holds a config.json"),
        ("a/b/c", "neither a local folder nor a Hub id"),
    ],
)
def test_model_that_can_not_be_read_says_what_to_do(tmp_path: Path, path: str | None, message: str):
    with pytest.raises(InputError, match=message):
        locate(ModelConfig(name="m", path=path), tmp_path)


def test_hub_that_is_switched_off_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and the model is not in the local cache"):
        locate(ModelConfig(name="m", path="nobody/nothing"), tmp_path)


@pytest.fixture
def dead_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's local cache, while the Hub itself can't be reached."""
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_unreachable_hub_is_one_line(tmp_path: Path, dead_hub: Path):
    message = r"^model.path=a/b: the Hub can't be reached \(\w+\) and the model is not in the local cache; .*$"
    with pytest.raises(InputError, match=message):
        locate(ModelConfig(name="m", path="a/b"), tmp_path)


def test_model_in_the_local_cache_needs_no_hub(tmp_path: Path, dead_hub: Path):
    snapshot = dead_hub / "models--a--b/snapshots/123"
    (dead_hub / "models--a--b/refs").mkdir(parents=True)
    (dead_hub / "models--a--b/refs/main").write_text("123")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"vocab_size": 5}')
    model = locate(ModelConfig(name="m", path="a/b"), tmp_path)
    assert (model.path, model.folder, model.config) == ("a/b", snapshot, {"vocab_size": 5})


@pytest.fixture
def hub_that_says(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """Sets the status and the error code that the Hub answers with."""
    status, code = 0, ""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    def say(new_status: int, new_code: str) -> None:
        nonlocal status, code
        status, code = new_status, new_code

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{server.server_port}")
    yield say
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "gated; accept its license at huggingface.co/a/b, then run `hf auth login`"),
        (404, "RepoNotFound", "the Hub has no such model, or it is private"),
        (404, "RevisionNotFound", "the Hub has it, but not revision v9; see model.revision"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(
    tmp_path: Path, hub_that_says: Callable[[int, str], None], status: int, code: str, message: str
):
    hub_that_says(status, code)
    with pytest.raises(InputError, match=f"^model.path=a/b: {message}"):
        locate(ModelConfig(name="m", path="a/b", revision="v9"), tmp_path)


def test_local_folder_is_served_as_it_is(tmp_path: Path):
    build_shape(tmp_path, vocab_size=300)
    model = locate(ModelConfig(name="m", path=str(tmp_path), revision="ignored"), tmp_path / "cache")
    assert (model.path, model.revision) == (str(tmp_path), None)


def test_another_shape_is_another_model(tmp_path: Path):
    folders = {
        locate(ModelConfig(name="m", build={"vocab_size": size}), tmp_path, partial(build_shape, vocab_size=size)).path
        for size in (300, 400)
    }
    assert len(folders) == 2


def test_tokenizer_neither_cuts_nor_fills_up_whatever_its_file_says(model: Model):
    plain = len(model.tokenizer().encode("a long sentence").ids)
    tokenizer = model.tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(model.folder / "tokenizer.json"))
    assert len(model.tokenizer().encode("a long sentence").ids) == plain == 15


FIELDS = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 4096},
}
BROKEN = {
    "cut off": lambda body: body[: len(body) // 2],
    "empty": lambda _: b"",
    "with a BOM": lambda body: b"\xef\xbb\xbf" + body,
    "binary": lambda _: b"\x80\x81\x00",
    "a list": lambda _: b"[]",
    "a folder": lambda _: None,
}


def read_all(folder: Path, **flags: Any) -> Model:
    """The model in `folder`, served with `flags`, of which everything was read."""
    served = as_served(locate(ModelConfig(name="m", path=str(folder)), folder / "cache"), flags)
    served.tokenizer()
    served.fingerprint()
    return served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    build_shape(made, vocab_size=400, **FIELDS)
    (made / "generation_config.json").write_text("{}")
    return made


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_of_a_model_is_named(folder: Path, how: str) -> None:
    read_all(folder)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        good = file.read_bytes()
        bad = BROKEN[how](good)
        file.unlink()
        if bad is None:
            file.mkdir()
        else:
            file.write_bytes(bad)
        with pytest.raises(InputError, match=f"^{file}: ") as caught:
            read_all(folder)
        assert "\n" not in str(caught.value)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(good)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("hidden_size", -64),
        ("hidden_size", 1.5),
        ("num_hidden_layers", True),
        ("vocab_size", 0),
        ("vocab_size", 10**30),
        ("max_position_embeddings", "4k"),
    ],
)
def test_a_size_that_is_none_is_named_with_its_file(folder: Path, name: str, value: Any) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, name: value}))
    with pytest.raises(InputError, match=f"^{folder}/config.json: {name}={value!r}; it must be a whole number from 1$"):
        read_all(folder)


def test_sizes_of_the_text_part_count_where_a_model_has_several(folder: Path) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"vision_config": {}, "text_config": body}))
    assert read_all(folder).config["max_position_embeddings"] == 4096
    (folder / "config.json").write_text(json.dumps({"text_config": {**body, "vocab_size": 0}}))
    with pytest.raises(InputError, match="vocab_size=0"):
        read_all(folder)


def save_tensor(file: Path) -> None:
    """A safetensors file of one tensor."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


def test_weights_that_are_missing_or_cut_off_are_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    one, two = folder / "one.safetensors", folder / "two.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=f"^{message}"):
            check_weights(read_all(folder))

    refused(f"{folder}: no weights there; .*load_format=dummy")
    save_tensor(one)
    index.write_text(json.dumps({"weight_map": {"a": one.name, "b": two.name}}))
    refused(f"{two}: No such file")
    save_tensor(two)
    check_weights(read_all(folder))
    whole = two.read_bytes()
    for bad in (whole[:-1], whole[:20], whole[:3], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        two.write_bytes(bad)
        refused(f"{two}: no whole safetensors file")
    two.write_bytes(whole)
    for text, message in (("{", "not JSON"), ("{}", "no `weight_map`"), ('{"weight_map": [1]}', "no `weight_map`")):
        index.write_text(text)
        refused(f"{index}: {message}")


def test_flags_that_name_a_tokenizer_or_a_configuration_are_followed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    build_shape(other, vocab_size=300, **FIELDS)
    own, named = read_all(folder), read_all(folder, tokenizer=str(other))
    assert (own.tokenizer().get_vocab_size(), named.tokenizer().get_vocab_size()) == (400, 300)
    assert own.config == named.config and own.fingerprint() != named.fingerprint()
    assert read_all(folder, hf_config_path=str(other)).config["vocab_size"] == 300
    for flag in ("tokenizer", "hf_config_path"):
        with pytest.raises(InputError, match=rf"^engine\.args\.{flag}=/nowhere: no model there"):
            read_all(folder, **{flag: "/nowhere"})


CODE = """
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}
    vocab_size = 256
    def get_vocab(self):
        return {chr(i): i for i in range(256)}
    def _tokenize(self, text):
        return list(text)
    def _convert_token_to_id(self, token):
        return ord(token)
    def _convert_id_to_token(self, index):
        return chr(index)
"""


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_tokenizer_runs_only_if_it_is_trusted_and_nobody_is_asked(
    folder: Path, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenization_own.py").write_text(CODE)
    auto = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    written = {"tokenizer_class": "OwnTokenizer", "auto_map": auto, "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks"))
    if trusted:
        served = read_all(folder, trust_remote_code=True)
        assert served.tokenizer().encode("Hi").ids == [72, 105]
        assert served.chat().apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    else:
        with pytest.raises(InputError, match=r"code of its own; set engine\.args\.trust_remote_code=true"):
            read_all(folder)


@pytest.mark.slow
def test_a_folder_without_a_tokenizer_says_which_flag_names_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=rf"^{folder}: no tokenizer .*engine\.args\.tokenizer=<Hub id or folder>$"):
        read_all(folder)
