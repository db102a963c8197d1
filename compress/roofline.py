"""The inference roofline: bytes and FLOPs of prefill and decode, and the least time they take.

Letters as in ARCHITECTURE.md: B batch, S context, T new tokens, D model, F ffn, H head dim,
N query heads, K KV heads, L layers, V vocabulary.  Bytes, seconds, FLOP (a multiply-add is 2).

    linear       2 rows parameters FLOP; its weights are read once, however many rows
    attention    2 N H + 2 N H FLOP for each pair of a query and a key that it sees (causal: the
                 i-th token of a sequence sees i, or its window); keys and values are read once
    time         of each part max(bytes / bandwidth, FLOP / rate), and the sum of the parts

A decode step reads all weights but the rows of the embedding that it does not look up, and the
keys and values of B contexts.  Left out are activations, 2 (in + out) bytes a row of a linear
beside 2 in out of its weights: for D = 4,096 and F = 11,008 0.03 % at batch 1, and 10 % at the
batch of an H100 from which compute limits the linear.  So is the one token of keys and values that
a step writes.

Sources: Williams et al., Roofline (CACM 2009); Pope et al., Efficiently Scaling Transformer
Inference (arXiv 2211.05102); Stanford CS336, lecture 10; Leviathan et al., Speculative Decoding
(arXiv 2211.17192), theorem 3.8.  docs/roofline.md has the formulas in one table, and says where
figures printed in the lecture are not what its formulas give.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from compress.core.errors import InputError
from compress.devices import Device as Device
from compress.devices import Efficiency as Efficiency
from compress.model_shape import Mla as Mla
from compress.model_shape import ModelShape as ModelShape
from compress.model_shape import Parameters as Parameters
from compress.model_shape import parameters as parameters
from compress.precision import NORM_BITS
from compress.precision import Precision as Precision
from compress.precision import bits as bits
from compress.precision import precision as precision

Limit = Literal["memory", "compute", "link", "overhead"]


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes by part: embedding, attention_projections, attention, mlp, norms, head."""

    flops: Mapping[str, float]
    bytes: Mapping[str, float]

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.total_flops / self.total_bytes


@dataclass(frozen=True)
class PartTime:
    seconds: float
    limit: Limit


@dataclass(frozen=True)
class Timing:
    """`limit` is what most of the time goes to."""

    seconds: float
    limit: Limit
    parts: Mapping[str, PartTime]


@dataclass(frozen=True)
class Memory:
    """Bytes that are held."""

    weights: float
    kv: float

    @property
    def total(self) -> float:
        return self.weights + self.kv


@dataclass(frozen=True)
class Step:
    """A decode step at the speed of memory."""

    bytes: float
    seconds: float
    tokens_per_s: float


# Memory


def weight_bytes(shape: ModelShape, precision: Precision) -> dict[str, float]:
    """Bytes of the weights by part, as `Parameters` has them.

    A tied head has no bytes of its own, unless it is stored in other bits than the embeddings.
    """
    count = parameters(shape)
    head = count.head
    if shape.tied and precision.head != precision.embeddings:
        head += shape.vocab * shape.hidden
    return {
        "embedding": count.embedding * precision.embeddings / 8,
        "attention": count.attention * precision.weights / 8,
        "mlp": count.mlp * precision.weights / 8,
        "norms": count.norms * NORM_BITS / 8,
        "head": head * precision.head / 8,
    }


def kv_bytes_per_token(shape: ModelShape, precision: Precision) -> float:
    """Bytes of keys and values that a token adds, while no window is full.

    2 L K H numbers; with MLA L (rank + rotary part); a part of that where layers share a cache.
    """
    return len(shape.kv_groups) * shape.kv_numbers * precision.kv / 8


def kv_bytes(shape: ModelShape, precision: Precision, context: float) -> float:
    """Bytes held of one sequence; a cache with a window holds no more than the window."""
    held = sum(max(_seen(context, window) for window in group) for group in shape.kv_groups)
    return held * shape.kv_numbers * precision.kv / 8


def kv_read_bytes(shape: ModelShape, precision: Precision, context: float) -> float:
    """Bytes that a decode step reads of one sequence: each layer reads, shared cache or not."""
    seen = sum(_seen(context, window) for window in shape.windows)
    return seen * shape.kv_numbers * precision.kv / 8


def memory(shape: ModelShape, precision: Precision, batch: int, context: float) -> Memory:
    """Bytes of weights, and of the keys and values of `batch` sequences."""
    weights = sum(weight_bytes(shape, precision).values())
    return Memory(weights, batch * kv_bytes(shape, precision, context))


def largest_batch(
    shape: ModelShape, precision: Precision, device: Device, context: float, reserve: float = 0.0
) -> int:
    """Most sequences of `context` tokens that fit beside the weights and `reserve` bytes; or 0."""
    left = device.memory - reserve - memory(shape, precision, 0, context).weights
    return max(0, int(left // kv_bytes(shape, precision, context)))


# Work


def prefill(shape: ModelShape, precision: Precision, batch: int, tokens: int) -> Work:
    """Work of `batch` prompts of `tokens` tokens, of which only the last go through the head.

    Keys and values are written and read once.
    """
    work = _forward(shape, precision, batch, tokens, tokens, head_rows=batch)
    written = batch * kv_bytes(shape, precision, tokens)
    return replace(work, bytes={**work.bytes, "attention": work.bytes["attention"] + written})


def decode(
    shape: ModelShape, precision: Precision, batch: int, context: int, tokens: int = 1
) -> Work:
    """Work of a step: the last `tokens` of `context` tokens of each of `batch` sequences.

    More than one token is what verifies a draft.
    """
    return _forward(shape, precision, batch, context, tokens, head_rows=batch * tokens)


def _forward(
    shape: ModelShape, precision: Precision, batch: int, context: int, tokens: int, head_rows: int
) -> Work:
    rows = batch * tokens
    count, stored = parameters(shape), weight_bytes(shape, precision)
    table = shape.vocab * shape.hidden
    shared = table if shape.tied and precision.head == precision.embeddings else 0
    pair = _flops_a_pair(shape, absorbed=tokens < context)
    pairs = sum(_pairs(context, tokens, window) for window in shape.windows)
    read = sum(_keys_read(context, tokens, window) for window in shape.windows)
    flops = {
        "embedding": 0.0,
        "attention_projections": 2.0 * rows * count.attention,
        "attention": float(batch * pairs * pair),
        "mlp": 2.0 * rows * count.mlp,
        "norms": 0.0,
        "head": 2.0 * head_rows * table,
    }
    moved = {
        "embedding": rows * shape.hidden * precision.embeddings / 8,
        "attention_projections": stored["attention"],
        "attention": batch * read * shape.kv_numbers * precision.kv / 8,
        "mlp": stored["mlp"],
        "norms": stored["norms"],
        "head": stored["head"] + shared * precision.embeddings / 8,
    }
    return Work(flops, moved)


def _flops_a_pair(shape: ModelShape, absorbed: bool) -> int:
    """FLOP for one query and one key of all heads of a layer: the score, and the value's share.

    MLA works on the latents themselves once they are cached (its matrices for keys and values are
    then applied to the query and the output, at the same FLOP), and on whole keys in a prompt.
    """
    if shape.mla is None:
        return 4 * shape.heads * shape.head_dim
    mla = shape.mla
    if absorbed:
        return 2 * shape.heads * (2 * mla.kv_rank + mla.rope_dim)
    return 2 * shape.heads * (mla.nope_dim + mla.rope_dim + mla.v_dim)


def _seen(context: float, window: int | None) -> float:
    return context if window is None else min(context, window)


def _pairs(context: int, tokens: int, window: int | None) -> int:
    """Keys seen by the last `tokens` of `context` tokens: the i-th sees i, or its window."""
    first = context - tokens + 1
    if window is None or window >= context:
        return (first + context) * tokens // 2
    growing = max(0, window - first + 1)  # tokens that see less than a whole window, or just one
    return (2 * first + growing - 1) * growing // 2 + (tokens - growing) * window


def _keys_read(context: int, tokens: int, window: int | None) -> int:
    """Distinct keys that the last `tokens` of `context` tokens see."""
    return context if window is None else min(context, window + tokens - 1)


# Time


def time_of(work: Work, device: Device, precision: Precision, link_bytes: float = 0.0) -> Timing:
    """The least time of a step: each part as long as its bytes or its FLOPs take.

    Attention is in 16 bits whatever the linears are.  Raises InputError for bytes over a link that
    the device has none of.
    """
    share = device.efficiency
    parts: dict[str, PartTime] = {}
    for part, moved in work.bytes.items():
        compute = "bf16" if part == "attention" else precision.compute
        by_memory = moved / (device.bandwidth * share.bandwidth)
        by_compute = work.flops[part] / (device.rate(compute) * share.matmul)
        limit: Limit = "compute" if by_compute > by_memory else "memory"
        parts[part] = PartTime(max(by_memory, by_compute), limit)
    if link_bytes:
        if not device.link:
            raise InputError(f"device '{device.name}' has no link; give its bytes/s as link")
        parts["link"] = PartTime(link_bytes / device.link, "link")
    if share.overhead:
        parts["overhead"] = PartTime(share.overhead, "overhead")
    spent: dict[Limit, float] = {}
    for time in parts.values():
        spent[time.limit] = spent.get(time.limit, 0.0) + time.seconds
    return Timing(sum(spent.values()), max(spent, key=lambda limit: spent[limit]), parts)


def ideal_step(weights: float, kv: float, bandwidth: float, batch: int) -> Step:
    """The lecture's decode step: all `weights` and `kv` bytes over the bandwidth."""
    seconds = (weights + kv) / bandwidth
    return Step(weights + kv, seconds, batch / seconds)


# Intensities, FLOP a byte


def matmul_intensity(rows: float, width_in: int, width_out: int) -> float:
    """Of [rows, in] x [in, out] in 16 bits, inputs, weights and outputs counted."""
    flops = 2 * rows * width_in * width_out
    return flops / (2 * (rows * width_in + width_in * width_out + rows * width_out))


def attention_intensity(context: float, tokens: float) -> float:
    """Of T queries on S keys of MHA in 16 bits, without a causal mask: S T / (S + T)."""
    return context * tokens / (context + tokens)


def device_intensity(device: Device, compute: str = "bf16") -> float:
    """Where a device's limit changes from memory to compute."""
    return device.rate(compute) / device.bandwidth


# Speculation


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens a pass of the target gives: 1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a).

    A draft's token counts only if all before it were accepted, each with probability a.
    """
    return sum(acceptance**i for i in range(length + 1))


def speculative_speedup(acceptance: float, length: int, cost: float) -> float:
    """Tokens a second against plain decode, a draft's step being `cost` of the target's."""
    return expected_tokens(acceptance, length) / (1 + length * cost)


def linear_expected_tokens(acceptance: float, length: int) -> float:
    """The lecture's linear approximation k a + 1, too high for 0 < a < 1 and k > 1."""
    return length * acceptance + 1


def linear_speculative_speedup(acceptance: float, length: int, cost: float) -> float:
    """The lecture's linear approximation (k a + 1) / (1 + k r)."""
    return linear_expected_tokens(acceptance, length) / (1 + length * cost)


# Tensor parallel


def shard(shape: ModelShape, devices: int) -> ModelShape:
    """What one of `devices` holds and computes, itself a shape for all functions here.

    Heads, F and V are split; norms are on every device, and so are a KV head where devices are more
    than KV heads, and MLA's latents with the matrices that make them.  Raises InputError where
    heads or F do not divide.
    """
    kv_heads = shape.kv_heads
    whole = kv_heads % devices == 0 or devices % kv_heads == 0
    if devices < 1 or shape.heads % devices or shape.ffn % devices or not whole:
        raise InputError(
            f"'{shape.name}' has {shape.heads} heads, {kv_heads} KV heads and an MLP {shape.ffn} "
            f"wide, which {devices} devices cannot share evenly; give a number that divides them"
        )
    return replace(
        shape,
        heads=shape.heads // devices,
        kv_heads=max(1, kv_heads // devices),
        ffn=shape.ffn // devices,
        vocab=-(-shape.vocab // devices),
    )


def link_bytes(shape: ModelShape, rows: int, devices: int) -> float:
    """Bytes that each device sends in a step of `rows` tokens.

    Two all-reduces of [rows, D] in 16 bits a layer, and one for the embeddings; a ring sends
    2 (n - 1) / n of that from each device.  Their latency is left out, and so is the gathering of
    logits.  Source: Megatron-LM (arXiv 1909.08053), section 3.
    """
    reduces = 2 * shape.layers + 1
    return reduces * rows * shape.hidden * 2 * 2 * (devices - 1) / devices
