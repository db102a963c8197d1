"""The whole way on real decoders: what transformers writes, and the same whoever else is there."""

import random
from typing import Any

import pytest
import torch

from compress.core.source import ModelSource
from compress.kernels.program.build import reason_against
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.decoder import Decoder
from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from compress.runtime.loading import load_decoder
from compress.runtime.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids, half of them with a beginning in common."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, 120) for _ in range(40)]
    made = []
    for index in range(count):
        own = [draw.randrange(3, 120) for _ in range(draw.randrange(1, 45))]
        made.append(shared + own if index % 2 else own)
    return made


def answers(
    decoder: Decoder,
    asked: list[list[int]],
    params: Any = GREEDY,
    blocks: int = 600,
    **settings: Any,
) -> tuple[list[list[int]], Any]:
    """What an engine with an empty cache answers, and its statistics."""
    engine = Engine(decoder, blocks, **{"max_tokens_per_step": 64, "max_sequences": 32} | settings)
    with LLM.from_engine(engine) as llm:
        found = [list(out.outputs[0].token_ids) for out in llm.generate(asked, params)]
        engine.check()
        return found, llm.statistics()


def load(folder: Any, dtype: str, kv_cache_dtype: str = "auto") -> Decoder:
    source = ModelSource(str(folder), folder)
    return load_decoder(
        source, torch.device("cpu"), dtype, most_tokens=64, kv_cache_dtype=kv_cache_dtype
    )


@pytest.mark.parametrize("operations", ["program", "torch"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "deepseek_v3", "youtu"])
def test_greedy_text_is_that_of_transformers(family, operations, model_folder, monkeypatch):
    """In float32 two ways of summing differ by 1e-6; no two logits here are as close as that."""
    if operations == "torch":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    elif reason := reason_against():
        pytest.skip(reason)
    asked = prompts(20)
    found, _ = answers(load(model_folder(family), "float32"), asked)
    model: Any = load_model(model_folder(family), "float32", torch.device("cpu"))
    for prompt, answer in zip(asked, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == expected


KINDS = ["float32", "bfloat16", "4 bits", "8 bits", "int8 cache", "fp8 cache"]
LATENTS = ["youtu", "int8 cache, youtu", "4 bits, deepseek_v3"]


@pytest.fixture(params=[*KINDS, *LATENTS])
def decoder(request, model_folder, tmp_path):
    if reason := reason_against():
        pytest.skip(f"not promised: {reason}")
    family = request.param.split()[-1] if request.param in LATENTS else "llama"
    folder = model_folder(family, torch.bfloat16)
    if "bits" in request.param:
        stage = {"method": "rtn", "group_size": 16, "bits": int(request.param[0])}
        recipe = {"model": str(folder), "out": str(tmp_path / "out"), "stages": [stage]}
        run_recipe(build_recipe(recipe))
        folder = tmp_path / "out"
    cache = request.param.split()[0] if "cache" in request.param else "auto"
    return load(folder, "float32" if request.param == "float32" else "bfloat16", cache)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_same_tokens_alone_together_preempted_and_from_the_prefix_cache(decoder, drawn):
    """Equal to the token, greedy and drawn with a seed: rows have the same bits in any batch."""
    asked = prompts(32)
    params = [GREEDY] * 32
    if drawn:
        params = [
            SamplingParams(max_tokens=20, top_p=0.9, seed=i, ignore_eos=True) for i in range(32)
        ]
    together, _ = answers(decoder, asked, params)
    for index in range(0, 32, 4):
        alone, _ = answers(decoder, [asked[index]], params[index], prefix_caching=False)
        assert alone == [together[index]]
    tight, counts = answers(decoder, asked, params, blocks=24)
    assert tight == together
    assert counts.preemptions > 5
    assert counts.blocks_in_use == 0
    _, cold = answers(decoder, asked, params, prefix_caching=False)
    assert cold.cached_prompt_tokens == 0
    engine = Engine(decoder, 600, max_tokens_per_step=64, max_sequences=32)
    with LLM.from_engine(engine) as llm:
        for _ in range(2):
            warm = [list(out.outputs[0].token_ids) for out in llm.generate(asked, params)]
            assert warm == together
        assert llm.statistics().cached_prompt_tokens > 500
    chunked, _ = answers(decoder, asked, params, max_tokens_per_step=7, max_sequences=5)
    assert chunked == together


def test_two_engines_in_turn_on_one_decoder_do_not_mix(decoder):
    """`allocate` makes a new cache; what an earlier engine left there is gone."""
    asked = prompts(4)
    assert answers(decoder, asked)[0] == answers(decoder, asked)[0]
