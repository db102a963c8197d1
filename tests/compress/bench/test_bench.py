"""`compress bench`: what it measures, never how fast it is."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from compress.bench import latency, peer, workload
from compress.bench.latency import Shape, percentile, run_once
from compress.bench.subject import Subject
from compress.bench.throughput import replay
from compress.bench.workload import Job
from compress.cli import main
from compress.core.errors import InputError

SMALL = ("--prompt-tokens", 20, "--new-tokens", 6, "--threads", 1, "--dtype", "float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(latency, "copy_bandwidth", lambda: 1e9)


@pytest.fixture(scope="module")
def subject(model_folder):
    return Subject(str(model_folder()), "float32", None, 1)


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def refused(done, message):
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_what_is_read(monkeypatch):
    """At a mean context of 20 tokens: one layer of two has a window of 8; 32 bytes a token each."""
    monkeypatch.setattr(latency, "read_bandwidth", lambda size: 1e6)
    decoder = SimpleNamespace(weight_bytes=1000, kv_bytes_read=lambda seen: (8 + seen) * 32)
    subject = SimpleNamespace(decoder=decoder)
    found = latency._traffic(subject, Shape(18, 4, batch=3), decode_rate=600)
    assert found["kv_bytes_per_step"] == 3 * (8 + 20) * 32
    assert found["bytes_per_step"] == 1000 + 3 * (8 + 20) * 32
    assert found["roofline_tokens_per_s"] == round(3 * 1e6 / found["bytes_per_step"], 2)
    assert found["bytes_per_s"] == 200 * found["bytes_per_step"]


def test_a_model_of_nan_is_not_timed(model_folder):
    ill = Subject(str(model_folder()), "float32", None, 1)
    ill.decoder.forward = lambda batch: torch.full((len(batch.rows), 128), torch.nan)
    shape = Shape(9, 4)
    with pytest.raises(InputError, match=r"cannot be timed: .*NaN"):
        run_once(latency.engine_for(ill, shape), [list(range(3, 12))], shape)
    with pytest.raises(InputError, match=r"cannot be timed: .*NaN"):
        replay(ill.engine(2, 64), ill, [Job(9, 4)], 1, "continuous")


def test_latency(model_folder, subject):
    flags = [*SMALL, "--repeat", 2]
    done = bench("latency", model_folder(), *flags, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for part in ("decode", "prefill"):
        assert 0 < found[f"{part}_tokens_per_s"] <= found[f"{part}_tokens_per_s_best"]
    between = found["inter_token_ms"]
    assert 0 < between["median"] <= between["p90"] <= between["p99"]
    assert found["time_to_first_token_s"] > 0
    # 2 layers, 2 KV heads of 8, keys and values in float32; the recorded program pads heads to 16
    assert found["kv_bytes_per_token"] in (2 * 2 * 2 * 8 * 4, 2 * 2 * 2 * 16 * 4)
    # 5 steps at contexts 21 to 25
    assert found["kv_bytes_per_step"] == 23 * found["kv_bytes_per_token"]
    assert found["bytes_per_step"] == found["weight_bytes"] + found["kv_bytes_per_step"]
    expected = found["bytes_per_step"] * found["decode_tokens_per_s"]
    assert found["bytes_per_s"] == pytest.approx(expected, rel=1e-3)  # of a rounded rate
    roof = found["read_bytes_per_s"] / found["bytes_per_step"]  # tokens/s at batch 1
    assert found["roofline_tokens_per_s"] == pytest.approx(roof, rel=1e-3)
    share = found["decode_tokens_per_s"] / found["roofline_tokens_per_s"]
    assert found["share_of_read"] == pytest.approx(share, abs=1e-3)  # rounded to 3 places
    assert found["copy_bytes_per_s"] == 1e9
    assert found["read_bytes_per_s"] > 0
    assert found["threads"] == 1
    assert found["prompts"] == "random token ids, seed 0"
    assert {"load_seconds", "memory_bytes", "kernels", "head_bits", "batch"} <= set(found)
    assert "peer" not in found
    shown = bench("latency", model_folder(), *flags, "--batch", 3)
    assert shown.exit_code == 0, shown.output
    assert "between tokens, p99" in shown.stdout


def test_a_batch_decodes_together(subject):
    """Also where the prompts take several steps, so that the first decode before the last begin."""
    shape = Shape(prompt_tokens=110, new_tokens=5, batch=9)
    run = run_once(
        subject.engine(9, shape.cached_tokens), subject.prompts([110] * 9), shape
    )  # fmt: skip
    assert len(run.firsts) == 9
    assert len(run.steps) == 4
    assert run.tokens >= 9 * 5
    assert max(run.firsts) == run.prefill > min(run.firsts)


def test_percentiles():
    values = list(range(1, 101))
    assert [percentile(values, p) for p in (50, 90, 99)] == [50, 90, 99]
    assert percentile([3.0], 99) == 3.0


def test_compare_with_transformers(model_folder):
    done = bench("latency", model_folder(), *SMALL, "--repeat", 2, "--compare", "hf", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for part in ("decode", "prefill"):
        key = f"{part}_tokens_per_s"
        expected = found[key] / found["peer"][key]
        assert found[f"{part}_ratio"] == pytest.approx(expected, abs=1e-3)
        assert found[f"{part}_ratio_best"] > 0
    assert found["peer"]["version"].startswith("transformers ")
    assert found["peer"]["threads"] == 1
    assert found["peer"]["dtype"] == found["dtype"] == "float32"


def llama_cpp_crashes(path):
    """Whether it ends by a signal on its own, without anything of ours."""
    code = (
        "import sys, llama_cpp; model = llama_cpp.Llama(sys.argv[1], n_ctx=32, verbose=False); "
        "model.eval(list(range(16)))"
    )
    return subprocess.run([sys.executable, "-c", code, path], capture_output=True).returncode < 0


def test_compare_with_llama_cpp(write_gguf, tmp_path):
    pytest.importorskip("llama_cpp")
    path = tmp_path / "tiny.gguf"
    kinds = dict.fromkeys(["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"], "Q4_0")
    write_gguf(path, kinds)
    if llama_cpp_crashes(path):
        pytest.skip("this build of llama.cpp crashes on so small a model (seen with AMX)")
    same = bench("latency", path, *SMALL, "--compare", "llama-cpp", "--json")
    assert same.exit_code == 0, same.output
    found = json.loads(same.stdout)
    assert found["peer"]["weights"].startswith("identical weights")
    assert found["decode_ratio"] > 0
    other = tmp_path / "other.gguf"
    write_gguf(other, kinds, seed=1)
    done = bench("latency", path, *SMALL, "--compare", "llama-cpp", "--gguf", other)
    assert done.exit_code == 0, done.output
    assert "its own, of another file" in done.stdout
    assert "ratio" in done.stdout


def test_a_peer_that_is_not_installed(model_folder, tmp_path):
    """A Python without packages; the message is the peer's own."""
    (tmp_path / "model.gguf").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    flags = ["--compare", "llama-cpp", "--gguf", tmp_path / "model.gguf", "--peer-python", python]
    done = bench("latency", model_folder(), *SMALL, *flags)
    refused(done, f"llama-cpp-python cannot be imported by {sys.executable}")
    assert f"run: {python} -m pip install llama-cpp-python" in done.stderr


def test_a_peer_that_dies(model_folder, tmp_path):
    (tmp_path / "model.gguf").touch()
    flags = ["--compare", "llama-cpp", "--gguf", tmp_path / "model.gguf", "--peer-python", "false"]
    refused(bench("latency", model_folder(), *SMALL, *flags), "the peer ended without a result")


def test_peers_count_steps_alike():
    found = peer.in_parts([1.0, 3.0, 3.5, 4.5])
    assert found == {"prefill": 2.0, "steps": [0.5, 1.0]}
    script = Path(peer.__file__)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import peer; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(script.parent)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"  # runs where torch is not installed


BAD = [
    (["latency", "--compare", "vllm"], "vllm"),
    (["latency", "--gguf", "x.gguf"], "--compare llama-cpp"),
    (["latency", "--compare", "hf", "--batch", "2"], "leave out --batch"),
    (["latency", "--compare", "llama-cpp"], "is no .gguf file"),
    (["latency", "--compare", "llama-cpp", "--gguf", "absent.gguf"], "does not exist"),
    (["latency", "--prompt-tokens", "127"], "more than the model's context of 128"),
    (["latency", "--new-tokens", "1"], "--new-tokens"),
    (["latency", "--batch", "300"], "give 1 to 256"),
    (["latency", "--dtype", "int8"], "int8"),
    (["latency", "--head-bits", "4"], "4"),
    (["throughput", "--batch", "1,x"], "'1,x' is no list of batch sizes"),
    (["throughput", "--batch", "0"], "'0' is no list of batch sizes"),
    (["throughput", "--trace", "absent.jsonl"], "absent.jsonl"),
    (["throughput", "--trace", "TRACE", "--requests", "3"], "--trace says"),
    (["throughput", "--prompt-tokens", "100"], "more than the model's context"),
    (["latency", "--no-such"], "No such option"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_calls(flags, message, model_folder, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt_tokens": 3, "new_tokens": 4}\n')
    kind, *rest = [str(trace) if flag == "TRACE" else flag for flag in flags]
    refused(bench(kind, model_folder(), *SMALL, *rest), message)


def test_no_such_model():
    refused(bench("latency", "./absent"), "does not exist")


BAD_TRACES = [
    ('{"prompt_tokens": 3}', "new_tokens"),
    ('{"prompt_tokens": 3, "new_tokens": 0}', "1 or more"),
    ('{"prompt_tokens": 3, "new_tokens": 1, "arrival": 2}', "did you mean 'arrival_s'"),
    ('{"prompt_tokens": 3, "new_tokens": 1, "arrival_s": -1}', "0 or more"),
    ("[1]", "[1] is no object"),
    ("{", "no JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_TRACES)
def test_bad_traces(line, message, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 3, "new_tokens": 4}\n\n' + line)
    with pytest.raises(InputError, match="line 3") as error:
        workload.read_trace(path)
    assert message in str(error.value)


def test_an_empty_trace(tmp_path):
    (tmp_path / "trace.jsonl").touch()
    with pytest.raises(InputError, match="holds no request"):
        workload.read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize("seed", range(3))
def test_continuous_takes_no_more_steps_than_static(seed, subject, monkeypatch):
    monkeypatch.setattr(workload, "SEED", seed)
    jobs = workload.uniform(17, prompt_tokens=20, new_tokens=15).jobs
    longest = max(job.prompt_tokens + job.new_tokens for job in jobs)
    runs = {
        policy: replay(subject.engine(4, longest), subject, jobs, 4, policy)
        for policy in ("static", "continuous")
    }
    assert runs["continuous"].steps < runs["static"].steps
    for run in runs.values():
        assert len(run.latencies) == len(jobs)
        # each request holds its slot from its first chunk to its last token, and prompts take one
        assert run.busy == sum(job.new_tokens for job in jobs)
        assert run.busy <= 4 * run.steps
    # static: the longest of each batch; all that is known of the schedule
    waves = [jobs[at : at + 4] for at in range(0, len(jobs), 4)]
    assert runs["static"].steps == sum(max(job.new_tokens for job in wave) for wave in waves)


def test_memory_is_counted_step_by_step(subject):
    """One request of 30 + 4 tokens: 30, 31, 32 and then 33 tokens in 2, 2, 2 and 3 blocks of 16."""
    run = replay(subject.engine(1, 40), subject, [Job(30, 5)], 1, "continuous")
    assert run.steps == 5
    assert run.held == 30 + 31 + 32 + 33  # after the fifth it has ended
    assert run.reserved["paged"] == 32 + 32 + 32 + 48
    assert run.reserved["contiguous, own length known"] == 4 * 34
    assert run.reserved["contiguous, longest of the trace"] == 4 * 34
    assert run.reserved["contiguous, the model's context"] == 4 * 128


def test_arrivals_are_waited_for(subject):
    jobs = [Job(5, 3), Job(5, 3, 0.05), Job(5, 3, 0.1)]
    run = replay(subject.engine(2, 8), subject, jobs, 2, "continuous")
    assert run.seconds >= 0.1
    assert len(run.latencies) == 3
    assert min(run.latencies) > 0
    static = replay(subject.engine(2, 8), subject, jobs, 2, "static")
    assert static.seconds >= 0.1
    assert max(static.latencies) >= 0.05  # the first waits for the second


def test_throughput(model_folder, tmp_path):
    trace = tmp_path / "trace.jsonl"
    jobs = [{"prompt_tokens": 10 + 3 * i, "new_tokens": 1 + 5 * (i % 4)} for i in range(9)]
    trace.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    flags = [*SMALL, "--batch", "4,1", "--trace", trace]
    done = bench("throughput", model_folder(), *flags, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["batch"] for row in found["batches"]] == [1, 4]
    assert found["batches"][0]["decode_speed_up"] == found["batches"][0]["speed_up"] == 1
    assert found["requests"] == 9
    assert found["slots"] == 4
    batching = found["batching"]
    assert batching["continuous"]["steps"] <= batching["static"]["steps"]
    assert batching["continuous"]["slot_occupancy"] >= batching["static"]["slot_occupancy"]
    assert found["continuous_ratio"] > 0
    waste = {name: row["waste"] for name, row in found["memory"].items()}
    assert 0 < waste["paged"] < waste["contiguous, longest of the trace"]
    assert waste["contiguous, longest of the trace"] < waste["contiguous, the model's context"] < 1
    shown = bench("throughput", model_folder(), *SMALL, "--batch", "2", "--lengths", "fixed")
    assert shown.exit_code == 0, shown.output
    assert "all 20 + 6 tokens" in shown.stdout
    assert "continuous" in shown.stdout
