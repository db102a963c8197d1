"""`compress plan` of a Hugging Face id fetches config.json alone: a hub counts the requests."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000,
}  # fmt: skip
PARAMETERS = 6_738_415_616  # of the published checkpoint


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub: one model, whose weights nobody should ask for."""

    commit = "c" * 40
    files = ("config.json", "model.safetensors", "tokenizer.json")
    asked: list[str] = []  # noqa: RUF012  of the class: a handler is made a request

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/someone/small/tree"):
            entry = {"type": "file", "size": 1, "oid": "e" * 40}
            body = json.dumps([entry | {"path": name} for name in self.files])
        elif self.path.startswith("/api/models/someone/small"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "someone/small", "sha": self.commit, "siblings": siblings})
        elif re.fullmatch(r"/someone/small/resolve/\w+/config\.json", self.path):
            body = json.dumps(LLAMA_7B)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", '"' + "e" * 40 + '"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def test_of_a_hub_id_only_the_config_is_fetched(tmp_path):
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    settings = {"HF_ENDPOINT": place, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    settings |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "compress", "plan", "someone/small", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | settings, timeout=120
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == PARAMETERS
    assert any("config.json" in path for path in Hub.asked)
    assert not [path for path in Hub.asked if "safetensors" in path or "tokenizer" in path]
