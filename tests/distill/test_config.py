"""Settings of the loop, and the learning rate that they give."""

import math
from itertools import pairwise

import pytest

from compress.core.config import build
from compress.core.errors import InputError
from compress.distill.config import TrainConfig
from compress.distill.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("200k", 200_000), ("2M", 2_000_000), ("1.5B", 1_500_000_000), ("4_096", 4096), (77, 77)],
)
def test_numbers_of_tokens(text, tokens):
    assert build(TrainConfig, {"tokens": text}, "x").tokens == tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": "many"}, "tokens = 'many': not a number; write it as 200000, 200k"),
        ({"tokens": "0"}, "tokens = '0': Input should be greater than or equal to 1"),
        ({"tokens": "2MB"}, "not a number"),
        ({"schedule": "linear"}, "schedule = 'linear': Input should be 'cosine', 'wsd' or"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"ema": 1.0}, "ema = 1.0"),
        ({"clip_norm": 0}, "clip_norm = 0"),
        ({"micro_bach": 3}, "did you mean 'micro_batch'"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(InputError, match=message):
        build(TrainConfig, values, "train")


def test_steps_cover_the_tokens():
    config = TrainConfig(tokens=1000, seq_len=10, batch_size=7)
    assert config.steps == 15  # 14 are 980


@pytest.mark.parametrize(
    ("tokens", "sequences"), [("1k", 2), ("200k", 2), ("400k", 3), ("1M", 8), ("1B", 8)]
)
def test_few_tokens_go_in_small_steps(tokens, sequences):
    """200 steps, as far as 2 to 8 sequences a step go."""
    config = build(TrainConfig, {"tokens": tokens}, "train")
    assert config.step_sequences == sequences
    assert config.steps * sequences * 512 >= config.tokens


def factors(**values):
    config = TrainConfig(tokens=100 * 16, seq_len=16, batch_size=1, **values)
    return [learning_rate_factor(step, config) for step in range(config.steps)]


def test_warmup():
    found = factors(warmup=0.1, schedule="constant")
    assert found[:11] == pytest.approx([0.1 * (i + 1) for i in range(10)] + [1.0])
    assert set(found[9:]) == {1.0}


def test_warmup_of_part_of_a_step_never_passes_the_peak():
    assert factors(warmup=0.005, schedule="constant")[0] == 1.0


def test_cosine():
    found = factors(warmup=0.2, schedule="cosine", min_ratio=0.1)
    assert found[20] == 1.0
    assert found[60] == pytest.approx(0.55)  # half the way is half the height
    assert found[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(a > b for a, b in pairwise(found[20:]))
    assert 0.1 < found[-1] < 0.101


def test_wsd():
    found = factors(warmup=0.1, schedule="wsd", decay=0.2, min_ratio=0.0)
    assert set(found[9:81]) == {1.0}
    assert found[90] == pytest.approx(0.5)
    assert found[99] == pytest.approx(0.05)


def test_nothing_but_warmup():
    assert factors(warmup=1.0)[-1] == 1.0
