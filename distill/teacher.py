"""The teacher of a distillation: a model that runs beside the student, or what it said before.

A `TopKCache` holds, for each sequence of the data, the probabilities p = softmax(t / τ) of the k
likeliest tokens at each position, so that the teacher runs once and not in every epoch and run:

    identity.json            what it is of (CacheIdentity)
    NNNNNNNNN.safetensors    some sequences; the number is the first one's place in the data
        log_probs  float16 [n, S, k]           log p, largest first
        indices    uint16 or int32 [n, S, k]   the tokens; uint16 where V <= 65,536
        rest       float32 [n, S]              what is left of the probability, 1 - Σ p
        index      int64 [n]                   places in the data
        tokens     int64 [n]                   a hash of each sequence's tokens and positions

Logarithms of probabilities, and not logits, since they are small numbers for tokens that matter:
float16 keeps log p to a share of 2⁻¹¹, and a logit of 20 to 0.008 only.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.core.commits import IDENTITY, Commits
from compress.core.errors import InputError
from compress.core.processes import processes
from compress.core.progress import track
from compress.core.shards import write_file
from compress.distill.head_loss import (
    ChunkedLogits,
    TeacherStates,
    TopK,
    blocks_of_rows,
    chunks_of,
    product_dtype,
)
from compress.distill.model_parts import Head, last_hidden, recording

SHARD_BYTES = 32 << 20
LEAST_LOG_PROB = -60_000.0  # float16 ends at -65,504
Sequence = dict[str, Tensor]  # the tensors of a file, without their first dimension


class LiveTeacher:
    """A model that runs beside the student, without gradients, in evaluation mode.

    Its parameters are frozen here.  It is no submodule of the student's, so that no wrapper shards
    or saves it: each process holds all of it, in the dtype that it was loaded in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = Head.of(model)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return self.head.vocabulary

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, record: Mapping[str, nn.Module] | None = None
    ) -> tuple[TeacherStates, dict[str, Tensor]]:
        """Last hidden states [B * S, D], and the outputs of the modules in `record`, [B, S, D].

        input_ids and position_ids int64 [B, S], on the device that the model moves to.
        """
        if self.head.linear.weight.device != input_ids.device:
            self.model.to(input_ids.device)
        with recording(record or {}) as outputs:
            hidden = last_hidden(self.model, input_ids, position_ids)
        return TeacherStates(hidden.flatten(0, 1), self.head), outputs


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache is of.

    teacher      a fingerprint of the teacher's weights, known without loading them
    k            how many tokens are kept of each position
    temperature  τ
    vocabulary   V, of which k are kept
    seq_len      S, tokens of a sequence
    """

    teacher: str
    k: int
    temperature: float
    vocabulary: int
    seq_len: int

    def __post_init__(self) -> None:
        if not 0 < self.k < self.vocabulary:
            raise InputError(
                f"top-k {self.k} is not between 1 and {self.vocabulary - 1}, one less than the "
                "teacher's tokens; 64 will mostly do"
            )

    @property
    def bytes_per_sequence(self) -> int:
        """What a sequence takes on the disk."""
        return self.seq_len * (self.k * (2 + self.index_dtype.itemsize) + 4) + 16

    @property
    def index_dtype(self) -> torch.dtype:
        """The dtype that tokens are stored in."""
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32


class TopKCache:
    """The teacher's likeliest tokens by a sequence's place in the data (see the module)."""

    def __init__(self, folder: Path, identity: CacheIdentity) -> None:
        """Open what `build` has written, all of it or a part.

        Raises InputError where nothing is, it is of something else, or a file is broken.
        """
        self.folder, self.identity = folder, identity
        if not (folder / IDENTITY).is_file():
            raise InputError(f"'{folder}' is no cache of a teacher's top-k; build it first")
        if difference := Commits(folder).difference(asdict(identity)):
            raise InputError(
                f"the cache '{folder}' was made with another {difference}; give another folder, or "
                "remove it"
            )
        self._place: dict[int, tuple[Any, int]] = {}  # place in the data -> open file, row in it
        for path in sorted(folder.glob("*.safetensors")):
            self._open(path)

    @classmethod
    def build(
        cls,
        folder: Path,
        identity: CacheIdentity,
        teacher: LiveTeacher,
        batches: Iterable[Mapping[str, Tensor]],
        sequences: int,
    ) -> "TopKCache":
        """Run the teacher on what the cache lacks of `batches`, and open it.

        batches hold input_ids and position_ids int64 [B, S] and index int64 [B]; of several
        processes each brings its share, `sequences` in all.  Broken off, it goes on with the
        sequences that are not in a file yet.

        Raises InputError for a folder that holds anything else, or cannot be written.
        """
        try:
            processes().first(lambda: _begin(folder, identity))
            there = cls(folder, identity)
            there._write(there._missing(teacher, batches), sequences)
        except OSError as error:
            raise InputError(
                f"cannot write the cache '{folder}': {error.strerror or error}; mend that and run "
                "the same command again to go on"
            ) from error
        processes().wait()
        return cls(folder, identity)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return self.identity.vocabulary

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, index: int) -> bool:
        return index in self._place

    def read(self, index: Tensor, input_ids: Tensor, position_ids: Tensor) -> TopK:
        """The likeliest tokens of the sequences at places `index` int64 [B]: B * S rows.

        Probabilities are scaled to the sum that they had before they were rounded.

        Raises InputError for a sequence that is not here, or was another when it was written.
        """
        hashes = _hashes(input_ids, position_ids)
        sequences = [self._read(*pair) for pair in zip(index.tolist(), hashes, strict=True)]
        log_probs, indices, rest = (
            torch.cat([sequence[name] for sequence in sequences]).to(input_ids.device)
            for name in ("log_probs", "indices", "rest")
        )
        log_probs += (torch.log1p(-rest) - log_probs.logsumexp(-1)).unsqueeze(-1)
        return TopK(log_probs, indices.long())

    def _read(self, index: int, tokens: int) -> Sequence:
        if index not in self._place:
            raise InputError(
                f"the cache '{self.folder}' lacks sequence {index} of the data; build it on all of "
                "the data that is trained on"
            )
        file, row = self._place[index]
        if file.get_slice("tokens")[row].item() != tokens:
            raise InputError(
                f"sequence {index} of the data is not the one that the cache '{self.folder}' was "
                "made of; give the same data, tokenizer, sequence length and seed, or another "
                "folder"
            )
        found = {name: file.get_slice(name)[row] for name in ("log_probs", "indices", "rest")}
        # under autocast to bfloat16 PyTorch joins no float16
        return {n: v.float() if v.is_floating_point() else v for n, v in found.items()}

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt").__enter__()
            index = file.get_tensor("index")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"cannot read {path}: {error}; remove that file and build the cache again"
            ) from None
        for row, place in enumerate(index.tolist()):
            self._place[place] = (file, row)

    def _missing(
        self, teacher: LiveTeacher, batches: Iterable[Mapping[str, Tensor]]
    ) -> Iterator[Sequence]:
        """Run the teacher on the sequences that are not here."""
        device = teacher.head.linear.weight.device
        for batch in batches:
            rows = [row for row, place in enumerate(batch["index"].tolist()) if place not in self]
            if not rows:
                continue
            tokens, positions = batch["input_ids"][rows], batch["position_ids"][rows]
            states, _ = teacher(tokens.to(device), positions.to(device))
            found = most_likely(states, self.identity)
            found = {name: t.unflatten(0, tokens.shape).cpu() for name, t in found.items()}
            found["index"] = batch["index"][rows].cpu()
            found["tokens"] = torch.tensor(_hashes(tokens, positions))
            for row in range(len(rows)):
                yield {name: tensor[row] for name, tensor in found.items()}

    def _write(self, found: Iterable[Sequence], sequences: int) -> None:
        many = max(1, SHARD_BYTES // self.identity.bytes_per_sequence)
        pending: list[Sequence] = []
        what = f"Teacher's top {self.identity.k}"
        for sequence in track(found, what, total=sequences, done=len(self)):
            pending.append(sequence)
            if len(pending) == many:
                self._commit(pending)
                pending = []
        if pending:
            self._commit(pending)

    def _commit(self, sequences: list[Sequence]) -> None:
        path = self.folder / f"{sequences[0]['index'].item():09d}.safetensors"
        write_file(path, {n: torch.stack([s[n] for s in sequences]) for n in sequences[0]})


@torch.no_grad()
def most_likely(teacher: TeacherStates, identity: CacheIdentity) -> dict[str, Tensor]:
    """log_probs [T, k], indices [T, k] and rest [T], in the dtypes that they are stored in."""
    dtype = product_dtype(teacher.hidden)
    chunks = chunks_of(len(teacher.hidden), teacher.head.vocabulary, dtype)
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    logits_of = ChunkedLogits.of_teacher(teacher, dtype, rows)
    log_probs, indices, rest = [], [], []
    for chunk in chunks:
        logits = logits_of[chunk]
        for rows in blocks_of_rows(logits):
            capped = teacher.head.cap(logits[rows].float())
            all_log_probs = torch.log_softmax(capped / identity.temperature, -1)
            top = all_log_probs.topk(identity.k)
            log_probs.append(top.values.clamp_min(LEAST_LOG_PROB).half())
            indices.append(top.indices.to(identity.index_dtype))
            rest.append((1 - top.values.exp().sum(-1)).clamp_min(0))
    return {
        "log_probs": torch.cat(log_probs),
        "indices": torch.cat(indices),
        "rest": torch.cat(rest),
    }


def _begin(folder: Path, identity: CacheIdentity) -> None:
    """Make the folder of a cache, if it is not there."""
    if (folder / IDENTITY).is_file():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is no cache, and not empty; give another folder for it")
    Commits(folder).begin(asdict(identity))


def _hashes(input_ids: Tensor, position_ids: Tensor) -> list[int]:
    """A 63-bit hash (XXH3) of each sequence."""
    both = torch.stack([input_ids, position_ids], 1).cpu().contiguous()
    return [xxhash.xxh3_64_intdigest(pair.numpy().tobytes()) >> 1 for pair in both]
