"""Fetching the Quora files and weights, from a server on this machine that fails as servers do."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import fetch
from models.pretrained import BUNDLED, HUB_FILES
from modules.settings import UserError
from tests.conftest import ROOT, narrow_hf_model

NAME, ROWS = "quora-train.csv", 3000
PART = f".{NAME}.part"
NOWHERE = "http://127.0.0.1:1"  # no port that anything listens on
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # a revision of the imitated hub


def pairs_file(rows: int, labelled: bool = True, word: str = "this") -> bytes:
    lines = ["\tid\tsentence1\tsentence2" + "\tis_duplicate" * labelled]
    lines += [f"{i}\t{i:x}\tIs it {word}?\tIs it {i}?" + "\t1.0" * labelled for i in range(rows)]
    return "\n".join(lines).encode() + b"\n"


WHOLE = pairs_file(ROWS)


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.files`, once per item of `server.faults` in that item's way."""

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers["Range"])
        fault = server.faults.pop(0) if server.faults else None
        if fault == "hangs":
            server.released.wait(30)
            return
        body = server.files.get(self.path)
        if body is None or isinstance(fault, int):
            self.send_error(fault or 404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.has_ranges else 0
        if self.headers.get("If-Range", f'"{len(body)}"') != f'"{len(body)}"':
            start = 0  # the file is not the one that the part is of
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
            self.wfile.write(body[start : start + server.piece if fault == "ends" else None])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server to fill with files; the fault "ends" breaks an answer off after `piece` bytes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "PAUSE", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.folder = f"http://127.0.0.1:{server.server_port}", tmp_path
    server.files, server.ranges, server.has_ranges = {f"/{NAME}": WHOLE}, [], True
    server.faults, server.piece, server.released = [], 1000, threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def failure(server, **others: tuple[bool, int]) -> str:
    """Fetch the files into the server's folder: the sentence that this fails with, if it does."""
    sentence = ""
    try:
        fetch.fetch_quora(server.url, server.folder, {NAME: (True, ROWS)} | others)
    except UserError as error:
        sentence = str(error)
    assert "\n" not in sentence
    return sentence


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_file_arrives_whole_and_alone(server, capsys):
    server.files = {f"/[1]/{NAME}": WHOLE}
    server.url += "/[1]/"  # no pattern for curl, and no second slash
    assert not failure(server)
    assert contents(server.folder) == {NAME: WHOLE}
    assert server.ranges == [None]
    assert f"{NAME}: 3,000 pairs\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "reason"),
    [(ROWS, ""), (ROWS - 1, "2,999 usable pairs, not 3,000 or more): move it away and run")],
)
def test_an_existing_file_is_checked_and_never_replaced(server, capsys, rows, reason):
    mine = pairs_file(rows, word="mine")
    (server.folder / NAME).write_bytes(mine)
    said = failure(server)
    assert reason in said
    assert bool(said) == bool(reason)
    assert bool(said) != ("3,000 pairs, already there" in capsys.readouterr().out)
    assert contents(server.folder) == {NAME: mine}
    assert server.ranges == []


def test_a_fetched_file_stays_when_the_next_one_fails(server):
    assert re.search(r"/another \(.*404\): check the address", failure(server, another=(True, 1)))
    assert contents(server.folder) == {NAME: WHOLE}


@pytest.mark.parametrize(
    ("has_ranges", "ranges"),
    [(True, [None, "bytes=1000-", "bytes=2000-"]), (False, [None, "bytes=1000-", None])],
)
def test_a_broken_download_is_resumed_or_without_ranges_starts_anew(server, has_ranges, ranges):
    server.has_ranges, server.faults = has_ranges, ["ends", "ends"][: 1 + has_ranges]
    assert not failure(server)
    assert server.ranges == ranges
    assert contents(server.folder) == {NAME: WHOLE}


def test_a_download_that_breaks_in_every_attempt_is_resumed_by_the_next_run(server):
    server.faults = ["ends"] * fetch.ATTEMPTS
    said = failure(server)
    assert re.match(rf"could not fetch {server.url}/{NAME} \(.+\): check .*, see data/README", said)
    assert contents(server.folder)[PART] == WHOLE[:4000]
    assert len(server.ranges) == fetch.ATTEMPTS
    assert not failure(server)
    assert server.ranges[fetch.ATTEMPTS :] == ["bytes=4000-"]
    assert contents(server.folder) == {NAME: WHOLE}


def test_the_part_of_a_file_that_has_changed_is_fetched_anew(server):
    server.faults = ["ends"] * fetch.ATTEMPTS
    assert failure(server)
    server.files[f"/{NAME}"] = changed = pairs_file(ROWS + 10, word="that")
    assert not failure(server)
    assert server.ranges[fetch.ATTEMPTS :] == ["bytes=4000-", None]
    assert contents(server.folder) == {NAME: changed}


@pytest.mark.parametrize("rows", [ROWS, ROWS + 10])
def test_a_part_as_long_as_the_file_or_longer_is_fetched_anew(server, rows):
    part = pairs_file(rows, word="that")  # of the same length if it has as many rows
    (server.folder / PART).write_bytes(part)
    assert not failure(server)
    assert server.ranges == [f"bytes={len(part)}-", None]
    assert contents(server.folder) == {NAME: WHOLE}


@pytest.mark.parametrize(
    ("fault", "reason", "attempts"),
    [(404, ".*404", 1), (403, ".*403", 1), (503, ".*503", 4), ("hangs", "Operation too slow.*", 4)],
)
def test_a_refusal_keeps_the_part_and_may_be_retried(server, monkeypatch, fault, reason, attempts):
    monkeypatch.setattr(fetch, "SILENCE", 1)
    (server.folder / PART).write_bytes(b"a part")
    server.faults = [fault] * 4
    said = failure(server)
    assert re.match(rf"could not fetch {server.url}/{NAME} \({reason}\): check the address", said)
    assert len(server.ranges) == attempts
    assert contents(server.folder) == {PART: b"a part"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<!DOCTYPE html>\n<title>Sign in</title>\n", "has no column id, sentence1"),
        (pairs_file(ROWS, labelled=False), "has no column is_duplicate"),
        (WHOLE[:-9], "2,999 usable pairs, not 3,000 or more"),
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


@pytest.mark.parametrize("address", ["", "me:", "http://127.0.0.1:x", "http://a b"])
def test_an_unusable_address_is_refused_at_once(server, capsys, address):
    server.url = address
    assert re.match(rf"could not fetch {address}/{NAME} \(.+\): check the", failure(server))
    assert "trying again" not in capsys.readouterr().out


def run_python(*words: str, folder, **environment) -> subprocess.CompletedProcess[str]:
    """Python as a person calls it in `folder`, with this checkout's modules."""
    environment |= {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_CACHE"} | environment
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_command_fetches_the_three_course_files(server, tmp_path):
    (tmp_path / "data").mkdir()
    files = {name: pairs_file(least, labelled) for name, (labelled, least) in fetch.QUORA.items()}
    server.files = {f"/mirror/{name}": body for name, body in files.items()}
    done = run_python("-m", "data.fetch", "quora", f"{server.url}/mirror", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path / "data") == files
    assert "quora-test-student.csv: 80,000 pairs\n" in done.stdout


def test_the_command_says_in_one_sentence_why_it_failed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / PART).write_bytes(b"a part")
    refused = (
        rf"could not fetch {NOWHERE}/{NAME} \(Failed to connect .*\): check the address and the "
        "network, then run the command again, which resumes the download; or put the file there "
        r"by hand, see data/README\.md"
    )
    no_curl = "curl is needed to fetch files: install it"
    no_hub = r"gpt2 is not in the Hugging Face cache and could not be fetched from the hub \(.*"
    for words, sentence, environment in (
        (["quora", NOWHERE], refused, {}),
        (["quora", NOWHERE], no_curl, {"PATH": str(tmp_path)}),
        (["weights", "gpt2"], no_hub, {"HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path)}),
    ):
        started = time.monotonic()
        done = run_python("-m", "data.fetch", *words, folder=tmp_path, **environment)
        assert time.monotonic() - started < 60  # the hub's own retries alone take 24 s a file
        assert done.returncode == 1
        assert re.fullmatch(rf"error: {sentence}\n", done.stderr)
    assert contents(tmp_path / "data") == {PART: b"a part"}


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
        assert f"gpt2 (3 layers, 8,192 tokens) is in {snapshot}\n" in done.stdout
        assert "--model_size gpt2" in done.stdout
    assert (snapshot / HUB_FILES[1]).read_bytes() == (made / HUB_FILES[1]).read_bytes()
    code = "from models.gpt2 import GPT2Model; print(GPT2Model.from_pretrained('gpt2').config)"
    assert "n_layer=3" in run_python("-c", code, folder=tmp_path, **hub).stdout


def test_other_weights_are_refused_with_the_names_there_are(tmp_path):
    done = run_python("-m", "data.fetch", "weights", "gpt3", folder=tmp_path)
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-1]
    assert all(name in sentence for name in ("'gpt3'", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    assert "nano" not in sentence


WORDS = ["foo", "''", "--weights", "--weights ''", "--weights gpt2 gpt2-xl", "--weights --data"]


@pytest.mark.parametrize("words", [*WORDS, "--data --weights", "--data http://127.0.0.1 more"])
def test_setup_refuses_other_words_before_it_does_anything(words):
    command = ["bash", ROOT / "setup.sh", *shlex.split(words)]
    env = os.environ | {"PYTHON": "false"}  # would end it with 1
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    usage = "usage: bash setup.sh [--test [PYTEST ARGUMENTS] | --data [URL] | --weights SIZE]\n"
    assert (done.returncode, done.stderr) == (2, usage)
