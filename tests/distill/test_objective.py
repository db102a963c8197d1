"""The objective against losses written out on the models' own logits."""

import pytest
import torch
from torch.nn import functional as F

from compress.distill.objective import LossConfig, Objective, Student
from compress.distill.teacher import LiveTeacher
from compress.loading import load_model

FAMILIES = ("llama", "qwen2", "gemma2", "cohere", "granite", "phi")


def batch_of(rows=2, length=12, seed=0):
    """Random tokens; the first two rows hold two documents, whose last tokens predict nothing."""
    tokens = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).repeat(rows, 1)
    positions[0, 5:] -= 5
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 4] = -100
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "labels": labels,
        "index": torch.arange(rows),
    }


def noisy(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_kl_and_cross_entropy_are_those_of_the_models_logits(model_folder, family):
    teacher, model = load_model(model_folder(family)), noisy(load_model(model_folder(family)))
    config = LossConfig(forward_kl=0.75, cross_entropy=0.5)
    student = Student(
        model, Objective(config, model, LiveTeacher(load_model(model_folder(family))))
    )
    batch = batch_of()
    loss = student(**batch)
    loss.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    kept = batch["labels"] != -100
    z, t = (m(**inputs, use_cache=False).logits[kept] for m in (model, teacher))
    kl = F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="sum")
    ce = F.cross_entropy(z, batch["labels"][kept], reduction="sum")
    (0.75 * kl + 0.5 * ce).backward()

    assert loss.tokens == kept.sum()
    torch.testing.assert_close(loss.parts["forward_kl"], kl.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.parts["cross_entropy"], ce.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, 0.75 * kl + 0.5 * ce, rtol=1e-4, atol=1e-4)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        # float32 sums in another order
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
