from pathlib import Path
from typing import Any

import optuna
import pytest

from autotune.config import CONF, vllm_flags
from autotune.config.command_line import compose
from autotune.config.schema import Config, SimConfig
from autotune.config.vllm_flags import Flag, recorded
from autotune.errors import InputError
from autotune.measure.prepare import prepare
from autotune.search.checks import check_space
from autotune.search.distributions import describe
from autotune.search.space import Space, parse, shared_start, swept_flags
from autotune.sim.backend import SimBackend
from tests.standin import StandIn, StandInConfig
from tests.studies import space


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
    ("written", "message"),
    [
        ("8", r"engine.args.a=8: a space holds choice\(…\), range"),
        ("[8, 16]", r"engine.args.a=\[8, 16\]: a space holds choice"),
        ("{'b': 1}", "engine.args.a={'b': 1}: no viable alternative .* quote"),
        ("choice(8", r"engine.args.a=choice\(8: no viable alternative .* close each bracket"),
        ("choice(null,8)", "write choice.*, with default in it for vLLM's own value"),
        ("glob(*)", r"engine.args.a=glob\(\*\): write choice"),
    ],
)
def test_line_of_a_space_that_is_no_sweep_is_named_alone(written: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        parse({"engine.args.a": written, "engine.args.b": "choice(1,2)"}, ["seed=1"], {}, {})
    assert "seed" not in str(error.value)


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


ANY_FLAG = StandIn(StandInConfig(), Path())


@pytest.mark.parametrize(
    ("kind", "expression", "message"),
    [
        ("conditions", "max_num_seq <= 20", "conditions.mine: 'max_num_seq <= 20' names max_num_seq, .* max_num_seqs?"),
        ("only_if", "enable_chunked_prefil", "did you mean enable_chunked_prefill?"),
        ("conditions", "max_num_seqs <=", "can't be read"),
        ("conditions", "max_num_seqs / 0", "conditions.mine: 'max_num_seqs / 0' can't be told: division by zero"),
        ("conditions", "False", "conditions.mine: 'False' names no flag; write a flag or a swept parameter"),
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
        check_space(swept, Config(), ANY_FLAG, {"max_num_seqs": 4})


def test_condition_on_flags_and_swept_parameters_is_fine():
    conditions = {"mine": "max_num_seqs <= 8 and int(block_size) > 4", "other": "not enable_chunked_prefill"}
    check_space(space("engine.args.block_size=choice(16)", conditions=conditions), Config(), ANY_FLAG, {})


class Recorded:
    """The vLLM whose flags are recorded, but for those that it `lacks`, and with `others`."""

    def __init__(self, lacks: tuple[str, ...] = (), **others: Flag) -> None:
        self.flags = {name: flag for name, flag in recorded().items() if name not in lacks} | others
        self.facts = {"vllm": "0.1"}

    def read(self, args: dict[str, Any]) -> dict[str, Any]:
        return vllm_flags.read(args, self.flags, "vLLM")


def read(*arguments: str, backend: Any = None, **rules: dict[str, str]) -> Space:
    """The space of `arguments` as the recorded vLLM reads it."""
    return check_space(space(*arguments, **rules), Config(), backend or Recorded(), {"max_num_batched_tokens": 8192})


def test_flag_and_value_that_another_vllm_has_are_left_out_with_one_line(caplog: pytest.LogCaptureFixture):
    old = Recorded(lacks=("max_num_active_seqs",), kv_cache_dtype=Flag(choices=["auto", "fp8"]))
    found = read(
        "engine.args.max_num_seqs=choice(8,16)",
        "engine.args.max_num_active_seqs=choice(4,8)",
        "engine.args.kv_cache_dtype=choice(auto,nvfp4,fp8)",
        backend=old,
        conditions={"active": "max_num_active_seqs <= max_num_seqs"},
    )
    assert list(found.parameters) == ["engine.args.max_num_seqs", "engine.args.kv_cache_dtype"]
    assert found.parameters["engine.args.kv_cache_dtype"].choices == ("auto", "fp8")
    assert caplog.messages == [
        "left out of the space, as vLLM 0.1 has no max_num_active_seqs",
        "left out of the space: engine.args.kv_cache_dtype=nvfp4: vLLM accepts auto, fp8",
    ]
    with pytest.raises(InputError, match=r"nothing to tune: vLLM 0\.1 has no max_num_active_seqs"):
        read("engine.args.max_num_active_seqs=choice(4,8)", backend=old)
    with pytest.raises(InputError, match="no such flag; did you mean max_num_active_seqs"):
        read("engine.args.max_num_activ_seqs=choice(4,8)")


def test_simulation_leaves_out_what_it_does_not_model(caplog: pytest.LogCaptureFixture):
    simulated = SimBackend(SimConfig(), Path())
    swept = ["engine.args.max_num_seqs=choice(8,16)", "engine.args.stream_interval=choice(1,4)", "backend.env.X=a,b"]
    assert list(read(*swept, backend=simulated).parameters) == ["engine.args.max_num_seqs"]
    assert caplog.messages == ["left out of the space, as the simulation has no stream_interval, backend.env.X"]


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
        ("max_num_seqs=interval(8,64)", r"max_num_seqs=8.0: vLLM takes a whole number; write int\(interval"),
        ("max_num_seqs=interval(8.5,64)", "engine.args.max_num_seqs=8.5: vLLM takes a whole number"),
        ("max_num_seqs=int(interval(0,64))", "engine.args.max_num_seqs=0: vLLM takes at least 1"),
        ("gpu_memory_utilization=range(0.9,1.2,step=0.1)", "takes more than 0 and at most 1"),
        ("kv_cache_dtype=choice(auto,fp9)", "engine.args.kv_cache_dtype=fp9: vLLM accepts auto"),
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


# What the installed vLLM refuses on a CPU, by flag: values of conf/space that it names, and why.
ON_CPU = {
    "attention_backend": ({"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"}, "vLLM on a CPU has no attention_backend"),
    "moe_backend": ({"triton", "cutlass", "flashinfer_cutlass", "deep_gemm", "marlin"}, "vLLM on a CPU has no moe_ba"),
    "enable_eplb": ({True}, "only supported on CUDA devices"),
    "api_server_count": ({2, 4}, "api_server_count is 1"),
    "kv_offloading_size": ({8.0, 32.0}, "vLLM on a CPU has no kv_offloading_size"),
    "quantization": ({"fp8", "fp8_per_block", "mxfp8"}, "vLLM on a CPU has no quantization"),
    "speculative_config": ({'{"method": "suffix", "num_speculative_tokens": 8}'}, "Install via"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "space").glob("*.yaml")))
def test_space_is_one_of_the_installed_vllm_and_its_refusals_are_named(name: str, caplog: pytest.LogCaptureFixture):
    config, params, sweeps = compose(["model=tiny_moe", f"space=[{name}]"], ["tracking=none"])
    if not params:
        return
    prepared = prepare(config)
    outcome = prepared.dry_run()
    found = check_space(parse(params, sweeps, config.conditions, config.only_if)[0], config, prepared.backend, {})
    assert not outcome.refusal and not caplog.messages and len(found.parameters) == len(params)
    for flag, (values, why) in ON_CPU.items():
        if f"engine.args.{flag}" in found.parameters:
            alone = {
                value: prepared.dry_run(swept_flags({f"engine.args.{flag}": value}, prepared.args))
                for value in found.parameters[f"engine.args.{flag}"].choices
            }
            assert {value for value, one in alone.items() if one.refusal} == values
            assert all(why in one.refusal for one in alone.values() if one.refusal)


SEQS, TOKENS, GRAPHS = (f"max_{name}" for name in ("num_seqs", "num_batched_tokens", "cudagraph_capture_size"))


@pytest.mark.parametrize(
    ("swept", "start"),
    [
        ([f"{SEQS}=int(interval(8,256))"], {SEQS: 256}),
        ([f"{SEQS}=int(interval(8,16384))"], {SEQS: 1024}),  # more would take memory from all
        ([f"{SEQS}=int(interval(8,1024))", f"{TOKENS}=choice(256,512)"], {SEQS: 512, TOKENS: 512}),
        ([f"{GRAPHS}=choice(default,256)", "num_gpu_blocks_override=choice(default)"], {GRAPHS: 512}),
        (["long_prefill_token_threshold=choice(0,256)", "block_size=choice(16,32)"], {}),
        (["block_size=choice(16,32)"], None),
    ],
)
def test_shared_server_starts_with_the_most_of_what_is_swept(swept: list[str], start: dict[str, Any] | None):
    assert shared_start(space(*(f"engine.args.{one}" for one in swept)), {GRAPHS: 512}) == start


def test_trials_that_differ_in_their_load_alone_share_a_server():
    assert shared_start(space("scenario.qps=interval(1,64)"), {}) == {}
