"""A model with layers removed, as a plain Hugging Face folder: a stand-in for a draft model.

    python benchmarks/layers_removed.py smollm2 build/smollm2-20-layers 3-7,11-15

Layers are counted from 0.  The others are not changed, and nothing is trained.
"""

import sys
from pathlib import Path

import torch

from compress.core.source import resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.loading import load_model
from compress.runtime.speculation.making import layers_of


def remove(ref: str, out: Path, layers: str) -> None:
    """Write the model `ref` names into `out`, without `layers` such as 3,7-12."""
    source = resolve_model(ref)
    model = load_model(source.folder, "float32", torch.device("cpu"))
    removed = layers_of(layers, model.config.num_hidden_layers)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept)
    if getattr(model.config, "layer_types", None):
        kinds = enumerate(model.config.layer_types)
        model.config.layer_types = [kind for index, kind in kinds if index not in removed]
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(out)
    load_tokenizer(source.folder).save_pretrained(out)


if __name__ == "__main__":
    remove(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
