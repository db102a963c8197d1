"""From what a user asks for to a speculator: which proposer, and how it decides its lengths.

    draft = "auto" | "ngram" | "self" | "self:3,7-12" | a checkpoint;  tokens = 1 to 64 | "auto"

`choose` finds out what can be wrong before any weights are read; `make_speculator` then makes
the proposer beside the model, and `settle` what decides the lengths, on a cache to measure on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.core.errors import InputError, nearest, shown
from compress.core.source import ModelSource, read_config, resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.kernels.lowbit_matmul import LinearWeight
from compress.runtime.batch import AsynchronousModel
from compress.runtime.decoder import Decoder
from compress.runtime.loading import load_decoder
from compress.runtime.speculation.draft_model import DraftModel, SelfDraft
from compress.runtime.speculation.lengths import AdaptiveLength, FixedLength
from compress.runtime.speculation.ngram import NgramProposer
from compress.runtime.speculation.proposer import Proposer
from compress.runtime.speculation.speculator import Speculator
from compress.runtime.speculation.step_cost import StepCost, measure_steps
from compress.runtime.weights import check_served, rounded_by_row

NGRAM, SELF, AUTO = "ngram", "self", "auto"
MOST_TOKENS = 64  # of one draft
MOST_AUTO = {NGRAM: 16, SELF: 8, "model": 8}  # that `auto` goes to
LEAST_LAYERS = 4  # of a model that can do with fewer
OWN = "draft"  # the folder in a checkpoint of a draft that was made for it
HEAD_BITS = 8  # of a draft's output layer, which is most of a small model's work


@dataclass(frozen=True)
class Choice:
    """A proposer that a model can have.

    name      what a user calls it
    tokens    of each draft; None lets them follow what pays
    left_out  layers of the model that a self-draft does without
    source    of a draft model
    """

    name: str
    kind: str
    tokens: int | None
    left_out: tuple[int, ...] = ()
    source: ModelSource | None = None

    @property
    def most(self) -> int:
        """Tokens of one draft, at most."""
        return self.tokens or MOST_AUTO[self.kind]


def choose(
    draft: str | None, tokens: int | str, source: ModelSource, tokenizer: Any
) -> Choice | None:
    """What a user asks for, for the model of `source`; reads no weights.

    A draft `auto` is the one in the model's folder, or none where there is none.

    InputError for a draft that is not found, not served, or has another vocabulary, for layers
    that the model lacks, and for a number of tokens that is not allowed.
    """
    if tokens == AUTO:
        number = None
    elif isinstance(tokens, int) and not isinstance(tokens, bool) and 1 <= tokens <= MOST_TOKENS:
        number = tokens
    else:
        raise InputError(
            f"num_speculative_tokens = {shown(tokens)}; allowed is 1 to {MOST_TOKENS}, or auto"
        )
    if draft == AUTO:
        name, own = "its own draft", source.folder / OWN
        draft = str(own) if (own / "config.json").is_file() else None
    else:
        name = draft or ""
    if draft is None:
        if number is None:
            return None
        raise InputError(
            f"num_speculative_tokens = {number} without a draft; give one, such as draft = ngram"
        )
    if draft == NGRAM:
        return Choice(name, NGRAM, number)
    if draft == SELF or draft.startswith(f"{SELF}:"):
        config = read_config(source.folder)
        count, share = config.get("num_hidden_layers"), config.get("kv_share")
        share = share if isinstance(share, int) and share > 0 else 1  # others are refused later
        if not isinstance(count, int) or count < LEAST_LAYERS:
            raise InputError(
                f"draft '{draft}': '{source.ref}' has {shown(count)} layers, and a draft of its "
                f"own takes a model of {LEAST_LAYERS} or more; give draft = ngram"
            )
        return Choice(name, SELF, number, left_out=_left_out(draft, count, share))
    try:
        drafting = resolve_model(draft)
    except InputError as error:
        meant = nearest(draft.partition(":")[0], (NGRAM, SELF))
        raise InputError(f"draft: {error}{meant}") from None
    check_served(drafting)
    _check_vocabulary(drafting, source, tokenizer)
    return Choice(name, "model", number, source=drafting)


def make_speculator(
    choice: Choice,
    target: Decoder,
    head: LinearWeight,
    device: torch.device,
    dtype: str,
    most: tuple[int, int],
    kv_cache_dtype: str = "auto",
) -> Speculator:
    """The proposer of `choice` for a model whose output layer is `head`; `settle` comes after.

    `most` are the tokens and the sequences of the model's largest batch.  A draft model's own keys
    and values are stored as `kv_cache_dtype`.
    """
    rounds = dtype != "float32"  # where it would gain nothing: codes are de-quantized
    if choice.kind == NGRAM:
        proposer: Proposer = NgramProposer(choice.most)
    elif choice.source is None:
        light = rounded_by_row(head) if rounds and head.bits > HEAD_BITS else None
        part = target.without(choice.left_out, light)
        description = f"the model without layers {_ranges(choice.left_out)}"
        proposer = SelfDraft(part, target, choice.most, *most, description)
    else:
        head_bits = HEAD_BITS if rounds else None
        model = load_decoder(choice.source, device, dtype, head_bits, most[0], kv_cache_dtype)
        for one in (target, model):  # whose caches have the same block numbers
            one.keep_all()
        description = f"draft model '{choice.source.ref}'"
        proposer = DraftModel(model, target, choice.most, *most, description)
    return Speculator(proposer, FixedLength(choice.most))


def settle(
    speculator: Speculator, choice: Choice, target: Decoder, num_blocks: int, most_tokens: int
) -> None:
    """Let the lengths follow what pays, if so chosen: measures steps on the empty cache, 1 s."""
    if choice.tokens is not None:
        return
    proposer = speculator.proposer
    cost = StepCost(measure_steps(target, num_blocks, most_tokens))
    if isinstance(proposer, DraftModel):
        proposer.measure(num_blocks)
    speculator.lengths = AdaptiveLength(proposer, cost, isinstance(target, AsynchronousModel))


def _left_out(draft: str, count: int, share: int) -> tuple[int, ...]:
    """The layers that a self-draft of a model of `count` layers does without.

    A layer goes with the one whose keys and values it uses, the first of its run of `share`.
    By default two runs of a sixth each in the first half, with some layers around and between:
    of what was tried on SmolLM2 (benchmarks/LOG.md) the best that is not made for it.
    """
    if draft == SELF:
        run, apart = max(1, count // 6), max(1, count // 10)
        second = 2 * apart + run
        both = (*range(apart, apart + run), *range(second, second + run))
        left = tuple(layer for layer in both if layer < count - 1)
    else:
        left = layers_of(draft.removeprefix(f"{SELF}:"), count)
    with_first = {layer for layer in range(count) if layer - layer % share in left}
    if len(with_first.union(left)) == count:
        raise InputError(f"draft '{draft}' leaves out all {count} layers; keep the first of a run")
    return tuple(sorted(with_first.union(left)))


def layers_of(text: str, count: int) -> tuple[int, ...]:
    """Layers to leave out of `count`, such as 3,7-12; InputError for any that are not there."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < count:
            raise InputError(
                f"layers {shown(text)} to leave out: allowed are numbers and ranges of 0 to "
                f"{count - 1}, such as 3,7-12"
            )
        layers.update(range(first, last + 1))
    if len(layers) == count:
        raise InputError(f"layers {shown(text)} to leave out are all {count}; keep one or more")
    return tuple(sorted(layers))


def _ranges(layers: tuple[int, ...]) -> str:
    """3,7-12 for (3, 7, 8, 9, 10, 11, 12)."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts)


def _check_vocabulary(drafting: ModelSource, source: ModelSource, tokenizer: Any) -> None:
    """InputError unless a draft model's tokens are the model's, number by number."""
    theirs: Mapping[str, int] = load_tokenizer(drafting.folder).get_vocab()
    ours: Mapping[str, int] = tokenizer.get_vocab()
    if theirs == ours:
        return
    if len(theirs) != len(ours):
        differ = f"{len(theirs)} tokens, and '{source.ref}' has {len(ours)}"
    else:
        token = min(
            (token for token in ours if theirs.get(token) != ours[token]), key=ours.__getitem__
        )
        differ = f"no token {shown(token)} of number {ours[token]}, as '{source.ref}' has"
    raise InputError(
        f"draft '{drafting.ref}' has {differ}; give a model of the same vocabulary, or ngram"
    )
