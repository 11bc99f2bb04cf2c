"""Fetching the Quora files and weights, from a server on this machine that fails as servers do."""

import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants, file_download

from data import fetch
from models.pretrained import BUNDLED, HUB_FILES
from modules.settings import UserError
from tests.conftest import ROOT, narrow_hf_model

NAME, ROWS = "quora-train.csv", 3000
PART = f".{NAME}.part"
NOWHERE = "http://127.0.0.1:1"  # no port that anything listens on
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # a revision of the imitated hub


def pairs_file(rows: int, has_labels: bool = True) -> bytes:
    lines = ["\tid\tsentence1\tsentence2" + "\tis_duplicate" * has_labels]
    lines += [f"{i}\t{i:x}\tIs it this?\tIs it {i}?" + "\t1.0" * has_labels for i in range(rows)]
    return "\n".join(lines).encode() + b"\n"


WHOLE = pairs_file(ROWS)


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.files`, once per item of `server.faults` in that item's way."""

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers["Range"])
        fault = server.faults.pop(0) if server.faults else None
        body = server.files.get(self.path)
        if body is None or isinstance(fault, int):
            self.send_error(fault or 404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.has_ranges else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("X-Repo-Commit", COMMIT)  # this and the ETag are for the hub's client
        self.send_header("ETag", f'"{len(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start : start + 1000 if fault == "ends" else None])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server to fill with files; the fault "ends" breaks an answer off after 1,000 bytes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.folder = f"http://127.0.0.1:{server.server_port}", tmp_path
    server.files, server.ranges, server.has_ranges = {f"/{NAME}": WHOLE}, [], True
    server.faults = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def failure(server) -> str:
    """Fetch the file into the server's folder: the sentence that this fails with, if it does."""
    sentence = ""
    try:
        fetch.fetch_pairs(f"{server.url}/{NAME}", server.folder / NAME, True, ROWS)
    except UserError as error:
        sentence = str(error)
    assert "\n" not in sentence
    return sentence


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("has_ranges", "part", "faults", "ranges"),
    [
        (True, b"", [], [None]),
        (True, b"", ["ends", "ends"], [None, "bytes=1000-", "bytes=2000-"]),
        (True, WHOLE[:4000], ["ends"], ["bytes=4000-", "bytes=5000-"]),
        (False, WHOLE[:4000], ["ends"], ["bytes=4000-", "bytes=1000-"]),
        (True, WHOLE, [], [f"bytes={len(WHOLE)}-", None]),
        (True, WHOLE + b"more", [], [f"bytes={len(WHOLE) + 4}-", None]),
    ],
    ids=["whole", "breaks", "resumed", "no ranges", "a whole part", "a longer part"],
)
def test_a_file_arrives_whole_and_alone(server, has_ranges, part, faults, ranges, capsys):
    if part:
        (server.folder / PART).write_bytes(part)
    server.has_ranges, server.faults = has_ranges, faults
    assert not failure(server)
    assert server.ranges == ranges
    assert contents(server.folder) == {NAME: WHOLE}
    assert capsys.readouterr().out.endswith(f"{NAME}: 3,000 pairs\n")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [(ROWS, ""), (ROWS - 1, "2,999 usable pairs, expected at least 3,000): move it away and run")],
)
def test_an_existing_file_is_checked_and_never_replaced(server, capsys, rows, reason):
    mine = pairs_file(rows)
    (server.folder / NAME).write_bytes(mine)
    said = failure(server)
    assert reason in said
    assert bool(said) == bool(reason)
    assert bool(said) != ("3,000 pairs, already there" in capsys.readouterr().out)
    assert contents(server.folder) == {NAME: mine}
    assert server.ranges == []


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_refusal_keeps_the_part(server, status):
    (server.folder / PART).write_bytes(b"a part")
    server.faults = [status]
    said = failure(server)
    assert re.match(rf"could not fetch {server.url}/{NAME} \(.*{status} .*\): check the ", said)
    assert server.ranges == ["bytes=6-"]
    assert contents(server.folder) == {PART: b"a part"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<!DOCTYPE html>\n<title>Sign in</title>\n", "has no column id, sentence1"),
        (pairs_file(ROWS, has_labels=False), "has no column is_duplicate"),
        (WHOLE[:-9], "2,999 usable pairs, expected at least 3,000"),
        (WHOLE + b"\xff", "is not UTF-8 text"),
        (b"", "has no column id"),
    ],
    ids=["HTML", "no labels", "truncated", "not UTF-8", "empty"],
)
def test_another_file_is_refused_and_the_next_run_starts_anew(server, body, reason):
    server.files[f"/{NAME}"] = body
    said = failure(server)
    assert said.startswith(f"{server.url}/{NAME} is not the course's file (")
    assert reason in said
    assert contents(server.folder) == {}
    server.files[f"/{NAME}"] = WHOLE
    assert not failure(server)
    assert server.ranges == [None, None]


@pytest.mark.parametrize("address", ["", "me:", "http://127.0.0.1:x", NOWHERE])
def test_an_unusable_address_is_refused(server, address):
    server.url = address
    assert re.match(rf"could not fetch {address}/{NAME} \(.+\): check the", failure(server))


def run_python(*words: str, folder, **environment) -> subprocess.CompletedProcess[str]:
    """Python as a person calls it in `folder`, with this checkout's modules."""
    environment |= {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_CACHE"} | environment
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_command_fetches_the_three_course_files(server, tmp_path):
    (tmp_path / "data").mkdir()
    files = {
        name: pairs_file(least, has_labels) for name, (has_labels, least) in fetch.QUORA.items()
    }
    server.files = {f"/mirror/{name}": body for name, body in files.items()}
    done = run_python("-m", "data.fetch", "quora", f"{server.url}/mirror/", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path / "data") == files
    assert "quora-test-student.csv: 80,000 pairs\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quora", NOWHERE], rf"could not fetch {NOWHERE}/{NAME} \(.+\): check the address .*"),
        (["weights", "gpt2"], r"gpt2 is not in the Hugging Face cache and could not be .*"),
    ],
)
def test_the_command_says_in_one_sentence_why_it_failed(tmp_path, words, sentence):
    (tmp_path / "data").mkdir()
    hub = {"HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path)}
    done = run_python("-m", "data.fetch", *words, folder=tmp_path, **hub)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {sentence}\n", done.stderr)


def test_weights_come_from_the_hub_and_then_from_the_cache(server, tmp_path):
    made, home = tmp_path / "made", tmp_path / "home"
    narrow_hf_model(vocab_size=8192, bos_token_id=8191, eos_token_id=8191).save_pretrained(made)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(BUNDLED / name, made)
    server.files = {f"/gpt2/resolve/main/{n}": (made / n).read_bytes() for n in HUB_FILES}
    server.files["/api/models/gpt2"] = f'{{"id": "gpt2", "sha": "{COMMIT}"}}'.encode()
    snapshot = home / "hub" / "models--gpt2" / "snapshots" / COMMIT
    for endpoint in (server.url, NOWHERE):
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
        done = run_python("-m", "data.fetch", "weights", "gpt2", folder=tmp_path, **hub)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"gpt2 is in {snapshot}\n"
    assert (snapshot / HUB_FILES[1]).read_bytes() == (made / HUB_FILES[1]).read_bytes()
    code = "from models.gpt2 import GPT2Model; print(GPT2Model.from_pretrained('gpt2').config)"
    assert "n_layer=3" in run_python("-c", code, folder=tmp_path, **hub).stdout
