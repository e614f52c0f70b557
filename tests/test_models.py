import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from autotune.config.schema import ModelConfig
from autotune.data.models import Model, build_shape, locate
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
        (403, "GatedRepo", "gated; accept its licence at huggingface.co/a/b, then run `hf auth login`"),
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
