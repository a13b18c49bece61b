"""A hub that refuses, as a server on this machine says it: what the person who named the model is told."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def hub():
    """Answers by the repository's name, with the hub's own codes."""
    answers = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "expired": (401, "InvalidToken"), "laion": (403, "GatedRepo")}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            status, code = next(answer for name, answer in answers.items() if name in self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("org/gated", "accepted its terms: do so on the model's page, then log in"),
        ("org/private", "no repository org/private, or it is private: correct the name, or log in"),
        ("org/expired", "the hub refuses the token"),
    ],
)
def test_who_is_refused_by_the_hub_is_told_what_to_do(hub, tmp_path, repo, words):
    """Only the first line was told: `403 Client Error. (Request ID: ...)`."""
    code = f"""
from pipeline.config import ConfigError
from pipeline.encoders.lineage import hub_commit, snapshot
for ask in (lambda: hub_commit("{repo}", None, "{tmp_path}"), lambda: snapshot("{repo}", "{COMMIT}", "{tmp_path}", None)):
    try:
        ask()
    except ConfigError as error:
        print(error)
"""
    lines = said_by(code, hub, tmp_path).splitlines()
    assert len(lines) == 2 and all(words in line and "HF_TOKEN" in line for line in lines), lines


def test_weights_of_open_clip_that_cannot_be_fetched_are_named_in_one_line(hub, tmp_path):
    """README's first job ended in six tracebacks on a machine without the hub."""
    code = f"""
from pipeline.config import ConfigError
from pipeline.encoders.openclip_model import load_open_clip
from pipeline.encoders.openclip_weights import resolve
try:
    load_open_clip(resolve("ViT-B-32", "laion2b_s34b_b79k", "{tmp_path}"), "{tmp_path}")
except ConfigError as error:
    print(error)
"""
    said = said_by(code, hub, tmp_path)
    assert said.startswith("the weights 'laion2b_s34b_b79k' of ViT-B-32 cannot be fetched") and said.count("\n") == 1


def said_by(code, hub, home):
    environment = {"HF_ENDPOINT": hub, "HOME": str(home), "HF_TOKEN": "hf_x", "PATH": "/usr/bin:/bin", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=True)
    return done.stdout
