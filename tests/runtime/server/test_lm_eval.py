"""lm-eval's own client for OpenAI servers, `local-completions`, against our model in its process.

The server draws log-probabilities from the decoding engine, the other side from `runtime.scoring`:
sums of up to 60 float32 log-probabilities, each off by some 1e-5, so 1e-3 is allowed.
"""

import random

import pytest

from compress.core.source import resolve_model
from tests.conftest import WORDS
from tests.runtime.server.conftest import app_of

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="lm-eval's client needs tenacity")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from compress.harness import RuntimeLM


@pytest.fixture
def both(tiny_llm, model_folder, serve):
    url = serve(app_of(tiny_llm)).url
    folder = str(model_folder("llama"))
    over_http = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="tiny",
        tokenizer=folder,
        tokenizer_backend="huggingface",
        max_length=127,
        batch_size=4,
        max_retries=1,
    )
    return over_http, RuntimeLM(resolve_model(folder))


def words(draw, count):
    return " ".join(draw.choices(WORDS, k=count))


def test_loglikelihoods(both):
    draw = random.Random(0)
    pairs = [(words(draw, draw.randrange(1, 25)), " " + words(draw, 3)) for _ in range(12)]
    instances = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    theirs, ours = (lm.loglikelihood(instances) for lm in both)
    assert [value for value, _ in theirs] == pytest.approx([v for v, _ in ours], abs=1e-3)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]


def test_generations(both):
    draw = random.Random(1)
    settings = {"until": ["w7"], "max_gen_toks": 20}
    pairs = [(words(draw, draw.randrange(1, 25)), settings) for _ in range(8)]
    theirs, ours = (
        lm.generate_until(
            [
                Instance("generate_until", {}, (text, dict(s)), i)
                for i, (text, s) in enumerate(pairs)
            ]
        )
        for lm in both
    )
    assert theirs == ours
