"""Fetch what this repository does not hold: the Quora files, or a GPT-2 from the hub.

python -m data.fetch quora                # into data/; `quora URL` takes them from a mirror
python -m data.fetch weights gpt2         # into the Hugging Face cache
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from data.pairs import read_pairs
from models.config import SIZES
from models.pretrained import find_checkpoint, load_config, load_tokenizer
from modules.settings import UserError

COURSE = "https://raw.githubusercontent.com/cfifty/public_cs224n_gpt/HEAD/data"
QUORA = {  # file -> labelled, least number of pairs
    "quora-train.csv": (True, 280_000),
    "quora-dev.csv": (True, 40_000),
    "quora-test-student.csv": (False, 80_000),
}
ATTEMPTS = 4  # for each file
PAUSE = 1  # seconds between two attempts
SILENCE = 20  # seconds without a byte after which an attempt ends
BROKEN = {18, 28, 52, 55, 56, 92}  # curl's exit codes when an answer breaks off or stalls
NO_RANGES = {33, 36}  # and when the server cannot resume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("quora").add_argument("url", nargs="?", default=COURSE)
    sizes = [size for size in SIZES if size != "gpt2-nano"]
    what.add_parser("weights").add_argument("size", choices=sizes)
    args = parser.parse_args()
    if args.what == "quora":
        fetch_quora(args.url, Path("data"), QUORA)
    else:
        fetch_weights(args.size)


def fetch_weights(size: str) -> None:
    """Have a model in the Hugging Face cache and say where; raises UserError if that fails."""
    folder = find_checkpoint(size)
    layers, tokens = load_config(folder).n_layer, len(load_tokenizer(folder))
    print(f"{size} ({layers} layers, {tokens:,} tokens) is in {folder}")
    print(f"Next: any of the four scripts with --model_size {size}")


def fetch_quora(base: str, folder: Path, files: dict[str, tuple[bool, int]]) -> None:
    """Fetch those of `files` that `folder` lacks; one that exists is checked, never replaced.

    Raises UserError if a file cannot be fetched or is not the course's.
    """
    for name, (labelled, least) in files.items():
        url, target, part = f"{base.rstrip('/')}/{name}", folder / name, folder / f".{name}.part"
        exists = target.exists()
        if not exists:
            print(f"Fetching {url}", flush=True)
            download(url, part)
        try:
            count = len(read_pairs(target if exists else part, labelled).ids)
            if count < least:
                raise UserError(f"{count:,} usable pairs, not {least:,} or more")
        except UserError as error:
            where, advice = (target, "move it away") if exists else (url, "give another URL")
            if not exists:
                remove(part)
            raise UserError(
                f"{where} is not the course's file ({error}): {advice} and run the command again, "
                "or see data/README.md"
            ) from None
        if not exists:
            os.replace(part, target)
            remove(part)
        print(f"{target}: {count:,} pairs" + (", already there" if exists else ""))


def curl_command(url: str, part: Path) -> list[str]:
    """curl's arguments to fetch `url`, or the rest of it if its ETag is still that of `part`."""
    command = ["curl", "--fail", "--location", "--globoff", "--connect-timeout", str(SILENCE)]
    command += ["--speed-time", str(SILENCE), "--speed-limit", "1"]
    command += ["--progress-bar" if sys.stderr.isatty() else "--silent"]
    command += ["--write-out", "%{http_code} %{errormsg}", "--output", str(part)]
    etag = part.with_suffix(".etag")
    if not part.exists():
        command += ["--etag-save", str(etag)]
    elif etag.exists() and etag.stat().st_size:
        command += ["--header", f"If-Range: {etag.read_text().strip()}"]
    return [*command, "--continue-at", "-", "--url", url]


def download(url: str, part: Path) -> None:
    """Fetch `url` by curl, resuming `part` if there is one; raises UserError if that fails."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            command = curl_command(url, part)
            curl = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            raise UserError("curl is needed to fetch files: install it") from None
        code = curl.returncode
        status, _, message = curl.stdout.partition(" ")
        reason = message or f"HTTP status {status}, curl's exit code {code}"
        if code in NO_RANGES or status == "416":  # 416: the part is as long as the file, or longer
            remove(part)
        elif code == 0:
            return
        elif code not in BROKEN and not status.startswith("5"):
            break
        if attempt < ATTEMPTS:
            print(f"{url}: {reason}; trying again", flush=True)
            time.sleep(PAUSE)
    if not part.exists():
        remove(part)  # its ETag
    raise UserError(
        f"could not fetch {url} ({reason}): check the address and the network, then run the "
        "command again, which resumes the download; or put the file there by hand, see "
        "data/README.md"
    )


def remove(part: Path) -> None:
    """Remove a part and the ETag kept beside it."""
    for path in (part, part.with_suffix(".etag")):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command resumes the download")
