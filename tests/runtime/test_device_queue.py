"""Inputs arrive as they were sent, all in one copy, and earlier ones are left alone."""

import numpy as np
import pytest
import torch

from compress.runtime.device_queue import ALIGNMENT, BUFFERS, Download, Graph, Uploads, offsets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arrays(seed):
    source = np.random.default_rng(seed)
    return [
        source.integers(-9, 9, 5),
        source.integers(0, 9, (3, 7), np.int32),
        source.random(3, np.float32),
        np.empty(0, np.int64),
        source.random((4, 3))[:, 1],
        source.random((2, 1)),
    ]


def test_every_array_arrives_in_its_shape_and_dtype():
    uploads = Uploads(DEVICE)
    sent = [(arrays(seed), uploads.send(arrays(seed))) for seed in range(3 * BUFFERS)]
    for given, found in sent:
        for array, tensor in zip(given, found, strict=True):
            assert tensor.device.type == DEVICE.type
            assert tensor.shape == array.shape
            np.testing.assert_array_equal(tensor.cpu().numpy(), array)
            assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()


def test_a_target_keeps_its_address_and_what_lies_beyond():
    uploads, given = Uploads(DEVICE), arrays(0)
    size = offsets(given)[-1]
    target = torch.full((size + 64,), 77, dtype=torch.uint8, device=DEVICE)
    for seed in range(5):
        found = uploads.send(arrays(seed), target)
        assert found[0].data_ptr() == target.data_ptr()
        np.testing.assert_array_equal(found[-1].cpu().numpy(), arrays(seed)[-1])
    assert (target[size:] == 77).all()


def test_the_last_array_may_be_shorter_than_the_target_has_room_for():
    """A decode step sends the rows of its block tables that are in use."""
    uploads = Uploads(DEVICE)
    whole = [np.arange(3), np.arange(40, dtype=np.int32).reshape(10, 4)]
    target = torch.zeros(offsets(whole)[-1], dtype=torch.uint8, device=DEVICE)
    first, table = uploads.send(whole, target)
    uploads.send([np.arange(3) + 5, np.full((2, 4), -1, np.int32)], target)
    assert first.tolist() == [5, 6, 7]
    assert table[:2].tolist() == [[-1] * 4] * 2
    assert table[2:].flatten().tolist() == list(range(8, 40))


def test_a_download_holds_what_was_drawn_then():
    drawn = torch.tensor([4, 5, -1], device=DEVICE)
    download = Download(drawn)
    drawn += 1
    assert download.tokens() == [4, 5, -1]


@pytest.mark.parametrize("times", [1, 4])
def test_a_graph_computes_on_what_its_inputs_hold_at_the_time(times):
    x, y = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    pool = torch.cuda.graph_pool_handle() if DEVICE.type == "cuda" else None
    graph = Graph(lambda: y.copy_(x * 2), DEVICE, pool)
    for value in range(times):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value] * 3
