"""A model whose cache holds tokens, so that every read can be checked, and the naive loop."""

import hashlib
from dataclasses import replace

import numpy as np
import torch

from compress.runtime.batch import Batch, Draws
from compress.runtime.cache_layout import CacheLayout
from compress.runtime.sampler import SamplingState, draw, sample
from compress.runtime.sampling_params import SamplingParams

VOCAB = 97
BLOCK = 4


def logits_of(tokens: list[int]) -> torch.Tensor:
    """float32 [V], a function of the whole prefix: no two prefixes look alike."""
    digest = hashlib.blake2b(np.array(tokens, np.int64).tobytes(), digest_size=8).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.standard_normal(VOCAB, np.float32) * 2)


class FakeModel:
    """Keeps (token, position, prefix) where a real one keeps keys and values; looks at every read.

    The prefix, a number, is made of what stands one position before: what a layer knows of tokens
    that have left its window.
    """

    def __init__(
        self,
        max_context: int = 200,
        block_size: int = BLOCK,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self.vocab_size = VOCAB
        self.max_context = max_context
        self.block_size = block_size
        self.layout = CacheLayout.of(windows, block_size)
        self.bytes_per_block = 16 * block_size
        self.prefixes: dict[tuple[int, ...], int] = {}
        self.texts: list[tuple[int, ...]] = []
        self.expected: dict[tuple[int, ...], None] = {}
        self.batches: list[Batch] = []
        self.fail_on: int | None = None  # a token that makes forward raise

    def allocate(self, num_blocks: int) -> None:
        self.cache = np.full((num_blocks, self.block_size, 3), -1)  # poisoned

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.cache[target] = self.cache[source]

    def logits_of(self, tokens: list[int]) -> torch.Tensor:
        return logits_of(tokens)

    def forward(self, batch: Batch) -> torch.Tensor:
        check_layout(batch)
        self.batches.append(batch)
        if self.fail_on is not None and (batch.tokens == self.fail_on).any():
            raise RuntimeError("the model broke")
        flat = self.cache.reshape(-1, 3)
        slots = batch.slots.numpy()
        assert len(set(slots.ravel().tolist())) == slots.size, "two tokens in one slot"
        flat[slots, 0] = batch.tokens.numpy()
        flat[slots, 1] = batch.positions.numpy()
        wanted, out = set(batch.rows.tolist()), []
        starts = batch.starts.tolist()
        for place in range(len(batch.contexts)):
            for row in range(starts[place], starts[place + 1]):
                number = self._read(batch, place, row)
                flat[slots[:, row], 2] = number
                if row in wanted:
                    out.append(self.logits_of(list(self.texts[number])))
        return torch.stack(out) if out else torch.empty(0, self.vocab_size)

    def _read(self, batch: Batch, place: int, row: int) -> int:
        """Look at what each group of layers sees from a token; the number of its prefix."""
        position, token = int(batch.positions[row]), int(batch.tokens[row])
        found = set()
        for table, window in zip(batch.block_tables.numpy(), self.layout.windows, strict=True):
            first = 0 if window is None else max(0, position - window + 1)
            places = np.arange(first, position + 1)
            blocks = table[place][places // self.block_size]
            read = self.cache[blocks, places % self.block_size]
            assert (read[:, 1] == places).all(), "a position read is not its own"
            assert int(read[-1, 0]) == token
            found.add(int(read[-2, 2]) if position else -1)
        assert len(found) == 1, "groups of layers hold different texts"
        before = found.pop()
        text = (*(self.texts[before] if position else ()), token)
        if text not in self.prefixes:
            self.prefixes[text] = len(self.texts)
            self.texts.append(text)
        return self.prefixes[text]


class FakeAsyncModel(FakeModel):
    """Draws itself, and lets nobody see a step's tokens before it is waited for.

    It takes the tokens to come of the launch before from its own memory, as a device does.
    """

    drawn: tuple[int, ...] = ()
    unfinished = 0
    most_unfinished = 2  # of an engine's: one step on its way, and the one after it

    def capture(self, most_sequences: int, lookahead: int = 0) -> None:
        self.most_sequences, self.lookahead = most_sequences, lookahead

    def forward(self, batch: Batch) -> torch.Tensor:
        tokens = batch.tokens.tolist()
        known = [token if token >= 0 else self.drawn[-1 - token] for token in tokens]
        return super().forward(replace(batch, tokens=torch.tensor(known)))

    def launch(self, batch: Batch, draws: Draws) -> "FakeLaunched":
        logits = self.forward(batch)
        assert draws.rows.dtype == np.int64
        rows = zip(
            logits.numpy()[draws.rows], draws.uniform, draws.temperature, draws.top_k,
            draws.top_p, draws.min_p, strict=True,
        )  # fmt: skip
        self.drawn = tuple(
            drawn_by_device(
                row,
                SamplingParams(
                    temperature=float(temperature), top_k=int(top_k), top_p=float(top_p),
                    min_p=float(min_p),
                ),
                uniform,
            )
            for row, uniform, temperature, top_k, top_p, min_p in rows
        )  # fmt: skip
        self.unfinished += bool(self.drawn)
        assert self.unfinished <= self.most_unfinished, "too many steps were not waited for"
        return FakeLaunched(self, self.drawn)


def drawn_by_device(row: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The draw, or -1 where there is none."""
    try:
        return draw(row, params, uniform)
    except ArithmeticError:
        return -1


class FakeLaunched:
    def __init__(self, model: FakeAsyncModel, drawn: tuple[int, ...]) -> None:
        self.model, self.drawn = model, drawn

    def tokens(self) -> list[int]:
        self.model.unfinished -= bool(self.drawn)
        return list(self.drawn)


def check_layout(batch: Batch) -> None:
    """The contract's dtypes and shapes."""
    count, sequences = len(batch.tokens), len(batch.contexts)
    for name in ("tokens", "positions", "slots", "rows"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).is_contiguous()
    for name in ("starts", "contexts", "block_tables"):
        assert getattr(batch, name).dtype == torch.int32
        assert getattr(batch, name).is_contiguous()
    assert len(batch.positions) == count
    assert batch.slots.shape == (len(batch.block_tables), count)
    assert len(batch.starts) == sequences + 1
    assert batch.starts[0] == 0
    assert batch.starts[-1] == count
    assert batch.block_tables.shape[1] == sequences
    ends = batch.positions[batch.starts[1:].long() - 1] + 1
    assert torch.equal(ends.int(), batch.contexts)
    assert torch.equal(batch.rows.sort().values, batch.rows)


def naive(prompt, params, seed=None, index=0, limit=None, eos=(), matcher=None) -> list[int]:
    """What a request must give: the whole prefix computed anew for each token."""
    from array import array

    seed = params.seed if seed is None else seed
    stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else set(eos))
    state = SamplingState(params, seed or 0, index, array("q", prompt), stops, VOCAB, matcher)
    tokens: list[int] = []
    while len(tokens) < (limit or params.max_tokens):
        drawn, _ = sample(logits_of(list(prompt) + tokens)[None], [state])
        tokens.append(drawn[0])
        state.record(drawn[0])
        if drawn[0] in stops or state.complete:
            break
    return tokens


def run(engine, check=True) -> dict[tuple[str, int], list]:
    """Step until idle; the increments of each output, in order."""
    got: dict[tuple[str, int], list] = {}
    while engine.has_work():
        for increment in engine.step():
            got.setdefault((increment.request_id, increment.index), []).append(increment)
        if check:
            engine.check()
    return got


def tokens_of(increments) -> list[int]:
    return [token for increment in increments for token in increment.token_ids]
