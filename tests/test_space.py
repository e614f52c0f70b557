from pathlib import Path

import optuna
import pytest

from autotune.config.schema import Config, SimConfig
from autotune.errors import InputError
from autotune.search.space import Space, check_space, describe, parse, swept_flags
from autotune.sim.backend import SimBackend


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


def test_condition_without_a_value_refuses_the_combination_and_no_more():
    found = space("engine.args.a=choice(1,2)", conditions={"c": "1 / (a - 2) < 3"})
    assert found.violated({"engine.args.a": 2}, {}) == "conditions.c: '1 / (a - 2) < 3' can't be told: division by zero"
    assert not found.violated({"engine.args.a": 1}, {})


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

    def read(self, args: dict[str, object]) -> dict[str, object]:
        """Take every flag as it is."""
        return args


@pytest.mark.parametrize(
    ("kind", "expression", "message"),
    [
        ("conditions", "max_num_seq <= 20", "conditions.mine: 'max_num_seq <= 20' names max_num_seq, .* max_num_seqs?"),
        ("only_if", "enable_chunked_prefil", "did you mean enable_chunked_prefill?"),
        ("conditions", "max_num_seqs <=", "can't be read"),
        ("conditions", "1 / 0", "conditions.mine: '1 / 0' can't be told: division by zero"),
        ("conditions", "1 / (max_num_seqs - 8) < 1", "can't be told: division by zero"),
        ("only_if", "2**10**9 > 1", "the power is too large"),
        ("conditions", "3**3999999 > 1", "the power is too large"),
        ("conditions", "1 << 10**9", "the power is too large"),
        ("conditions", "2**0.5**-5000 > 1", "can't be told"),
        ("conditions", "max_num_seqs * 10.0**300 * 10.0**300 < 2**1000 * 10**200", "can't be told"),
        ("conditions", "f'{1:>1000000000}' == ''", "can't be told"),
        ("conditions", "'%1000000000d' % 1 == ''", "% takes numbers"),
        ("conditions", "'a'.rjust(1000000000) == ''", "only a flag has fields"),
        ("conditions", "max_num_seqs < '4'", "conditions.mine: .*not supported between instances of 'int' and 'str'"),
        ("conditions", "rand() < 0.5", "names rand, which is no flag"),
        ("conditions", "max_num_seqs.bits > 4", "names max_num_seqs.bits, which is no flag"),
        ("conditions", "(" * 400 + "1" + ")" * 400, "can't be read: .*"),
        ("conditions", "1 + " * 5000 + "1", "more than 1000 characters"),
        ("conditions", "", "can't be read"),
        ("conditions", "\0", "can't be read"),
        ("conditions", "[i for i in 3]", "names i, which is no flag"),
        ("conditions", "lambda: 1", "can't be told"),
    ],
)
def test_condition_that_can_not_be_told_is_refused(kind: str, expression: str, message: str):
    name = "mine" if kind == "conditions" else "engine.args.max_num_seqs"
    swept = space("engine.args.max_num_seqs=choice(4,8)", **{kind: {name: expression}})
    with pytest.raises(InputError, match=message):
        check_space(swept, Config(), AnyFlag(), {"max_num_seqs": 4})


def test_condition_on_flags_and_swept_parameters_is_fine():
    conditions = {"mine": "max_num_seqs <= 8 and int(block_size) > 4", "other": "not enable_chunked_prefill"}
    check_space(space("engine.args.block_size=choice(16)", conditions=conditions), Config(), AnyFlag(), {})


def read(*arguments: str, **rules: dict[str, str]) -> Space:
    """The space of `arguments` as the recorded vLLM reads it."""
    return check_space(
        space(*arguments, **rules), Config(), SimBackend(SimConfig(), Path()), {"max_num_batched_tokens": 8192}
    )


@pytest.mark.parametrize(
    ("written", "choices"),
    [
        ("max_num_batched_tokens=choice(4k,8K,default)", (4000, 8192, "default")),
        ("max_num_batched_tokens=choice(4k,4000)", (4000,)),
        ("max_model_len=auto,2048", (-1, 2048)),
        ("compilation_config.cudagraph_mode=choice(FULL,PIECEWISE)", ("FULL", "PIECEWISE")),
        ("compilation_config.cudagraph_capture_sizes=choice([1,2],[1,2,4])", ("[1, 2]", "[1, 2, 4]")),
        ("cudagraph_capture_sizes=choice([1,2],4,default)", ("[1, 2]", "[4]", "default")),
        (
            'speculative_config=choice({method:ngram,num_speculative_tokens:4},\'{"b":1,"a":[{"c":null}]}\')',
            ('{"method": "ngram", "num_speculative_tokens": 4}', '{"a": [{"c": null}], "b": 1}'),
        ),
        ("speculative_config={a:1},{a:2}", ('{"a": 1}', '{"a": 2}')),
        ("enforce_eager=choice(true,false)", (True, False)),
    ],
)
def test_choices_are_what_vllm_reads(written: str, choices: tuple[object, ...]):
    (distribution,) = read(f"engine.args.{written}").parameters.values()
    assert distribution == optuna.distributions.CategoricalDistribution(choices)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("max_num_seqs=choice(8,abc)", "engine.args.max_num_seqs=abc: vLLM takes a whole number"),
        ("max_num_seqs=interval(8.5,64)", "engine.args.max_num_seqs=8.5: vLLM takes a whole number"),
        ("max_num_seqs=int(interval(0,64))", "engine.args.max_num_seqs=0: vLLM takes at least 1"),
        ("max_num_seqs=choice([1,2],8)", "takes a whole number"),
        ("tensor_parallel_size=choice(0,1)", "engine.args.tensor_parallel_size=0: vLLM takes at least 1"),
        ("gpu_memory_utilization=range(0.9,1.2,step=0.1)", "takes more than 0 and at most 1"),
        ("kv_cache_dtype=choice(auto,fp9)", "engine.args.kv_cache_dtype=fp9: vLLM accepts auto"),
        ("enforce_eager=choice(yes,no)", "engine.args.enforce_eager=yes: vLLM takes true or false"),
        ("enforce_eager=range(0,2)", "takes true or false"),
        ("compilation_conf.mode=choice(1,2)", "no such flag; did you mean compilation_config"),
        ("max_num_seqs.mode=choice(1,2)", r"engine.args.max_num_seqs=.*takes a whole number"),
    ],
)
def test_value_of_a_sweep_that_vllm_does_not_take_is_one_line(written: str, message: str):
    with pytest.raises(InputError, match=message):
        read(f"engine.args.{written}")


def test_condition_reads_fields_and_lists_of_flags():
    found = read(
        "engine.args.compilation_config.cudagraph_mode=choice(FULL,PIECEWISE,default)",
        "engine.args.cudagraph_capture_sizes=choice([1,2],[1,2,4])",
        "engine.args.block_size=choice(16,32)",
        conditions={"dotted": "compilation_config.cudagraph_mode != 'FULL' or len(cudagraph_capture_sizes) == 2"},
        only_if={"engine.args.block_size": "cudagraph_mode == 'FULL'"},
    )
    mode, sizes = "engine.args.compilation_config.cudagraph_mode", "engine.args.cudagraph_capture_sizes"
    assert not found.violated({mode: "FULL", sizes: "[1, 2]"}, {})
    assert found.violated({mode: "FULL", sizes: "[1, 2, 4]"}, {})
    assert not found.violated({mode: "default", sizes: "[1, 2, 4]"}, {"compilation_config": {"mode": 3}})
    study = optuna.create_study()
    for value in ("FULL", "PIECEWISE"):
        study.enqueue_trial({mode: value})
        assert ("engine.args.block_size" in found.suggest(study.ask(), {})) == (value == "FULL")


def test_flags_of_a_trial_are_whole_and_have_what_is_not_swept():
    params = {"engine.args.compilation_config.cudagraph_capture_sizes": "[1, 2]", "engine.args.max_num_seqs": "default"}
    assert swept_flags(params, {"compilation_config": {"mode": 3}, "max_num_seqs": 8}) == {
        "compilation_config": {"mode": 3, "cudagraph_capture_sizes": [1, 2]},
        "max_num_seqs": None,
    }
