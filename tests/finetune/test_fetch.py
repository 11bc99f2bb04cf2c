"""Fetching data and weights, from a server on this machine that fails in all the usual ways."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from datasets import read_pairs
from finetune.fetch import ATTEMPTS, QUORA, fetch_data
from finetune.runtime import RunError
from models.pretrained import BUNDLED, HUB_FILES
from tests.conftest import ROOT, narrow_hf_model

NAME, ROWS = "quora-train.csv", 3000
TABLE = {NAME: (True, ROWS)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # a revision of the imitated hub


def pairs_file(rows: int, labelled: bool = True, word: str = "this") -> bytes:
    lines = ["\tid\tsentence1\tsentence2" + "\tis_duplicate" * labelled]
    lines += [f"{i}\t{i:x}\tIs it {word}?\tIs it {i}?" + "\t1.0" * labelled for i in range(rows)]
    return "\n".join(lines).encode() + b"\n"


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.files`, once per item of `server.faults` in that item's way."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.command, self.path, self.headers))
        fault = server.faults.pop(0) if server.faults else None
        if fault == "silent":
            server.released.wait(30)
            return
        body = server.files.get(self.path)
        if body is None or isinstance(fault, int) and fault >= 400:
            self.send_error(404 if body is None else fault)
            return
        tag = server.tag.format(hashlib.sha256(body).hexdigest())
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.ranges else 0
        if self.headers.get("If-Range", tag) != tag and server.compares:
            start = 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("X-Repo-Commit", COMMIT)
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(body) if fault is None else start + server.piece
        self.wfile.write(body[start:end])
        if fault == "stalls":
            server.released.wait(30)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server to fill with files; most faults end or stall an answer after `piece` bytes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files = {f"/{NAME}": pairs_file(ROWS)}
    server.requests, server.faults, server.piece = [], [], 1000
    server.tag, server.ranges, server.compares = '"{}"', True, True
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetch(server, folder, table=TABLE):
    fetch_data(server.url, folder, table, timeout=0.5, pause=0)


def ranges(server) -> list[str | None]:
    return [headers["Range"] for _, _, headers in server.requests]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def broken_off(server, tmp_path):
    """A folder in which a run was left when every answer ended early."""
    server.faults = ["ends"] * ATTEMPTS
    with pytest.raises(RunError):
        fetch(server, tmp_path)
    server.requests.clear()
    return tmp_path


def test_a_file_arrives_whole_and_alone(server, tmp_path, capsys):
    fetch(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == server.files[f"/{NAME}"]
    assert names(tmp_path) == [NAME]
    assert ranges(server) == [None]
    assert f"{NAME}: 3,000 pairs\n" in capsys.readouterr().out


def test_a_file_that_is_there_is_kept_and_not_asked_for(server, tmp_path, capsys):
    mine = pairs_file(ROWS, word="mine")
    (tmp_path / NAME).write_bytes(mine)
    fetch(server, tmp_path)
    assert server.requests == []
    assert (tmp_path / NAME).read_bytes() == mine
    assert "3,000 pairs, there already" in capsys.readouterr().out


def test_a_file_that_is_there_and_too_short_is_told_and_kept(server, tmp_path):
    mine = pairs_file(ROWS - 1)
    (tmp_path / NAME).write_bytes(mine)
    with pytest.raises(RunError, match=r"2,999 usable pairs, not 3,000 or more\): move it away"):
        fetch(server, tmp_path)
    assert server.requests == []
    assert (tmp_path / NAME).read_bytes() == mine


def test_a_good_file_survives_when_the_next_one_cannot_be_had(server, tmp_path):
    with pytest.raises(RunError, match=r"quora-dev\.csv \(HTTP Error 404"):
        fetch(server, tmp_path, TABLE | {"quora-dev.csv": (True, 1)})
    assert (tmp_path / NAME).read_bytes() == server.files[f"/{NAME}"]


def test_a_slash_ends_no_address(server, tmp_path):
    fetch_data(f"{server.url}/", tmp_path, TABLE)
    assert [path for _, path, _ in server.requests] == [f"/{NAME}"]


@pytest.mark.parametrize("fault", ["ends", "stalls"])
@pytest.mark.parametrize("tag", ['"{}"', 'W/"{}"'])
def test_a_broken_connection_is_gone_on_with(server, tmp_path, fault, tag):
    server.faults, server.tag = [fault, fault], tag
    fetch(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == server.files[f"/{NAME}"]
    assert ranges(server) == [None, "bytes=999-", "bytes=1998-"]  # the last byte once more
    strong = tag.startswith('"')
    assert all(("If-Range" in headers) == strong for _, _, headers in server.requests[1:])
    assert names(tmp_path) == [NAME]


def test_an_answer_that_never_gets_whole_is_told_and_the_next_run_goes_on(server, tmp_path):
    server.faults = ["ends"] * ATTEMPTS
    with pytest.raises(
        RunError, match=r"ended after 3,997 of .* bytes\): check .* by hand"
    ) as told:
        fetch(server, tmp_path)
    assert "\n" not in str(told.value)
    assert len(server.requests) == ATTEMPTS
    assert names(tmp_path) == [f".{NAME}.etag", f".{NAME}.part"]
    fetch(server, tmp_path)
    assert ranges(server)[ATTEMPTS:] == ["bytes=3996-"]
    assert (tmp_path / NAME).read_bytes() == server.files[f"/{NAME}"]
    assert names(tmp_path) == [NAME]


def test_a_whole_part_that_was_not_put_in_place_is_not_fetched_again(server, broken_off):
    whole = server.files[f"/{NAME}"]
    (broken_off / f".{NAME}.part").write_bytes(whole)
    fetch(server, broken_off)
    assert ranges(server) == [f"bytes={len(whole) - 1}-"]
    assert (broken_off / NAME).read_bytes() == whole


@pytest.mark.parametrize("compares", [True, False], ids=["If-Range", "no If-Range"])
@pytest.mark.parametrize("rows", [ROWS + 10, 100])  # longer and shorter than the part
def test_a_file_that_changed_meanwhile_is_started_anew(server, broken_off, compares, rows):
    server.compares = compares  # a server without If-Range sends the end of the new file
    server.files[f"/{NAME}"] = changed = pairs_file(rows, word="that")
    assert (len(changed) < 3997) == (rows == 100)
    fetch(server, broken_off, {NAME: (True, rows)})
    assert (broken_off / NAME).read_bytes() == changed
    assert ranges(server) == ["bytes=3996-"] + [None] * (not compares)


def test_a_server_without_ranges_starts_over(server, broken_off):
    server.ranges = False
    server.faults = ["ends"]
    fetch(server, broken_off)
    assert ranges(server) == ["bytes=3996-", "bytes=999-"]
    assert (broken_off / NAME).read_bytes() == server.files[f"/{NAME}"]


def test_a_server_without_etags_starts_over(server, tmp_path):
    server.tag = ""
    server.faults = ["ends"]
    fetch(server, tmp_path)
    assert ranges(server) == [None, None]
    assert (tmp_path / NAME).read_bytes() == server.files[f"/{NAME}"]


@pytest.mark.parametrize("fault", ["silent", "stalls"])
def test_a_server_that_hangs_is_told(server, tmp_path, fault):
    server.faults = [fault] * ATTEMPTS
    started = time.monotonic()
    with pytest.raises(RunError, match=rf"could not fetch {server.url}/{NAME} \(timed out\)"):
        fetch(server, tmp_path)
    assert time.monotonic() - started < 20
    assert len(server.requests) == ATTEMPTS
    assert (tmp_path / f".{NAME}.part").exists() == (fault == "stalls")
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize(("code", "requests"), [(404, 1), (403, 1), (503, ATTEMPTS)])
def test_a_refusal_is_told_and_asked_again_only_if_it_may_pass(server, broken_off, code, requests):
    server.faults = [code] * ATTEMPTS
    with pytest.raises(RunError, match=rf"\(HTTP Error {code}: .*\): check the address"):
        fetch(server, broken_off)
    assert len(server.requests) == requests
    assert (broken_off / f".{NAME}.part").stat().st_size == 3997


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<!DOCTYPE html>\n<title>Sign in</title>\n", "has no column id, sentence1"),
        (pairs_file(ROWS, labelled=False), "has no column is_duplicate"),
        (pairs_file(ROWS - 1), "2,999 usable pairs, not 3,000 or more"),
        (pairs_file(ROWS) + b"\xff", "is not UTF-8 text"),
        (b"", "has no column id"),
    ],
)
def test_another_file_is_refused_and_the_next_run_starts_anew(server, tmp_path, body, reason):
    good, server.files[f"/{NAME}"] = server.files[f"/{NAME}"], body
    with pytest.raises(RunError, match=rf"{server.url}/{NAME} is not the course's file.*{reason}"):
        fetch(server, tmp_path)
    assert not (tmp_path / NAME).exists()
    assert not (tmp_path / f".{NAME}.part").exists()
    server.files[f"/{NAME}"] = good
    fetch(server, tmp_path)
    assert ranges(server) == [None, None]
    assert names(tmp_path) == [NAME]


def test_an_answer_of_unknown_length_is_refused(server, tmp_path):
    server.faults = ["no length"]
    with pytest.raises(RunError, match=r"\(the server does not say how long the file is\)"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("address", ["", "nowhere", "me:", "http://127.0.0.1:x", "http://é/a b"])
def test_what_is_no_address_is_told(tmp_path, capsys, address):
    with pytest.raises(RunError, match=f"could not fetch {address}/{NAME} "):
        fetch_data(address, tmp_path, TABLE, pause=0)
    if ":" not in address:
        assert "trying again" not in capsys.readouterr().out


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_python(*words: str, folder, **environment) -> subprocess.CompletedProcess[str]:
    """Python in `folder` as a person calls it, with this checkout's modules."""
    environment |= {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    inherited = {k: v for k, v in os.environ.items() if k != "HF_HUB_CACHE"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def test_the_three_course_files_by_the_command(server, tmp_path):
    (tmp_path / "data").mkdir()
    for name, (labelled, least) in QUORA.items():
        server.files[f"/mirror/{name}"] = pairs_file(least, labelled)
    server.faults, server.piece = ["ends"], 1_000_000
    words = ["-m", "finetune.fetch", "data", f"{server.url}/mirror"]
    done = run_python(*words, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path / "data") == sorted(QUORA)
    assert [len(read_pairs(tmp_path / "data" / name, False, 9).ids) for name in QUORA] == [9] * 3
    assert "quora-test-student.csv: 80,000 pairs\n" in done.stdout
    assert ranges(server) == [None, "bytes=999999-", None, None]


def test_a_server_that_cannot_be_reached_is_told_in_one_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    url = f"http://127.0.0.1:{closed_port()}"
    done = run_python("-m", "finetune.fetch", "data", url, folder=tmp_path)
    assert done.returncode == 1
    reason = re.fullmatch(
        rf"error: could not fetch {url}/{NAME} \((.*)\): check the address and the network, then "
        "run the command again, it goes on where it stopped; or put the file there by hand, see "
        r"data/README\.md\n",
        done.stderr,
    )
    assert "Connection refused" in reason[1]
    assert names(tmp_path / "data") == []


def test_weights_come_from_the_hub_and_then_from_the_cache(server, tmp_path):
    made, home = tmp_path / "made", tmp_path / "home"
    narrow_hf_model(vocab_size=8192, bos_token_id=8191, eos_token_id=8191).save_pretrained(made)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(BUNDLED / name, made)
    server.files = {f"/gpt2/resolve/main/{n}": (made / n).read_bytes() for n in HUB_FILES}
    server.files["/api/models/gpt2"] = f'{{"id": "gpt2", "sha": "{COMMIT}"}}'.encode()
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(home)}
    done = run_python("-m", "finetune.fetch", "weights", "gpt2", folder=tmp_path, **hub)
    assert done.returncode == 0, done.stderr
    snapshot = home / "hub" / "models--gpt2" / "snapshots" / COMMIT
    assert f"gpt2 (3 layers, 8,192 tokens) is in {snapshot}\n" in done.stdout
    assert "--model_size gpt2" in done.stdout
    assert (snapshot / HUB_FILES[1]).read_bytes() == (made / HUB_FILES[1]).read_bytes()

    hub["HF_ENDPOINT"] = f"http://127.0.0.1:{closed_port()}"
    code = "from models.gpt2 import GPT2Model; print(GPT2Model.from_pretrained('gpt2').config)"
    done = run_python("-c", code, folder=tmp_path, **hub)
    assert "n_layer=3" in done.stdout, done.stderr


def test_weights_without_a_network_end_in_one_sentence_within_seconds(tmp_path):
    nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}", "HF_HOME": str(tmp_path)}
    started = time.monotonic()
    done = run_python("-m", "finetune.fetch", "weights", "gpt2", folder=tmp_path, **nowhere)
    assert time.monotonic() - started < 60  # the hub's own retries alone take 24 s a file
    assert done.returncode == 1
    said = "error: gpt2 is not in the Hugging Face cache and could not be fetched from the hub ("
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_other_weights_are_refused_with_the_names_there_are(tmp_path):
    done = run_python("-m", "finetune.fetch", "weights", "gpt3", folder=tmp_path)
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-1]
    assert all(name in sentence for name in ("'gpt3'", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    assert "nano" not in sentence


@pytest.mark.parametrize(
    "words",
    [
        ["foo"],
        [""],
        ["--weights"],
        ["--weights", ""],
        ["--weights", "gpt2", "gpt2-xl"],
        ["--weights", "--data"],
        ["--data", "--weights"],
        ["--data", "http://127.0.0.1", "more"],
    ],
)
def test_setup_refuses_other_words_before_it_does_anything(words, tmp_path):
    python = tmp_path / "python"  # what it would call first
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "setup.sh", *words],
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    usage = "usage: bash setup.sh [--test [PYTEST ARGUMENTS] | --data [URL] | --weights SIZE]\n"
    assert (done.returncode, done.stderr) == (2, usage)
    assert not (tmp_path / "called").exists()
