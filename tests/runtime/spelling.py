"""Tokenizers that can spell JSON, and a tiny random model with one of them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASCII = [chr(code) for code in range(32, 127)]
BITS_OF_JSON = [
    '{"',
    '":',
    '",',
    '"}',
    "},",
    "[[",
    "]]",
    "tr",
    "ue",
    "nu",
    "ll",
    "true",
    "10",
    "ab",
]


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, then two that spell nothing; 97 in all."""
    vocabulary = {"Ġ" if c == " " else c: i for i, c in enumerate(ASCII)} | {"<s>": 95, "</s>": 96}
    return _byte_level(vocabulary, [])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte, and a few tokens that cross the boundaries of JSON's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<|end|>", *alphabet]
    merges = []
    for token in BITS_OF_JSON:
        halves = next(
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if {token[:cut], token[cut:]} <= set(tokens)
        )
        merges.append(halves)
        tokens.append(token)
    tokenizer = _byte_level({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark for spaces, and bytes for what has no token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [c for c in ASCII if c != " "] + ['▁"', "▁{", "▁[", '":']
    merges = [("▁", '"'), ("▁", "{"), ("▁", "["), ('"', ":")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_spelling_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a random Llama, context 1024, whose vocabulary is larger than its tokenizer's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 37, hidden_size=48, intermediate_size=80, head_dim=8,
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    )
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level(vocabulary, merges) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
