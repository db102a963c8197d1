"""Blocks that have left a window are given back while a sequence runs, and nobody notices."""

import json
import shutil

import pytest
import torch

from compress.kernels.program.build import reason_against
from compress.loading import load_model
from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.draft_model import SelfDraft
from compress.runtime.speculation.lengths import FixedLength
from compress.runtime.speculation.speculator import Speculator
from tests.runtime.fakes import FakeModel, naive, run, tokens_of
from tests.runtime.test_generation import load, prompts

WINDOW = 21
GREEDY = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)


@pytest.fixture(params=["program", "torch"])
def operations(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    elif reason := reason_against():
        pytest.skip(reason)


@pytest.fixture(params=["all windowed", "some global"])
def folder(request, model_folder, tmp_path):
    if request.param == "some global":
        return model_folder("cwm", layers=5)
    copied = shutil.copytree(model_folder("mistral", layers=5), tmp_path / "windowed")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"sliding_window": WINDOW}))
    return copied


def answered(decoder, asked, speculator=None, blocks=400, **settings):
    """Tokens of each prompt, and the most blocks that were ever in use, with `check` every step."""
    engine = Engine(
        decoder, blocks, max_tokens_per_step=32, max_sequences=8, speculator=speculator, **settings
    )
    for number, prompt in enumerate(asked):
        engine.add_request(str(number), prompt, GREEDY)
    found, most = {}, 0
    while engine.has_work():
        for increment in engine.step():
            found.setdefault(int(increment.request_id), []).extend(increment.token_ids)
        engine.check()
        most = max(most, engine.pool.in_use)
    assert engine.pool.in_use == 0
    return [found[number] for number in range(len(asked))], most, engine


def test_greedy_text_is_that_of_transformers(operations, folder):
    """Float32 in two orders of sums; also preempted, from the prefix cache, and in small chunks."""
    asked = [prompt[:70] for prompt in prompts(8, seed=1)]
    decoder = load(folder, "float32")
    found, _, _ = answered(decoder, asked, prefix_caching=False)
    model = load_model(folder, "float32", torch.device("cpu"))
    for prompt, answer in zip(asked, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, min_new_tokens=50,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == expected
    lone = decoder.layout.blocks_for(120)
    tight, _, engine = answered(decoder, asked, blocks=lone)
    assert tight == found
    assert engine.statistics().preemptions
    warm, _, engine = answered(decoder, [*asked, *asked])
    assert warm == [*found, *found]
    assert engine.statistics().cached_prompt_tokens > 300


def test_a_sequence_holds_no_more_than_its_windows(folder):
    """Tokens far beyond the window, in a cache that could not hold them all."""
    decoder = load(folder, "float32")
    layout = decoder.layout
    windowed = len(layout.windowed)
    (prompt,) = [prompts(2)[1][:45]]
    tokens = len(prompt) + 50
    room = layout.blocks_for(tokens)
    found, most, _ = answered(decoder, [prompt], blocks=room, prefix_caching=False)
    assert most <= room
    whole = -(-tokens // 16)
    # 21 tokens reach into at most 3 blocks; global layers keep them all
    assert room == (len(layout.windows) - windowed) * whole + windowed * 3
    assert room < len(layout.windows) * whole
    assert answered(decoder, [prompt], prefix_caching=False)[0] == found


@pytest.mark.parametrize("windows", [(6,), (None, 6)])
def test_the_prefix_cache_serves_prompts_longer_than_the_window(windows):
    """Blocks that a running sequence gave back are still found by who begins alike."""
    model = FakeModel(windows=windows)
    engine = Engine(model, 60, max_tokens_per_step=16, max_sequences=4)
    params = SamplingParams(max_tokens=20, temperature=0)
    prompt = list(range(40))
    engine.add_request("a", prompt, params)
    assert tokens_of(run(engine)["a", 0]) == naive(prompt, params)
    for name, begin in (("b", prompt), ("c", prompt[:22])):
        engine.add_request(name, [*begin, 90], params)
        (sequence,) = engine.requests[name].sequences
        engine.step()
        assert sequence.request.cached_tokens == len(begin) // 4 * 4
        assert sequence.blocks_held <= engine.pool.layout.blocks_for(len(begin) + 1, 4)
        engine.check()
        assert tokens_of(run(engine)[name, 0])
    assert engine.pool.cached + engine.pool.free == 60


def test_forks_share_what_is_in_the_window_and_copy_what_they_write():
    model = FakeModel(windows=(None, 6))
    engine = Engine(model, 80, max_tokens_per_step=16, max_sequences=4)
    params = SamplingParams(max_tokens=15, seed=3, n=3)
    prompt = list(range(30))
    engine.add_request("a", prompt, params)
    got = run(engine)
    for index in range(3):
        assert tokens_of(got["a", index]) == naive(prompt, params, index=index)


def test_what_the_model_proposes_to_itself_is_verified_behind_a_window(operations, folder):
    """The text without drafts, and of these some are accepted."""
    decoder = load(folder, "float32")
    asked = [prompt[:60] for prompt in prompts(3, seed=2)]
    expected, _, _ = answered(decoder, asked)
    part = decoder.without([1])
    proposer = SelfDraft(part, decoder, 4, 64, 8, "without a layer")
    found, _, engine = answered(decoder, asked, Speculator(proposer, FixedLength(4)))
    assert found == expected
    assert engine.statistics().drafted_tokens > 50


def test_a_step_reads_no_more_than_the_windows(model_folder):
    decoder = load(model_folder("cwm", layers=5), "float32")
    each = decoder.bytes_per_token / 5
    assert decoder.kv_bytes_read(10) == 5 * 10 * each
    assert decoder.kv_bytes_read(100) == (4 * WINDOW + 100) * each


def test_a_window_that_no_context_outgrows_is_none(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("mistral"), tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))
    assert load(folder, "float32").layout.windows == (None,)


def test_a_draft_model_of_its_own_keeps_all_blocks(operations, model_folder):
    """Its cache has the model's block numbers, and it may have fallen behind any window."""
    folder = str(model_folder("cwm", layers=5))
    settings = {"dtype": "float32", "kv_cache_memory": "1MiB", "device": "cpu"}
    asked = [prompt[:60] for prompt in prompts(3, seed=5)]
    texts = []
    for draft in (None, str(model_folder("llama"))):
        tokens = 3 if draft else "auto"
        with LLM(folder, draft=draft, num_speculative_tokens=tokens, **settings) as llm:
            assert llm.engine.pool.layout.windows == ((None,) if draft else (None, *[WINDOW] * 4))
            texts.append([output.outputs[0].token_ids for output in llm.generate(asked, GREEDY)])
            llm.engine.check()
    assert texts[0] == texts[1]


def test_the_cache_is_described_by_kind(model_folder, monkeypatch):
    """Two KV heads of 8 dimensions in float32: 128 bytes a token and layer."""
    monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")  # the program pads heads to 16
    with LLM(str(model_folder("cwm", layers=5)), dtype="float32", kv_cache_memory="64KiB") as llm:
        assert llm.cache_description == (
            "Keys and values take 128 bytes a token of the whole text and 512 bytes a token in "
            "windows of 21; room for 1.6 sequences of 128 tokens"
        )
        assert llm.statistics().cache_bytes_in_use == 0
