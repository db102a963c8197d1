"""The GPU's way of computing, whole: Triton kernels, captured steps, one step ahead.

On a machine without a GPU Triton's interpreter computes, and a captured step is its work done anew;
float32 alone then, which is what the interpreter is right in.
"""

import json
import shutil
from array import array
from dataclasses import replace

import pytest
import torch

from compress.core.source import ModelSource
from compress.kernels.ahead_of_time import all_entries
from compress.kernels.eager import Eager
from compress.kernels.paged_attention import triton as attention
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.batch import AsynchronousModel, Batch
from compress.runtime.decoder import EagerDecoder
from compress.runtime.engine import Engine
from compress.runtime.gpu_decoder import GpuDecoder
from compress.runtime.llm import LLM
from compress.runtime.loading import load_decoder
from compress.runtime.sampler import SamplingState, draw, draws_of
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.scoring import Span, score
from compress.runtime.speculation.speculator import Speculator
from compress.runtime.weights import load_weights
from tests.kernels.guarded import Guard
from tests.runtime.speculation.test_engine import Always, Oracle
from tests.runtime.test_generation import prompts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON_NAMES = {
    torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=5, temperature=0.9, seed=5, ignore_eos=True)
FILTERED = SamplingParams(max_tokens=5, top_k=20, top_p=0.8, min_p=0.02, seed=6, ignore_eos=True)
PENALIZED = SamplingParams(max_tokens=5, seed=7, repetition_penalty=1.3, ignore_eos=True)


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    monkeypatch.setenv("COMPRESS_CPU_KERNELS", "triton")


def load(folder, kind=GpuDecoder):
    source = ModelSource(str(folder), folder)
    if kind is EagerDecoder:
        return EagerDecoder(load_weights(source), DEVICE, torch.float32)
    decoder = load_decoder(source, DEVICE, "float32", most_tokens=48)
    assert isinstance(decoder, GpuDecoder)
    assert isinstance(decoder, AsynchronousModel)
    return decoder


def answers(decoder, asked, params, blocks=60, **settings):
    engine = Engine(decoder, blocks, max_tokens_per_step=48, max_sequences=4, **settings)
    with LLM.from_engine(engine) as llm:
        found = llm.generate(asked, params)
        engine.check()
        return [[out.token_ids for out in request.outputs] for request in found], llm.statistics()


@pytest.fixture
def quantized(model_folder, tmp_path):
    """A function that quantizes a tiny model of a family."""

    def make(family, folder=None, **settings):
        stage = {"method": "rtn", "group_size": 16, **settings}
        recipe = {"model": str(folder or model_folder(family)), "out": str(tmp_path / "out")}
        run_recipe(build_recipe({**recipe, "stages": [stage]}))
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("family", ["qwen3", "youtu", "llama_cla", "qwen3_cla"])
def test_greedy_text_of_a_quantized_model_is_that_of_transformers(family, quantized):
    """In float32 two ways of summing differ by 1e-6; no two logits here are as close as that."""
    folder = quantized(family)
    asked = prompts(3)
    found, _ = answers(load(folder), asked, GREEDY)
    model = load_model(folder, "float32", torch.device("cpu"))
    for prompt, (answer,) in zip(asked, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == expected


def test_every_way_of_drawing_gives_the_hosts_tokens(model_folder):
    """Draws of the device, of the host, n of one prompt, in one batch, preempted and not.

    Both sides invert the same distribution with the same number; logits differ by 1e-6, so that a
    token would differ once in some 10,000 draws.
    """
    folder = model_folder("llama")
    several = SamplingParams(max_tokens=3, seed=8, n=2, ignore_eos=True)
    asked = prompts(5, seed=2)
    params = [GREEDY, SAMPLED, FILTERED, PENALIZED, several]
    expected, _ = answers(load(folder, EagerDecoder), asked, params)
    assert isinstance(load(folder, EagerDecoder)._operations, Eager)
    decoder = load(folder)
    found, _ = answers(decoder, asked, params)
    assert found == expected


def test_preempted_while_a_token_is_being_drawn(model_folder):
    """Two prompts fill a block each, and of the blocks they go on in there is one."""
    folder = model_folder("llama")
    asked = [prompts(2)[1][:15], prompts(2)[1][15:30]]
    expected, _ = answers(load(folder, EagerDecoder), asked, [SAMPLED, FILTERED])
    found, counts = answers(load(folder), asked, [SAMPLED, FILTERED], blocks=3)
    assert found == expected
    assert counts.preemptions


def test_captured_steps_give_what_single_launches_give(quantized, monkeypatch):
    """Equal tokens with and without padding; only steps in which everyone decodes are replayed."""
    folder = quantized("mistral", bits=8, symmetric=False)
    asked = prompts(3, seed=4)
    captured = load(folder)
    found, counts = answers(captured, asked, SAMPLED)
    assert {size for size, _ in captured._captured} == {(1, 1, 1), (2, 2, 1), (4, 4, 1)}
    monkeypatch.setattr(GpuDecoder, "capture", lambda self, most, lookahead: None)
    single = load(folder)
    expected, same = answers(single, asked, SAMPLED)
    assert not single._captured
    assert found == expected
    assert counts.steps == same.steps


@pytest.mark.parametrize("family", ["llama", "youtu"])
def test_padding_touches_no_cache(family, model_folder):
    """Three first tokens in a step of four, on a cache of NaN: nothing else is read or written."""
    decoder = load(model_folder(family))
    decoder.allocate(8)
    decoder.capture(4)
    for keys, values in decoder._cache:
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    blocks = torch.tensor([3, 5, 6])
    batch = Batch(
        tokens=torch.tensor([7, 8, 9]),
        positions=torch.zeros(3, dtype=torch.int64),
        slots=16 * blocks[None],
        starts=torch.arange(4, dtype=torch.int32),
        contexts=torch.ones(3, dtype=torch.int32),
        block_tables=blocks[None, :, None].int(),
        rows=torch.arange(3),
    )
    states = [(SamplingState(GREEDY, 0, 0, array("q"), frozenset(), 128), 0)] * 3
    assert decoder._step_for(batch, filtered=False).size.sequences == 4
    assert min(decoder.launch(batch, draws_of(range(3), states)).tokens()) >= 0
    assert written(decoder) == [[3, 0], [5, 0], [6, 0]]


def written(decoder):
    """[block, position] of all that is not NaN; the same in all layers."""
    found = [
        (~part.isnan().any(dim=(1, 3))).nonzero().tolist()  # of [blocks, 16]
        for layer in decoder._cache
        for part in layer
    ]
    assert found == [found[0]] * len(found)
    return found[0]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_drafts_of_several_lengths_in_one_captured_step(family, model_folder):
    """Three, one and two tokens in a step of four sequences and eight tokens, the first and the
    last without a draw, as when a draft model catches up: draws are in their order, and of what
    was not written before, nothing is read."""
    decoder = load(model_folder(family))
    decoder.allocate(8)
    decoder.capture(4, 2)
    for keys, values in decoder._cache:
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    batch = Batch(
        tokens=torch.tensor([7, 8, 9, 10, 11, 12]),
        positions=torch.tensor([0, 1, 2, 0, 0, 1]),
        slots=torch.tensor([[48, 49, 50, 80, 96, 97]]),
        starts=torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        contexts=torch.tensor([3, 1, 2], dtype=torch.int32),
        block_tables=torch.tensor([[[3], [5], [6]]], dtype=torch.int32),
        rows=torch.tensor([1, 2, 3, 4, 5]),
    )
    logits = decoder.forward(batch)
    states = [(SamplingState(SAMPLED, 0, 0, array("q"), frozenset(), 128), i) for i in range(4)]
    draws = draws_of(range(4), states)
    expected = [
        draw(row.numpy(), SAMPLED, u) for row, u in zip(logits, draws.uniform, strict=False)
    ]
    assert decoder._step_for(batch, filtered=False).size == (4, 8, 3)
    assert decoder.launch(batch, draws).tokens() == expected
    assert written(decoder) == [[3, 0], [3, 1], [3, 2], [5, 0], [6, 0], [6, 1]]


def test_drafts_are_verified_in_captured_steps(model_folder, monkeypatch):
    """With proposals that are wrong at every other place, with and without filters on the draws.

    The text is that of the plain run of PyTorch's operations, and of attention of rows that are
    padding nothing is looked at: they are NaN.
    """
    guard = Guard()
    monkeypatch.setattr(attention.torch, "empty_like", guard.empty_like)
    folder = model_folder("llama")
    asked = [prompt[:9] for prompt in prompts(3, seed=6)]
    params = [GREEDY, SAMPLED, replace(FILTERED, max_tokens=3)]
    expected, plain = answers(load(folder, EagerDecoder), asked, params)
    known = {(tuple(prompt), 0): out for prompt, (out,) in zip(asked, expected, strict=True)}
    oracle = Oracle(known, wrong=2)
    oracle.most = 2
    decoder, taken = load(folder), []
    find = decoder._step_for

    def step_for(batch, filtered):
        step = find(batch, filtered)
        taken.append((len(batch.contexts), len(batch.tokens), filtered, step and step.size))
        return step

    monkeypatch.setattr(decoder, "_step_for", step_for)
    found, counts = answers(decoder, asked, params, speculator=Speculator(oracle, Always()))
    assert found == expected
    assert counts.drafted_tokens > counts.accepted_tokens > 0
    assert counts.steps < plain.steps
    drafted = [size for sequences, tokens, _, size in taken if sequences < tokens < 4 * sequences]
    assert drafted
    assert None not in drafted
    assert {filtered for *_, filtered, size in taken if size} == {False, True}


def test_scores_with_a_window(model_folder, tmp_path):
    """Log-probabilities, as other decoders give them: float32 sums in another order."""
    folder = shutil.copytree(model_folder("mistral"), tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 21}))
    spans = [Span(torch.randint(3, 120, (70,)).numpy(), 3), Span(torch.arange(5, 25).numpy(), 1)]
    found, expected = (
        dict(score(load(folder, kind), spans, 48)) for kind in (GpuDecoder, EagerDecoder)
    )
    for index in range(2):
        torch.testing.assert_close(
            torch.from_numpy(found[index].log_probabilities),
            torch.from_numpy(expected[index].log_probabilities),
            rtol=0,
            atol=2e-4,
        )


@pytest.mark.parametrize("blocks", [9, 60])
def test_layers_of_two_windows_have_their_own_blocks(blocks, model_folder):
    """The tokens that PyTorch's operations give, in captured steps, alone and preempted."""
    folder = model_folder("cwm", layers=3)
    asked = [prompt[:30] for prompt in prompts(4, seed=6)]
    params = [GREEDY, SAMPLED, FILTERED, GREEDY]
    expected, _ = answers(load(folder, EagerDecoder), asked, params, prefix_caching=False)
    decoder = load(folder)
    assert decoder.layout.windows == (None, 21, 21)
    found, counts = answers(decoder, asked, params, blocks)
    assert found == expected
    assert bool(counts.preemptions) == (blocks == 9)


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        ("qwen3", {"_attend", "_rope_and_write"}),
        ("qwen3_cla", {"_attend", "_rope_and_write"}),
        ("youtu", {"_attend_latents", "_latent_write"}),
    ],
)
def test_what_is_launched_was_compiled_ahead_of_time(family, kernels, quantized, model_folder):
    """Types of the arguments of every launch, in float16 with float16 scales, as entries have."""
    folder = quantized(family, folder=model_folder(family, torch.float16))
    source = ModelSource(str(folder), folder)
    decoder = load_decoder(source, DEVICE, "float16", most_tokens=48)
    compiled: dict[str, list[dict[str, str]]] = {}
    launched: dict[str, list[dict[str, str]]] = {}
    for entry in all_entries(90):
        kernel = entry.kernel
        pointers = {name: kind for name, kind in entry.types.items() if kind[0] == "*"}
        compiled.setdefault(kernel.__name__, []).append(pointers)

        def note(*args, kernel=kernel, **constants):
            given = dict(zip(kernel.arg_names, args, strict=False)) | constants
            types = {
                name: "*" + TRITON_NAMES[value.dtype]
                for name, value in given.items()
                if isinstance(value, torch.Tensor)
            }
            launched.setdefault(kernel.__name__, []).append(types)

        if len(compiled[kernel.__name__]) == 1:
            kernel.add_pre_run_hook(note)
    try:
        answers(decoder, prompts(2), [GREEDY, FILTERED])
    finally:
        for entry in all_entries(90):
            entry.kernel.pre_run_hooks.clear()
    assert launched.keys() >= {"_embed", "product", "_rms_norm", "_draw", *kernels}
    for name, every in launched.items():
        for types in every:
            assert types in compiled[name], f"{name}: launched with {types}"


def test_logits_that_are_not_numbers_end_the_request(model_folder):
    decoder = load(model_folder("llama"))
    decoder._final_norm.fill_(float("nan"))
    engine = Engine(decoder, 60, max_tokens_per_step=48, max_sequences=4)
    with LLM.from_engine(engine) as llm:
        (output,) = llm.generate([[5, 6, 7]], GREEDY)[0].outputs
    assert (output.finish_reason, output.token_ids) == ("error", [])
    assert "NaN" in output.error
