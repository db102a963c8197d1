"""A model without some of its layers: what it computes, and that the cache stays the model's."""

import threading
from pathlib import Path

import pytest
import torch

from benchmarks.layers_removed import remove
from compress.core.source import ModelSource
from compress.kernels.program.build import reason_against
from compress.runtime.batch import Batch
from compress.runtime.decoder import EagerDecoder
from compress.runtime.engine import Engine
from compress.runtime.gpu_decoder import GpuDecoder
from compress.runtime.loading import make_decoder
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.draft_model import SelfDraft
from compress.runtime.speculation.speculator import Speculator
from compress.runtime.weights import load_weights, rounded_by_row
from tests.runtime.speculation.test_draft_model import run
from tests.runtime.speculation.test_engine import Always
from tests.runtime.test_logits import TOKENS

CPU = torch.device("cpu")
LAYERS = 6
LEFT_OUT = (1, 3, 4)
PROMPTS = [TOKENS[:40].tolist(), TOKENS[20:31].tolist(), TOKENS[:45].tolist()]
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0, logprobs=1),
    SamplingParams(max_tokens=30, temperature=0.9, seed=1, n=2, logprobs=1),
    SamplingParams(max_tokens=20, temperature=0, repetition_penalty=1.2),
]


@pytest.fixture(params=["program", "PyTorch"])
def operations(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    elif reason := reason_against():
        pytest.skip(reason)
    return request.param


def one_batch(count: int) -> Batch:
    """The first tokens of one sequence, in the first blocks, with the logits of each."""
    places = torch.arange(count)
    return Batch(
        tokens=TOKENS[places],
        positions=places,
        slots=places[None],
        starts=torch.tensor([0, count], dtype=torch.int32),
        contexts=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(-(-count // 16), dtype=torch.int32)[None, None],
        rows=places,
    )


def load(folder, dtype=torch.float32):
    return make_decoder(load_weights(ModelSource(str(folder), folder)), CPU, dtype, 64)


def engine_of(decoder, left_out=None, k=4, blocks=40):
    speculator = None
    if left_out is not None:
        proposer = SelfDraft(decoder.without(left_out), decoder, k, 64, 8, "some layers")
        speculator = Speculator(proposer, Always())
    return Engine(decoder, blocks, max_tokens_per_step=64, max_sequences=8, speculator=speculator)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_computes_what_the_layers_left_compute(operations, family, model_folder, tmp_path):
    whole = model_folder(family, layers=LAYERS)
    remove(str(whole), tmp_path, "1,3-4")
    alone = load(tmp_path)
    decoder = load(whole)
    part = decoder.without(LEFT_OUT)
    assert part.bytes_per_block == 0 < decoder.bytes_per_block
    for model in (decoder, part, alone):
        model.allocate(8)
    batch = one_batch(60)
    assert torch.equal(part.forward(batch), alone.forward(batch))
    assert len(part.windows) == len(alone.windows) == LAYERS - len(LEFT_OUT)


def test_it_may_have_a_head_of_its_own(operations, model_folder):
    weights = load_weights(ModelSource("m", model_folder(layers=LAYERS)))
    decoder = make_decoder(weights, CPU, torch.bfloat16, 64)
    light = decoder.without((), rounded_by_row(weights.head))
    same = decoder.without(())
    assert light.weight_bytes < same.weight_bytes == decoder.weight_bytes
    for model in (decoder, light, same):
        model.allocate(8)
    batch = one_batch(30)
    exact = decoder.forward(batch)
    assert torch.equal(same.forward(batch), exact)
    close = light.forward(batch)
    assert not torch.equal(close, exact)
    # a step of the rounding is 1/127 of a row's largest weight; its errors add up at random
    assert (close - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("left_out", [LEFT_OUT, ()])
def test_outputs_are_those_of_the_plain_run(operations, left_out, model_folder):
    decoder = load(model_folder("qwen3", layers=LAYERS))
    expected = run(engine_of(decoder), PROMPTS, PARAMS)
    engine = engine_of(decoder, left_out)
    assert run(engine, PROMPTS, PARAMS) == expected
    counts = engine.statistics()
    assert 0 < counts.accepted_tokens < counts.drafted_tokens or not left_out
    if not left_out and operations == "program":  # a row's bits do not depend on its batch
        assert counts.accepted_tokens == counts.drafted_tokens > 50
    assert engine.pool.in_use == 0


def test_it_leaves_no_trace_in_the_cache(model_folder):
    if reason := reason_against():
        pytest.skip(reason)
    decoder = load(model_folder("qwen3", layers=LAYERS))
    caches = []
    for left_out in (None, LEFT_OUT):
        engine = engine_of(decoder, left_out)
        engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=40, temperature=0))
        (sequence,) = engine.requests["a"].sequences
        while sequence.produced < 35:
            engine.step()
        full = sequence.tables[0][: (len(PROMPTS[0]) + 30) // 16].tolist()
        caches.append([tensor[full] for pair in decoder._cache for tensor in pair])
        counts = engine.statistics()
    assert 0 < counts.accepted_tokens < counts.drafted_tokens
    assert all(torch.equal(*pair) for pair in zip(*caches, strict=True))


def test_two_programs_share_their_threads(model_folder, monkeypatch):
    if reason := reason_against():
        pytest.skip(reason)
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("no /proc to count threads in")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # of each program
    decoder = load(model_folder(layers=LAYERS))
    part = decoder.without(LEFT_OUT)
    for model in (decoder, part):
        model.allocate(8)
    started = []

    def work():
        before = set(tasks.iterdir())
        for model in (decoder, part, decoder):
            model.forward(one_batch(4))
            started.append(len(set(tasks.iterdir()) - before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert started == [2, 2, 2]  # beside the thread itself


def test_a_draft_of_a_device_is_chained(model_folder, monkeypatch):
    """Triton's kernels, in the interpreter or on a GPU, against PyTorch's without a draft.

    In float32 the two differ by 1e-6, so that a draw would once in some 10,000.
    """
    monkeypatch.setenv("COMPRESS_CPU_KERNELS", "triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = ModelSource("m", model_folder("qwen3"))
    params = [
        SamplingParams(max_tokens=6, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.9, seed=5, ignore_eos=True),
    ]
    asked = [TOKENS[:11].tolist(), TOKENS[3:7].tolist()]
    settings = {"max_tokens_per_step": 16, "max_sequences": 1}
    plain = EagerDecoder(load_weights(source), device, torch.float32)
    expected = run(Engine(plain, 4, **settings), asked, params)
    target = make_decoder(load_weights(source), device, torch.float32, 16)
    assert isinstance(target, GpuDecoder)
    proposer = SelfDraft(target.without([0]), target, 2, 16, 1, "a draft")
    engine = Engine(target, 4, speculator=Speculator(proposer, Always()), **settings)
    assert run(engine, asked, params) == expected
    counts = engine.statistics()
    assert counts.drafted_tokens > 0
    assert counts.accepted_tokens < counts.drafted_tokens
