"""A student without a teacher, and data for it."""

import copy

import pytest
import torch
from torch import nn

from compress.distill.data import PackedData
from compress.distill.loss_value import Loss


class Predictor(nn.Module):
    """A causal language model and the sum of its cross-entropy."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, labels, index):
        out = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        logits = out.logits.float().flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return Loss(total, (labels != -100).sum(), {"cross_entropy": total.detach()})


@pytest.fixture
def make_student(model_folder):
    """A function that makes the tiny model of a family, ready to be trained."""
    from compress.core.device import default_device
    from compress.loading import load_model

    def make(family="llama"):
        return Predictor(load_model(model_folder(family), "float32", default_device()))

    return make


def documents(count, seed=0, longest=40):
    """Documents of 1 to `longest` tokens in which each follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        start = int(torch.randint(3, 115, (1,), generator=generator))
        made.append([3 + (start + 7 * i) % 112 for i in range(length)])
    return made


@pytest.fixture
def packed(tmp_path):
    """A function that packs documents into windows of 32, 4 of them held out."""
    from compress.distill.data import pack

    def make(count=60, seq_len=32, held_out=4, seed=0):
        path = tmp_path / "tokens"
        pack(documents(count, seed), path)
        return PackedData.read(path, seq_len, held_out)

    return make


@pytest.fixture
def twice(make_student):
    """Two equal students."""
    one = make_student()
    return one, copy.deepcopy(one)
