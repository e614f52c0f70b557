"""dataset=cnn_dailymail: MLPerf's cnn_eval.json from the Hub's Parquet files, which the tests write themselves."""

import json
import logging
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf
from pyarrow import parquet
from tokenizers import Tokenizer, processors

from autotune.config.schema import DatasetConfig
from autotune.data import cnn_dailymail, samples
from autotune.data.models import Model
from autotune.errors import InputError

ARTICLES = [f"(CNN) Article {i} with {{braces}},\u2028\x85 a line break and 東京." for i in range(5)]
HIGHLIGHTS = [f"Highlight {i} ." for i in range(5)]


class Hub:
    """Stands in for snapshot_download: writes Parquet files as the Hub has them and counts the downloads."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot, self.calls, self.cached = snapshot, 0, False
        self.write("validation-00000-of-00002.parquet", ARTICLES[:3], HIGHLIGHTS[:3])
        self.write("validation-00001-of-00002.parquet", ARTICLES[3:], HIGHLIGHTS[3:])

    def write(self, name: str, articles: list[Any], highlights: list[Any]) -> None:
        (self.snapshot / "3.0.0").mkdir(parents=True, exist_ok=True)
        ids = [str(i) for i in range(len(articles))]
        table = pyarrow.table({"article": articles, "highlights": highlights, "id": ids})
        parquet.write_table(table, self.snapshot / "3.0.0" / name)

    def __call__(self, repository: str, local_files_only: bool, **asked: Any) -> str:
        assert repository == "abisee/cnn_dailymail"
        assert asked == {"repo_type": "dataset", "revision": "abc", "allow_patterns": "3.0.0/validation-*.parquet"}
        if local_files_only and not self.cached:
            raise LocalEntryNotFoundError("not in the cache")
        self.calls += not local_files_only
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "snapshot")
    monkeypatch.setattr(cnn_dailymail, "snapshot_download", hub)
    monkeypatch.setattr(cnn_dailymail, "dataset_info", lambda *_, **__: None)
    return hub


def records(tokenizer: Tokenizer, folder: Path, expected: int = 5) -> list[dict[str, Any]]:
    return list(cnn_dailymail.records(tokenizer, str(folder), "abc", expected))


def kept(folder: Path) -> Path:
    (path,) = folder.glob("cnn_eval-*.json")
    return path


def test_records_are_mlperfs_in_the_splits_order(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = records(tokenizer, tmp_path / "kept")
    assert [set(record) for record in made] == [{"instruction", "input", "tok_input", "output"}] * 5
    assert [record["input"] for record in made] == ARTICLES
    assert [record["output"] for record in made] == HIGHLIGHTS
    assert tokenizer.decode(made[1]["tok_input"]) == (
        "Summarize the following news article in 128 tokens. Please output the summary only, without any other text."
        f"\n\nArticle:\n{ARTICLES[1]}\n\nSummary:"
    )


def test_prompts_begin_with_the_tokenizers_bos(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert {record["tok_input"].index(bos) for record in records(tokenizer, tmp_path)} == {0}


def test_an_article_longer_than_any_limit_is_not_cut(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    hub.write("validation-00000-of-00002.parquet", ["a" * 9000] * 3, HIGHLIGHTS[:3])
    assert len(records(tokenizer, tmp_path)[0]["tok_input"]) > 9000


def test_the_file_is_a_json_list_and_its_checksum_holds(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = records(tokenizer, tmp_path)
    assert json.loads(kept(tmp_path).read_text()) == made == list(samples.read_records(kept(tmp_path)))
    subprocess.run(["sha256sum", "-c", f"{kept(tmp_path).name}.sha256"], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.glob("cnn_eval*")) == sorted(
        [kept(tmp_path).name, f"{kept(tmp_path).name}.sha256"]
    )


def test_the_file_is_made_once_for_each_tokenizer(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = records(tokenizer, tmp_path / "kept")
    assert records(tokenizer, tmp_path / "kept") == first
    assert hub.calls == 1
    tokenizer.add_tokens(["Article"])
    other = records(tokenizer, tmp_path / "kept")
    assert hub.calls == 2
    assert other[0]["tok_input"] != first[0]["tok_input"]
    assert len(list((tmp_path / "kept").glob("cnn_eval-*.json"))) == 2


def test_a_damaged_file_is_made_again(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = records(tokenizer, tmp_path)
    kept(tmp_path).write_text(kept(tmp_path).read_text().replace("Highlight 3", "Highlight 4"))
    with caplog.at_level(logging.WARNING):
        assert records(tokenizer, tmp_path) == first
    assert "not what its sha256 says" in caplog.text
    assert records(tokenizer, tmp_path) == first
    assert hub.calls == 2


def test_a_file_without_its_checksum_is_made_again(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    records(tokenizer, tmp_path)
    kept(tmp_path).with_name(f"{kept(tmp_path).name}.sha256").unlink()
    records(tokenizer, tmp_path)
    assert hub.calls == 2


def test_an_interrupted_run_leaves_nothing_behind(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"input": "the first"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cnn_dailymail, "_from_parquet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            records(tokenizer, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []
    assert len(records(tokenizer, tmp_path / "kept")) == 5


def test_too_few_records_are_refused_and_not_kept(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"5 records in .*parquet, not 13368; .*dataset\.records\.expected"):
        records(tokenizer, tmp_path / "kept", expected=13368)
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("column", ["article", "highlights"])
def test_a_record_without_text_is_named(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path, column: str, empty: str | None
) -> None:
    columns = {"article": ARTICLES[3:], "highlights": HIGHLIGHTS[3:]} | {column: ["text", empty]}
    hub.write("validation-00001-of-00002.parquet", columns["article"], columns["highlights"])
    with pytest.raises(InputError, match=rf"validation-00001-of-00002\.parquet, record 2: no `{column}`"):
        records(tokenizer, tmp_path)


def test_a_file_with_other_columns_is_named(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = hub.snapshot / "3.0.0" / "validation-00000-of-00002.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"]}), file)
    with pytest.raises(InputError, match=r"validation-00000-of-00002\.parquet, record 1: no `article`"):
        records(tokenizer, tmp_path)


def test_a_file_that_is_no_parquet_is_named(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (hub.snapshot / "3.0.0" / "validation-00000-of-00002.parquet").write_text("version https://git-lfs.github.com/spec")
    with pytest.raises(InputError, match=r"validation-00000-of-00002\.parquet: not a readable Parquet file"):
        records(tokenizer, tmp_path)


def test_files_put_into_the_folder_need_no_hub(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    hub.snapshot.rename(tmp_path / "kept" / "cnn_dailymail")
    assert len(records(tokenizer, tmp_path / "kept")) == 5
    assert hub.calls == 0


def test_files_in_the_hubs_cache_need_no_hub(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    hub.cached = True
    assert len(records(tokenizer, tmp_path / "kept")) == 5
    assert hub.calls == 0


def test_a_download_that_left_an_empty_cache_is_taken_up_again(hub: Hub, tokenizer: Tokenizer, tmp_path: Path) -> None:
    hub.cached = True
    (hub.snapshot / "3.0.0").rename(tmp_path / "3.0.0")
    with pytest.raises(InputError, match="0 records"):
        records(tokenizer, tmp_path / "kept")
    assert hub.calls == 1


def test_without_the_hub_one_line_says_what_to_do(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known\nAn error happened while …")

    monkeypatch.setattr(cnn_dailymail, "dataset_info", unreachable)
    with pytest.raises(InputError) as caught:
        records(tokenizer, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("ConnectionError: Name", f"{tmp_path}/cnn_dailymail/3.0.0", "dataset.path=<cnn_eval.json>"):
        assert part in message
    assert hub.calls == 0


def test_its_configuration_prepares_samples(hub: Hub, model: Model, tmp_path: Path) -> None:
    config = OmegaConf.merge(
        OmegaConf.structured(DatasetConfig),
        OmegaConf.load(Path(__file__).parents[1] / "conf" / "dataset" / "cnn_dailymail.yaml"),
        {"records": {"folder": str(tmp_path), "revision": "abc", "expected": 5}, "max_output_tokens": 128},
    )
    dataset = OmegaConf.to_object(config)
    assert isinstance(dataset, DatasetConfig)
    fields = {key: value for key, value in dataset.records.items() if key != "_target_"}
    made = samples.prepare(dataset, model, tmp_path, partial(cnn_dailymail.records, **fields))
    assert len(made) == 5
    assert made.output_tokens.tolist() == [len(text) for text in HIGHLIGHTS]
    assert model.tokenizer().decode(made.prompts[4].tolist()).endswith(f"{ARTICLES[4]}\n\nSummary:")
