"""The shape of a dense decoder: the numbers from which parameters, bytes and FLOPs follow.

Letters as in ARCHITECTURE.md: D hidden, F ffn, N heads, K kv_heads, H head_dim, L layers, V vocab.

Parameters of a layer (biases where the model has them)

    q, o           D N H each                 k, v    D K H each
    MLP            3 D F gated (gate, up, down), else 2 D F
    norms          D each, twice that with a bias; on queries and keys H each, or N H and K H

and with multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1), for ranks
r of keys and values and q of queries, head parts n (no position), p (rotary) and v (value)

    queries        D q + q + q N (n + p), or D N (n + p) without a rank
    keys, values   D (r + p) + r + r N (n + v)            output   N v D
"""

from dataclasses import dataclass
from typing import Literal

from compress.core.errors import InputError, shown


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention: ranks and the parts of a head."""

    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    q_rank: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder.

    windows    tokens that a query of each layer sees, itself included; None for all
    kv_share   neighbouring layers that share one cache (and the k and v projections)
    norms      norms of width D in a layer; one more follows the last layer
    qk_norm    norms on queries and keys: one for all heads ("head"), or as wide as all ("all")
    positions  rows of a learned table of positions
    """

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    tied: bool = False
    max_context: int = 4096
    windows: tuple[int | None, ...] = ()
    mla: Mla | None = None
    kv_share: int = 1
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    positions: int = 0

    def __post_init__(self) -> None:
        counts = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab")
        for key in (*counts, "max_context", "kv_share"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"{key} = {shown(value)} of '{self.name}' is no size; give 1 or more"
                )
        if self.heads % self.kv_heads:
            raise InputError(
                f"'{self.name}' has {self.heads} heads on {self.kv_heads} KV heads; "
                "give a whole number of heads for each KV head"
            )
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        if len(self.windows) != self.layers:
            raise InputError(
                f"'{self.name}' has {len(self.windows)} windows for {self.layers} layers; "
                "give one for each layer"
            )
        for window in self.windows:
            if window is not None and (not isinstance(window, int) or window < 1):
                raise InputError(
                    f"window {shown(window)} of '{self.name}' is no size; give 1 or more, or none"
                )

    @property
    def kv_groups(self) -> tuple[tuple[int | None, ...], ...]:
        """Windows of the layers behind each cache."""
        share = self.kv_share
        return tuple(self.windows[at : at + share] for at in range(0, self.layers, share))

    @property
    def kv_numbers(self) -> int:
        """Numbers that one cache holds for a token: 2 K H, or with MLA its rank and rotary part."""
        if self.mla:
            return self.mla.kv_rank + self.mla.rope_dim
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model by part; `head` is 0 where it is the embedding.

    attention  projections of all layers with their biases;  norms  all, those inside MLA included
    """

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.mlp + self.norms + self.head


def parameters(shape: ModelShape) -> Parameters:
    """Count the parameters of a model, each tensor once."""
    D, F, L = shape.hidden, shape.ffn, shape.layers
    norm = D * (2 if shape.norm_bias else 1)
    mlp = (3 if shape.gated else 2) * D * F
    if shape.mlp_bias:
        mlp += (2 if shape.gated else 1) * F + D
    attention, inner_norms = _mla(shape, shape.mla) if shape.mla else _attention(shape)
    return Parameters(
        embedding=(shape.vocab + shape.positions) * D,
        attention=attention,
        mlp=L * mlp,
        norms=(L * shape.norms + 1) * norm + inner_norms,
        head=(0 if shape.tied else shape.vocab * D) + (shape.vocab if shape.head_bias else 0),
    )


def _attention(shape: ModelShape) -> tuple[int, int]:
    """Parameters of the projections, and of the norms on queries and keys, of all layers."""
    D, L, caches = shape.hidden, shape.layers, len(shape.kv_groups)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = D + (1 if shape.qkv_bias else 0)
    projections = L * (rows * queries + queries * D) + caches * 2 * rows * keys
    if shape.out_bias:
        projections += L * D
    widths = {"none": (0, 0), "head": (shape.head_dim, shape.head_dim), "all": (queries, keys)}
    on_queries, on_keys = widths[shape.qk_norm]
    return projections, L * on_queries + caches * on_keys


def _mla(shape: ModelShape, mla: Mla) -> tuple[int, int]:
    """The same with latent attention; its norms are those of the two ranks."""
    D, N, L, caches = shape.hidden, shape.heads, shape.layers, len(shape.kv_groups)
    q_width = N * (mla.nope_dim + mla.rope_dim)
    if mla.q_rank is None:
        queries, q_norm = D * q_width, 0
    else:
        queries, q_norm = D * mla.q_rank + mla.q_rank * q_width, mla.q_rank
        queries += mla.q_rank if shape.qkv_bias else 0
    keys = D * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * N * (mla.nope_dim + mla.v_dim)
    keys += mla.kv_rank + mla.rope_dim if shape.qkv_bias else 0
    output = N * mla.v_dim * D + (D if shape.out_bias else 0)
    return L * (queries + output) + caches * keys, L * q_norm + caches * mla.kv_rank
