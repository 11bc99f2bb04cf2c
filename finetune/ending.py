"""How a run ends: exit codes, one-sentence messages for errors that a user can fix, signals."""

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

from finetune.runtime import MEMORY_ADVICE, torchrun_ranks
from modules.settings import UserError

OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory"
    "|Failed to CUDA calloc"  # NCCL
    "|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    "|CUBLAS_STATUS_NOT_INITIALIZED when calling .cublas(Lt)?Create"  # no room for its workspace
)
PEER_EXITED = re.compile(
    "Connection (closed|reset) by peer|Broken pipe|Read timeout|Socket closed|ncclRemoteError"
)
NOT_DETERMINISTIC = re.compile(r"\w+ does not have a deterministic implementation")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESUME_ADVICE = "run the same command with --resume to continue"


class Finished(Exception):
    """Raised when there is nothing to do; the message says why."""


class Interrupted(BaseException):
    """Raised when the signal `signum` asks the run to stop."""

    def __init__(self, signum: int):
        self.signum = signum


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Defer SIGNALS in the block; yields a function that returns the last one received, or 0.

    Raises Interrupted after the block if one was received.
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
    """Call a script's main; an error that a user can fix ends it with one sentence and exit code 1.

    The exit code is 143 after SIGTERM, 130 after SIGINT and 129 after SIGHUP, with `advice` shown.
    `debug` also shows the traceback. Only rank 0 prints to stdout.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the process ends
        elif isinstance(stream, io.TextIOWrapper):  # not in a notebook
            # A character that cannot be encoded must not end a run, and logs must be current.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if torchrun_ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    if not dist.is_torchelastic_launched():  # under torchrun, even a blocked process must end
        for signum in set(SIGNALS) - {signal.SIGINT}:
            if signal.getsignal(signum) == signal.SIG_DFL:
                signal.signal(signum, _interrupt)
    code, reason = 0, ""
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # wait until rank 0 has written everything
    except SystemExit:
        raise
    except Finished as finished:
        print(finished)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code, reason = _exit_code_and_message(error, advice)
        if not reason:
            raise
    _exit(code, reason)


def _exit_code_and_message(error: BaseException, advice: str) -> tuple[int, str]:
    """Exit code and message; the message is empty for a bug in the program."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        signum = getattr(error, "signum", signal.SIGINT)
        sentence = f"stopped by {signal.Signals(signum).name}"
        return 128 + signum, f"{sentence}: {advice}" if advice else sentence
    if isinstance(error, UserError | OSError):
        return 1, str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return 1, f"out of memory: {MEMORY_ADVICE}; earlier saves are intact"
    if found := NOT_DETERMINISTIC.search(str(error)):
        return 1, f"{found[0]} on this device: leave out --deterministic"
    if dist.is_initialized() and PEER_EXITED.search(str(error)):
        return 1, "another process has exited"
    return 1, ""


def _interrupt(signum: int, frame: object) -> None:
    raise Interrupted(signum)


def _exit(code: int, reason: str) -> None:
    rank = torchrun_ranks()[0]
    if code == 1:
        if rank:  # if rank 0 fails too, torchrun ends this one before it repeats the error
            time.sleep(3)
        reason = f"error{f' on rank {rank}' if rank else ''}: {reason}"
    if reason and (code == 1 or not rank):
        print(reason, file=sys.stderr)
    if not dist.is_initialized():
        if code:
            sys.exit(code)
        return
    sys.stdout.flush()
    # DistributedDataParallel keeps the process group alive, and its threads can abort the
    # interpreter's shutdown, so skip the shutdown.
    os._exit(code)
