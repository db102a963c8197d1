"""Layers that use the keys and values of another: half the cache, and the text of transformers."""

import pytest
import torch

from compress.kernels.program.build import reason_against
from compress.loading import load_model
from compress.runtime.cache_layout import CacheLayout
from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.draft_model import SelfDraft
from compress.runtime.speculation.lengths import FixedLength
from compress.runtime.speculation.making import choose
from compress.runtime.speculation.speculator import Speculator
from tests.runtime.test_families import source_of
from tests.runtime.test_generation import answers, load, prompts


@pytest.fixture(params=["program", "torch"])
def operations(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    elif reason := reason_against():
        pytest.skip(reason)


def test_layers_that_read_take_no_room():
    sources = [0, 0, 2, 2, 4]
    layout = CacheLayout.of([None] * 5, 16, sources)
    assert layout.width == 3
    assert layout.groups == (0,) * 5
    assert layout.places == (0, 0, 1, 1, 2)
    assert layout.kinds == [(None, 3)]
    windowed = CacheLayout.of([None, None, 8, 8, None, None, 8, 8], 4, [0, 0, 2, 2, 4, 4, 6, 6])
    assert windowed.windows == (None, 8)
    assert windowed.groups == (0, 0, 1, 1, 0, 0, 1, 1)
    assert windowed.places == (0, 0, 0, 0, 1, 1, 1, 1)
    assert windowed.kinds == [(None, 2), (8, 2)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_cache_takes_what_the_first_layers_write(family, operations, model_folder):
    """Two layers of four, and three of five: as a model of so many layers, to the byte."""
    for layers, owners in ((4, 2), (5, 3)):
        sharing = load(model_folder(f"{family}_cla", layers=layers), "float32")
        plain = load(model_folder(family, layers=owners), "float32")
        assert sharing.bytes_per_block == plain.bytes_per_block
        assert sharing.bytes_per_token == plain.bytes_per_token
        engine = Engine(sharing, 8, max_tokens_per_step=32, max_sequences=2)
        assert engine.statistics().cache_bytes_per_token == plain.bytes_per_token
        held = {id(tensor) for place in sharing._stored for tensor in place}
        assert len(held) == 2 * owners  # what `allocate` made, in 8 blocks


@pytest.mark.parametrize("family", ["llama_cla", "qwen2_cla", "qwen3_cla", "mistral_cla"])
def test_greedy_text_is_that_of_transformers(family, operations, model_folder):
    """With transformers' cache too; also preempted, and from the prefix cache."""
    folder = model_folder(family, layers=5)
    asked, decoder = prompts(6), load(folder, "float32")
    found, _ = answers(decoder, asked, prefix_caching=False)
    model = load_model(folder, "float32", torch.device("cpu"))
    for prompt, answer in zip(asked, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == expected
    tight, counts = answers(decoder, asked, blocks=decoder.layout.blocks_for(110))
    assert tight == found
    assert counts.preemptions
    warm, counts = answers(decoder, [*asked, *asked])
    assert warm == [*found, *found]
    assert counts.cached_prompt_tokens > 100


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_keys_and_values_in_8_bits(kind, model_folder, monkeypatch):
    """Both ways of computing read what the first layers wrote: the same text, mostly that of float,
    whose logits are as near to one another as in any model of random weights."""
    if reason := reason_against():
        pytest.skip(reason)
    folder, asked = model_folder("llama_cla", layers=4), prompts(6)
    decoder = load(folder, "float32", kind)
    assert decoder.bytes_per_token < load(folder, "float32").bytes_per_token / 2
    found, _ = answers(decoder, asked)
    monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    other, _ = answers(load(folder, "float32", kind), asked)
    agree = [
        a == b for one, two in zip(found, other, strict=True) for a, b in zip(one, two, strict=True)
    ]
    assert sum(agree) > 0.8 * len(agree)


def test_what_the_model_proposes_to_itself(operations, model_folder):
    """Without a whole run, and with a first layer that stays while another goes."""
    folder = model_folder("llama_cla", layers=6)
    decoder, asked = load(folder, "float32"), prompts(3, seed=2)
    expected, _ = answers(decoder, asked)
    for left_out in ([2, 3], [1]):
        proposer = SelfDraft(decoder.without(left_out), decoder, 4, 64, 8, "without layers")
        speculator = Speculator(proposer, FixedLength(4))
        found, counts = answers(decoder, asked, speculator=speculator, max_sequences=8)
        assert found == expected
        assert counts.drafted_tokens > 30


def test_a_layer_is_left_out_with_the_one_it_reads(model_folder):
    source = source_of(model_folder("llama_cla", layers=6))
    assert choose("self:2", "auto", source, None).left_out == (2, 3)
    assert choose("self:3", "auto", source, None).left_out == (3,)
    left_out = choose("self", "auto", source, None).left_out
    assert all(layer in left_out for layer in range(6) if layer - layer % 2 in left_out)


def test_shared_keys_and_values_are_read_by_each_layer(model_folder):
    """So a step of the attention reads as much as without sharing."""
    sharing = load(model_folder("llama_cla", layers=4), "float32")
    assert sharing.kv_bytes_read(10) == 2 * 10 * sharing.bytes_per_token
    assert sharing.kv_bytes_read(10) == load(model_folder(layers=4), "float32").kv_bytes_read(10)


def test_what_is_said_of_the_cache(model_folder, monkeypatch):
    """Two KV heads of 8 dimensions in float32, 128 bytes a token and layer, in two layers."""
    monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")  # the program pads heads to 16
    folder = str(model_folder("llama_cla", layers=4))
    with LLM(folder, dtype="float32", kv_cache_memory="64KiB") as llm:
        assert llm.cache_description.startswith("Keys and values take 256 bytes a token;")
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        assert len(llm.generate([prompts(1)[0]], params)[0].outputs[0].token_ids) == 4
