"""Text evaluation against transformers' own loss, torch's kl_div and synthetic truths."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.evaluate import TextEvalConfig, evaluate_text, summarize
from compress.loading import load_model

VOCABULARY = 97
SEQ_LEN, WINDOWS = 17, 5  # 16 scored positions: odd on purpose, and the text is a little longer


def save_tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, **{word: i for i, word in enumerate(words, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def tiny_llama(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # far from uniform predictions, so that errors show
    )
    return LlamaForCausalLM(config).eval()


WORDS = [f"w{i}" for i in range(VOCABULARY - 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(seed=0).save_pretrained(folder)
    save_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perturbed")
    changed = tiny_llama(seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.05 * torch.randn_like(weight)
    changed.save_pretrained(folder)
    save_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    numbers = np.random.default_rng(0).integers(0, VOCABULARY - 2, SEQ_LEN * WINDOWS + 3)
    path.write_text(" ".join(f"w{n}" for n in numbers), encoding="utf-8")
    return path


def config_for(text: Path, **changes: int | str) -> TextEvalConfig:
    return TextEvalConfig(text, **{"seq_len": SEQ_LEN, "windows": WINDOWS, **changes})


def evaluate(folder: Path, config: TextEvalConfig, against: Path | None = None) -> dict:
    original = None if against is None else ModelSource(str(against), against)
    return evaluate_text(ModelSource(str(folder), folder), config, original)


def windows_of(text: Path) -> torch.Tensor:
    """Token ids without the tokenizer: word wN is token N + 2."""
    ids = [int(word[1:]) + 2 for word in text.read_text(encoding="utf-8").split()]
    return torch.tensor(ids[: SEQ_LEN * WINDOWS]).view(WINDOWS, SEQ_LEN)


def logits_of(folder: Path, window: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder)(window[None]).logits[0, :-1]


def test_perplexity_equals_transformers_loss(model: Path, text: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        losses = [reference(w[None], labels=w[None]).loss.item() for w in windows_of(text)]
    result = evaluate(model, config_for(text))
    assert result["nll"] == pytest.approx(np.mean(losses), abs=1e-5)  # fp32 sums in another order
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert result["tokens"] == WINDOWS * (SEQ_LEN - 1)
    low, high = result["perplexity_interval"]
    assert low < result["perplexity"] < high
    assert "kl_mean" not in result
    json.dumps(result, allow_nan=False)


def test_long_windows_are_scored_in_full(model: Path, tmp_path: Path, monkeypatch) -> None:
    """Windows longer than the slice of positions, and no multiple of it, lose no position."""
    monkeypatch.setattr("compress.evaluate.POSITIONS_AT_ONCE", 7)
    path = tmp_path / "long.txt"
    path.write_text(" ".join(f"w{(n * n) % 90}" for n in range(120)), encoding="utf-8")
    ids = torch.tensor([(n * n) % 90 + 2 for n in range(120)]).view(2, 60)
    reference = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        losses = [reference(w[None], labels=w[None]).loss.item() for w in ids]
    result = evaluate(model, config_for(path, seq_len=60, windows=2), against=model)
    assert result["nll"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert result["tokens"] == 118


def test_model_against_itself_is_no_loss(model: Path, text: Path) -> None:
    result = evaluate(model, config_for(text), against=model)
    assert result["kl_mean"] == 0
    assert result["kl_p99"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity_ratio"] == 1
    # Paired: the windows differ, the ratio on each does not.
    assert result["perplexity_ratio_interval"] == [1, 1]
    assert result["perplexity_interval"][0] < result["perplexity_interval"][1]


def test_divergence_equals_torch_kl_div(model: Path, perturbed: Path, text: Path) -> None:
    divergences, agreements = [], []
    for window in windows_of(text):
        p = logits_of(model, window).double().log_softmax(-1)
        q = logits_of(perturbed, window).double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        divergences.append(kl)
        agreements.append(p.argmax(-1) == q.argmax(-1))
    kl = torch.cat(divergences).numpy()
    result = evaluate(perturbed, config_for(text), against=model)
    other_way = evaluate(model, config_for(text), against=perturbed)
    assert result["kl_mean"] == pytest.approx(kl.mean(), rel=1e-4)  # fp32 against fp64
    assert result["kl_p99"] == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(torch.cat(agreements).double().mean().item())
    assert 0 < result["top1_agreement"] < 1, "the perturbation should flip some tokens"
    # The direction matters, and swapping the models swaps the perplexities.
    assert other_way["kl_mean"] != pytest.approx(kl.mean(), rel=1e-2)
    assert other_way["perplexity"] == pytest.approx(result["perplexity_original"])
    assert result["perplexity_ratio"] == pytest.approx(
        result["perplexity"] / result["perplexity_original"]
    )
    for name in ("perplexity_ratio", "kl_mean", "top1_agreement"):
        low, high = result[f"{name}_interval"]
        assert low < result[name] < high
    assert result["kl_p99_interval"][0] <= result["kl_p99"] <= result["kl_p99_interval"][1]


def test_seed_fixes_the_intervals(model: Path, perturbed: Path, text: Path) -> None:
    first = evaluate(perturbed, config_for(text, seed=3), against=model)
    assert evaluate(perturbed, config_for(text, seed=3), against=model) == first
    other = evaluate(perturbed, config_for(text, seed=4), against=model)
    assert other["kl_mean_interval"] != first["kl_mean_interval"]


def synthetic_scores(generator: np.random.Generator) -> np.ndarray:
    """[4, 48, 20] scores with a known truth: nll 3.0, ratio exp(0.1), divergence 0.2 on average.

    Tokens of a window share most of their noise, as in text; the original shares all of it.
    """
    shared = generator.normal(0, 0.5, (48, 1))
    noise = generator.normal(0, 0.2, (48, 20))
    original = 2.9 + shared + noise
    extra = 0.1 + generator.normal(0, 0.05, (48, 1)) + generator.normal(0, 0.05, (48, 20))
    divergence = generator.gamma(4, 0.05, (48, 1)) * np.ones((1, 20))
    agree = generator.random((48, 20)) < 0.9
    return np.stack([original + extra, original, divergence, agree.astype(float)])


def test_intervals_cover_the_truth() -> None:
    """95 % intervals cover the truth in 300 repetitions as often as they should.

    A percentile bootstrap over 48 windows covers about 93 to 95 %.  Were it exactly 93 %, fewer
    than 89 % or more than 98.5 % of 300 would be seen with p < 0.01 (binomial).  Resampling
    tokens instead of windows would cover about 40 %, an unpaired ratio 100 %.
    """
    truths = {
        "perplexity": np.exp(3.0),
        "perplexity_ratio": np.exp(0.1),
        "kl_mean": 0.2,
        "top1_agreement": 0.9,
    }
    generator = np.random.default_rng(0)
    config = TextEvalConfig(Path("unused"), bootstrap=400)
    covered = dict.fromkeys(truths, 0)
    for _ in range(300):
        result = summarize(synthetic_scores(generator), config)
        for name, truth in truths.items():
            low, high = result[f"{name}_interval"]
            covered[name] += low <= truth <= high
    for name, count in covered.items():
        assert 0.89 <= count / 300 <= 0.985, f"{name} covered in {count} of 300"


def test_quantile_interval_equals_a_plain_bootstrap() -> None:
    """The weighted quantile agrees with one that copies the drawn windows and sorts them."""
    generator = np.random.default_rng(5)
    divergence = generator.gamma(0.3, 1.0, (24, 30)) * generator.gamma(2, 1.0, (24, 1))
    scores = np.stack([np.ones((24, 30)), np.ones((24, 30)), divergence, np.ones((24, 30))])
    result = summarize(scores, TextEvalConfig(Path("unused"), bootstrap=1000, seed=1))
    drawn = generator.integers(0, 24, (4000, 24))
    plain = np.quantile(divergence[drawn].reshape(4000, -1), 0.99, axis=1, method="inverted_cdf")
    for bound, share in zip(result["kl_p99_interval"], (0.025, 0.975), strict=True):
        # Share of plain resamples below our bound: 2.5 % and 97.5 % up to the noise of 1,000
        # resamples (standard deviation 0.5 %) and ties between the few largest values.
        below, at_most = np.mean(plain < bound), np.mean(plain <= bound)
        assert below - 0.02 <= share <= at_most + 0.02


def test_mixed_bit_widths_are_dequantized_exactly(model: Path, tmp_path: Path) -> None:
    """A compressed-tensors checkpoint with 8-bit and asymmetric 4-bit layers, packed here by hand.

    Weights must be scale x (code - zero point) in fp32, each layer by its own scheme, and ready
    before the first forward pass.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(model / "model.safetensors")
    expected = {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        bits = 8 if "down_proj" in name else 4
        rows, columns = tensors.pop(name).shape
        codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)  # unsigned
        scale = torch.rand(rows, columns // 16, generator=generator).half()
        zeros = torch.full((rows, columns // 16), 2 ** (bits - 1))
        if bits == 4:
            zeros = torch.randint(0, 16, zeros.shape, generator=generator)
            tensors[f"{name}_zero_point"] = pack(zeros.T, 4).T.contiguous()
        tensors[f"{name}_packed"] = pack(codes, bits)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor([rows, columns])
        centred = codes - zeros.repeat_interleave(16, dim=1)
        expected[name] = centred * scale.float().repeat_interleave(16, dim=1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = quantization_config()
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_model(tmp_path, "float32", "cpu").state_dict()
    assert len(expected) == 14
    for name, weight in expected.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes [r, c] into int32 [r, c * bits / 32], the first code in the low bits."""
    fields = codes.numpy().astype(np.uint32).reshape(codes.shape[0], -1, 32 // bits)
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    words = np.bitwise_or.reduce(fields << shifts, axis=-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def quantization_config() -> dict:
    def group(targets: str, bits: int, symmetric: bool) -> dict:
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
        weights |= {"strategy": "group", "group_size": 16}
        return {"targets": [targets], "weights": weights}

    groups = {"group_0": group("re:.*down_proj", 8, True)}
    groups["group_1"] = group("re:.*(q|k|v|o|gate|up)_proj", 4, False)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def test_weights_come_in_the_dtype_asked_for(model: Path) -> None:
    assert load_model(model, "bfloat16", "cpu").dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"dtype 'bfloat' is unknown.*'bfloat16'"):
        load_model(model, "bfloat", "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1; allowed is 2 or more"),
        ({"windows": 1}, "windows is 1; allowed is 2 or more"),
        ({"bootstrap": 0}, "bootstrap is 0; allowed is 100 or more"),
        ({"seed": -1}, "seed is -1; allowed is 0 or more"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown; allowed are float32"),
        ({"windows": 6}, "which is 5 windows of 17, not 6; ask for fewer"),
        ({"seq_len": 65}, "allows at most 64 tokens"),
    ],
)
def test_bad_settings(model: Path, text: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(model, config_for(text, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"w1 w2 \xff w3", r"not UTF-8 \(byte 6\)"),
        (b"w1 w2 w3", "has 3 tokens, which is 0 windows of 17"),
    ],
)
def test_bad_text(model: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        evaluate(model, config_for(path))


def test_vocabularies_that_do_not_fit(model: Path, text: Path, tmp_path: Path) -> None:
    larger, reordered = tmp_path / "larger", tmp_path / "reordered"
    tiny_llama(seed=0, vocabulary=VOCABULARY + 3).save_pretrained(larger)
    save_tokenizer(larger, WORDS)
    with pytest.raises(InputError, match=r"97 vocabulary entries and .* has 100"):
        evaluate(model, config_for(text), against=larger)
    too_small = tmp_path / "too_small"
    tiny_llama(seed=0, vocabulary=50).save_pretrained(too_small)
    save_tokenizer(too_small, WORDS)
    with pytest.raises(InputError, match=r"gives token .* but the model has 50"):
        evaluate(too_small, config_for(text))
    tiny_llama(seed=0).save_pretrained(reordered)
    save_tokenizer(reordered, WORDS[::-1])
    with pytest.raises(InputError, match="encode the text differently"):
        evaluate(model, config_for(text), against=reordered)


def test_broken_models(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        evaluate(tmp_path, config_for(text))
    bare = tmp_path / "bare"
    tiny_llama(seed=0).save_pretrained(bare)
    with pytest.raises(InputError, match="no usable tokenizer"):
        evaluate(bare, config_for(text))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("runtime", r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("transformers", r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_a_tensor_that_is_missing(engine: str, message: str, text: Path, tmp_path: Path) -> None:
    weights = tiny_llama(seed=0)
    state = weights.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    weights.save_pretrained(tmp_path, state_dict=state)
    save_tokenizer(tmp_path, WORDS)
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, config_for(text, engine=engine))


@pytest.mark.parametrize("engine", ["runtime", "transformers"])
def test_logits_that_are_no_numbers(engine: str, text: Path, tmp_path: Path) -> None:
    weights = tiny_llama(seed=0)
    with torch.no_grad():
        weights.model.norm.weight.fill_(3e38)
    weights.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, WORDS)
    with pytest.raises(InputError, match="NaN or infinite logits"):
        evaluate(tmp_path, config_for(text, engine=engine))
