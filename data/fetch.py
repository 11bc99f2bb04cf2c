"""Download what this repository does not include: the Quora files, or GPT-2 weights.

python -m data.fetch quora                # into data/; `quora URL` uses a mirror
python -m data.fetch weights gpt2         # into the Hugging Face cache
"""

import argparse
import os
import sys
from pathlib import Path

from data.pairs import read_pairs
from models.config import SIZES, first_line
from models.pretrained import find_checkpoint
from modules.settings import UserError

COURSE = "https://raw.githubusercontent.com/cfifty/public_cs224n_gpt/HEAD/data"
QUORA = {  # file -> whether it has labels, minimum number of pairs
    "quora-train.csv": (True, 280_000),
    "quora-dev.csv": (True, 40_000),
    "quora-test-student.csv": (False, 80_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("quora").add_argument("url", nargs="?", default=COURSE)
    sizes = [size for size in SIZES if size != "gpt2-nano"]
    what.add_parser("weights").add_argument("size", choices=sizes)
    args = parser.parse_args()
    if args.what == "quora":
        for name, (has_labels, least) in QUORA.items():
            fetch_pairs(f"{args.url.rstrip('/')}/{name}", Path("data", name), has_labels, least)
    else:
        print(f"{args.size} is in {find_checkpoint(args.size)}")


def fetch_pairs(url: str, target: Path, has_labels: bool, least: int) -> None:
    """Download a file and check it; a file that already exists is only checked.

    Raises UserError if the download fails, or the file is invalid or has fewer than `least` pairs.
    """
    exists = target.exists()
    path = target if exists else target.with_name(f".{target.name}.part")
    if not exists:
        download(url, path)
    try:
        count = len(read_pairs(path, has_labels).ids)
        if count < least:
            raise UserError(f"{count:,} usable pairs, expected at least {least:,}")
    except UserError as error:
        where, advice = (target, "move it away") if exists else (url, "give another URL")
        if not exists:
            path.unlink()
        raise UserError(
            f"{where} is not the course's file ({error}): {advice} and run the command again, "
            "or see data/README.md"
        ) from None
    os.replace(path, target)
    print(f"{target}: {count:,} pairs" + (", already there" if exists else ""), flush=True)


def download(url: str, part: Path) -> None:
    """Download `url` to `part`, or what `part` still lacks. A UserError leaves `part` in place."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import httpx, logging

    logging.set_verbosity_error()  # failed attempts are retried, or end in the UserError below
    print(f"Fetching {url}", flush=True)
    try:
        with open(part, "ab") as file:
            # A compressed response could not be appended to an uncompressed file.
            headers = {"Accept-Encoding": "identity"}
            http_get(url, file, resume_size=file.tell(), headers=headers)
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 416:
            part.unlink()  # at least as long as the file, so start over
            return download(url, part)
        raise UserError(
            f"could not fetch {url} ({first_line(error)}): check the address and the network, then "
            "run the command again to resume the download, or put the file into data/ yourself "
            "(see data/README.md)"
        ) from None


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to resume the download")
