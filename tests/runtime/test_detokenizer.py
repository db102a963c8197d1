"""Text as it comes equals the text at the end, in every kind of tokenizer; stop strings."""

import random
from array import array

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.runtime.detokenizer import Detokenizer

TEXTS = [
    "Hello world,  two spaces",
    "größer als 5€ — 漢字かな 👩\u200d👩\u200d👧 🇩🇪 end",
    " a\n\n b\tc",
    "héé ",
    "…",
]


def byte_level():
    """As in GPT-2, Qwen, SmolLM: a token is a run of bytes; few merges, so characters break up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: place for place, symbol in enumerate([*alphabet, "he", "ll", "Ġw", "or"])}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("o", "r")]
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return wrapped(made)


def sentence_piece():
    """As in Llama 2 and Mistral: words carry their leading space, rare characters fall to bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrdtas,H"]
    vocab = {piece: place for place, piece in enumerate([*pieces, "he", "▁w", "ll"])}
    merges = [("h", "e"), ("▁", "w"), ("l", "l")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(made)


def wrapped(made):
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENIZERS = {"byte level": byte_level(), "sentence piece": sentence_piece()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def pieces_of(tokenizer, prompt, output, stop=()):
    detokenizer = Detokenizer(tokenizer, array("q", prompt), stop)
    pieces = []
    for token in output:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.finish()]


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def after(tokenizer, prompt, tokens):
    """The text of `tokens` that is not whole after `prompt`, with which they begin."""
    known = next(
        text
        for end in range(len(prompt), -1, -1)
        if not (text := decode(tokenizer, prompt[:end])).endswith("\ufffd")
    )
    return decode(tokenizer, tokens)[len(known) :]


@pytest.mark.parametrize("text", TEXTS)
def test_text_as_it_comes_equals_the_text_at_the_end(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in range(1, len(tokens)):
        pieces = pieces_of(tokenizer, tokens[:cut], tokens[cut:])
        assert "".join(pieces) == after(tokenizer, tokens[:cut], tokens)
        assert all("\ufffd" not in piece for piece in pieces)


def test_random_text(tokenizer):
    source = random.Random(0)
    for _ in range(30):
        text = "".join(source.choice(["he", " w", "漢", "é", "🎉", "  ", "\n"]) for _ in range(40))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = pieces_of(tokenizer, tokens[:1], tokens[1:])
        assert "".join(pieces) == after(tokenizer, tokens[:1], tokens)


def test_special_tokens_leave_no_text_and_no_trace(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokens = tokenizer("he w", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(tokenizer, tokens, [end] * 100 + tokens)).strip() == "he w"
    detokenizer = Detokenizer(tokenizer, array("q", tokens), ())
    for _ in range(1000):
        detokenizer.push(end)
        assert len(detokenizer._window) < 50


def test_bytes_that_never_become_a_character_come_out():
    tokenizer = TOKENIZERS["byte level"]
    start = tokenizer("é", add_special_tokens=False)["input_ids"][0]  # first of two bytes
    pieces = pieces_of(tokenizer, [70], [start] * 40)
    assert "".join(pieces) == "\ufffd" * 40
    assert any(pieces[:20])


def test_stop_strings_across_tokens(tokenizer):
    tokens = tokenizer("he world", add_special_tokens=False)["input_ids"]
    whole = decode(tokenizer, tokens)[len(decode(tokenizer, tokens[:1])) :]
    for begin in range(len(whole)):
        for end in range(begin + 1, len(whole) + 1):
            stop = whole[begin:end]
            pieces = pieces_of(tokenizer, tokens[:1], tokens[1:], (stop, "never"))
            assert "".join(pieces) == whole[: whole.find(stop)]


def test_the_first_of_several_stop_strings_counts():
    tokenizer = TOKENIZERS["byte level"]
    tokens = tokenizer("xabcabd", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(tokenizer, tokens[:1], tokens[1:], ("abd", "ca"))) == "ab"
    assert "".join(pieces_of(tokenizer, tokens[:1], tokens[1:], ("abd",))) == "abc"
    assert "".join(pieces_of(tokenizer, tokens[:1], tokens[1:], ("abde",))) == "abcabd"


def test_what_could_become_a_stop_string_is_held_back():
    tokenizer = TOKENIZERS["byte level"]
    tokens = tokenizer("xabac", add_special_tokens=False)["input_ids"]
    assert pieces_of(tokenizer, tokens[:1], tokens[1:], ("abad",)) == ["", "", "", "abac", ""]


def test_a_tokenizer_with_a_way_of_its_own_is_asked():
    """The library beneath it is asked at once only where its class adds nothing."""

    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    plain = TOKENIZERS["byte level"]
    loud = Loud(tokenizer_object=plain.backend_tokenizer)
    tokens = plain("hello")["input_ids"]
    for tokenizer, text in ((plain, "hello"), (loud, "HELLO")):
        detokenizer = Detokenizer(tokenizer, array("q", []), ())
        assert "".join([*map(detokenizer.push, tokens), detokenizer.finish()]) == text
