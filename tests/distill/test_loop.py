"""The loop against a loop written out in plain PyTorch, and what it does beside training."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from compress.core.errors import InputError
from compress.distill import loop
from compress.distill.checkpoint import whole_weights
from compress.distill.config import TrainConfig
from compress.distill.loop import train
from compress.distill.schedule import learning_rate_factor
from compress.distill.training import decay_matrices

SETTINGS = {
    "tokens": 6 * 8 * 32,
    "seq_len": 32,
    "batch_size": 8,
    "micro_batch": 3,
    "learning_rate": 3e-3,
    "precision": "float32",
    "save_every": 100,
}


def settings(**changes):
    return TrainConfig(**SETTINGS | changes)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


def plainly(student, data, config, autocast=False, decay=0.0):
    """Train by the book: one batch a step, the mean over its predicted tokens, AdamW."""
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    losses, norms = [], []
    for step in range(config.steps):
        batch = data.batch(data.drawn(step, config.batch_size, config.seed))
        for group in adamw.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        adamw.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = student.model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)))
        adamw.step()
        losses.append(float(loss.detach()))
    return losses, norms


@pytest.fixture
def two(make_student):
    """Two equal students."""
    one = make_student().requires_grad_(True)
    return one, copy.deepcopy(one)


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 20])
def test_the_gradient_does_not_depend_on_micro_batches(micro_batch, two, packed, tmp_path):
    data = packed()
    config = settings(micro_batch=micro_batch, weight_decay=0.3, clip_norm=0.7)
    losses, norms = plainly(two[1], data, config, decay=0.3)
    train(two[0], data, config, tmp_path)
    assert losses[-1] < 0.97 * losses[0]
    found = [row for row in rows_of(tmp_path) if "loss" in row]
    # the same sums in another order, in float32, over six steps
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-5)
    assert [row["gradient_norm"] for row in found] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 0.7  # clipped
    for one, other in zip(two[0].parameters(), two[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_bfloat16_casts_are_as_good_as_new_after_each_step(two, packed, tmp_path):
    """The casts kept over micro-batches must not outlive the step that changes the weights."""
    data = packed()
    config = settings(precision="bfloat16", micro_batch=2, learning_rate=1e-2)
    losses, _ = plainly(two[1], data, config, autocast=True)
    train(two[0], data, config, tmp_path)
    # bfloat16 rounds to 1 in 256; sums of gradients differ in order. The loss falls by a fifth.
    assert losses_of(tmp_path) == pytest.approx(losses, rel=2e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert {p.dtype for p in two[0].parameters()} == {torch.float32}


def test_weights_are_cast_once_a_step(make_student, packed, tmp_path):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == (80, 48):
                self.count += (kwargs or {}).get("dtype") == torch.bfloat16
            return function(*args, **(kwargs or {}))

    config = settings(precision="bfloat16", micro_batch=2, tokens=2 * 8 * 32)
    with Casts() as casts:
        train(make_student().requires_grad_(True), packed(held_out=0), config, tmp_path)
    assert casts.count == 2 * 2 * 2  # gate and up of two blocks, in two steps of four micro-batches


def test_activation_checkpointing_changes_nothing_but_memory(two, packed, tmp_path):
    kept = []

    def run(student, name, **changes):
        count = 0

        def pack_hook(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            train(student, packed(), settings(**changes), tmp_path / name)
        kept.append(count)
        return losses_of(tmp_path / name)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    plain = run(two[0], "a", precision="bfloat16")
    assert run(two[1], "b", precision="bfloat16", activation_checkpointing=True) == plain
    assert kept[1] != kept[0]
    inner = two[1].model.model
    assert inner.gradient_checkpointing


def test_activation_checkpointing_needs_a_model_that_can(packed, tmp_path):
    student = nn.Linear(2, 2)
    with pytest.raises(InputError, match="Linear holds no model that supports it"):
        train(student, packed(), settings(activation_checkpointing=True), tmp_path)


def test_the_moving_average(two, packed, tmp_path):
    """By hand from the weights after each step, and swapped in at the end and for evaluation."""
    data = packed()
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            seen.append(self.param_groups[0]["params"][0].detach().clone())

    config = settings(ema=0.3)
    average = two[0].model.get_input_embeddings().weight.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        train(two[0], data, config, tmp_path)
    assert len(seen) == 6
    for step, weights in enumerate(seen):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights
    found = two[0].model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, seen[-1])
    batch = data.batch(torch.arange(4))
    with torch.no_grad():
        loss = two[0](**batch)
    last = rows_of(tmp_path)[-1]["evaluation"]["loss"]
    assert last == pytest.approx(float(loss.total / loss.tokens), rel=1e-6)


def test_rows(make_student, packed, tmp_path):
    config = settings(evaluate_every=1)
    result = train(make_student().requires_grad_(True), packed(), config, tmp_path)
    rows = rows_of(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in steps] == [256 * n for n in range(1, 7)]
    evaluations = [row for row in rows if "evaluation" in row]
    assert [row["step"] for row in evaluations] == list(range(7))
    assert evaluations[-1]["evaluation"]["loss"] < evaluations[0]["evaluation"]["loss"]
    for row in steps:
        assert row["parts"] == {"cross_entropy": row["loss"]}
        assert row["learning_rate"] > 0
    assert (result.steps, result.tokens) == (6, 1536)
    assert result.loss == steps[-1]["loss"]
    assert result.evaluations == evaluations
    assert result.seconds == rows[-1]["seconds"] > 0


def test_how_often(make_student, packed, tmp_path):
    config = settings(evaluate_every=4, save_every=2)
    train(make_student().requires_grad_(True), packed(), config, tmp_path)
    assert [row["step"] for row in rows_of(tmp_path) if "evaluation" in row] == [0, 4, 6]
    found = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert found == ["step-00000004", "step-00000006"]  # the last two


@pytest.mark.parametrize(
    ("tokens", "evaluated"),
    # 4 sequences held out, of which a forward pass takes as long as training on 43 tokens does
    [(256, [0, 1]), (1024, [0, 2, 4]), (1536, [0, 2, 4, 6]), (20 * 256, list(range(0, 21, 2)))],
)
def test_few_tokens_are_evaluated_seldom(make_student, packed, tmp_path, tokens, evaluated):
    config = settings(tokens=tokens)
    train(make_student().requires_grad_(True), packed(), config, tmp_path)
    assert [row["step"] for row in rows_of(tmp_path) if "evaluation" in row] == evaluated


@pytest.mark.parametrize(("seconds", "saved"), [(0, 10), (1000, 1)])
def test_checkpoints_by_default(make_student, packed, tmp_path, monkeypatch, seconds, saved):
    """After each tenth of the steps where that takes long enough; after the last one anyway."""
    monkeypatch.setattr(loop, "SECONDS", seconds)
    counted = []
    save = loop.Training.save
    monkeypatch.setattr(loop.Training, "save", lambda *a: counted.append(a[1]) or save(*a))
    config = settings(tokens=20 * 256, save_every=None)
    train(make_student().requires_grad_(True), packed(), config, tmp_path)
    assert counted == (list(range(2, 21, 2)) if saved == 10 else [20])


def test_the_plot(make_student, packed, tmp_path):
    pytest.importorskip("matplotlib")
    train(make_student().requires_grad_(True), packed(), settings(), tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_groups_with_rates_of_their_own(two, packed, tmp_path):
    """The rate of a group follows the schedule, and frozen parameters stay as they are."""
    student = two[0].requires_grad_(False)
    scales = [p.requires_grad_(True) for p in student.parameters() if p.dim() == 1]
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            super().step(closure)

    def groups(module):
        assert module is student
        return [{"params": scales[:1], "lr": 0.5}, {"params": scales[1:]}]

    config = settings(warmup=0.5, schedule="constant", tokens=4 * 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        train(student, packed(), config, tmp_path, parameter_groups=groups)
    assert rates == [[pytest.approx(0.5 * f), pytest.approx(3e-3 * f)] for f in (0.5, 1, 1, 1)]
    for one, other in zip(student.parameters(), two[1].parameters(), strict=True):
        assert torch.equal(one, other) == (one.dim() > 1)


def test_vectors_do_not_decay(make_student):
    matrices, vectors = decay_matrices(make_student().requires_grad_(True))
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert vectors["weight_decay"] == 0.0
    assert "weight_decay" not in matrices


def test_what_is_trained_is_float32_and_the_rest_as_it_was(make_student, packed, tmp_path):
    student = make_student().bfloat16().requires_grad_(False)
    trained = student.model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    train(student, packed(), settings(precision="bfloat16"), tmp_path)
    for parameter in student.parameters():
        assert parameter.dtype == (torch.float32 if parameter is trained else torch.bfloat16)


def test_whole_weights(make_student):
    student = make_student()
    found = whole_weights(student)
    assert found.keys() == student.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in student.state_dict().items())


class Poisoned(nn.Module):
    """A student whose loss on some sequences is not a number."""

    def __init__(self, student, sequences, value=math.nan):
        super().__init__()
        self.student, self.sequences, self.value = student, sequences, value

    def forward(self, input_ids, position_ids, labels, index):
        loss = self.student(input_ids, position_ids, labels, index)
        if self.training and set(index.tolist()) & set(self.sequences):
            loss.total.data.fill_(self.value)
        return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value, make_student, packed, tmp_path):
    data = packed()
    config = settings(save_every=2, micro_batch=2)
    drawn = data.drawn(3, 8, 0).tolist()
    seen = {i for step in range(3) for i in data.drawn(step, 8, 0).tolist()}
    bad = next(i for i in drawn if i not in seen)
    student = Poisoned(make_student().requires_grad_(True), [bad], value)
    batch = drawn[drawn.index(bad) // 2 * 2 :][:2]
    message = (
        rf"training step 4: the loss of sequences \[{min(batch)}, {max(batch)}\] is not finite; "
        "the checkpoint of step 2 is kept"
    )
    with pytest.raises(InputError, match=message):
        train(student, data, config, tmp_path)
    assert len(losses_of(tmp_path)) == 3
    assert all(p.isfinite().all() for p in student.parameters())
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_a_gradient_that_is_not_finite(make_student, packed, tmp_path):
    student = make_student().requires_grad_(True)
    student.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match=r"step 1: the gradient \(the losses are finite\) is not"):
        train(student, packed(), settings(), tmp_path)


def test_nothing_to_train(make_student, packed, tmp_path):
    with pytest.raises(InputError, match="no parameter of the student is trainable"):
        train(make_student().requires_grad_(False), packed(), settings(), tmp_path)


def test_data_of_another_length(make_student, packed, tmp_path):
    with pytest.raises(InputError, match="sequences of 32 tokens and seq_len is 16"):
        train(make_student().requires_grad_(True), packed(), settings(seq_len=16), tmp_path)


def test_trackers_get_the_numbers(make_student, packed, tmp_path, monkeypatch):
    from accelerate import tracking

    logged = []

    class Mine(tracking.GeneralTracker):
        name = "mine"
        requires_logging_directory = False

        def __init__(self, run_name, **_):
            super().__init__()
            logged.append(run_name)

        @property
        def tracker(self):
            return None

        def store_init_configuration(self, values):
            logged.append(values)

        def log(self, values, step=None, **_):
            logged.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    monkeypatch.setattr(tracking, "_available_trackers", ["mine"])
    config = settings(trackers=("mine",), tokens=256)
    train(make_student().requires_grad_(True), packed(), config, tmp_path)
    name, values, before, step, after = logged
    assert (name, values["learning_rate"]) == ("compress", 3e-3)
    rows = rows_of(tmp_path)
    assert before == (
        0,
        {f"evaluation/{k}": rows[0]["evaluation"]["loss"] for k in ("loss", "cross_entropy")},
    )
    assert step[0] == 1
    assert step[1]["loss"] == step[1]["parts/cross_entropy"] == rows[1]["loss"]
    assert after[0] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "tracker 'tensorbord' is unknown; .* did you mean 'tensorboard'"),
        ("aim", "tracker 'aim' is not installed; run: pip install aim"),
    ],
)
def test_trackers_that_are_not_there(name, message, make_student, packed, tmp_path):
    with pytest.raises(InputError, match=message):
        train(make_student().requires_grad_(True), packed(), settings(trackers=(name,)), tmp_path)
