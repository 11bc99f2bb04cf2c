"""How a run ends: exit codes, one sentence for what a user can mend, signals."""

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch.distributed as dist

from datasets import DataError
from finetune.files import release
from finetune.runtime import LESS_MEMORY, RunError, torchrun_place
from models.pretrained import CheckpointError
from modules.adapters import AdapterError

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")
PEER_GONE = re.compile("Connection (closed|reset) by peer|Broken pipe|Read timeout|Socket closed")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TO_GO_ON = "the same command with --resume goes on"


class Interrupted(BaseException):
    """A signal has come that asks the run to end: `signum`."""

    def __init__(self, signum: int):
        self.signum = signum


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], int]]:
    """Within, SIGNALS are only noted; gives a function that tells which one came, or 0.

    Raises Interrupted behind the block if one came.
    """
    came = 0

    def note(signum: int, frame: object) -> None:
        nonlocal came
        came = signum

    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    before = {s: handler for s, handler in before.items() if handler != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield lambda: came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if came:
        raise Interrupted(came)


def run(main: Callable[[], None], to_go_on: str = TO_GO_ON) -> None:
    """Call a script's main and leave: what a user can mend ends in one sentence and exit code 1.

    SIGTERM ends in 143, SIGINT in 130 and SIGHUP in 129, with `to_go_on` as advice.
    """
    for stream in (sys.stdout, sys.stderr):  # no character is worth a run; logs can be followed
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if not dist.is_torchelastic_launched():  # its processes are to go at once, waiting or not
        for signum in set(SIGNALS) - {signal.SIGINT}:
            if signal.getsignal(signum) == signal.SIG_DFL:
                signal.signal(signum, _interrupt)
    code, reason = 0, ""
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # until process 0 has written everything
    except SystemExit:
        raise
    except BaseException as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        code, reason = _verdict(error, to_go_on)
        if not reason:
            raise
    _leave(code, reason)


def _verdict(error: BaseException, to_go_on: str) -> tuple[int, str]:
    """Exit code and what to tell; nothing to tell of what is a fault of the program."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        signum = getattr(error, "signum", signal.SIGINT)
        advice = f": {to_go_on}" if to_go_on and "--predict_only" not in sys.argv else ""
        return 128 + signum, f"stopped by {signal.Signals(signum).name}{advice}"
    if isinstance(error, AdapterError | CheckpointError | DataError | RunError | OSError):
        return 1, str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return 1, f"out of memory: {LESS_MEMORY}; what was saved before is whole"
    if dist.is_initialized() and PEER_GONE.search(str(error)):
        return 1, "another process is gone"
    return 1, ""


def _interrupt(signum: int, frame: object) -> None:
    raise Interrupted(signum)


def _leave(code: int, reason: str) -> None:
    release()
    rank = torchrun_place()[0]
    if code == 1:
        if rank:  # where process 0 fails as well, torchrun ends this one before it says so too
            time.sleep(3)
        reason = f"error{f' in process {rank}' if rank else ''}: {reason}"
    if reason and (code == 1 or not rank):
        print(reason, file=sys.stderr)
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    # DistributedDataParallel keeps the group alive, whose threads can abort the interpreter while
    # it shuts down: leave without that.
    os._exit(code)
