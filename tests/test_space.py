import optuna
import pytest

from autotune.errors import InputError
from autotune.search.space import Space, check_space, describe, parse


def space(*arguments: str, conditions: dict[str, str] | None = None, only_if: dict[str, str] | None = None) -> Space:
    return parse({}, arguments, conditions or {}, only_if or {})[0]


def test_command_line_adds_a_parameter_to_the_group():
    found, fixed = parse({"engine.args.block_size": "choice(16,32)"}, ["engine.args.x=range(1,4)", "seed=1"], {}, {})
    assert list(found.parameters) == ["engine.args.block_size", "engine.args.x"]
    assert fixed == ["seed=1"]


def test_fixed_value_on_the_command_line_takes_its_parameter_out_of_the_space():
    found, fixed = parse({"engine.args.a": "choice(1,2)", "engine.args.b": "choice(1,2)"}, ["engine.args.a=7"], {}, {})
    assert list(found.parameters) == ["engine.args.b"]
    assert fixed == ["engine.args.a=7"]


def test_empty_space_says_what_to_write():
    with pytest.raises(InputError, match="nothing to tune"):
        parse({}, ["seed=1"], {}, {})


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("tag(log,int(interval(16,1024)))", "16…1024, log"),
        ("range(0.90,0.96,step=0.01)", "0.9…0.95, step 0.01"),
        ("range(8,33,step=8)", "8…32, step 8"),
        ("choice(auto,fp8)", "auto | fp8"),
    ],
)
def test_ranges_steps_and_choices_mean_what_they_say(written: str, shown: str):
    assert describe(space(f"engine.args.x={written}").parameters["engine.args.x"]) == shown


def test_condition_compares_swept_and_known_flags():
    found = space(
        "engine.args.max_num_seqs=choice(8,64)", conditions={"fits": "max_num_seqs <= max_num_batched_tokens"}
    )
    assert found.violated({"engine.args.max_num_seqs": 64}, {"max_num_batched_tokens": 32}) == (
        "conditions.fits: not max_num_seqs <= max_num_batched_tokens"
    )
    assert not found.violated({"engine.args.max_num_seqs": 8}, {"max_num_batched_tokens": 32})


def test_condition_on_a_flag_that_nobody_knows_holds():
    found = space("engine.args.a=choice(1,2)", conditions={"c": "a <= unheard_of"})
    assert not found.violated({"engine.args.a": 2}, {})


def test_misspelt_condition_is_named():
    found = space("engine.args.a=choice(1,2)", conditions={"c": "a <="})
    with pytest.raises(InputError, match="condition 'a <='"):
        found.violated({"engine.args.a": 2}, {})


@pytest.mark.parametrize(("chunked", "suggested"), [(True, 2), (False, 1)])
def test_parameter_is_suggested_only_if_its_condition_holds(chunked: bool, suggested: int):
    found = space(
        "engine.args.a=choice(1,2)", "engine.args.b=choice(1,2)", only_if={"engine.args.b": "enable_chunked_prefill"}
    )
    trial = optuna.create_study().ask()
    assert len(found.suggest(trial, {"enable_chunked_prefill": chunked})) == suggested


def test_grid_size_is_the_product_of_the_steps():
    assert space("engine.args.a=choice(1,2,3)", "engine.args.b=range(0.90,0.96,step=0.01)").grid_size == 18


def test_grid_needs_steps():
    with pytest.raises(InputError, match=r"sampler=grid: engine.args.a has no steps"):
        _ = space("engine.args.a=interval(0.5,2)").grid


def test_group_that_is_swept_is_said_to_need_studies_of_its_own():
    with pytest.raises(InputError, match="model=tiny,smollm2: a study sweeps fields, not groups"):
        parse({}, ["model=tiny,smollm2"], {}, {})


class AnyFlag:
    flags = ("max_num_seqs", "enable_chunked_prefill")

    def check(self, args: dict[str, object]) -> None:
        """Takes every flag."""


@pytest.mark.parametrize(
    ("kind", "expression", "message"),
    [
        ("conditions", "max_num_seq <= 20", "conditions.mine: 'max_num_seq <= 20' names max_num_seq, .* max_num_seqs?"),
        ("only_if", "enable_chunked_prefil", "did you mean enable_chunked_prefill?"),
        ("conditions", "max_num_seqs <=", "can't be read"),
        ("conditions", "1 / 0", "condition '1 / 0': "),
    ],
)
def test_condition_that_can_not_be_told_is_refused(kind: str, expression: str, message: str):
    name = "mine" if kind == "conditions" else "engine.args.max_num_seqs"
    swept = space("engine.args.max_num_seqs=choice(4,8)", **{kind: {name: expression}})
    with pytest.raises(InputError, match=message):
        check_space(swept, AnyFlag(), {"max_num_seqs": 4})


def test_condition_on_flags_and_swept_parameters_is_fine():
    conditions = {"mine": "max_num_seqs <= 8 and int(block_size) > 4", "other": "not enable_chunked_prefill"}
    check_space(space("engine.args.block_size=choice(16)", conditions=conditions), AnyFlag(), {})
