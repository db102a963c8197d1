"""The loss on logits in chunks beside the same on whole logits: time and memory on a real model.

    python benchmarks/head_loss.py --model smollm2 --sequences 2 --seq-len 512

Forward and backward of KL(teacher || student) from the last hidden states on, the product with the
head included, under bfloat16 autocast, the head in float32 and trained, as in distillation:

    whole    logits [T, V] of both, torch.log_softmax in float32, autograd
    chunked  compress.distill.head_loss
    top-64   compress.distill.head_loss, the teacher's 64 likeliest tokens from memory instead

The hidden states are the model's own on random tokens; the teacher's are of a copy with some noise
in its weights.  Variants take turns; times are medians.  No ratio is printed unless loss and
gradients agree.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peak_memory import peak_bytes
from torch import Tensor

from compress.core.device import default_device
from compress.core.source import resolve_model
from compress.distill import losses
from compress.distill.head_loss import TeacherStates, Term, TopK, head_loss
from compress.distill.model_parts import last_hidden
from compress.distill.teacher import LiveTeacher
from compress.loading import load_model

Variant = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    device = default_device()
    variants, inputs = prepare(arguments, device)
    found = {name: gradients(run, inputs) for name, run in variants.items()}
    cosines = [
        torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
        for a, b in zip(found["whole"][1], found["chunked"][1], strict=True)
    ]
    agree = min(cosines) > 0.999 and abs(found["chunked"][0] / found["whole"][0] - 1) < 1e-3
    print(
        f"{arguments.sequences} x {arguments.seq_len} tokens of {arguments.model}, {device.type}, "
        f"{torch.get_num_threads()} threads; loss {found['whole'][0]:.2f}, chunked "
        f"{found['chunked'][0]:.2f}, cosine of gradients {min(cosines):.6f}"
    )
    if not agree:
        raise SystemExit("the two do not agree: no ratio")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.turns):
        for name, run in variants.items():
            seconds[name].append(timed(run, inputs, device))
    peaks = {
        name: peak_bytes(lambda run=run: gradients(run, inputs), device.type)
        for name, run in variants.items()
    }
    whole = statistics.median(seconds["whole"])
    print("| variant | seconds | beside whole | peak MiB |\n|---|---|---|---|")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"| {name} | {middle:.3f} | {middle / whole:.2f} | {peaks[name] / 2**20:.0f} |")


def prepare(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Variant], list[Tensor]]:
    """The variants, each a function that gives the loss, and what it has gradients by."""
    folder = resolve_model(arguments.model).folder
    model, other = load_model(folder), load_model(folder, "bfloat16")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    teacher = LiveTeacher(other)
    head = LiveTeacher(model).head
    shape = (arguments.sequences, arguments.seq_len)
    tokens = torch.randint(0, head.vocabulary, shape, device=device)
    positions = torch.arange(shape[1], device=device).expand(shape)
    states, _ = teacher(tokens, positions)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = last_hidden(model, tokens, positions).flatten(0, 1)
        kept = torch.log_softmax(teacher.head.linear(states.hidden).float(), -1).topk(64)
    hidden.requires_grad_()
    weight: Any = head.linear.weight.requires_grad_()
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=device)

    def whole() -> Tensor:
        z = head.linear(hidden).float()
        with torch.no_grad():
            t = teacher.head.linear(states.hidden).float()
        return losses.forward_kl(z, t).sum()

    def chunked(given: TeacherStates | TopK, loss: Any) -> Variant:
        return lambda: head_loss(hidden, head, labels, given, {"kl": Term(1.0, loss)})[0]

    variants = {
        "whole": whole,
        "chunked": chunked(states, lambda z, t, _: losses.forward_kl(z, t)),
        "top-64": chunked(
            TopK(*kept), lambda z, top, _: losses.topk_kl(z, top.log_probs, top.indices)
        ),
    }
    return variants, [hidden, weight]


def gradients(run: Variant, inputs: list[Tensor]) -> tuple[float, list[Tensor]]:
    """The loss, and its mean's gradients, one forward and backward."""
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        loss = run()
    found = torch.autograd.grad(loss / len(inputs[0]), inputs)
    return loss.item(), list(found)


def timed(run: Variant, inputs: list[Tensor], device: torch.device) -> float:
    """Seconds of one forward and backward."""
    started = time.perf_counter()
    gradients(run, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
