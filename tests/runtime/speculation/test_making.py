"""What a user asks for: which proposer comes of it, and one clear line for what cannot be."""

import json
import shutil

import pytest

from benchmarks.layers_removed import remove
from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.core.tokenizer import load_tokenizer
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.draft_model import DraftModel, SelfDraft
from compress.runtime.speculation.lengths import AdaptiveLength, FixedLength
from compress.runtime.speculation.making import choose
from compress.runtime.speculation.ngram import NgramProposer

LAYERS = 6
PROMPTS = [[3, 4, 5, 6, 7] * 4, list(range(20, 60))]
PARAMS = [
    SamplingParams(max_tokens=30, temperature=0),
    SamplingParams(max_tokens=30, temperature=0.8, seed=2),
]


@pytest.fixture(scope="module")
def target(model_folder):
    return model_folder("qwen3", layers=LAYERS)


@pytest.fixture(scope="module")
def smaller(target, tmp_path_factory):
    """The same model with layers removed: a draft model with its vocabulary."""
    folder = tmp_path_factory.mktemp("smaller")
    remove(str(target), folder, "1,3-4")
    return folder


def chosen(folder, draft, tokens="auto"):
    return choose(draft, tokens, ModelSource("the model", folder), load_tokenizer(folder))


def test_what_is_chosen(target, smaller):
    assert chosen(target, None) is None
    assert chosen(target, "ngram").most == 16
    assert chosen(target, "ngram", 3).most == 3
    assert chosen(target, "self").left_out == (1, 3)
    assert chosen(target, "self:0,2-4").left_out == (0, 2, 3, 4)
    assert chosen(target, str(smaller)).source.folder == smaller


def test_the_rule_for_layers(tmp_path):
    def left_out(count):
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": count}))
        return choose("self", 1, ModelSource("m", tmp_path), None).left_out

    assert left_out(30) == (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    assert left_out(4) == (1,)
    for count in range(4, 100):
        layers = left_out(count)
        assert 0 not in layers  # without it nothing else is any good
        assert count - 1 not in layers
        assert 0.15 * count <= len(layers) <= 0.4 * count


@pytest.mark.parametrize(
    ("draft", "tokens", "message"),
    [
        ("ngram", 0, "num_speculative_tokens = 0; allowed is 1 to 64, or auto"),
        ("ngram", 65, "num_speculative_tokens = 65; allowed"),
        ("ngram", True, "num_speculative_tokens = True; allowed"),
        ("ngram", "often", "num_speculative_tokens = 'often'; allowed"),
        (None, 4, "num_speculative_tokens = 4 without a draft; give one"),
        ("/no/such/folder", 4, "model folder '/no/such/folder' does not exist"),
        ("", 4, "model '' is empty"),
        (
            "./ngrm",
            4,
            "model folder './ngrm' does not exist; check the path; did you mean 'ngram'?",
        ),
        ("./selff:3", 4, "'./selff:3' does not exist; check the path; did you mean 'self'?"),
        ("self:6", 4, "layers '6' to leave out: allowed are numbers and ranges of 0 to 5"),
        ("self:4-2", 4, "layers '4-2' to leave out: allowed"),
        ("self:", 4, "layers '' to leave out: allowed"),
        ("self:1;2", 4, "layers '1;2' to leave out: allowed"),
        ("self:0-5", 4, "layers '0-5' to leave out are all 6; keep one or more"),
    ],
)
def test_one_line_for_what_cannot_be(draft, tokens, message, target):
    with pytest.raises(InputError) as caught:
        chosen(target, draft, tokens)
    assert message in str(caught.value)


def test_a_model_of_few_layers_has_no_draft_of_its_own(model_folder):
    with pytest.raises(InputError, match=r"'the model' has 2 layers, .* 4 or more; give .* ngram"):
        chosen(model_folder("qwen3", layers=2), "self")


def test_another_vocabulary_is_refused(target, smaller, tmp_path):
    shutil.copytree(smaller, tmp_path / "draft")
    path = tmp_path / "draft" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"no token 'w1' of number 16, as 'the model' has; give"):
        chosen(target, str(tmp_path / "draft"))
    del vocabulary["9" + "9"]
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != "99"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"has 124 tokens, and 'the model' has 125; give a model"):
        chosen(target, str(tmp_path / "draft"))


def test_a_model_that_is_not_served_is_refused(target, model_folder):
    with pytest.raises(InputError, match="the runtime serves classes"):
        chosen(target, str(model_folder("gemma2")))


@pytest.mark.parametrize("draft", ["ngram", "self", "model"])
@pytest.mark.parametrize("tokens", [3, "auto"])
def test_outputs_are_those_of_the_plain_run(draft, tokens, target, smaller):
    settings = {"kv_cache_memory": "600KB", "dtype": "float32", "max_sequences": 4}
    with LLM(str(target), **settings) as llm:
        expected = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
        plain_blocks, size = llm.engine.pool.num_blocks, llm.engine.model.bytes_per_block
    name = str(smaller) if draft == "model" else draft
    with LLM(str(target), draft=name, num_speculative_tokens=tokens, **settings) as llm:
        got = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
        speculator, counts = llm.engine._speculator, llm.statistics()
        blocks, decoder = llm.engine.pool.num_blocks, llm.engine.model
    assert got == expected
    proposer, lengths = speculator.proposer, speculator.lengths
    kinds = {"ngram": NgramProposer, "self": SelfDraft, "model": DraftModel}
    assert type(proposer) is kinds[draft]
    assert type(lengths) is (AdaptiveLength if tokens == "auto" else FixedLength)
    if tokens == "auto":
        assert proposer.seconds([2, 1]) >= 0
    else:
        assert counts.drafted_tokens > 0
        assert len(counts.accepted_at) <= tokens
    if draft == "model":  # its cache takes memory from the same allowance
        assert proposer.bytes_per_block == size // 2
        assert blocks == 600_000 // (size + size // 2) < plain_blocks
    else:
        assert proposer.bytes_per_block == 0
        assert blocks == plain_blocks
    assert proposer.description
    assert decoder.bytes_per_block == size
