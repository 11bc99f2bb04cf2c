"""Fetch what this repository does not hold: the Quora files, or a GPT-2 from the hub.

python -m data.fetch quora                # into data/; `quora URL` takes them from a mirror
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
QUORA = {  # file -> labelled, least number of pairs
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
        for name, (labelled, least) in QUORA.items():
            fetch_pairs(f"{args.url.rstrip('/')}/{name}", Path("data", name), labelled, least)
    else:
        print(f"{args.size} is in {find_checkpoint(args.size)}")


def fetch_pairs(url: str, target: Path, labelled: bool, least: int) -> None:
    """Fetch a file of at least so many pairs; one that exists is checked, never replaced.

    Raises UserError if it cannot be fetched or is another file.
    """
    exists = target.exists()
    path = target if exists else target.with_name(f".{target.name}.part")
    if not exists:
        download(url, path)
    try:
        count = len(read_pairs(path, labelled).ids)
        if count < least:
            raise UserError(f"{count:,} usable pairs, not {least:,} or more")
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
    """Fetch `url`, or what `part` lacks of it, which UserError leaves as it is."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import httpx, logging

    logging.set_verbosity_error()  # an attempt that fails is followed by others, or by the error
    print(f"Fetching {url}", flush=True)
    try:
        with open(part, "ab") as file:
            # A compressed answer would not continue a file that is not.
            headers = {"Accept-Encoding": "identity"}
            http_get(url, file, resume_size=file.tell(), headers=headers)
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 416:
            part.unlink()  # as long as the file, or longer
            return download(url, part)
        raise UserError(
            f"could not fetch {url} ({first_line(error)}): check the address and the network, then "
            "run the command again, which resumes the download; or put the file there by hand, "
            "see data/README.md"
        ) from None


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command resumes the download")
