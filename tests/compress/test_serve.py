"""`compress serve`, the command: what it refuses, what it says, and that it serves."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from compress.cli import main
from compress.runtime.server.listener import bind, is_local, url_of

COMMAND = [sys.executable, "-m", "compress", "serve"]


def refused(*arguments: str) -> str:
    """What is said where the command ends with 2, in one line."""
    done = CliRunner().invoke(main, ["serve", *arguments])
    assert done.exit_code == 2, done.output
    lines = done.output.strip().splitlines()
    assert len(lines) == 1, done.output
    return lines[0]


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "no/model", "--port", port], capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: cannot listen on 127.0.0.1 port {port}: Address already in use; "
        "choose another, or 0 for any that is free\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "192.0.2.1"], "give an address of this machine"),  # reserved for documents
        (["--port", "70000"], "0<=x<=65535"),
        (["--api-key", ""], "take no empty text"),
        (["--max-body-size", "much"], "'much' is no size"),
        (["--drain-seconds", "-1"], "0<=x<=86400"),
        (["--drain-seconds", "inf"], "0<=x<=86400"),
        (["--max-queued-requests", "-1"], "x>=0"),
        (["--num-speculative-tokens", "4", "--draft", "none"], "-tokens goes with --draft"),
    ],
)
def test_bad_options(arguments, words):
    assert words in refused("m", "--port", "0", *arguments)


def test_addresses():
    for host, local in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with bind(host, 0) as listener:
            assert is_local(listener) is local
            assert (
                url_of(listener)
                == f"http://{listener.getsockname()[0]}:{listener.getsockname()[1]}"
            )
            with pytest.raises(ValueError, match="in use"):
                bind(host, listener.getsockname()[1])


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_addresses_of_version_6():
    try:
        listener = bind("::1", 0)
    except ValueError:
        pytest.skip("this machine has no IPv6")
    with listener:
        assert is_local(listener)
        assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_a_model_that_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [*COMMAND, str(tmp_path), "--port", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_a_model_is_served(model_folder):
    """From the first line to the last: ready, answers as `LLM.generate` gives them, the end.

    It drafts, and they are those of an LLM that does not.
    """
    from compress.runtime.llm import LLM
    from compress.runtime.sampling_params import SamplingParams

    folder = str(model_folder("llama"))
    options = "--port 0 --kv-cache-memory 16MiB --dtype float32 --json --host 0.0.0.0"
    options += " --draft ngram --num-speculative-tokens 3"
    names = ["--served-model-name", "tiny", "--served-model-name", "other"]
    process = subprocess.Popen(
        [*COMMAND, folder, *options.split(), *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COMPRESS_API_KEY": "from-the-environment"},
    )
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["model"] == "tiny"
        assert ready["pid"] == process.pid
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(ready["url"]).port, timeout=9)

        def ask(method, path, body=None, key="from-the-environment"):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, text.decode() if path == "/metrics" else json.loads(text)

        assert ask("GET", "/v1/models", key="wrong")[0] == 401
        models = ask("GET", "/v1/models")[1]["data"]
        assert [model["id"] for model in models] == ["tiny", "other"]
        body = {"model": "other", "prompt": "w1 w2 w3", "max_tokens": 60, "temperature": 0}
        status, answer = ask("POST", "/v1/completions", body)
        assert status == 200
        with LLM(folder, dtype="float32", kv_cache_memory="16MiB") as llm:
            params = SamplingParams(max_tokens=60, temperature=0)
            assert (
                answer["choices"][0]["text"] == llm.generate("w1 w2 w3", params)[0].outputs[0].text
            )
        accepted = r'^compress:spec_decode_num_accepted_tokens_total{model_name="tiny"} (\S+)$'
        found = re.search(accepted, ask("GET", "/metrics")[1], re.MULTILINE)
        assert float(found[1]) > 0
        connection.close()
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=10)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    assert not output
    lines = said.splitlines()
    # a key is set, so no warning
    assert re.fullmatch("Keys and values take 512 bytes a token; room for .* tokens", lines[0])
    assert lines[1] == "Tokens are proposed by ngram"
    assert lines[2] == f"Serving tiny at {ready['url']}"
    assert len(lines) == 6  # and one a request
    assert "environment" not in said


def test_a_server_that_is_open_to_all_is_warned_of(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [*COMMAND, str(tmp_path), "--port", "0", "--host", "0.0.0.0"],
        capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if key != "COMPRESS_API_KEY"},
    )  # fmt: skip
    warning, error = done.stderr.splitlines()
    assert warning.startswith("Warning: whoever reaches http://0.0.0.0:")
    assert "COMPRESS_API_KEY" in warning
    assert error.startswith("Error: ")
