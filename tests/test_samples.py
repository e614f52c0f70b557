import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from autotune.config.schema import DatasetConfig, Output
from autotune.data.models import Model, build_shape
from autotune.data.samples import Samples, prepare
from autotune.errors import InputError


def load(tmp_path: Path, model: Model, records: list[Any], **settings: Any) -> Samples:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return prepare(DatasetConfig(name="d", path=str(path), **settings), model, tmp_path / "cache", None)


def test_token_ids_are_sent_as_they_are(tmp_path: Path, model: Model):
    samples = load(tmp_path, model, [{"tok_input": [5, 6], "input": "ignored", "output": "four"}])
    assert samples.prompts[0].tolist() == [5, 6] and samples.output_tokens.tolist() == [4]


@pytest.mark.parametrize(("ids", "message"), [([1, 512], "must be .* below the vocabulary's 512"), ([], "is empty")])
def test_token_ids_that_are_none_are_named(tmp_path: Path, model: Model, ids: list[int], message: str):
    with pytest.raises(InputError, match=f"record 1: .*{message}"):
        load(tmp_path, model, [{"tok_input": ids, "output": "bb"}])


def test_lengths_stay_within_their_bounds(tmp_path: Path, model: Model):
    records = [{"input": "a", "output": "x" * length} for length in (1, 5, 500)]
    assert load(tmp_path, model, records).output_tokens.tolist() == [2, 5, 128]


def test_natural_end_needs_no_reference(tmp_path: Path, model: Model):
    samples = load(tmp_path, model, [{"input": "a"}], output=Output.natural, max_output_tokens=9)
    assert samples.output_tokens.tolist() == [9] and not samples.ignore_eos


def test_count_takes_the_first_and_refuses_too_few(tmp_path: Path, model: Model):
    records = [{"input": "a", "output": "bb"}] * 3
    assert len(load(tmp_path, model, records, count=2)) == 2
    with pytest.raises(InputError, match=r"3 records, fewer than dataset.count=4"):
        load(tmp_path, model, records, count=4)


def test_text_that_begins_with_the_first_token_gets_no_second_one(tmp_path: Path, model: Model):
    tokenizer = model.tokenizer()
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 510)])
    tokenizer.save(str(model.folder / "tokenizer.json"))
    plain, templated = (load(tmp_path, model, [{"input": text, "output": "b"}]) for text in ("hi", "<s>hi"))
    assert plain.prompts[0].tolist() == [510, *tokenizer.encode("hi", add_special_tokens=False).ids]
    assert templated.prompts[0].tolist().count(510) <= 1


def test_sample_that_does_not_fit_is_named(tmp_path: Path, model: Model):
    samples = load(tmp_path, model, [{"input": "a", "output": "bb"}, {"input": "a" * 9, "output": "bb"}])
    samples.check_fits(11)
    with pytest.raises(InputError, match="record 2: 9 prompt \\+ 2 output tokens exceed max_model_len=10"):
        samples.check_fits(10)


def test_samples_load_as_they_were_saved(tmp_path: Path, model: Model):
    made = load(tmp_path, model, [{"input": "a", "output": "bb"}, {"input": "cde", "output": "ffff"}])
    replace(made, path=tmp_path / "copy.npz").save()
    copy = Samples.load(tmp_path / "copy.npz")
    assert (copy.name, copy.checksum, copy.ignore_eos) == (made.name, made.checksum, True)
    assert [prompt.tolist() for prompt in copy.prompts] == [[64], [66, 67, 68]]
    assert copy.output_tokens.tolist() == [2, 4]
    assert {file.name for file in tmp_path.glob("copy*")} == {"copy.npz"}


def test_records_are_made_once_for_the_same_data_set_and_model(tmp_path: Path, model: Model):
    calls = 0

    def make(tokenizer: Tokenizer) -> list[dict[str, Any]]:
        nonlocal calls
        calls += 1
        return [{"tok_input": [1], "output": "aa"}]

    one, again, other = (
        prepare(DatasetConfig(name="d", max_output_tokens=most), model, tmp_path, make) for most in (8, 8, 9)
    )
    assert one == again != other
    assert calls == 2


def test_another_tokenizer_makes_other_samples(tmp_path: Path, model: Model):
    before = load(tmp_path, model, [{"input": "a", "output": "bb"}])
    build_shape(model.folder, vocab_size=400)
    load(tmp_path, model, [{"input": "a", "output": "bb"}])
    assert len(list((tmp_path / "cache/samples").iterdir())) == 2
    assert len(before) == 1


def test_nothing_to_send_says_what_to_write(tmp_path: Path, model: Model):
    with pytest.raises(InputError, match="no data set: write dataset=cnn_shaped"):
        prepare(DatasetConfig(name="d"), model, tmp_path, None)


def test_changed_file_is_prepared_again(tmp_path: Path, model: Model):
    assert len(load(tmp_path, model, [{"input": "a", "output": "bb"}])) == 1
    assert len(load(tmp_path, model, [{"input": "a", "output": "bb"}] * 2)) == 2
    assert len(list((tmp_path / "cache/samples").iterdir())) == 2
