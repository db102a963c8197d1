"""The cache of a teacher's likeliest tokens: what is stored, going on, and every refusal."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from compress.core.errors import InputError
from compress.distill import head_loss, losses
from compress.distill import teacher as module
from compress.distill.objective import LossConfig, Objective, Student
from compress.distill.teacher import CacheIdentity, LiveTeacher, TopKCache
from compress.loading import load_model
from tests.distill.batches import batch_of, noisy, split

IDENTITY = CacheIdentity("a teacher", k=16, temperature=1.0, vocabulary=128, seq_len=12)
SEQUENCES = 5


@pytest.fixture
def teacher(model_folder):
    return LiveTeacher(load_model(model_folder("gemma2")))


@pytest.fixture
def batch():
    return batch_of(SEQUENCES)


@pytest.fixture
def cache(teacher, batch, tmp_path):
    return TopKCache.build(tmp_path / "cache", IDENTITY, teacher, split(batch, 2), SEQUENCES)


def read(cache, batch):
    return cache.read(batch["index"], batch["input_ids"], batch["position_ids"])


def logits_of(teacher, batch):
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    return teacher.model(**inputs, use_cache=False).logits.detach().flatten(0, 1)


def test_it_holds_the_likeliest_tokens_of_each_position(cache, teacher, batch):
    expected = torch.log_softmax(logits_of(teacher, batch), -1).topk(16)
    found = read(cache, batch)
    # float16 keeps 11 bits of a logarithm; scaling to the sum corrects by as much
    torch.testing.assert_close(found.log_probs, expected.values, rtol=2**-10, atol=2**-10)
    sums = found.log_probs.double().exp().sum(-1)
    torch.testing.assert_close(sums, expected.values.double().exp().sum(-1), rtol=1e-6, atol=0)
    # of tokens as likely as each other either may be the last
    assert (found.indices == expected.indices).float().mean() > 0.99
    assert len(cache) == SEQUENCES
    assert 4 in cache
    assert 5 not in cache


def test_it_is_read_in_any_order_and_on_any_batch(cache, batch):
    whole = read(cache, batch).log_probs.unflatten(0, (SEQUENCES, 12))
    order = torch.tensor([3, 0, 4])
    part = read(cache, {name: tensor[order] for name, tensor in batch.items()})
    assert torch.equal(part.log_probs.unflatten(0, (3, 12)), whole[order])


def test_it_is_read_under_autocast(cache, batch):
    """As in training in bfloat16, under which PyTorch joins no float16."""
    expected = read(cache, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = read(cache, batch)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.indices, expected.indices)


def test_chunks_of_unequal_size(teacher, batch, cache, tmp_path, monkeypatch):
    """60 tokens in chunks of at most 7: some have 6."""
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 7 * 128 * 4)
    monkeypatch.setattr(head_loss, "BLOCK_BYTES", 2 * 128 * 4)
    chunked = TopKCache.build(tmp_path / "chunked", IDENTITY, teacher, [batch], SEQUENCES)
    found, expected = read(chunked, batch), read(cache, batch)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=2**-10, atol=2**-10)


def test_temperature(teacher, batch, tmp_path):
    warm = replace(IDENTITY, temperature=3.0)
    cache = TopKCache.build(tmp_path / "cache", warm, teacher, [batch], SEQUENCES)
    expected = torch.log_softmax(logits_of(teacher, batch) / 3, -1).topk(16).values
    found = read(cache, batch).log_probs
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, "uint16"), (65537, "int32")])
def test_tokens_are_stored_as_narrow_as_the_vocabulary_allows(vocabulary, dtype):
    identity = replace(IDENTITY, vocabulary=vocabulary)
    assert identity.index_dtype == getattr(torch, dtype)


def test_the_last_token_of_a_large_vocabulary_survives():
    """65,535 is beyond what int16 holds."""
    identity = CacheIdentity("t", k=1, temperature=1.0, vocabulary=1 << 16, seq_len=1)
    head = module.Head(torch.nn.Linear(1, 1 << 16, bias=False))
    torch.nn.init.zeros_(head.linear.weight).data[-1] = 9
    found = module.most_likely(module.TeacherStates(torch.ones(1, 1), head), identity)
    assert found["indices"].dtype == torch.uint16
    assert found["indices"].item() == 65535


def test_files(cache, batch):
    (path,) = cache.folder.glob("*.safetensors")
    stored = load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        "log_probs": (torch.float16, (5, 12, 16)),
        "indices": (torch.uint16, (5, 12, 16)),
        "rest": (torch.float32, (5, 12)),
        "index": (torch.int64, (5,)),
        "tokens": (torch.int64, (5,)),
    }
    assert sum(t.nbytes for t in stored.values()) == 5 * IDENTITY.bytes_per_sequence


def test_broken_off_it_goes_on(teacher, batch, tmp_path, monkeypatch):
    """What is in a file by then is not run again, and the cache is the same in the end."""
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * IDENTITY.bytes_per_sequence)
    ran = []

    def counting(ids, positions):
        ran.append(len(ids))
        return teacher(ids, positions)

    counting.head = teacher.head

    def breaking():
        yield from split(batch, 1)[:3]
        raise KeyboardInterrupt

    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        TopKCache.build(folder, IDENTITY, counting, breaking(), SEQUENCES)
    assert ran == [1, 1, 1]
    part = TopKCache(folder, IDENTITY)
    assert [index in part for index in range(SEQUENCES)] == [True, True, False, False, False]
    cache = TopKCache.build(folder, IDENTITY, counting, [batch], SEQUENCES)
    assert ran == [1, 1, 1, 3]
    assert len(cache) == SEQUENCES
    again = TopKCache.build(folder, IDENTITY, counting, [batch], SEQUENCES)
    assert ran == [1, 1, 1, 3]
    whole = TopKCache.build(tmp_path / "whole", IDENTITY, teacher, split(batch, 1), SEQUENCES)
    assert torch.equal(read(again, batch).indices, read(whole, batch).indices)


def test_a_teacher_that_is_cached_gives_the_loss_of_one_that_runs(
    cache, teacher, batch, model_folder
):
    """To within the lumped rest; with nearly all tokens kept, to within float16."""
    found = []
    for k in (None, 16, 127):
        at = cache
        if k == 127:
            identity = replace(IDENTITY, k=127)
            folder = cache.folder.with_name("all")
            at = TopKCache.build(folder, identity, teacher, [batch], SEQUENCES)
        model = noisy(load_model(model_folder("gemma2")))
        config = LossConfig(topk=k, cross_entropy=0.5)
        student = Student(model, Objective(config, model, at if k else teacher))
        loss = student(**batch)
        loss.total.backward()
        found.append((loss.parts, model.get_input_embeddings().weight.grad))
    (live, gradient), (lumped, _), (every, close) = found
    assert live["cross_entropy"] == lumped["cross_entropy"]
    assert 0.5 * live["forward_kl"] < lumped["forward_kl"] < live["forward_kl"]
    torch.testing.assert_close(every["forward_kl"], live["forward_kl"], rtol=1e-3, atol=0)
    scale = gradient.abs().max().item()
    torch.testing.assert_close(close, gradient, rtol=0, atol=2e-3 * scale)


def test_another_identity_is_refused(cache):
    for change, said in (
        ({"teacher": "another"}, "another teacher (a teacher, now another)"),
        ({"k": 8}, "another k (16, now 8)"),
        ({"temperature": 2.0}, "another temperature (1.0, now 2.0)"),
        ({"vocabulary": 129}, "another vocabulary (128, now 129)"),
        ({"seq_len": 13}, "another seq_len (12, now 13)"),
    ):
        with pytest.raises(InputError, match="give another folder, or remove it") as caught:
            TopKCache(cache.folder, replace(IDENTITY, **change))
        assert said in str(caught.value)


def test_other_data_is_refused(cache, batch):
    for name in ("input_ids", "position_ids"):
        other = dict(batch)
        other[name] = other[name].clone()
        other[name][1, 7] += 1
        with pytest.raises(InputError, match="sequence 1 of the data is not the one"):
            read(cache, other)
    moved = batch | {"index": torch.tensor([1, 0, 2, 3, 4])}
    with pytest.raises(InputError, match="sequence 1 of the data is not the one"):
        read(cache, moved)
    with pytest.raises(InputError, match="lacks sequence 7 of the data"):
        read(cache, batch | {"index": torch.tensor([0, 1, 2, 3, 7])})


def test_folders_that_are_no_cache_are_refused(cache, teacher, batch, tmp_path):
    with pytest.raises(InputError, match="no cache of a teacher's top-k; build it first"):
        TopKCache(tmp_path / "absent", IDENTITY)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="no cache, and not empty"):
        TopKCache.build(mine, IDENTITY, teacher, [batch], SEQUENCES)
    assert (mine / "thesis.txt").read_text() == "ten years of work"
    with pytest.raises(InputError, match="no cache, and not empty"):
        TopKCache.build(mine / "thesis.txt", IDENTITY, teacher, [batch], SEQUENCES)
    (path,) = cache.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"cannot read {path}.*remove that file"):
        TopKCache(cache.folder, IDENTITY)


def test_a_full_disk_is_one_line(teacher, batch, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(InputError, match=r"cannot write the cache '.*': No space left on device"):
        TopKCache.build(tmp_path / "cache", IDENTITY, teacher, [batch], SEQUENCES)


@pytest.mark.parametrize("k", [0, 128, 1000])
def test_k_is_below_the_vocabulary(k):
    with pytest.raises(InputError, match=f"top-k {k} is not between 1 and 127"):
        replace(IDENTITY, k=k)


def test_identity_is_readable(cache):
    stored = json.loads((cache.folder / "identity.json").read_text())
    assert stored == {
        "teacher": "a teacher",
        "k": 16,
        "temperature": 1.0,
        "vocabulary": 128,
        "seq_len": 12,
    }


def test_a_live_teacher_is_frozen(teacher, batch):
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    states, _ = teacher(batch["input_ids"], batch["position_ids"])
    assert states.hidden.shape == (SEQUENCES * 12, 48)
    assert not states.hidden.requires_grad
    kl = losses.forward_kl(
        teacher.head.cap(teacher.head.linear(states.hidden)), logits_of(teacher, batch)
    )
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-5)
