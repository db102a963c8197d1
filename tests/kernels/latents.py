"""Batches on a paged cache of latents, and attention in float64 to judge by."""

import torch
from torch.nn import functional as F

from compress.kernels.latent_attention import UpProjections
from compress.kernels.paged_attention.cache import QuantizedBlocks, quantize
from compress.kernels.paged_attention.reference import write_kv
from tests.kernels.paged import BLOCK


def make(sequences, sizes, dtype, codes=None, seed=0):
    """Sequences of (tokens before, new tokens) on a cache that is NaN where not written.

    `sizes` are (N, P, d, v, R).  Returns the arguments of latent_attention up to block_tables, and
    the contiguous (keys, latents) of each sequence: with `codes`, what these stand for.  The sizes
    of rows then differ a thousandfold.
    """
    heads, nope, rope, value, rank = sizes
    generator = torch.Generator().manual_seed(seed)
    contexts = [before + new for before, new in sequences]
    counts = [-(-context // BLOCK) for context in contexts]
    free = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    cache = []
    for dim in (rope, rank):
        part = torch.full((len(free), 1, BLOCK, dim), float("nan"), dtype=dtype)
        if codes:
            bits = torch.randint(0, 126, part.shape, dtype=torch.uint8, generator=generator)
            scales = torch.full(part.shape[:3], float("nan"))
            part = QuantizedBlocks(codes, bits.view(codes.dtype), scales)
        cache.append(part)
    tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int32)
    contiguous = []
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        places = torch.arange(context)
        slots = tables[row, places // BLOCK].long() * BLOCK + places % BLOCK
        new = [torch.randn(context, 1, dim, generator=generator).to(dtype) for dim in (rope, rank)]
        if codes:
            size = 10 ** (-3 * torch.rand(2, context, 1, 1, generator=generator))
            new = [x.float() * by for x, by in zip(new, size, strict=True)]
        write_kv(*cache, *new, slots)
        if codes:
            coded = [quantize(x, codes) for x in new]
            new = [held.double() * scales.double()[..., None] for held, scales in coded]
        contiguous.append(tuple(x[:, 0] for x in new))
    starts = torch.tensor([0] + [new for _, new in sequences]).cumsum(0).to(torch.int32)
    q = torch.randn(int(starts[-1]), heads, nope + rope, generator=generator).to(dtype)
    up = UpProjections(
        *(torch.randn(heads, dim, rank, generator=generator) / rank**0.5 for dim in (nope, value))
    ).to(torch.device("cpu"), dtype)
    batch = (q, *cache, up, starts, torch.tensor(contexts, dtype=torch.int32), tables)
    return batch, contiguous


def plain(q, keys, latents, up, scale):
    """One sequence in float64, keys and values made of latents: q [t, N, P + d] -> [t, N, v]."""
    k = torch.einsum("npr,jr->njp", up.keys.double(), latents.double())
    k = torch.cat([k, keys.double().expand(len(k), -1, -1)], dim=-1)
    v = torch.einsum("nvr,jr->njv", up.values.double(), latents.double())
    places = torch.arange(len(keys))
    seen = places <= places[len(keys) - len(q) :, None]
    arguments = (q.double().transpose(0, 1), k, v)
    return F.scaled_dot_product_attention(*arguments, attn_mask=seen, scale=scale).transpose(0, 1)
