"""`compress distill` from checkpoint to checkpoint, broken off, and on bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import distillation
from compress.cli import main
from compress.core.errors import InputError
from compress.core.shards import hashed_file
from compress.distill import training
from compress.distillation import run_distillation
from compress.recipe import build_distillation
from compress.recipe_file import load_recipe

TRAIN = {
    "tokens": 4 * 4 * 32,
    "seq_len": 32,
    "batch_size": 4,
    "micro_batch": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "save_every": 2,
    "evaluate_every": 4,
}


@pytest.fixture(scope="module")
def teacher(model_folder):
    return model_folder("qwen3")


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """The teacher with a tenth of noise on its matrices, in bfloat16."""
    folder = shutil.copytree(teacher, tmp_path_factory.mktemp("student") / "student")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator) * value.std() * (value.dim() > 1)
        tensors[name] = (value + 0.1 * noise).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@pytest.fixture
def recipe(teacher, student, text_file, tmp_path):
    """A function that makes a recipe; `train` and `data` change those parts."""

    def make(train=None, data=None, model=student, out="out", **stage):
        stage = {
            "method": "distill",
            "teacher": str(teacher),
            "data": {"source": str(text_file), "held_out": 4} | (data or {}),
            "train": TRAIN | (train or {}),
        } | stage
        values = {"model": str(model), "out": str(tmp_path / out), "stages": [stage]}
        return build_distillation(values)

    return make


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_a_student_comes_nearer_to_its_teacher(recipe, student, teacher, tmp_path):
    report = run_distillation(recipe())
    out = tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    evaluations = report["training"]["evaluations"]
    assert [row["tokens"] for row in evaluations] == [0, 512]
    assert evaluations[-1]["loss"] < 0.9 * evaluations[0]["loss"]
    assert evaluations[0]["parts"] == {"forward_kl": evaluations[0]["loss"]}
    # a stock checkpoint of the student's class and dtype, whose distance is what was reported
    model, report_of_loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report_of_loading[key] for key in ("missing_keys", "unexpected_keys"))
    assert type(model).__name__ == "Qwen3ForCausalLM"
    before, after = weights_of(student), weights_of(out)
    assert before.keys() == after.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert not any(torch.equal(before[name], after[name]) for name in before if "proj" in name)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert json.loads((out / "compress.json").read_text())["training"] == report["training"]
    page = (out / "report.html").read_text()
    assert "forward kl" in page
    assert f'<data value="{evaluations[-1]["loss"]}">' in page
    assert f"--against {teacher}" in page
    assert "distilled" in (out / "README.md").read_text()


def test_the_recipe_in_the_output_makes_it_again(recipe, tmp_path):
    run_distillation(recipe())
    told = json.loads((tmp_path / "out" / "compress.json").read_text())["recipe"]
    (tmp_path / "again.yaml").write_text(json.dumps(told))
    again = load_recipe(tmp_path / "again.yaml", {"out": str(tmp_path / "again")})
    run_distillation(again)
    one, two = (hashed_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert one == two


class BrokenOff(BaseException):
    """In the place of a kill."""


@pytest.mark.parametrize(
    "changes",
    [{}, {"data": {"source": "self"}}, {"lora": {"rank": 4}}, {"loss": {"topk": 8}}],
    ids=["plain", "self", "lora", "topk"],
)
def test_a_run_that_was_broken_off_goes_on(changes, recipe, tmp_path, monkeypatch):
    run_distillation(recipe(out="whole", **changes))
    step = training.Training.step

    def broken(self, number):
        if number == 3:
            raise BrokenOff
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "step", broken)
        with pytest.raises(BrokenOff):
            run_distillation(recipe(**changes))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"another recipe\.stages\.0\.train\.learn"):
        run_distillation(recipe(train={"learning_rate": 2e-3}, **changes))
    steps = []
    monkeypatch.setattr(
        training.Training, "step", lambda self, number: steps.append(number) or step(self, number)
    )
    monkeypatch.setattr(distillation, "pack", None)  # the data is there
    run_distillation(recipe(**changes))
    assert steps == [2, 3]
    for name in ("model.safetensors", "config.json", "README.md"):
        found = (tmp_path / "out" / name).read_bytes().replace(b'"out"', b'"whole"')
        assert found == (tmp_path / "whole" / name).read_bytes()
    told = [json.loads((tmp_path / n / "compress.json").read_text()) for n in ("whole", "out")]
    assert told[0]["training"] == told[1]["training"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_sampling_goes_on_after_the_last_batch(recipe, tmp_path, monkeypatch):
    changes = {"data": {"source": "self"}, "train": {"tokens": 160 * 32}}  # 164 pieces, 2 batches
    run_distillation(recipe(out="whole", **changes))
    sampled, count = distillation.calibration.sampled_batch, []

    def broken(*arguments):
        count.append(arguments)
        if len(count) == 2:
            raise BrokenOff
        return sampled(*arguments)

    monkeypatch.setattr(distillation.calibration, "sampled_batch", broken)
    with pytest.raises(BrokenOff):
        run_distillation(recipe(**changes))
    run_distillation(recipe(**changes))
    assert len(count) == 3
    one, two = (hashed_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert one == two


def test_lora_changes_linears_of_blocks_and_by_a_low_rank(recipe, student, tmp_path):
    report = run_distillation(recipe(lora={"rank": 2, "targets": ["q_proj", "down_proj"]}))
    evaluations = report["training"]["evaluations"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    before, after = weights_of(student), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        moved = (after[name].float() - before[name].float()).abs().max()
        assert (moved > 0) == name.endswith(("q_proj.weight", "down_proj.weight")), name


def test_merged_adapters_are_what_was_trained(recipe, tmp_path):
    """In float32 the merged model's loss on the held-out part is that of the last evaluation."""
    from compress.distill.data import PackedData
    from compress.distill.objective import LossConfig, Objective, Student
    from compress.distill.teacher import LiveTeacher
    from compress.loading import load_model

    values = recipe(lora={"rank": 4})
    object.__setattr__(values, "dtype", "float32")
    kept = []
    report = None
    with pytest.MonkeyPatch.context() as patch:
        data = distillation._data
        patch.setattr(distillation, "_data", lambda *a: kept.append(data(*a)) or kept[-1])
        report = run_distillation(values)
    assert isinstance(kept[0], PackedData)
    model = load_model(tmp_path / "out")
    whole = LiveTeacher(load_model(Path(values.stages[0].teacher)))
    with torch.no_grad():
        loss = Student(model, Objective(LossConfig(), model, whole))(
            **kept[0].batch(torch.arange(4))
        )
    # float32 sums of a product taken apart and put together
    assert float(loss.total / loss.tokens) == pytest.approx(
        report["training"]["evaluations"][-1]["loss"], rel=1e-4
    )


def sequences_in(cache):
    return {int(n) for path in cache.glob("*.safetensors") for n in load_file(path)["index"]}


def test_the_teacher_runs_once(recipe, teacher, tmp_path, monkeypatch):
    """With a cache, a second run with other settings loads no teacher, and keeps the first loss;
    one with another seed runs it on the sequences that the first did not draw."""
    changes = {"loss": {"topk": 16}, "cache": str(tmp_path / "cache")}
    first = run_distillation(recipe(**changes))
    loaded = []
    load = distillation.load_model
    monkeypatch.setattr(
        distillation,
        "load_model",
        lambda folder, *rest: loaded.append(folder) or load(folder, *rest),
    )
    kept = sequences_in(tmp_path / "cache")
    second = run_distillation(recipe(train={"learning_rate": 1e-2}, out="second", **changes))
    assert teacher not in loaded
    one, two = (report["training"]["evaluations"] for report in (first, second))
    assert one[0] == two[0]
    assert one[-1] != two[-1]
    run_distillation(recipe(train={"seed": 1}, out="seed", **changes))
    assert teacher in loaded
    assert kept < sequences_in(tmp_path / "cache")
    with pytest.raises(InputError, match=r"cache .* was made with another k \(16, now 8\)"):
        run_distillation(recipe(out="third", loss={"topk": 8}, cache=str(tmp_path / "cache")))


def test_the_text_alone(recipe, monkeypatch):
    """Cross-entropy needs no teacher, and loads none."""
    report = run_distillation(recipe(loss={"cross_entropy": 1.0}, teacher=None))
    assert list(report["training"]["evaluations"][0]["parts"]) == ["cross_entropy"]
    assert "teacher" not in report["recipe"]["stages"][0]


def test_little_text_is_gone_through_several_times(recipe, tmp_path, capsys):
    (tmp_path / "little.jsonl").write_text('{"text": "w1 w2 w3 w4 w5"}\n' * 20)
    run_distillation(recipe(data={"source": str(tmp_path / "little.jsonl")}))
    assert "passes over them" in capsys.readouterr().err


def write_jsonl(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


BAD = [
    ({"teacher": None}, "no teacher is given, and a loss compares with one; give --teacher"),
    (
        {"teacher": None, "loss": {"cross_entropy": 1}, "data": {"source": "self"}},
        "no teacher is given, and data 'self' comes from one",
    ),
    ({"teacher": "/no/such/model"}, "model folder '/no/such/model' does not exist"),
    ({"model": "/no/such/model"}, "model folder '/no/such/model' does not exist"),
    ({"train": {"seq_len": 256}}, "seq_len is 256; .* allows at most 128 tokens"),
    ({"train": {"trackers": ["tensorbord"]}}, "tracker 'tensorbord' is unknown"),
    ({"data": {"source": "absent.txt"}}, "training file 'absent.txt' does not exist"),
    ({"data": {"held_out": 5000}}, "not one sequence of 32 to train on after 5000"),
    ({"loss": {"topk": 128}}, "top-k 128 is not between 1 and 127"),
    ({"loss": {"topk": 8, "jsd": 1}}, "topk"),
    ({"lora": {"targets": ["q_prj"]}}, "LoRA target 'q_prj' names no linear"),
    ({"lora": {"targets": ["lm_head"]}}, "LoRA target 'lm_head' is the head"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes, message, recipe, tmp_path):
    with pytest.raises(InputError, match=message):
        run_distillation(recipe(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the data has no text"),
        (json.dumps({"text": ""}), "the data has no text"),
        (json.dumps({"text": "w1 w2"}), "tokens, not one sequence of 32"),
        (json.dumps({"txt": "w1"}), "training data .* has no text field 'text'"),
        ("{", "cannot read training file"),
    ],
)
def test_data_that_will_not_do(text, message, recipe, tmp_path):
    path = tmp_path / "data" / "text.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        run_distillation(recipe(data={"source": str(path)}))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_another_vocabulary(recipe, student, tmp_path):
    other = shutil.copytree(student, tmp_path / "models" / "other")
    path = other / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] |= {"w1": 17, "w2": 16}
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"differ in 2, such as 'w1' \(16 and 17\); distillation"):
        run_distillation(recipe(model=other))


def test_another_size_of_vocabulary(recipe, model_folder, tmp_path, student):
    from transformers import AutoModelForCausalLM

    other = shutil.copytree(student, tmp_path / "models" / "other")
    model = AutoModelForCausalLM.from_pretrained(student)
    model.resize_token_embeddings(136)
    model.save_pretrained(other)
    with pytest.raises(InputError, match=r"predicts 128 tokens, student '.*' 136; distillation"):
        run_distillation(recipe(model=other))


def test_a_quantized_student(recipe, student, tmp_path):
    from compress.pipeline import run_recipe
    from compress.recipe import build_recipe

    run_recipe(
        build_recipe(
            {
                "model": str(student),
                "out": str(tmp_path / "w4"),
                "stages": [{"method": "rtn", "group_size": 16}],
            }
        )
    )
    with pytest.raises(InputError, match="already quantized"):
        run_distillation(recipe(model=tmp_path / "w4"))


def test_a_loss_that_is_not_finite_keeps_the_checkpoints(recipe, tmp_path, monkeypatch):
    backward = training.Training._backward

    def poisoned(self, batches):
        losses = backward(self, batches)
        if self.optimizer.optimizer.state and self.data.seq_len:
            states = self.optimizer.optimizer.state.values()
            if max(float(state["step"]) for state in states) == 3:
                losses[0].total.fill_(float("nan"))
        return losses

    monkeypatch.setattr(training.Training, "_backward", poisoned)
    with pytest.raises(InputError, match=r"step 4: the loss of sequences .* step 2 is kept in"):
        run_distillation(recipe())
    kept = tmp_path / ".out.progress" / "training" / "checkpoints"
    assert [path.name for path in kept.glob("step-*")] == ["step-00000002"]


def test_too_little_memory_or_disk(recipe, monkeypatch):
    from compress import distill_preflight

    with monkeypatch.context() as patched:
        patched.setattr(distill_preflight, "free_memory", lambda: 1000)
        with pytest.raises(InputError, match=r"training takes .* of memory, and 1 kB are free"):
            run_distillation(recipe())
    monkeypatch.setattr("compress.core.outfolder.free_disk", lambda _: 1000)
    with pytest.raises(InputError, match="of disk while it is made"):
        run_distillation(recipe())


def test_a_class_that_shapes_do_not_plan_trains_all_the_same(recipe, monkeypatch, capsys):
    """Its forward asks for a tensor's value, which a tensor without data does not have."""
    from compress.distill import memory
    from compress.distill.model_parts import last_hidden

    def curious(model, ids, positions):
        assert ids.sum().item() == 0
        return last_hidden(model, ids, positions)

    monkeypatch.setattr(memory, "last_hidden", curious)
    run_distillation(recipe())
    assert "The plan is without activations" in capsys.readouterr().err


def command(student, teacher, text_file, out, *more):
    return [
        *("distill", "--student", str(student), "--teacher", str(teacher), "--out", str(out)),
        *("--data", str(text_file), "--tokens", "256", "--seq-len", "32", "--held-out", "2"),
        *("--batch-size", "4", "--micro-batch", "2", *more),
    ]


def test_the_command(student, teacher, text_file, tmp_path):
    more = ["--loss", "forward_kl=1,cross_entropy=0.5", "--set", "schedule=wsd,warmup=0.5"]
    more += ["--set", "loss:temperature=2.0", "--lora", "4", "--set", "lora:alpha=4", "--json"]
    arguments = command(student, teacher, text_file, tmp_path / "out", *more)
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    stage = report["recipe"]["stages"][0]
    assert (stage["loss"]["forward_kl"], stage["loss"]["cross_entropy"]) == (1.0, 0.5)
    assert (stage["loss"]["temperature"], stage["lora"]["alpha"]) == (2.0, 4.0)
    assert (stage["train"]["schedule"], stage["train"]["warmup"]) == ("wsd", 0.5)
    assert report["training"]["steps"] == 2
    again = CliRunner().invoke(main, command(student, teacher, text_file, tmp_path / "out"))
    assert again.exit_code == 2
    assert "exists; pass --overwrite" in again.stderr
    arguments = command(student, teacher, text_file, tmp_path / "out", "--overwrite")
    table = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "256 tokens in 2 steps" in table.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss", "forward_kl"], "--loss 'forward_kl' is not NAME=WEIGHT"),
        (["--loss", "forward=1"], "unknown key 'forward'"),
        (["--set", "schedule"], "--set 'schedule' is not [PART:]KEY=VALUE"),
        (["--set", "model:x=1"], "parts are train, data, loss, lora"),
        (["--set", "shedule=wsd"], "did you mean 'schedule'"),
        (["--tokens", "lots"], "tokens = 'lots'"),
        (["--lora", "0"], "rank"),
    ],
)
def test_bad_flags(more, message, student, teacher, text_file, tmp_path):
    arguments = command(student, teacher, text_file, tmp_path / "out", *more)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_defaults_that_the_help_states():
    import re

    from compress.cli.distill import distill_command
    from compress.distill.config import ENOUGH_STEPS, TrainConfig
    from compress.recipe import DistillRecipe, TrainingData

    loop, data = TrainConfig(), TrainingData()
    defaults = {"data": data.source, "held_out": data.held_out, "losses": "forward_kl=1"}
    defaults |= {"tokens": f"{loop.tokens // 10**6}M", "dtype": DistillRecipe.dtype}
    few, many = TrainConfig(tokens=1), TrainConfig(tokens=1 << 40)
    sequences = f"{few.step_sequences} to {many.step_sequences}"
    defaults["batch_size"] = f"{sequences}, for {ENOUGH_STEPS} steps"
    checked = 0
    for option in distill_command.params:
        stated = re.search(r"\[default: (.*?)\]", getattr(option, "help", None) or "")
        if stated:
            value = defaults.get(option.name, getattr(loop, option.name, None))
            same = float(stated[1]) == value if option.name == "learning_rate" else None
            assert same or stated[1] == str(value), option.name
            checked += 1
    assert checked == 10


def test_a_dry_run_says_what_it_takes(recipe, tmp_path, student, teacher):
    train = {"tokens": "1k", "seq_len": 32, "batch_size": 4}
    (tmp_path / "r.yaml").write_text(
        json.dumps(
            {
                "model": str(student),
                "out": str(tmp_path / "out"),
                "stages": [{"method": "distill", "teacher": str(teacher), "train": train}],
            }
        )
    )
    run = ["run", str(tmp_path / "r.yaml")]
    done = CliRunner().invoke(main, [*run, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "1,024 tokens in 8 steps from" in done.stdout.replace("\n", " ")
    plan = json.loads(CliRunner().invoke(main, [*run, "--dry-run", "--json"]).stdout)
    parameters = AutoModelForCausalLM.from_pretrained(student).num_parameters()
    assert plan["parameters"] == parameters
    # weights, gradients and two moments of the student in float32, and the teacher
    assert plan["memory_bytes"] > 4 * 4 * parameters
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    done = CliRunner().invoke(main, [*run, "--activation-memory", "1MB"])
    assert done.exit_code == 2
    assert "a distillation takes no --activation-memory" in done.stderr


def test_two_processes(student, teacher, text_file, tmp_path):
    """The whole command under accelerate: sampling by one process, a cache written by both."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes"]
    reports = []
    for count in (1, 2):
        how = [str(count), *(["--multi_gpu"] if count > 1 else []), "-m", "compress"]
        more = ("--topk", "8", "--set", "precision=float32", "--json")
        arguments = command(student, teacher, "self", tmp_path / str(count), *more)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launch, *how, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout)["training"])  # one speaks
    assert reports[0]["data_sha256"] == reports[1]["data_sha256"]
    for one, two in zip(*(report["evaluations"] for report in reports), strict=True):
        # sums in another order, in float32; top-k probabilities are stored in float16
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
