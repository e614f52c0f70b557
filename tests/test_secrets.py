"""Secrets in every place that a user can put one, and every byte that is left behind."""

import logging
import sys
import time
from pathlib import Path

import pytest

from autotune.config import redact
from autotune.errors import InputError
from autotune.sweep import storage
from autotune.sweep.checks import check_secrets
from tests.conftest import Main
from tests.studies import SEQS, space, study

PLACES = [  # § is the secret
    "engine.args.model_loader_extra_config={api_key: '§1', server: {password: '§2'}}",
    "tracking.uri='http://me:§3@host/db'",
    """model.args.additional_config='{"token": "§4"}'""",
    "model.args.hf_overrides={licence: '§5'}",
    "tracking.experiment='https://h/?password=§6&a=1'",
    "secrets=[licence]",
]


def planted(places: list[str]) -> list[str]:
    return [place.replace("§", "pl4nt/ed@To:ken-") for place in places]


def left(folder: Path) -> list[str]:
    """Files below `folder` that hold a planted secret in any of its forms."""
    forms = (b"pl4nt/ed@To:ken-", b"pl4nt%2Fed", b"pl4nt\\/ed", b"To:ken-", b"To%3Aken-")
    return [
        str(path) for path in folder.rglob("*") if path.is_file() and any(one in path.read_bytes() for one in forms)
    ]


@pytest.fixture(autouse=True)
def own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test's list is its own."""
    monkeypatch.setattr(redact, "_names", set())
    monkeypatch.setattr(redact, "_hidden", set())


def test_study_leaves_no_secret_in_any_file(tmp_path: Path):
    said = study(tmp_path, *planted(PLACES), "n_trials=1", f"{SEQS}=choice(8)", simulated=True)
    assert "Study s: 1 trial, 0 failed" in said
    assert len(list(tmp_path.glob("multirun/s/*/result.json"))) == 2 and left(tmp_path) == []


@pytest.mark.parametrize(
    ("shown", "written"),
    [
        ({"env": {"PGPASSWORD": "***", "DB_PIN_KEY": "***"}}, {"env": {"PGPASSWORD": "topsecret", "DB_PIN_KEY": 1234}}),
        (["env", "TOKEN=***", "-e", "X=1"], ["env", "TOKEN=a b,c", "-e", "X=1"]),
        (["seed=1", "engine.args.hf_token=***"], ["seed=1", "engine.args.hf_token=hf_x"]),
        ({"secrets": {"token": ["***", "***"]}}, {"secrets": {"token": ["a", "b"]}}),
        (["curl", "--api-key", "***", "--max", "3"], ["curl", "--api-key", "abc", "--max", "3"]),
        ({"credentials": {"user": "***"}, "authToken": "***"}, {"credentials": {"user": "x"}, "authToken": "y"}),
        ("postgresql://me:***@host/db", "postgresql://me:p/w@x@host/db"),
        ("https://***@host/x", "https://token@host/x"),
        ("https://h/x?password=***&x=1", "https://h/x?password=pw&x=1"),
        ("engine.args.x={token: ***, other: 1}", "engine.args.x={token: abc, other: 1}"),
        ("backend.prefix=[env,'TOKEN=***']", "backend.prefix=[env,'TOKEN=a b,c']"),
        (r'engine.args.x="{\"token\": \"***\"}"', r'engine.args.x="{\"token\": \"abc\"}"'),
        ('{"a": {"api_key": "***"}, "n": 1}', '{"a": {"api_key": "abc"}, "n": 1}'),
        ("{'token': '***', 'api_key': None}", "{'token': 'abc', 'api_key': None}"),
        ("export HF_TOKEN=***; x", "export HF_TOKEN=abc; x"),
        ("Authorization: Bearer ***", "Authorization: Bearer abcdefgh1"),
        ("found *** in it", "found hf_abcdefghijklmnopqrst in it"),
    ],
)
def test_secret_is_hidden_wherever_it_stands(shown: object, written: object):
    assert redact.redact(written) == shown


@pytest.mark.parametrize(
    "text",
    [
        *({"hf_token": ""}, {"max_tokens": 3, "monkey": "x"}),
        "num_key_value_heads=8 max_num_batched_tokens=4096 long_prefill_token_threshold=3 tokenizer=auto bypass=5",
        *("engine.args.api_key: set by autotune itself", "'x' is no command and no key=value", "Unexpected token: foo"),
        "secrets=A",
        *("add backend.env.HF_TOKEN=… to this command", "http://127.0.0.1:5000/a@b", "hf_token=null", '{"n": 1}'),
    ],
)
def test_what_is_no_secret_stays(text: object):
    assert redact.redact(text) == text


def test_what_was_hidden_once_is_hidden_in_every_form_and_in_what_is_logged(caplog: pytest.LogCaptureFixture):
    redact.redact({"password": 'p"w/12'})
    assert redact.redact(['p"w/12', r"p\"w/12", "p%22w/12", "p&quot;w/12", "pw"]) == ["***"] * 4 + ["pw"]
    before = logging.getLogRecordFactory(), sys.stdout, sys.stderr
    try:
        redact.install([])
        logging.getLogger("x").error("it is %s", 'p"w/12')
    finally:
        logging.setLogRecordFactory(before[0])
        sys.stdout, sys.stderr = before[1:]
    assert caplog.messages == ["it is ***"]


def test_own_names_are_fields_or_variables(tmp_path: Path):
    redact.add_names(["LICENCE", "engine.args.a.b"])
    assert redact.redact({"engine": {"args": {"a": {"b": "x"}}}, "env": {"licence": "y"}, "b": "z"}) == {
        "engine": {"args": {"a": {"b": "***"}}},
        "env": {"licence": "***"},
        "b": "z",
    }


@pytest.mark.parametrize(
    "words",
    [
        ["engine.args.x={token:§,", "-m"],
        ["backend.env.HF_TOKEN=§", "modell=tiny"],
        ["backend.prefix=[env,TOKEN=§", "x"],
    ],
)
def test_error_repeats_no_secret(words: list[str], main: Main):
    done = main(*planted(words))
    assert done.returncode and "To:ken-" not in done.stdout + done.stderr and "autotune:" in done.stderr


def test_database_that_does_not_answer_is_named_without_its_password():
    for password, said in ((planted(["§"])[0], "write %2F, %3A and %40"), ("pl4nted", "Connection refused")):
        with (
            pytest.raises(InputError, match=said) as raised,
            storage.opened(f"postgresql://me:{password}@127.0.0.1:1/db", "s"),
        ):
            pass
        assert "postgresql://me:***@127.0.0.1:1/db" in str(raised.value)
        assert "ken-" not in str(raised.value) and "pl4nted" not in str(raised.value)


def test_secret_is_not_swept(tmp_path: Path):
    with pytest.raises(InputError, match=r"hf_token: a secret can't be swept"):
        study(tmp_path, "engine.args.hf_token=choice(a,b)", simulated=True)


def test_choice_that_is_no_number_is_no_secret():
    check_secrets(space(f"{SEQS}=choice(nan,4)"))


@pytest.mark.slow
def test_single_trial_leaves_none_in_hydras_files_nor_in_mlflow(main: Main, tmp_path: Path):
    words = [place for place in PLACES if "tracking" not in place]
    done = main("model=tiny", "backend=sim", "study=s", "hydra.output_subdir=.hydra", *planted(words))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "multirun/trials/s/.hydra/overrides.yaml").exists() and left(tmp_path) == []
    assert "To:ken-" not in done.stdout + done.stderr


@pytest.mark.slow
def test_jobs_of_a_cluster_are_readable_for_their_user_alone(main: Main, tmp_path: Path):
    words = ["launcher=slurm", "launcher.cluster=local", "tracking=none", f"{SEQS}=choice(8)", "n_trials=1"]
    setup = "launcher.parameters.slurm_setup=['export HF_TOKEN=§']"
    done = main("-m", "model=tiny", "backend=sim", "space=none", "study=s", *words, *planted([*PLACES[:1], setup]))
    assert done.returncode == 0, done.stderr
    assert {path.relative_to(tmp_path).parts[2] for path in map(Path, left(tmp_path))} <= {".submitit"}
    assert (tmp_path / "multirun/s/.submitit").stat().st_mode & 0o777 == 0o700
    assert all(Path(path).stat().st_mode & 0o777 == 0o600 for path in left(tmp_path))


@pytest.mark.parametrize("text", ["a" * 20_000, "\n" * 20_000, "[" * 20_000], ids=["one word", "blank", "nested"])
def test_long_text_takes_no_time(text: str):
    began = time.process_time()
    assert redact.redact(text) == text
    assert time.process_time() - began < 1  # minutes, if all before each character were looked at again


def test_negative_numbers_of_a_list_are_no_flags():
    assert redact.redact({"intervals": {"tpot_p99_ms": [-1.5, 2.0]}}) == {"intervals": {"tpot_p99_ms": [-1.5, 2.0]}}


def test_number_in_a_secrets_field_is_hidden_too():
    """YAML reads a password of digits, or one such as 12e5, as a number."""
    assert redact.redact({"password": 12e5, "api_key": 123456, "gpu_j_per_token": 0.5}) == {
        "password": "***",
        "api_key": "***",
        "gpu_j_per_token": 0.5,
    }
