"""Each setting is checked when it is made, in one line that says what is allowed."""

import pytest

from compress.core.errors import InputError
from compress.runtime.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0; allowed is a whole number, 1 or more"),
        ({"max_tokens": 1.5}, "max_tokens = 1.5"),
        ({"n": 0}, "n = 0"),
        ({"n": True}, "n = True"),
        ({"temperature": -0.1}, "temperature = -0.1; allowed is a number, 0 or more"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0}, "top_p = 0; give a number above 0"),
        ({"top_p": 1.1}, "top_p = 1.1; allowed is a number, 0 to 1"),
        ({"top_k": -2}, "top_k = -2"),
        ({"min_p": 2}, "min_p = 2"),
        ({"seed": "x"}, "seed = 'x'"),
        ({"seed": 2**64}, "seed = "),
        ({"stop": ["a", ""]}, "stop = "),
        ({"stop": 3}, "stop = 3; give a list"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs = -1"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs = 1000000"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0; allowed is a number, 0.01 to 100"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty = 1e-300"),
        ({"presence_penalty": 3}, "presence_penalty = 3"),
        ({"frequency_penalty": None}, "frequency_penalty = None"),
        ({"ignore_eos": 1}, "ignore_eos = 1"),
        ({"logit_bias": [1]}, "logit_bias = [1]; give a table from tokens to numbers"),
        ({"logit_bias": {"a": 1}}, "logit_bias: 'a' is no token number"),
        ({"logit_bias": {-1: 1}}, "logit_bias: -1 is no token number"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 = 101; allowed is -100 to 100"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3 = nan"),
        ({"logit_bias": {3: None}}, "logit_bias of token 3 = None"),
        ({"grammar": {"type": "object"}}, "grammar = {'type': 'object'}; give a Grammar"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError) as caught:
        SamplingParams(**settings)
    assert message in str(caught.value)


def test_lists_become_tuples():
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]).stop_token_ids == (1,)
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop="a"))


def test_a_bias_is_copied_and_takes_digits_as_keys():
    given = {"5": 1, 6: -2.5}
    params = SamplingParams(logit_bias=given)
    given[7] = 3
    assert params.logit_bias == {5: 1.0, 6: -2.5}
    assert params == SamplingParams(logit_bias={5: 1, 6: -2.5})
    assert hash(params) is not None


def test_what_is_greedy_and_what_is_penalized():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams().penalized
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 1.5}).penalized
