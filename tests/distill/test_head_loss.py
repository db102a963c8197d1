"""The losses on logits in chunks, against the same on whole logits; and the memory they take."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from compress.core.errors import InputError
from compress.distill import head_loss as module
from compress.distill import losses
from compress.distill.head_loss import IGNORED, TeacherStates, Term, TopK, head_loss
from compress.distill.model_parts import Head

T, V, D = 13, 17, 6
TERMS = {
    "forward_kl": Term(0.75, lambda z, t, _: losses.forward_kl(z, t, 2.0)),
    "reverse_kl": Term(0.5, lambda z, t, _: losses.reverse_kl(z, t)),
    "jsd": Term(0.25, lambda z, t, _: losses.jsd(z, t, 0.3)),
    "cross_entropy": Term(1.5, lambda z, _, labels: losses.cross_entropy(z, labels)),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Chunks of 3 tokens with a teacher and 6 without, in float64, and blocks of 2 rows."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * V * 8 * 2)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * V * 4)


def head_of(width, seed, bias=True, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    return Head(nn.Linear(width, V, bias=bias, dtype=dtype), **settings)


def hidden_of(width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, width, dtype=torch.float64, generator=generator).to(dtype)


def labels_of(ignored=(0, 5, 12)):
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(9))
    labels[list(ignored)] = IGNORED
    return labels


def logits_of(head, hidden, weight=None, bias=None):
    weight = head.linear.weight if weight is None else weight
    bias = head.linear.bias if bias is None else bias
    return head.cap(nn.functional.linear(hidden, weight, bias) * head.scale)


class _Anew(torch.autograd.Function):
    """A scalar function with the gradient that it has, whose backward can be asked for twice."""

    @staticmethod
    def forward(ctx, function, *inputs):
        with torch.enable_grad():
            leaves = [i.detach().requires_grad_() for i in inputs]
            value = function(*leaves)
            ctx.save_for_backward(*torch.autograd.grad(value, leaves))
        return value.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, *(gradient * saved for saved in ctx.saved_tensors)


KINDS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 3.0},
    "scaled and capped": {"scale": 3.0, "softcap": 2.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*TERMS, "all"])
def test_gradients_against_differences(name, kind):
    """To the hidden states, the head's weight and its bias, in float64."""
    head = head_of(D, 0, **KINDS[kind])
    teacher = TeacherStates(hidden_of(D + 2, 1), head_of(D + 2, 2, **KINDS[kind]))
    terms = TERMS if name == "all" else {name: TERMS[name]}

    def loss(hidden, weight, bias):
        linear = nn.Linear(D, V, dtype=torch.float64)
        del linear.weight, linear.bias
        linear.weight, linear.bias = weight, bias
        return head_loss(
            hidden, Head(linear, head.scale, head.softcap), labels_of(), teacher, terms
        )[0]

    inputs = [hidden_of(D, 3), head.linear.weight.detach(), head.linear.bias.detach()]
    inputs = [i.clone().requires_grad_() for i in inputs]
    assert gradcheck(partial(_Anew.apply, loss), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_whole_logits(kind):
    head, teacher_head = head_of(D, 0, **KINDS[kind]), head_of(D + 2, 2, **KINDS[kind])
    hidden, labels = hidden_of(D, 3).requires_grad_(), labels_of()
    teacher = TeacherStates(hidden_of(D + 2, 1), teacher_head)
    total, parts = head_loss(hidden, head, labels, teacher, TERMS)
    inputs = [hidden, head.linear.weight, head.linear.bias]
    gradients = torch.autograd.grad(total * 0.5, inputs)

    kept = labels != IGNORED
    z, t = logits_of(head, hidden)[kept], logits_of(teacher_head, teacher.hidden)[kept]
    sums = {name: term.loss(z, t.detach(), labels[kept]).sum() for name, term in TERMS.items()}
    whole = sum(TERMS[name].weight * value for name, value in sums.items())
    for name, value in sums.items():
        torch.testing.assert_close(parts[name], value.detach())
        assert not parts[name].requires_grad
    torch.testing.assert_close(total, whole)
    for found, expected in zip(gradients, torch.autograd.grad(whole * 0.5, inputs), strict=True):
        torch.testing.assert_close(found, expected)
    assert (gradients[0][~kept] == 0).all()
    assert teacher_head.linear.weight.grad is None


def test_a_cached_teacher():
    head, hidden, labels = head_of(D, 0), hidden_of(D, 3).requires_grad_(), labels_of()
    t = torch.log_softmax(hidden_of(V, 4), -1)
    top = TopK(*t.topk(5))
    terms = {"kl": Term(2.0, lambda z, top, _: losses.topk_kl(z, top.log_probs, top.indices))}
    total, _ = head_loss(hidden, head, labels, top, terms)
    kept = labels != IGNORED
    whole = 2 * losses.topk_kl(logits_of(head, hidden)[kept], *(x[kept] for x in t.topk(5))).sum()
    torch.testing.assert_close(total, whole)
    inputs = [hidden, head.linear.weight]
    gradients = torch.autograd.grad(total, inputs)
    for found, expected in zip(gradients, torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 12, 13, 100])
def test_the_size_of_chunks_does_not_matter(monkeypatch, rows):
    """Every token is in one chunk and one block, whatever divides or does not divide what."""
    head, hidden, labels = head_of(D, 0), hidden_of(D, 3).requires_grad_(), labels_of(ignored=(2,))
    teacher = TeacherStates(hidden_of(D, 1), head_of(D, 2))
    inputs = [hidden, head.linear.weight, head.linear.bias]
    expected = torch.autograd.grad(head_loss(hidden, head, labels, teacher, TERMS)[0], inputs)
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * V * 8 * 2)
    monkeypatch.setattr(module, "BLOCK_BYTES", max(1, rows - 1) * V * 4)
    chunks = module.chunks_of(T, V, torch.float64, 2)
    assert [i for c in chunks for i in range(T)[c]] == list(range(T))
    assert max(c.stop - c.start for c in chunks) <= rows
    found = torch.autograd.grad(head_loss(hidden, head, labels, teacher, TERMS)[0], inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_positions_that_predict_nothing_cost_nothing(monkeypatch):
    """Only the others reach the product, and with none of them the loss is 0, with gradients."""
    head, hidden = head_of(D, 0), hidden_of(D, 3).requires_grad_()
    teacher = TeacherStates(hidden_of(D, 1), head_of(D, 2))
    seen = []
    terms = {"seen": Term(1.0, lambda z, t, y: seen.append(len(z)) or losses.cross_entropy(z, y))}
    head_loss(hidden, head, labels_of(), teacher, terms)
    assert sum(seen) == T - 3
    total, parts = head_loss(hidden, head, labels_of(range(T)), teacher, TERMS)
    total.backward()
    assert total == 0
    assert all(part == 0 for part in parts.values())
    assert (hidden.grad == 0).all()
    assert (head.linear.weight.grad == 0).all()


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient(frozen):
    head, hidden = head_of(D, 0, bias=False), hidden_of(D, 3).requires_grad_(frozen != "hidden")
    head.linear.weight.requires_grad_(frozen != "weight")
    total, _ = head_loss(hidden, head, labels_of(), None, {"cross_entropy": TERMS["cross_entropy"]})
    total.backward()
    assert (head.linear.weight.grad is None) == (frozen == "weight")
    assert (hidden.grad is None) == (frozen == "hidden")


def test_a_second_backward_is_refused():
    """The gradients were scaled in place: handing them out again would be wrong in silence."""
    hidden = hidden_of(D, 3).requires_grad_()
    total, _ = head_loss(
        hidden, head_of(D, 0), labels_of(), None, {"cross_entropy": TERMS["cross_entropy"]}
    )
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_without_gradients_none_are_made(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    head, hidden = head_of(D, 0), hidden_of(D, 3).requires_grad_()
    with torch.no_grad():
        total, _ = head_loss(hidden, head, labels_of(), TeacherStates(hidden, head_of(D, 2)), TERMS)
    assert not total.requires_grad


def test_under_autocast_products_are_bfloat16_and_losses_float32():
    """Against float32: bfloat16 rounds each logit to 2⁻⁹ of itself."""
    head, hidden = head_of(D, 0, dtype=torch.float32), hidden_of(D, 3, torch.float32)
    hidden.requires_grad_()
    teacher = TeacherStates(hidden_of(D, 1, torch.float32), head_of(D, 2, dtype=torch.float32))
    dtypes = set()

    def spy(z, t, labels):
        dtypes.update((z.dtype, t.dtype))
        return losses.forward_kl(z, t)

    found = []
    for autocast in (torch.autocast("cpu", dtype=torch.bfloat16), nullcontext()):
        with autocast:
            total, _ = head_loss(hidden, head, labels_of(), teacher, {"kl": Term(1.0, spy)})
        assert total.dtype == torch.float32
        found.append([total, *torch.autograd.grad(total, [hidden, head.linear.weight])])
    assert dtypes == {torch.float32}
    for rounded, exact in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_weights_in_bfloat16_get_gradients_in_bfloat16():
    head, hidden = head_of(D, 0, dtype=torch.bfloat16), hidden_of(D, 3, torch.bfloat16)
    total, _ = head_loss(
        hidden.requires_grad_(), head, labels_of(), None, {"ce": TERMS["cross_entropy"]}
    )
    total.backward()
    assert total.dtype == torch.float32
    assert hidden.grad.dtype == head.linear.weight.grad.dtype == torch.bfloat16


def test_float16_multiplies_in_float32():
    """The gradient of an unlikely token's logit is below what float16 holds."""
    assert module.product_dtype(torch.zeros(1, dtype=torch.float16)) == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_memory(monkeypatch, autocast):
    """By the allocator's own record: chunks, blocks and gradients, as the module says, and no more.

    `peak_bytes` counts all that PyTorch allocates in the call, in operators' insides too.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from peak_memory import peak_bytes

    tokens, vocabulary, width, item = 1024, 4096, 16, 2 if autocast else 4
    chunk, block = 1 << 20, 1 << 16
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    head = Head(nn.Linear(width, vocabulary, bias=False))
    other = Head(nn.Linear(width, vocabulary, bias=False))
    labels = torch.zeros(tokens, dtype=torch.int64)

    def run(tokens):
        hidden = torch.randn(tokens, width, requires_grad=True)
        teacher = TeacherStates(torch.randn(tokens, width), other)
        terms = {"forward_kl": Term(1.0, lambda z, t, _: losses.forward_kl(z, t))}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            head_loss(hidden, head, labels[:tokens], teacher, terms)[0].backward()
        head.linear.weight.grad = None

    run(64)
    peak, half = peak_bytes(lambda: run(tokens)), peak_bytes(lambda: run(tokens // 2))
    head_bytes = vocabulary * width * 4
    matrices = 1 + (3 * item / 4 if autocast else 0)  # dL/dW; both W and a summand in bfloat16
    rows = tokens * width * 4
    assert peak < chunk + 10 * block + matrices * head_bytes + 10 * rows
    assert peak < tokens * vocabulary * item  # one whole matrix of logits
    assert peak - half < 10 * rows


def test_a_sharded_head_is_refused(monkeypatch):
    from torch.distributed import tensor

    head = head_of(D, 0)
    monkeypatch.setattr(tensor, "DTensor", nn.Parameter)
    with pytest.raises(InputError, match="sharded by itself; let FSDP wrap the transformer blocks"):
        head_loss(hidden_of(D, 3), head, labels_of(), None, {"ce": TERMS["cross_entropy"]})
