import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from autotune.config.schema import Config
from autotune.text import one_line, rounded, shorten


def test_message_is_one_line_without_hydras_search_path():
    error = HydraException("Could not find 'x'\nAvailable options:\n\ta\n\tb\nConfig search path:\n\tprovider=hydra")
    assert one_line(error) == "Could not find 'x'; Available options: a; b"


def test_what_omegaconf_adds_for_developers_is_left_out():
    with pytest.raises(OmegaConfBaseException, match="full_key: n_trials") as caught:
        OmegaConf.structured(Config).n_trials = "many"
    assert one_line(caught.value) == "Value 'many' of type 'str' could not be converted to Integer"


def test_cause_of_an_error_is_told_with_it():
    error = HydraException("Error in call")
    error.__cause__ = ValueError("the cause")
    assert one_line(error) == "Error in call; the cause"


def test_changes_are_shown_without_their_prefix():
    assert shorten({"engine.args.max_num_seqs": 8, "scenario.qps": 2.5}) == "max_num_seqs=8 scenario.qps=2.5"


@pytest.mark.parametrize(
    ("value", "words"),
    [(15585.9, "15,586"), (1057.02, "1,057"), (8.3279, "8.328"), (1024, "1,024"), (True, "True"), (None, "")],
)
def test_figures_have_no_exponents(value: object, words: str):
    assert rounded(value) == words
