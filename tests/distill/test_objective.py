"""The objective against losses written out on what the models themselves put out."""

import pytest
import torch
from torch.nn import functional as F

from compress.core.config import build
from compress.core.errors import InputError
from compress.distill.model_parts import Head, recording
from compress.distill.objective import LossConfig, Objective, Student
from compress.distill.state_losses import paired
from compress.distill.teacher import CacheIdentity, LiveTeacher, TopKCache
from compress.loading import load_model
from tests.conftest import tiny_config
from tests.distill.batches import batch_of, gradients_of, noisy, split

FAMILIES = ("llama", "qwen2", "gemma2", "cohere", "granite", "phi")
# float32 sums in another order, and a tiny model's gradients of many magnitudes
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def run(model, batch, **settings):
    return model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        **settings,
    )


def student_of(model, teacher, **settings):
    teacher = None if teacher is None else LiveTeacher(teacher)
    return Student(model, Objective(LossConfig(**settings), model, teacher))


def another(family="llama", **changes):
    """A random model of the family with other sizes."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config)


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_on_logits_are_those_of_the_models_logits(model_folder, family):
    teacher, model = load_model(model_folder(family)), noisy(load_model(model_folder(family)))
    student = student_of(model, teacher, forward_kl=0.75, reverse_kl=0.25, cross_entropy=0.5)
    batch = batch_of()
    loss = student(**batch)
    loss.total.backward()
    gradients = gradients_of(model)

    model.zero_grad()
    kept = batch["labels"] != -100
    z, t = (run(m, batch).logits[kept] for m in (model, teacher))
    log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
    expected = {
        "forward_kl": F.kl_div(log_q, log_p, log_target=True, reduction="sum"),
        "reverse_kl": F.kl_div(log_p, log_q, log_target=True, reduction="sum"),
        "cross_entropy": F.cross_entropy(z, batch["labels"][kept], reduction="sum"),
    }
    weights = {"forward_kl": 0.75, "reverse_kl": 0.25, "cross_entropy": 0.5}
    total = sum(weights[name] * value for name, value in expected.items())
    total.backward()

    assert loss.tokens == kept.sum()
    assert loss.tokens.dtype == torch.int64
    assert loss.parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loss.parts[name], value.detach(), **CLOSE)
    torch.testing.assert_close(loss.total, total, **CLOSE)
    assert_same_gradients(gradients, gradients_of(model))


def test_the_teachers_own_weights_lose_nothing(model_folder):
    folder = model_folder()
    student = student_of(load_model(folder), load_model(folder), hidden_mse=1, attention_mse=1)
    loss = student(**batch_of())
    assert loss.parts["hidden_mse"] == loss.parts["attention_mse"] == 0
    assert loss.total.abs() < 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_losses_on_states(model_folder, family):
    """Against transformers' own record of hidden states and a hook on its attention modules."""
    teacher, model = load_model(model_folder(family)), noisy(load_model(model_folder(family)))
    weights = {
        "hidden_mse": 0.5,
        "hidden_cosine": 2.0,
        "attention_mse": 0.25,
        "attention_error": 0.125,
    }
    student = student_of(model, teacher, **weights, forward_kl=1e-9, layers=((0, 0), (0, 1)))
    assert len(student.objective.states.projections) == 0
    batch = batch_of()
    loss = student(**batch)
    loss.total.backward()
    gradients = gradients_of(model)

    model.zero_grad()
    kept = batch["labels"] != -100
    seen = []
    for m in (model, teacher):
        outputs = []
        handles = [
            block.self_attn.register_forward_hook(lambda _m, _a, o, to=outputs: to.append(o[0]))
            for block in m.base_model.layers
        ]
        blocks = [
            block.register_forward_hook(
                lambda _m, _a, o, to=outputs: to.append(o[0] if isinstance(o, tuple) else o)
            )
            for block in m.base_model.layers
        ]
        first = run(m, batch, output_hidden_states=True).hidden_states[1]
        for handle in handles + blocks:
            handle.remove()
        assert torch.equal(outputs[1], first)
        seen.append([output[kept] for output in outputs])
    (attention, block, *_), (attention_0, block_0, attention_1, block_1) = seen
    expected = {
        "hidden_mse": sum(((block - b) ** 2).mean(-1).sum() for b in (block_0, block_1)) / 2,
        "hidden_cosine": sum((1 - F.cosine_similarity(block, b)).sum() for b in (block_0, block_1))
        / 2,
        "attention_mse": sum(
            ((attention - a) ** 2).mean(-1).sum() for a in (attention_0, attention_1)
        )
        / 2,
        "attention_error": sum(
            (((attention - a) ** 2).sum(-1) / (a**2).sum(-1)).sum()
            for a in (attention_0, attention_1)
        )
        / 2,
    }
    total = sum(weights[name] * value for name, value in expected.items())
    total.backward()
    for name, value in expected.items():
        torch.testing.assert_close(loss.parts[name], value.detach(), **CLOSE)
        assert not loss.parts[name].requires_grad
    reached = gradients_of(model)
    assert_same_gradients({name: gradients[name] for name in reached}, reached)


def test_states_of_another_width_go_through_learned_projections(model_folder):
    """Student blocks 0, 1 of two stand for the teacher's 1, 3 of four; the maps are trained too."""
    teacher = load_model(model_folder(layers=4))
    model = another(hidden_size=36)
    student = student_of(model, teacher, hidden_mse=1.0, attention_mse=1.0)
    states = student.objective.states
    assert states.pairs == [(0, 1), (1, 3)]
    maps = dict(student.named_parameters())
    maps = {n: p for n, p in maps.items() if "projections" in n}
    assert {tuple(p.shape) for p in maps.values()} == {(48, 36)}
    assert len(maps) == 4  # two pairs, of blocks and of attention
    assert set(maps) <= set(student.state_dict())
    batch = batch_of()
    loss = student(**batch)
    loss.total.backward()
    assert all((p.grad != 0).any() for p in maps.values())

    blocks = {"ours": model.model.layers[1], "theirs": teacher.model.layers[3]}
    with recording(blocks) as outputs:
        run(model, batch)
        run(teacher, batch)
    kept = batch["labels"] != -100
    mapped = outputs["ours"][kept] @ states.projections["block-1"].weight.T
    one = ((mapped - outputs["theirs"][kept]) ** 2).mean(-1).sum()
    states.pairs = [(1, 3)]
    del states.of_student["block-0"], states.of_student["attention-0"]
    found = student(**batch).parts["hidden_mse"]
    torch.testing.assert_close(found, one.detach(), **CLOSE)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (2, 6, [(0, 2), (1, 5)]),
        (4, 6, [(0, 1), (1, 2), (2, 3), (3, 5)]),
        (1, 5, [(0, 4)]),
    ],
)
def test_even_pairs(ours, theirs, expected):
    assert paired("even", ours, theirs) == expected


def test_pieces_of_a_batch_add_up(model_folder):
    teacher, model = load_model(model_folder()), noisy(load_model(model_folder()))
    student = student_of(model, teacher, cross_entropy=1.0, hidden_cosine=1.0)
    batch = batch_of(4)
    whole = student(**batch)
    whole.total.backward()
    expected = gradients_of(student)
    student.zero_grad()
    pieces = [student(**piece) for piece in split(batch, 1)]
    for piece in pieces:
        piece.total.backward()
    assert sum(piece.tokens for piece in pieces) == whole.tokens
    for name, value in whole.parts.items():
        torch.testing.assert_close(sum(piece.parts[name] for piece in pieces), value, **CLOSE)
    assert_same_gradients(gradients_of(student), expected)


def test_positions_that_predict_nothing_do_not_count(model_folder):
    """Nor do they in losses on states: whatever stands after the last label changes nothing."""
    teacher, model = load_model(model_folder()), noisy(load_model(model_folder()))
    student = student_of(model, teacher, cross_entropy=1.0, hidden_mse=1.0)
    batch = batch_of()
    batch["labels"][:, 8:] = -100
    before = student(**batch)
    batch["input_ids"][:, 9:] = 5
    after = student(**batch)
    assert torch.equal(before.total, after.total)
    assert before.tokens == 8 + 8 - 1


def test_the_teacher_is_no_part_of_the_student(model_folder):
    teacher, model = load_model(model_folder()), load_model(model_folder())
    student = student_of(model, teacher, hidden_mse=1.0)
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in student.parameters()}
    assert set(student.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_cross_entropy_alone_needs_no_teacher(model_folder):
    model = load_model(model_folder())
    student = student_of(model, None, forward_kl=0.0, cross_entropy=1.0)
    assert student(**batch_of()).parts.keys() == {"cross_entropy"}


def test_checkpointed_activations_give_the_same_gradients(model_folder):
    """Blocks run again in the backward; their states were recorded once."""
    found = []
    for checkpointed in (False, True):
        teacher, model = load_model(model_folder()), noisy(load_model(model_folder()))
        student = student_of(model.train(), teacher, hidden_mse=1.0, attention_mse=1.0)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        student(**batch_of()).total.backward()
        found.append(gradients_of(model))
    assert_same_gradients(*found)


def test_reentrant_checkpoints_are_refused(model_folder):
    """Inside of them states have no gradients, and the loss on them would train nothing."""
    model = noisy(load_model(model_folder()))
    student = student_of(model.train(), load_model(model_folder()), attention_mse=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(InputError, match="use_reentrant=False"):
        student(**batch_of())


def test_under_autocast_the_loss_is_float32(model_folder):
    teacher, model = load_model(model_folder()), noisy(load_model(model_folder()))
    student = student_of(model, teacher, cross_entropy=1.0, hidden_mse=1.0, attention_mse=1.0)
    exact = student(**batch_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = student(**batch_of())
    for name, value in rounded.parts.items():
        assert value.dtype == torch.float32
        # bfloat16 keeps 8 bits, and two layers round a dozen times
        torch.testing.assert_close(value, exact.parts[name], rtol=0.1, atol=0)
    assert rounded.total.dtype == torch.float32


def test_lora(model_folder):
    """Only the adapters get gradients, those of the full weights' losses."""
    peft = pytest.importorskip("peft")
    teacher, model = load_model(model_folder()), load_model(model_folder())
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    student = student_of(adapted, teacher, cross_entropy=1.0, hidden_mse=1.0)
    batch = batch_of()
    loss = student(**batch)
    loss.total.backward()
    assert all("lora" in name for name in gradients_of(student))
    assert len(gradients_of(student)) == 8
    kept = batch["labels"] != -100
    ce = F.cross_entropy(run(adapted, batch).logits[kept], batch["labels"][kept], reduction="sum")
    torch.testing.assert_close(loss.parts["cross_entropy"], ce.detach(), **CLOSE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forward_kl": 0}, "no loss on logits"),
        ({"forward_kl": 0, "hidden_mse": 1}, "no loss on logits"),
        ({"forward_kl": -1}, "forward_kl = -1"),
        ({"cross_entropy": float("nan")}, "cross_entropy = nan"),
        ({"cross_entropy": float("inf")}, "cross_entropy = inf"),
        ({"temperature": 0}, "temperature = 0"),
        ({"jsd_beta": 1}, "jsd_beta = 1"),
        ({"jsd_beta": 0}, "jsd_beta = 0"),
        ({"topk": 0}, "topk = 0"),
        ({"topk": 8, "jsd": 1, "hidden_mse": 1}, "drop topk or jsd, hidden_mse"),
        ({"topk": 8, "forward_kl": 0, "cross_entropy": 1}, "topk needs a weight of forward_kl"),
        ({"layers": "odd"}, "layers"),
        ({"forward_lk": 1}, "did you mean 'forward_kl'?"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(InputError) as caught:
        build(LossConfig, settings, "loss")
    assert said in str(caught.value)


def test_pairs_from_a_recipe():
    assert build(LossConfig, {"layers": [[0, 1], [2, 5]]}, "loss").layers == ((0, 1), (2, 5))


def test_pairs_that_are_not_there(model_folder):
    model, teacher = load_model(model_folder()), load_model(model_folder(layers=4))
    for pair in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(InputError, match="the student has blocks 0 to 1, the teacher 0 to 3"):
            student_of(model, teacher, hidden_mse=1.0, layers=(pair,))


def test_vocabularies_that_differ(model_folder):
    with pytest.raises(InputError, match="the teacher has 128 tokens and the student 96"):
        student_of(another(vocab_size=96), load_model(model_folder()))


def test_teachers_that_do_not_fit_the_losses(model_folder, tmp_path):
    model, teacher = load_model(model_folder()), LiveTeacher(load_model(model_folder()))
    identity = CacheIdentity("a", k=8, temperature=1.0, vocabulary=128, seq_len=12)
    cache = TopKCache.build(tmp_path / "cache", identity, teacher, [batch_of()], 2)
    for settings, given, said in (
        ({"jsd": 1.0}, None, "forward_kl, jsd compare with a teacher"),
        ({}, cache, "give the loss a topk to match"),
        ({"topk": 8}, teacher, "top-8 at temperature 1, from a cache"),
        ({"topk": 4}, cache, "top-4 at temperature 1, and the cache"),
        ({"topk": 8, "temperature": 2.0}, cache, "top-8 at temperature 2, and the cache"),
    ):
        with pytest.raises(InputError, match=said):
            Objective(LossConfig(**settings), model, given)
    Objective(LossConfig(topk=8), model, cache)


def test_heads_that_are_not_known(model_folder, monkeypatch):
    model = load_model(model_folder())
    Head.of(model)
    forward = type(model).forward

    def shifted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(InputError, match="makes its logits in a way that is not known here"):
        Head.of(model)
    monkeypatch.setattr(type(model), "forward", forward)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="is a Sequential; it must be a plain linear layer"):
        Head.of(model)


def test_trying_a_head_out_leaves_the_model_as_it_was(model_folder):
    model = load_model(model_folder()).train()
    Head.of(model)
    assert all(module.training for module in model.modules())
    model.eval()
    Head.of(model)
    assert not any(module.training for module in model.modules())
