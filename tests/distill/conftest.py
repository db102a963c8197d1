"""A student without a teacher, and data for it."""

import pytest
import torch
from torch import nn

from compress.distill.data import PackedData, pack
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


def predictor(folder):
    """The model in a folder, ready to be trained; its strong channels would make it diverge."""
    from compress.core.device import default_device
    from compress.loading import load_model

    model = load_model(folder, "float32", default_device())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(parameter.std() / 0.05)
    return Predictor(model)


@pytest.fixture
def make_student(model_folder):
    """A function that makes a student of a family."""
    return lambda family="llama": predictor(model_folder(family))


def documents(count, seed=0, longest=40):
    """Documents of 1 to `longest` tokens, in each of which tokens count up by sevens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        start = int(torch.randint(0, 112, (1,), generator=generator))
        made.append([3 + (start + 7 * i) % 112 for i in range(length)])
    return made


@pytest.fixture
def packed(tmp_path):
    """A function that packs documents, with 4 windows held out."""

    def make(count=60, seq_len=32, held_out=4, seed=0):
        pack(documents(count, seed), tmp_path / "tokens")
        return PackedData.read(tmp_path / "tokens", seq_len, held_out)

    return make
