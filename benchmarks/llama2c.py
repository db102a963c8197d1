"""A llama2.c checkpoint (legacy format) as a Hugging Face folder.

    python benchmarks/llama2c.py stories260K.bin build/stories260K
    python benchmarks/weight_only.py --model build/stories260K --calibrations self --samples 256 ...

The file is 7 int32 (dim, ffn, layers, heads, KV heads, vocabulary, context; a negative vocabulary
says that the head is not tied), then float32 tensors, each over all layers (llama2.c's export.py,
legacy_export).  Rotary pairs lie side by side there, half a head apart in transformers.  The
tokenizer is a stand-in, to whom token 17 is the word `t17`: for text that the model writes itself.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast


def convert(path: Path, out: Path) -> None:
    """Write config.json and model.safetensors into `out`."""
    data = path.read_bytes()
    dim, ffn, layers, heads, kv_heads, vocab, context = struct.unpack("7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy())
    head_dim, position = dim // heads, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return values[position - count : position].view(shape)

    def halves(weight: torch.Tensor) -> torch.Tensor:
        pairs = weight.view(layers, -1, head_dim // 2, 2, dim)
        return pairs.transpose(2, 3).reshape(weight.shape)

    embeddings = take(abs(vocab), dim)
    per_layer = {"input_layernorm": take(layers, dim)}
    per_layer["self_attn.q_proj"] = halves(take(layers, heads * head_dim, dim))
    per_layer["self_attn.k_proj"] = halves(take(layers, kv_heads * head_dim, dim))
    per_layer["self_attn.v_proj"] = take(layers, kv_heads * head_dim, dim)
    per_layer["self_attn.o_proj"] = take(layers, dim, heads * head_dim)
    per_layer["post_attention_layernorm"] = take(layers, dim)
    per_layer["mlp.gate_proj"] = take(layers, ffn, dim)
    per_layer["mlp.down_proj"] = take(layers, dim, ffn)
    per_layer["mlp.up_proj"] = take(layers, ffn, dim)
    tensors = {"model.embed_tokens.weight": embeddings, "model.norm.weight": take(dim)}
    take(2, context, head_dim // 2)  # cosines and sines of the rotary embedding
    if vocab < 0:
        tensors["lm_head.weight"] = take(-vocab, dim)
    if position != len(values):
        raise SystemExit(f"{path} holds {len(values)} numbers, not {position}: another format?")
    for name, stacked in per_layer.items():
        for layer in range(layers):
            tensors[f"model.layers.{layer}.{name}.weight"] = stacked[layer].contiguous()
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,
    )
    config.architectures = ["LlamaForCausalLM"]
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(abs(vocab), out)


def write_tokenizer(vocabulary: int, out: Path) -> None:
    """A word for each token, with blanks between."""
    words = {f"t{token}": token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
