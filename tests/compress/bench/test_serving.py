"""`compress bench serve`: every statistic against numbers worked out by hand."""

import json
import math
import subprocess
import sys

import pytest
from click.testing import CliRunner

from compress.bench.client import Answer
from compress.bench.prompts import prompts_of, read_prompts
from compress.bench.serving import Load, Objective, arrivals, summary
from compress.cli import main
from compress.core.errors import InputError

# What a client may see later than the server meant it, on a busy machine of one core, in ms.
SLACK = 250


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", "serve", *map(str, arguments)])


def measured(*arguments):
    done = bench(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(done, *messages):
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    for message in messages:
        assert message in errors[0]


@pytest.fixture
def prompts_file(tmp_path):
    """A function that writes prompts, a line each, and returns the file."""

    def write(*texts):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return path

    return write


def answer(sent, texts, tokens, due=None, error=None):
    """An answer that ends with its last text."""
    return Answer(
        due=sent if due is None else due,
        sent=sent,
        texts=texts,
        counts=[1] * len(texts),
        ended=texts[-1],
        prompt_tokens=10,
        output_tokens=tokens,
        error=error,
        message="the queue is full" if error else "",
    )


ANSWERS = [
    answer(0.0, [0.1, 0.2, 0.4], 3),  # TTFT 100, gaps 100 and 200, E2E 400, TPOT 150
    answer(1.0, [1.3, 1.4], 5),  # TTFT 300, gap 100, E2E 400, TPOT 25: 4 tokens in one event
    answer(2.0, [2.2], 1, due=1.5),  # TTFT 200, E2E 200, no TPOT; sent 500 late
    answer(3.0, [5.0], 9, error="HTTP 429"),
]


def test_statistics():
    found = summary(ANSWERS, Load(request_rate=2.0), Objective())
    assert found["request_rate"] == 2.0
    assert found["max_concurrency"] is None
    assert found["duration"] == 5.0  # from 0.0 to 5.0, the refused one too
    assert (found["completed"], found["failed"]) == (3, 1)
    assert found["errors"] == {"HTTP 429": 1}
    assert found["error_messages"] == {"HTTP 429": "the queue is full"}
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert found["tokens_counted_by"] == "the server"
    assert found["tokens_per_event"] == 1.5  # 9 in 6 events
    assert found["request_throughput"] == 3 / 5
    assert found["output_throughput"] == 9 / 5
    assert found["total_token_throughput"] == 39 / 5
    expected = {
        "mean_ttft_ms": 200, "median_ttft_ms": 200, "p90_ttft_ms": 300, "p99_ttft_ms": 300,
        "mean_tpot_ms": 87.5, "median_tpot_ms": 87.5, "p90_tpot_ms": 150, "p99_tpot_ms": 150,
        "mean_itl_ms": 400 / 3, "median_itl_ms": 100, "p90_itl_ms": 200, "p99_itl_ms": 200,
        "mean_e2e_ms": 1000 / 3, "median_e2e_ms": 400, "p90_e2e_ms": 400, "p99_e2e_ms": 400,
        "mean_late_ms": 125, "median_late_ms": 0, "p90_late_ms": 500, "p99_late_ms": 500,
    }  # fmt: skip
    # rounded to 4 places
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        ("ttft:250", 2),
        ("ttft:250,tpot:100", 1),  # of the two the first has 150; one token has no TPOT
        ("tpot:25", 2),
        ("e2e:399", 1),
        ("ttft:1000,tpot:1000,e2e:9000", 3),  # never the refused one
    ],
)
def test_goodput(objective, good):
    found = summary(ANSWERS, Load(), Objective.parse(objective))
    assert found["good"] == good
    assert found["request_goodput"] == good / 5


def test_no_answer_at_all():
    found = summary([ANSWERS[3]], Load(concurrency=4), Objective())
    assert (found["completed"], found["failed"], found["max_concurrency"]) == (0, 1, 4)
    assert found["mean_ttft_ms"] is found["p99_e2e_ms"] is None


def test_arrivals_are_poisson():
    """Gaps of a Poisson process are exponential: Kolmogorov-Smirnov, on one fixed draw.

    With 2,000 gaps the statistic exceeds 1.95 / sqrt(2000) with probability 0.001.
    """
    count, rate = 2000, 8.0
    times = arrivals(count, rate, seed=0)
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < count / rate
    gaps = sorted(after - before for before, after in zip([0.0, *times], times, strict=False))
    cdf = [1 - math.exp(-rate * gap) for gap in gaps]
    furthest = max(
        max(p - i / count, (i + 1) / count - p) for i, p in enumerate(cdf)
    )  # fmt: skip
    assert furthest < 1.95 / math.sqrt(count)
    assert arrivals(count, rate, seed=0) == times != arrivals(count, rate, seed=1)
    twice = arrivals(count, 2 * rate, seed=0)
    assert twice == pytest.approx([time / 2 for time in times])
    assert set(arrivals(3, math.inf, seed=0)) == {0.0}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_times_of_a_server_that_keeps_its_own(fake_server, endpoint):
    """5 tokens, the first after 50 ms, each other 20 ms later; sleeping is never too short."""
    server = fake_server(first=0.05, gap=0.02, tokens=5)
    report = measured(
        "--url", server.url + "/v1", "--dataset", "random:7,5", "--num-prompts", 4,
        "--endpoint", endpoint, "--api-key", "secret", "--ignore-eos",
    )  # fmt: skip
    assert report["model"] == "fake-model"
    assert report["url"] == server.url
    (load,) = report["loads"]
    assert (load["completed"], load["errors"]) == (4, {})
    assert (load["total_input_tokens"], load["total_output_tokens"]) == (28, 20)
    assert load["request_rate"] is None
    for name, least in {"ttft": 50, "tpot": 20, "e2e": 130}.items():
        for kind in ("mean", "median", "p90", "p99"):
            assert least - 1 < load[f"{kind}_{name}_ms"] < least + SLACK, name
    assert 15 < load["mean_itl_ms"] < 20 + SLACK  # one that came late shortens the next gap
    assert len(server.bodies) == 1 + 4
    for body in server.bodies:
        assert body["model"] == "fake-model"
        assert body["max_tokens"] == 5
        assert body["temperature"] == 0
        assert body["ignore_eos"] is True
        assert body["stream"] is True
        assert body["stream_options"] == {"include_usage": True}
        assert ("messages" in body) == (endpoint == "chat")
    assert len({json.dumps(body) for body in server.bodies}) == 5  # no prompt twice
    assert set(server.keys) == {"Bearer secret"}


@pytest.mark.parametrize("counts", [True, False])
def test_events_of_several_tokens(fake_server, counts, tmp_path):
    """7 tokens in events of 1, 3 and 3, those of an event 60 ms after the event before."""
    server = fake_server(first=0.01, gap=0.02, tokens=7, together=3)
    flags = ["--url", server.url, "--dataset", "random:3,7", "--num-prompts", 2]
    flags += ["--count-events"] if counts else []
    out = tmp_path / "out.json"
    (load,) = measured(*flags, "--warmup", 0, "--out", out)["loads"]
    assert load["total_output_tokens"] == 14
    assert load["tokens_per_event"] == pytest.approx(7 / 3, abs=1e-4)
    asked = [body["stream_options"].get("continuous_usage_stats") for body in server.bodies]
    assert asked == [True if counts else None] * 2
    for request in json.loads(out.read_text())["loads"][0]["requests"]:
        gaps = request["itl"]
        assert len(gaps) == (6 if counts else 2)
        assert 0.08 < sum(gaps) < request["e2e"]
        assert not counts or gaps[:3] == [gaps[0]] * 3
    printed = bench(*flags, "--warmup", 0).stdout
    assert ("between tokens" in printed) == counts
    assert ("events bring several tokens (2.33" in printed) != counts


def test_tokens_of_an_event_share_its_time():
    one = Answer(due=0.0, texts=[1.0, 1.3, 1.5], counts=[2, 3, 1])
    assert one.gaps == pytest.approx([0.1, 0.1, 0.1, 0.2])


def test_what_goes_wrong_is_counted_by_kind(fake_server, prompts_file):
    server = fake_server(first=0.01, gap=0.01)
    path = prompts_file("good", "refuse", "cut", "fail", "end early", "nonsense", "good again")
    report = measured(
        "--url", server.url, "--dataset", path, "--num-prompts", 7, "--warmup", 0,
        "--concurrency", 7,
    )  # fmt: skip
    (load,) = report["loads"]
    assert load["completed"] == 2
    expected = {"HTTP 429": 1, "cut off": 2, "error event": 1, "not OpenAI's format": 1}
    assert load["errors"] == expected
    assert load["error_messages"]["HTTP 429"] == "the queue is full"
    assert load["error_messages"]["error event"] == "the engine has failed"
    assert load["total_output_tokens"] == 10
    assert len(server.bodies) == 7  # nothing is tried again


def test_an_answer_without_text_ends_all_the_same(fake_server, prompts_file):
    server = fake_server(tokens=0)
    report = measured("--url", server.url, "--dataset", prompts_file("silent"), "--num-prompts", 1)
    (load,) = report["loads"]
    assert load["completed"] == 1
    assert load["mean_ttft_ms"] == load["mean_e2e_ms"] > 0
    assert load["mean_tpot_ms"] is load["mean_itl_ms"] is None


def test_a_server_without_usage(fake_server):
    server = fake_server(usage=False, first=0.01, gap=0.001)
    arguments = ["--url", server.url, "--dataset", "random:3,5", "--num-prompts", 2]
    (load,) = measured(*arguments)["loads"]
    assert load["total_output_tokens"] == 10
    assert load["tokens_counted_by"] == "events with text"
    assert "sent no usage" in bench(*arguments).stdout


def test_clients_wait_for_their_answers(fake_server):
    server = fake_server(first=0.02, gap=0.005)
    report = measured(
        "--url", server.url, "--dataset", "random:3,5", "--num-prompts", 12, "--concurrency", "3,1",
    )  # fmt: skip
    assert [load["max_concurrency"] for load in report["loads"]] == [1, 3]
    assert server.most == 3
    one, three = report["loads"]
    assert one["duration"] > 12 * 0.04 * 0.99  # 20 ms, and 4 times 5 ms
    assert three["duration"] > 4 * 0.04 * 0.99
    assert one["completed"] == three["completed"] == 12


def test_requests_come_by_themselves(fake_server, tmp_path):
    """At 40 a second 20 requests come within half a second, however slow the server.

    One after another they would take 12 s; 2 s are for a machine that does much else.
    """
    server = fake_server(first=0.6, gap=0.0)
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    pytest.importorskip("matplotlib")
    done = bench(
        "--url", server.url, "--dataset", "random:3,5", "--num-prompts", 20, "--warmup", 0,
        "--request-rate", "40,80", "--goodput", "ttft:5000", "--out", out, "--plot", plot,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("40/s", "80/s", "good/s", "20/20"):
        assert words in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    kept = json.loads(out.read_text())
    assert kept["goodput_objective_ms"] == {"ttft": 5000}
    for load, rate in zip(kept["loads"], (40, 80), strict=True):
        assert load["good"] == 20
        sent = sorted(request["sent"] for request in load["requests"])
        times = arrivals(20, rate, seed=0)
        meant = [time - times[0] for time in times]
        assert all(0 <= a - b + 0.05 < 2.05 for a, b in zip(sent, meant, strict=True))
        assert all(request["output_tokens"] == 5 for request in load["requests"])
    assert server.most >= 10


def test_one_load_is_printed_whole(fake_server, prompts_file):
    server = fake_server(first=0.01, gap=0.001)
    path = prompts_file("one", "two", "refuse")
    done = bench(
        "--url", server.url, "--dataset", path, "--num-prompts", 6, "--goodput", "e2e:60000",
        "--warmup", 0, "--request-rate", "inf",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("all at once", "TTFT", "TPOT", "ITL", "E2E", "4 of 6", "HTTP 429", "come again"):
        assert words in done.stdout
    assert "the queue is full" in done.stdout


def test_forms_of_datasets(tmp_path):
    path = tmp_path / "prompts"
    lines = [
        {"prompt": "one", "id": 7, "max_tokens": 3, "temperature": 0.5},
        {"messages": [{"role": "system", "content": "be brief"}]},
        {"question_id": 81, "category": "writing", "turns": ["two", "and then"]},
        {
            "id": "x",
            "conversations": [{"from": "gpt", "value": "0"}, {"from": "human", "value": "3"}],
        },
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    found = read_prompts(path, "chat")
    assert [prompt.content for prompt in found] == ["one", lines[1]["messages"], "two", "3"]
    assert found[0].settings == {"max_tokens": 3, "temperature": 0.5}
    user = [{"role": "user", "content": "one"}]
    assert found[0].body("chat") == {"messages": user, "max_tokens": 3, "temperature": 0.5}
    assert found[0].body("completions")["prompt"] == "one"
    path.write_text(json.dumps(lines))  # one list
    assert read_prompts(path, "chat") == found
    with pytest.raises(InputError, match=r"entry 2: messages go to --endpoint chat"):
        read_prompts(path, "completions")


def test_a_file_s_prompts_come_again_in_the_seed_s_order(prompts_file):
    path = prompts_file(*map(str, range(20)))
    orders = []
    for seed in (0, 0, 1):
        prompts, distinct = prompts_of(str(path), "chat", seed)
        assert distinct == 20
        twice = [next(prompts).content for _ in range(40)]
        assert twice[:20] == twice[20:]
        assert sorted(twice[:20], key=int) == list(map(str, range(20)))
        orders.append(twice)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("7", "line 2: 7 is no object"),
        ("{}", "line 2: {}; give one of"),
        ('{"prompt": ""}', "line 2: '' is no prompt"),
        ('{"prompt": "a", "messages": []}', "give one of"),
        ('{"prompt": "a", "n": 2}', "unknown key 'n'"),
        ('{"prompt": "a", "max_token": 2}', "did you mean 'max_tokens'?"),
        ('{"messages": "hello"}', "messages = 'hello'; give a list"),
        ('{"turns": []}', "[] is no prompt"),
        ('{"conversations": [{"from": "gpt", "value": "a"}]}', "is no prompt"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    refused(bench("--url", "http://127.0.0.1:1", "--dataset", path), message)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--dataset", "missing.jsonl"], ["cannot read dataset 'missing.jsonl'"]),
        (["--dataset", "random:0,4"], ["'random:0,4'; give random:IN,OUT"]),
        (["--request-rate", "1,0"], ["'1,0' is no list of rates"]),
        (["--request-rate", "nan"], ["no list of rates"]),
        (["--concurrency", "1,x"], ["'1,x' is no list"]),
        (["--concurrency", "1", "--request-rate", "1"], ["one of the two"]),
        (["--goodput", "ttf:3"], ["objective 'ttf:3'", "ttft, tpot, e2e"]),
        (["--goodput", "ttft:0"], ["objective 'ttft:0'"]),
        (["--url", "localhost:8000"], ["--url 'localhost:8000'"]),
        (["--out", "no/such/folder.json"], ["there is no folder 'no/such'"]),
        ([], ["cannot reach http://127.0.0.1:1", "check --url"]),
        (["--model", "m"], ["none of 1 requests was answered", "no connection"]),
    ],
)
def test_bad_input(arguments, messages):
    first = ["--url", "http://127.0.0.1:1", "--dataset", "random:3,3"]
    refused(bench(*first, *arguments), *messages)


def test_a_refusal_at_the_warm_up_says_what_the_server_says(fake_server, prompts_file):
    server = fake_server()
    done = bench("--url", server.url, "--dataset", prompts_file("refuse"))
    refused(done, "HTTP 429: the queue is full", "check --url, --model and --api-key")


def test_measuring_a_server_needs_no_torch(fake_server):
    """The client runs where the server does not: nothing heavy is loaded, and no model."""
    server = fake_server(first=0.01, gap=0.001)
    script = (
        "import sys; from compress.cli import main; "
        f"main(['bench', 'serve', '--url', '{server.url}', '--dataset', 'random:3,3', "
        "'--num-prompts', '2', '--json'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
