"""Fetch what this repository does not hold: the Quora files, or a GPT-2 from the hub.

python -m finetune.fetch data                # into data/; data URL takes them from a mirror
python -m finetune.fetch weights gpt2        # into the Hugging Face cache
"""

import argparse
import os
import re
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from datasets import DataError, read_pairs
from finetune.ending import run
from finetune.runtime import RunError
from models.config import SIZES
from models.pretrained import find_checkpoint, load_config, load_tokenizer

COURSE = "https://raw.githubusercontent.com/cfifty/public_cs224n_gpt/HEAD/data"
QUORA = {  # file -> labelled, least number of pairs
    "quora-train.csv": (True, 280_000),
    "quora-dev.csv": (True, 40_000),
    "quora-test-student.csv": (False, 80_000),
}
ATTEMPTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("data").add_argument("url", nargs="?", default=COURSE)
    sizes = [size for size in SIZES if size != "gpt2-nano"]
    what.add_parser("weights").add_argument("size", choices=sizes)
    args = parser.parse_args()
    if args.what == "data":
        fetch_data(args.url, Path("data"), QUORA)
    else:
        fetch_weights(args.size)


def fetch_weights(size: str) -> None:
    """Have a model in the Hugging Face cache and say where; CheckpointError if that fails."""
    folder = find_checkpoint(size)
    layers, tokens = load_config(folder).n_layer, len(load_tokenizer(folder))
    print(f"{size} ({layers} layers, {tokens:,} tokens) is in {folder}")
    print(f"Next: any of the four scripts with --model_size {size}")


def fetch_data(
    base: str,
    folder: Path,
    files: dict[str, tuple[bool, int]],
    timeout: float = 20,
    pause: float = 1,
) -> None:
    """Fetch those of `files` that `folder` lacks; one that is there is checked, never replaced.

    `timeout` is how many seconds a server may be silent, `pause` those between two attempts.
    Raises RunError where a file cannot be had or is not what it should be.
    """
    for name, (labelled, least) in files.items():
        url, target, part = f"{base.rstrip('/')}/{name}", folder / name, folder / f".{name}.part"
        there = target.exists()
        if not there:
            print(f"Fetching {url}")
            _fetch(url, part, timeout, pause)
        try:
            count = len(read_pairs(target if there else part, labelled).ids)
            if count < least:
                raise DataError(f"{count:,} usable pairs, not {least:,} or more")
        except DataError as error:
            where, advice = (target, "move it away") if there else (url, "give another URL")
            if not there:
                part.unlink()
            raise RunError(
                f"{where} is not the course's file ({error}): {advice} and run the command again, "
                "or see data/README.md"
            ) from None
        if not there:
            os.replace(part, target)
            part.with_suffix(".etag").unlink(missing_ok=True)
        print(f"{target}: {count:,} pairs" + ", there already" * there)


def _fetch(url: str, part: Path, timeout: float, pause: float) -> None:
    """Receive `part` in some attempts, each of which goes on where the last one broke off."""
    for left in reversed(range(ATTEMPTS)):
        try:
            return _receive(url, part, timeout)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: not an address
            code = error.code if isinstance(error, HTTPError) else 500
            if code == 416:  # the file there is shorter than the part
                part.unlink(missing_ok=True)
            reason = error.reason if type(error) is URLError else error
            if not left or isinstance(error, ValueError) or (code < 500 and code != 416):
                raise RunError(
                    f"could not fetch {url} ({reason}): check the address and the network, then "
                    "run the command again, it goes on where it stopped; or put the file there "
                    "by hand, see data/README.md"
                ) from None
        print(f"{url}: {reason}; trying again")
        time.sleep(pause)


def _receive(url: str, part: Path, timeout: float) -> None:
    """Bring `part` to its full length; what it holds stays if the file's ETag is the same still."""
    etag = part.with_suffix(".etag")
    known = etag.read_text() if part.exists() and etag.exists() else ""
    # Its last byte comes again: of a part that is whole, a server would have nothing to send.
    start = max(part.stat().st_size - 1, 0) if known else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and not known.startswith("W/"):  # If-Range takes strong ones only: RFC 9110, 13.1.5
        headers["If-Range"] = known
    with urlopen(Request(url, headers=headers), timeout=timeout) as response:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
        if response.status != 206:
            start, length = 0, int(response.headers["Content-Length"] or -1)
        elif span and int(span[1]) == start and response.headers["ETag"] == known:
            length = int(span[2])
        else:
            part.unlink(missing_ok=True)
            raise ConnectionError("the server answered with a part of another file")
        if length < 0:
            raise ValueError("the server does not say how long the file is")
        with (
            open(part, "r+b" if start else "wb") as file,
            tqdm(total=length, initial=start, unit="B", unit_scale=True, disable=None) as bar,
        ):
            if not start:
                etag.write_text(response.headers["ETag"] or "")
            file.seek(start)
            while file.tell() < length and (block := response.read1(2**16)):
                file.write(block)
                bar.update(len(block))
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
    if size != length:
        raise ConnectionError(f"the connection ended after {size:,} of {length:,} bytes")


if __name__ == "__main__":
    run(main, "the same command goes on where it stopped")
