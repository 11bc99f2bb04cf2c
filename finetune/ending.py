"""How a run ends: exit codes, one sentence for what a user can mend, signals."""

import contextlib
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch.distributed as dist

from finetune.runtime import LESS_MEMORY, torchrun_place
from modules.settings import UserError

OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory"
    "|Failed to CUDA calloc"  # NCCL
    "|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    "|CUBLAS_STATUS_NOT_INITIALIZED when calling .cublas(Lt)?Create"  # no room for its workspace
)
PEER_GONE = re.compile(
    "Connection (closed|reset) by peer|Broken pipe|Read timeout|Socket closed|ncclRemoteError"
)
NOT_DETERMINISTIC = re.compile(r"\w+ does not have a deterministic implementation")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TO_RESUME = "the same command with --resume resumes it"


class Finished(Exception):
    """There is nothing left to do; the message says why."""


class Interrupted(BaseException):
    """The signal `signum` asks the run to end."""

    def __init__(self, signum: int):
        self.signum = signum


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], int]]:
    """Within, SIGNALS are only noted; yields a function that returns the one that came, or 0.

    Raises Interrupted after the block if one came.
    """
    came = []
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    before = {s: handler for s, handler in before.items() if handler != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, lambda signum, frame: came.append(signum))
    try:
        yield lambda: came[-1] if came else 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if came:
        raise Interrupted(came[-1])


def run(main: Callable[[], None], *, debug: bool = False, advice: str = "") -> None:
    """Call a script's main: what a user can mend ends in one sentence and exit code 1.

    SIGTERM ends in 143, SIGINT in 130 and SIGHUP in 129, with `advice`. With `debug` the traceback
    is shown too. Of several ranks only rank 0 prints.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the process ends
        elif isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            # No character is worth a run; logs can be followed.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if torchrun_place()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    if not dist.is_torchelastic_launched():  # its processes end at once, waiting or not
        for signum in set(SIGNALS) - {signal.SIGINT}:
            if signal.getsignal(signum) == signal.SIG_DFL:
                signal.signal(signum, _interrupt)
    code, reason = 0, ""
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # until rank 0 has written everything
    except SystemExit:
        raise
    except Finished as finished:
        print(finished)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code, reason = _verdict(error, advice)
        if not reason:
            raise
    _exit(code, reason)


def _verdict(error: BaseException, advice: str) -> tuple[int, str]:
    """Exit code and sentence; no sentence for a fault of the program."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        signum = getattr(error, "signum", signal.SIGINT)
        sentence = f"stopped by {signal.Signals(signum).name}"
        return 128 + signum, f"{sentence}: {advice}" if advice else sentence
    if isinstance(error, UserError | OSError):
        return 1, str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return 1, f"out of memory: {LESS_MEMORY}; earlier saves are intact"
    if found := NOT_DETERMINISTIC.search(str(error)):
        return 1, f"{found[0]} on this device: leave out --deterministic"
    if dist.is_initialized() and PEER_GONE.search(str(error)):
        return 1, "another process has gone"
    return 1, ""


def _interrupt(signum: int, frame: object) -> None:
    raise Interrupted(signum)


def _exit(code: int, reason: str) -> None:
    rank = torchrun_place()[0]
    if code == 1:
        if rank:  # if rank 0 fails as well, torchrun ends this one before it says so too
            time.sleep(3)
        reason = f"error{f' on rank {rank}' if rank else ''}: {reason}"
    if reason and (code == 1 or not rank):
        print(reason, file=sys.stderr)
    if not dist.is_initialized():
        if code:
            sys.exit(code)
        return
    sys.stdout.flush()
    # DistributedDataParallel keeps the group alive, whose threads can abort the interpreter while
    # it shuts down: exit without that.
    os._exit(code)
