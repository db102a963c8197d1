"""Packing documents into windows, and which of them a step takes."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from compress.core.errors import InputError
from compress.distill.data import PackedData, pack
from compress.loading import load_model
from tests.distill.conftest import documents


def written_out(made, seq_len):
    """Windows by the definition, a token at a time: (id, position, label)."""
    rows = []
    for document in made:
        for place, token in enumerate(document):
            label = document[place + 1] if place + 1 < len(document) else -100
            rows.append((token, place, label))
    windows = []
    for start in range(0, len(rows) - seq_len + 1, seq_len):
        window = rows[start : start + seq_len]
        # a document that goes on from the window before begins anew
        first = window[0][1]
        continued = next((i for i, row in enumerate(window) if row[1] == 0 and i), len(window))
        windows.append(
            [
                (t, p - first if i < continued else p, label)
                for i, (t, p, label) in enumerate(window)
            ]
        )
    return torch.tensor(windows)  # [N, S, 3]


@pytest.mark.parametrize("seq_len", [5, 16, 32])
def test_windows_are_what_the_definition_says(seq_len, tmp_path):
    made = documents(40)
    pack(made, tmp_path / "tokens")
    data = PackedData.read(tmp_path / "tokens", seq_len)
    expected = written_out(made, seq_len)
    assert len(data) == len(expected) > 3
    batch = data.batch(torch.arange(len(data)))
    found = torch.stack([batch[n] for n in ("input_ids", "position_ids", "labels")], dim=-1)
    assert torch.equal(found, expected)
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_the_last_window_may_end_with_the_data(tmp_path):
    pack([[5, 6, 7, 8]], tmp_path / "tokens")
    batch = PackedData.read(tmp_path / "tokens", 4).batch(torch.tensor([0]))
    assert batch["labels"].tolist() == [[6, 7, 8, -100]]


def test_rows_are_documents():
    batch = PackedData.of_rows(torch.tensor([[5, 6, 7], [8, 9, 10]])).batch(torch.tensor([1, 0]))
    assert batch["input_ids"].tolist() == [[8, 9, 10], [5, 6, 7]]
    assert batch["labels"].tolist() == [[9, 10, -100], [6, 7, -100]]
    assert batch["index"].tolist() == [1, 0]


def test_only_as_many_documents_are_read_as_are_needed(tmp_path):
    def stream():
        yield [1] * 60
        yield []
        yield [2] * 60
        raise AssertionError("one document too many")

    pack(stream(), tmp_path / "tokens", tokens=100)
    assert len(PackedData.read(tmp_path / "tokens", 40)) == 3


def test_a_file_is_whole_or_absent(tmp_path):
    def broken():
        yield [1, 2, 3]
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        pack(broken(), tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


# every kind of attention mask: full, sliding, both in turn
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "cohere"])
def test_nothing_leaks_between_documents(family, model_folder, tmp_path):
    """Logits of a document in a packed window are those of the document alone."""
    model = load_model(model_folder(family), "float32")
    made = [document for document in documents(30, longest=20) if len(document) > 1]
    pack(made, tmp_path / "tokens")
    batch = PackedData.read(tmp_path / "tokens", 64).batch(torch.tensor([0, 2]))
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for row in range(2):
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            assert len(starts) > 3
            for start, stop in pairwise([*starts, 64]):
                alone = model(input_ids=batch["input_ids"][row : row + 1, start:stop]).logits
                # other sums of the same float32 numbers; a leak is of order 1
                torch.testing.assert_close(
                    logits[row, start:stop], alone[0], rtol=1e-4, atol=1e-4 * alone.abs().max()
                )


def test_each_pass_sees_each_sequence_once(packed):
    data = packed(60, held_out=4)
    size = 7  # does not divide a pass
    drawn = torch.cat([data.drawn(step, size, seed=3) for step in range(2 * data.trained)])
    passes = drawn.split(data.trained)[:-1]
    assert len(passes) > 5
    for one in passes:
        assert one.sort().values.tolist() == list(range(4, len(data)))
    assert len({tuple(one.tolist()) for one in passes}) == len(passes)


def test_a_step_may_be_larger_than_the_data(packed):
    data = packed(10, held_out=1)
    drawn = data.drawn(0, 3 * data.trained, 0)
    assert drawn.bincount(minlength=len(data)).tolist() == [0] + [3] * data.trained


def test_the_order_is_the_seeds(packed):
    data = packed()
    assert torch.equal(data.drawn(2, 8, 1), data.drawn(2, 8, 1))
    assert not torch.equal(data.drawn(2, 8, 1), data.drawn(2, 8, 2))


def test_fingerprint(packed):
    one = packed().fingerprint()
    assert packed().fingerprint() == one
    assert len({one, packed(seq_len=16).fingerprint(), packed(held_out=3).fingerprint()}) == 3
    assert packed(seed=1).fingerprint() != one
    assert len(one) == 2 * hashlib.sha256().digest_size


@pytest.mark.parametrize(
    ("made", "held_out", "message"),
    [
        ([], 0, "no text: every document is empty"),
        ([[], []], 0, "no text: every document is empty"),
        ([[1, 2, 3]], 0, "3 tokens, not one sequence of 8 to train on; give more text"),
        ([[1] * 31], 3, "31 tokens, not one sequence of 8 to train on after 3 for evaluation"),
    ],
)
def test_too_little_data(made, held_out, message, tmp_path):
    pack(made, tmp_path / "tokens")
    with pytest.raises(InputError, match=message):
        PackedData.read(tmp_path / "tokens", 8, held_out)


def test_numpy_tokens(tmp_path):
    pack([np.array([4, 5], dtype=np.uint16), np.array([6, 7])], tmp_path / "tokens")
    batch = PackedData.read(tmp_path / "tokens", 4).batch(torch.tensor([0]))
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7]]


def test_the_windows_that_a_run_uses(tmp_path):
    """Those held out, and whatever its steps draw, also over several passes."""
    pack([list(range(100))], tmp_path / "tokens")
    data = PackedData.read(tmp_path / "tokens", 4, held_out=3)
    for steps in (1, 3, 20):
        drawn = {int(place) for step in range(steps) for place in data.drawn(step, 2, 7)}
        assert data.used(steps, 2, 7).tolist() == sorted({0, 1, 2} | drawn)
