"""Attention whose values are narrower than its keys, as of latents, at the speed of any other.

PyTorch's fused attention wants keys and values of one width; for others it writes all scores out,
which takes two to eight times as long.  Zeros beside the values give zeros beside the outputs,
which are cut off: the same function.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "compress_padded_values"  # of our function, for transformers
# Model types whose attention asks for nothing but a function by its name.  Those with an indexer
# (deepseek_v32 and its kin) make their mask of chosen tokens for `sdpa` and `eager` alone.
DENSE = ("deepseek_v2", "deepseek_v3", "minicpm3", "youtu")


def pad_values(model: Any) -> None:
    """Let a model whose keys are wider than its values pad these, if it uses PyTorch's attention.

    The choice is the loaded model's own; it is not saved with it.
    """
    narrow = any(
        getattr(module, "v_head_dim", 0) < getattr(module, "qk_head_dim", 0)
        for module in model.modules()
    )
    dense = model.config.model_type in DENSE
    if narrow and dense and model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any
) -> tuple[Tensor, None]:
    """query [B, N, S, H], key [B, K, S, H], value [B, K, S, V] with V < H -> [B, S, N, V]."""
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))
    output, _ = sdpa_attention_forward(module, query, key, value, *args, **settings)
    return output[..., :width], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
