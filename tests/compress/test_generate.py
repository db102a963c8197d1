"""`compress generate` and `compress chat`: text as it comes, and files of prompts that go on."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from compress.answer_file import AnswerFile
from compress.chat import Conversation
from compress.cli import main
from compress.core.errors import InputError
from compress.runtime.llm import LLM
from compress.runtime.outputs import Increment
from compress.runtime.sampling_params import SamplingParams

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
FLOAT32 = ("--dtype", "float32")


def run(*arguments, text=None):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=text)


def refused(done, message):
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def model(model_folder, tmp_path_factory):
    """The tiny Llama with a chat template: what was said, word by word."""
    folder = shutil.copytree(model_folder(), tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llm(model):
    with LLM(str(model), dtype="float32") as made:
        yield made


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PROMPTS = [
    {"prompt": "w5 w7", "id": "first"},
    {"prompt": "w1 w2 w3", "max_tokens": 30, "temperature": 15},
    {"messages": [{"role": "user", "content": "w9 w8"}], "id": 3, "stop": ["w1"]},
    {"prompt": "w5 w7 w11 w3", "temperature": 0, "ignore_eos": True, "max_tokens": 3},
    {"prompt": "w4", "n": 2, "temperature": 1, "seed": 5},
    *({"prompt": f"w1 w2 w{i // 10}", "temperature": 20} for i in range(20)),
]


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


def bulk(model, prompts, out, *more):
    return run("generate", model, "--input", prompts, "--out", out, *FLOAT32, *more)


def answers_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt(model, llm):
    done = run("generate", model, "--prompt", "w5 w7", "--max-tokens", 6, *FLOAT32)
    assert done.exit_code == 0, done.output
    expected = llm.generate("w5 w7", SamplingParams(max_tokens=6, temperature=0))[0].outputs[0]
    assert done.stdout == f"w5 w7{expected.text}\n"
    assert "tokens/s" in done.stderr
    said = json.loads(
        run(
            "generate", model, "--prompt", "w5 w7", "--max-tokens", 6, *FLOAT32, "--json"
        ).stdout
    )  # fmt: skip
    assert said["text"] == expected.text
    assert said["completion_tokens"] == said["tokens"] == len(expected.token_ids)
    assert said["finish_reason"] == expected.finish_reason
    assert 0 < said["time_to_first_token"] <= said["seconds"]


def test_drafts_change_nothing_but_what_is_said_of_them(model):
    """The tiny model repeats itself, which prompt look-up finds."""
    flags = ["generate", model, "--prompt", "w5 w7", "--max-tokens", 60, *FLOAT32]
    plain, drafts = run(*flags), run(*flags, "--draft", "ngram", "--num-speculative-tokens", 3)
    assert drafts.exit_code == 0, drafts.output
    assert drafts.stdout == plain.stdout
    assert "tokens drafted, " in drafts.stderr
    assert "drafted" not in plain.stderr
    said = json.loads(
        run(*flags, "--draft", "ngram", "--num-speculative-tokens", 3, "--json").stdout
    )
    found = said["speculation"]
    drafted, accepted = found["drafted_tokens"], found["accepted_tokens"]
    assert found["drafts"] <= drafted <= 3 * found["drafts"]
    assert 0 < accepted == sum(found["accepted_at"]) <= drafted
    assert found["acceptance_rate"] == pytest.approx(accepted / drafted, abs=1e-4)
    assert found["mean_accepted_length"] == pytest.approx(1 + accepted / found["drafts"], abs=1e-4)
    assert f"{accepted} accepted ({accepted / drafted:.0%})" in drafts.stderr
    short = run(
        "generate", model, "--prompt", "w5", "--max-tokens", 1, *FLOAT32, "--draft", "ngram"
    )
    assert "no tokens were drafted" in short.stderr


def test_settings_reach_the_runtime(model, llm):
    flags = ["--temperature", 13, "--top-p", 0.9, "--top-k", 20, "--min-p", 0.01, "--seed", 4]
    flags += ["--stop", "w7", "--stop", "w8", "--n", 3, "--max-tokens", 9]
    said = json.loads(
        run("generate", model, "--prompt", "w5", "--chat", *flags, *FLOAT32, "--json").stdout
    )
    params = SamplingParams(
        max_tokens=9, temperature=13, top_p=0.9, top_k=20, min_p=0.01, seed=4,
        stop=("w7", "w8"), n=3,
    )  # fmt: skip
    (expected,) = llm.chat([{"role": "user", "content": "w5"}], params)
    assert [o["text"] for o in said["outputs"]] == [o.text for o in expected.outputs]
    shown = run("generate", model, "--prompt", "w5", "--chat", *flags, *FLOAT32).stdout
    assert shown.splitlines()[0].startswith("[1] ")


def test_a_file_of_prompts(model, llm, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    done = bulk(model, prompts, out, "--max-tokens", 12, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answers"] == len(PROMPTS)
    assert "Answering" in done.stderr
    answers = answers_in(out)
    assert [answer["index"] for answer in answers] == list(range(len(PROMPTS)))
    assert [answer.get("id") for answer in answers[:4]] == ["first", None, 3, None]
    assert len(answers[4]["outputs"]) == 2
    alone = SamplingParams(max_tokens=12, temperature=0)
    expected = llm.generate("w5 w7", alone)[0]
    assert answers[0]["text"] == expected.outputs[0].text
    assert answers[0]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answers[3]["completion_tokens"] == 3
    assert len({answer["text"] for answer in answers[5:]}) == 20  # each line has its own seed
    assert [path.name for path in tmp_path.glob(".answers*")] == []

    refused(bulk(model, prompts, out, "--max-tokens", 12), "exists; pass --overwrite")
    before = out.read_bytes()
    done = bulk(model, prompts, out, "--max-tokens", 12, "--overwrite", "--in-flight", 2)
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == before  # whatever was in a step together


BAD_LINES = [
    ({"prompt": "w1", "max_token": 3}, "unknown key 'max_token'", "did you mean 'max_tokens'?"),
    ({"prompt": "w1", "logprobs": 3}, "unknown key 'logprobs'", "allowed: prompt, messages, id"),
    ({"prompt": "w1", "temperature": -1}, "temperature = -1", "0 or more"),
    ({"prompt": "w1", "seed": "x"}, "seed = 'x'", "whole number"),
    ({"prompt": 3}, "prompt = 3", "give text"),
    ({"id": 1}, "give 'prompt' or 'messages'", ""),
    ({"prompt": "w1", "messages": []}, "one of the two", ""),
    ({"messages": []}, "messages = []", ""),
    ({"messages": [{"role": "user"}]}, "{'role': 'user'}", "'content'"),
    ([1], "[1] is no object", ""),
    ({"prompt": "\ud800"}, "no JSON in UTF-8", ""),
    ({"prompt": "w1", "temperature": float("nan")}, "NaN is no JSON", ""),
    ({"prompt": "w1 " * 200}, "in the model's context of 128", "shorten it"),
    ({"prompt": "w1", "stop_token_ids": [500]}, "stop_token_ids = 500", "0 to 127"),
]


@pytest.mark.parametrize(("line", "message", "remedy"), BAD_LINES)
def test_a_bad_line_is_refused_before_any_answer(line, message, remedy, model, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "w1"}, line])
    done = bulk(model, prompts, tmp_path / "out" / "answers.jsonl")
    refused(done, message)
    assert "prompts.jsonl, line 2: " in done.stderr
    assert remedy in done.stderr
    assert not (tmp_path / "out").exists()


BAD_CALLS = [
    (["--prompt", "w1", "--input", "FILE"], "one of the two"),
    ([], "give --prompt TEXT or --input FILE"),
    (["--input", "FILE"], "--input needs --out"),
    (["--input", "absent.jsonl", "--out", "x"], "absent.jsonl"),
    (["--input", "EMPTY", "--out", "x"], "holds no line"),
    (["--input", "FILE", "--out", "FOLDER"], "is a folder"),
    (["--prompt", "w1", "--out", "x"], "--out goes with --input"),
    (["--prompt", "w1", "--in-flight", "3"], "--in-flight goes with --input"),
    (["--prompt", "w1", "--dtype", "float8"], "float8"),
    (["--prompt", "w1", "--head-bits", "3"], "3"),
    (["--prompt", "w1", "--top-p", "2"], "top_p = 2"),
    (["--prompt", "w1", "--stop", ""], "stop"),
    (["--prompt", "w1", "--kv-cache-memory", "much"], "'much' is no size"),
    (["--prompt", "w1", "--kv-cache-memory", "1kB"], "a cache of 0 blocks"),
    (["--prompt", "w1", "--num-speculative-tokens", "4"], "4 without a draft; give one"),
    (["--prompt", "w1", "--num-speculative-tokens", "4", "--draft", "none"], "goes with --draft"),
    (["--prompt", "w1", "--draft", "ngram", "--num-speculative-tokens", "0"], "neither auto nor a"),
    (["--prompt", "w1", "--draft", "ngram", "--num-speculative-tokens", "all"], "'all' is neither"),
    (["--prompt", "w1", "--draft", "ngram", "--num-speculative-tokens", "65"], "65"),
    (["--prompt", "w1", "--draft", "no/such/folder"], "no/such/folder"),
    (["--prompt", ""], "the prompt holds no token"),
    (["--prompt", "w1 " * 200], "in the model's context of 128"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_CALLS)
def test_bad_calls(flags, message, model, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    places = {"FILE": str(prompts), "FOLDER": str(tmp_path), "EMPTY": str(tmp_path / "empty")}
    refused(run("generate", model, *[places.get(flag, flag) for flag in flags]), message)


def test_no_chat_template(model_folder):
    refused(run("generate", model_folder(), "--chat", "--prompt", "w1"), "no chat template")
    refused(run("chat", model_folder()), "no chat template")


def test_killed_at_random_moments(model, prompts, tmp_path):
    """Each time at another moment; what comes out in the end are the bytes of an unbroken run."""
    script = Path(__file__).with_name("killing_answers.py")
    command = [sys.executable, str(script), str(model), str(prompts), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] >= 5
    assert found["resumed"] >= 1  # some runs found answers of those before


@pytest.fixture
def broken_off(model, prompts, tmp_path, monkeypatch):
    """An output whose run ended after seven answers, the last of them not whole."""
    keep, out = AnswerFile.keep, tmp_path / "answers.jsonl"

    def interrupted(self, answers):
        for count, record in enumerate(keep(self, answers)):
            yield record
            if count == 6:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "keep", interrupted)
        done = bulk(model, prompts, out, "--max-tokens", 12)
    assert done.exit_code == 130
    assert "run the same command again" in done.stderr
    assert not out.exists()
    path = tmp_path / ".answers.jsonl.progress" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    return out


def test_goes_on(broken_off, model, prompts, tmp_path):
    done = bulk(model, prompts, broken_off, "--max-tokens", 12)
    assert done.exit_code == 0, done.output
    assert f"Going on after 6 of {len(PROMPTS)} answers" in done.stderr
    assert bulk(model, prompts, tmp_path / "whole", "--max-tokens", 12).exit_code == 0
    assert broken_off.read_bytes() == (tmp_path / "whole").read_bytes()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_another_run_is_refused(broken_off, model, prompts):
    done = bulk(model, prompts, broken_off, "--max-tokens", 13)
    refused(done, "unfinished run with another settings.max_tokens (12, now 13)")
    write_lines(prompts, [*PROMPTS[:-1], {"prompt": "w6"}])
    done = bulk(model, prompts, broken_off, "--max-tokens", 12)
    refused(done, "unfinished run with another input")
    assert bulk(model, prompts, broken_off, "--max-tokens", 12, "--restart").exit_code == 0
    assert len(answers_in(broken_off)) == len(PROMPTS)


def test_a_file_is_answered_the_same_with_drafts(model, prompts, tmp_path):
    flags = ["--max-tokens", 40, "--json"]
    assert bulk(model, prompts, tmp_path / "plain", *flags).exit_code == 0
    done = bulk(model, prompts, tmp_path / "drafts", *flags, "--draft", "ngram")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "drafts").read_bytes() == (tmp_path / "plain").read_bytes()
    assert json.loads(done.stdout)["speculation"]["drafted_tokens"] >= 0
    table = bulk(model, prompts, tmp_path / "drafts", "--overwrite", "--draft", "ngram").stdout
    assert "drafts" in table


def test_a_draft_is_part_of_a_run(broken_off, model, prompts):
    done = bulk(model, prompts, broken_off, "--max-tokens", 12, "--draft", "ngram")
    refused(done, "unfinished run with another draft (None, now ngram)")


def test_a_full_disk_keeps_the_answers(model, prompts, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "finish", full)
        done = bulk(model, prompts, tmp_path / "out")
    refused(done, "No space left on device; answers so far are kept")
    done = bulk(model, prompts, tmp_path / "out")
    assert f"Going on after {len(PROMPTS)} of {len(PROMPTS)} answers" in done.stderr
    assert len(answers_in(tmp_path / "out")) == len(PROMPTS)


def test_two_runs_on_one_output(model, prompts, tmp_path):
    with AnswerFile(tmp_path / "out", overwrite=False).locked():
        refused(bulk(model, prompts, tmp_path / "out"), "another run")


def test_chat_takes_each_line_as_a_turn(model, llm):
    flags = ["--temperature", 0, "--max-tokens", 5, *FLOAT32]
    text = "w5 w7\n\nw3\n/reset\nw5 w7\n/what\n/system w1\nw5 w7\n/exit\nw9\n"
    done = run("chat", model, *flags, text=text)
    assert done.exit_code == 0, done.output
    params, messages, expected = SamplingParams(max_tokens=5, temperature=0), [], []

    def turn(said):
        messages.append({"role": "user", "content": said})
        expected.append(llm.chat(messages, params)[0].outputs[0].text)
        messages.append({"role": "assistant", "content": expected[-1]})

    turn("w5 w7")
    turn("w3")
    messages.clear()
    turn("w5 w7")
    messages[:] = [{"role": "system", "content": "w1"}]
    turn("w5 w7")
    assert done.stdout == "".join(f"{answer}\n" for answer in expected)
    assert expected[0] == expected[2]
    assert "'/what' is no command" in done.stderr
    assert "begins anew" in done.stderr


def test_chat_with_drafts(model):
    flags = ["--temperature", 0, "--max-tokens", 30, *FLOAT32]
    text = "w5 w7\nw3\n"
    plain = run("chat", model, *flags, text=text)
    done = run("chat", model, *flags, "--draft", "ngram", text=text)
    assert done.exit_code == 0, done.output
    assert done.stdout == plain.stdout


def test_chat_that_outgrows_the_context(model):
    done = run("chat", model, *FLOAT32, text="w1 " * 200 + "\n")
    refused(done, "the model's context holds 128; shorten the turn, or begin anew with /reset")


def test_a_turn_that_cannot_be_answered_is_left_out(llm):
    conversation = Conversation(llm, SamplingParams(max_tokens=500, temperature=0))
    note = conversation.say("w1 " * 200, lambda text: None)
    assert note is not None
    assert "Not answered: the conversation has" in note
    assert conversation.messages == []
    note = conversation.say("w1", lambda text: None)
    if note is not None:  # unless the model ended by itself
        assert note == "(cut off: the model's context of 128 tokens is full; /reset)"


@pytest.fixture
def interrupts():
    """SIGINT as a terminal's programs have it: a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_stops_the_answer_only(llm, monkeypatch):
    closed = threading.Event()

    async def endless(prompt, params):
        import asyncio

        try:
            for count in range(1000):
                yield Increment("0", 0, [5], f"w{count} ")
                if count == 3:
                    signal.raise_signal(signal.SIGINT)
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    conversation = Conversation(llm, SamplingParams(max_tokens=5, temperature=0))
    with monkeypatch.context() as patched:
        patched.setattr(llm, "stream", endless)
        assert conversation.say("w1", lambda text: None) == "(stopped)"
    assert closed.is_set()
    assert conversation.messages[-1] == {"role": "assistant", "content": "w0 w1 w2 w3 "}
    assert conversation.say("w2", lambda text: None) in (None, "(cut off: --max-tokens is reached)")
    assert len(conversation.messages) == 4


def test_a_template_that_takes_no_system_message(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusing + TEMPLATE)
    refused(run("chat", folder, "--system", "w1", *FLOAT32), "no system")
    with pytest.raises(InputError, match="no system"), LLM(str(folder), dtype="float32") as llm:
        Conversation(llm, SamplingParams(), system="w1")
