"""Cross-layer attention: each run of `kv_share` layers uses the keys and values of its first one.

No class of transformers does this for Llama, Mistral, Qwen2 and Qwen3 (some others share in ways of
their own).  Here are four, under model types of their own; importing this module makes transformers
know them.  Without it transformers refuses their checkpoints, rather than fill in projections at
random.

The first layer of a run hands keys (after RoPE) and values on behind its hidden states, in one
tensor [B, S, D + 2 K H], which the others read, and the last of them cuts off.  So a layer is a
function of one tensor, as in other models, and can be run, stored and gone on from by itself.

Source: Brandon et al., "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention",
arXiv 2405.12981, section 2.2.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from compress.core.own_class import CROSS_LAYER


class CrossLayerAttention(nn.Module):
    """Attention of grouped queries, with keys and values of its own or with those handed to it."""

    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, stock: Any, owns: bool) -> None:
        super().__init__()
        config = stock.config
        self.config, self.layer_idx, self.owns = config, stock.layer_idx, owns
        self.head_dim, self.scaling = stock.head_dim, stock.scaling
        self.num_key_value_groups = stock.num_key_value_groups
        self.attention_dropout, self.is_causal = stock.attention_dropout, True
        # Mistral's attention has it in the config, Qwen's layer by layer
        in_config = getattr(config, "sliding_window", None)
        self.sliding_window = getattr(stock, "sliding_window", in_config)
        own = ("k_proj", "v_proj", "k_norm") if owns else ()
        for name, module in stock.named_children():
            if name in ("q_proj", "o_proj", "q_norm", *own):
                self.add_module(name, module)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        handed: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, S, D], and the keys and values of these tokens, [B, K, S, H] each."""
        queries = self._turned("q", hidden_states, position_embeddings)
        if handed is None:
            keys = self._turned("k", hidden_states, position_embeddings)
            values = self._heads(self.v_proj(hidden_states)).transpose(1, 2)
        else:
            keys, values = handed
        attended = keys, values
        if past_key_values is not None:  # its first layers' keep what the others read
            if handed is None:
                past_key_values.shared = past_key_values.update(keys, values, self.layer_idx)
            attended = getattr(past_key_values, "shared", attended)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(
            self,
            queries,
            *attended,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(output), keys, values

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim))  # [B, S, heads, H]

    def _turned(self, of: str, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys by head, normed where the class does, after RoPE: [B, heads, S, H]."""
        heads = self._heads(self.get_submodule(f"{of}_proj")(states))
        norm = getattr(self, f"{of}_norm", None)
        heads = (heads if norm is None else norm(heads)).transpose(1, 2)
        cosine, sine = (angle.unsqueeze(1) for angle in angles)
        return heads * cosine + rotate_half(heads) * sine


class CrossLayerBlock(GradientCheckpointingLayer):
    """A decoder layer that may hand keys and values on, or take those handed to it.

    owns   its attention has keys and values of its own
    hands  a layer after it reads them
    """

    def __init__(self, stock: Any, owns: bool, hands: bool) -> None:
        super().__init__()
        self.hidden_size, self.owns, self.hands = stock.hidden_size, owns, hands
        self.self_attn = CrossLayerAttention(stock.self_attn, owns)
        self.mlp, self.input_layernorm = stock.mlp, stock.input_layernorm
        self.post_attention_layernorm = stock.post_attention_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, S, D], with keys and values behind them where they are handed on."""
        kwargs.pop("use_cache", None)
        handed = None
        if not self.owns:
            tail = hidden_states[..., self.hidden_size :].chunk(2, dim=-1)
            by_head = (part.unflatten(-1, (-1, self.self_attn.head_dim)) for part in tail)
            handed = tuple(part.transpose(1, 2) for part in by_head)
            hidden_states = hidden_states[..., : self.hidden_size]
        attended, keys, values = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            handed=handed,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        if not self.hands:
            return hidden_states
        tail = (part.transpose(1, 2).flatten(2) for part in (keys, values))
        return torch.cat([hidden_states, *tail], dim=-1)


class _CrossLayer:
    """What makes a class of transformers one with shared keys and values."""

    _no_split_modules = ["CrossLayerBlock"]  # noqa: RUF012 (transformers wants a list)

    def __init__(self, config: Any) -> None:
        if not isinstance(config.kv_share, int) or config.kv_share < 1:
            raise ValueError(f"kv_share = {config.kv_share!r} is no number of layers")
        super().__init__(config)  # type: ignore[call-arg]
        sources = kv_sources(config.num_hidden_layers, config.kv_share)
        model: Any = self.model  # type: ignore[attr-defined]
        model.layers = nn.ModuleList(
            CrossLayerBlock(
                layer, owns=source == index, hands=sources[index + 1 : index + 2] == [source]
            )
            for index, (layer, source) in enumerate(zip(model.layers, sources, strict=True))
        )
        for part in (self, model):
            part._no_split_modules = self._no_split_modules


def kv_sources(layers: int, share: int) -> list[int]:
    """Of each layer the one whose keys and values it uses: the first of its run.

    The last run is shorter where `share` does not divide the number of layers.
    """
    return [index - index % share for index in range(layers)]


class LlamaClaConfig(LlamaConfig):
    """Llama's, and how many neighbouring layers share keys and values."""

    model_type = f"llama{CROSS_LAYER}"
    kv_share: int = 2


class LlamaClaForCausalLM(_CrossLayer, LlamaForCausalLM):
    """Llama with shared keys and values."""

    config_class = LlamaClaConfig


class MistralClaConfig(MistralConfig):
    """Mistral's, and how many neighbouring layers share keys and values."""

    model_type = f"mistral{CROSS_LAYER}"
    kv_share: int = 2


class MistralClaForCausalLM(_CrossLayer, MistralForCausalLM):
    """Mistral with shared keys and values."""

    config_class = MistralClaConfig


class Qwen2ClaConfig(Qwen2Config):
    """Qwen2's, and how many neighbouring layers share keys and values."""

    model_type = f"qwen2{CROSS_LAYER}"
    kv_share: int = 2


class Qwen2ClaForCausalLM(_CrossLayer, Qwen2ForCausalLM):
    """Qwen2 with shared keys and values."""

    config_class = Qwen2ClaConfig


class Qwen3ClaConfig(Qwen3Config):
    """Qwen3's, and how many neighbouring layers share keys and values."""

    model_type = f"qwen3{CROSS_LAYER}"
    kv_share: int = 2


class Qwen3ClaForCausalLM(_CrossLayer, Qwen3ForCausalLM):
    """Qwen3 with shared keys and values."""

    config_class = Qwen3ClaConfig


CLASSES: Mapping[str, type] = {
    LlamaClaConfig.model_type: LlamaClaForCausalLM,
    MistralClaConfig.model_type: MistralClaForCausalLM,
    Qwen2ClaConfig.model_type: Qwen2ClaForCausalLM,
    Qwen3ClaConfig.model_type: Qwen3ClaForCausalLM,
}
for _kind, _class in CLASSES.items():
    AutoConfig.register(_kind, _class.config_class)
    AutoModelForCausalLM.register(_class.config_class, _class)
