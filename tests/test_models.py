from functools import partial
from pathlib import Path

import pytest

from autotune.errors import InputError
from autotune.models import build_shape, locate
from autotune.schema import ModelConfig


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


def test_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and the model is not in the local cache"):
        locate(ModelConfig(name="m", path="nobody/nothing"), tmp_path)
