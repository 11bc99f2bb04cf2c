"""Errors that a user can mend end in one sentence."""

import pytest
import torch
from torch.distributed import DistBackendError

from finetune import ending


def test_an_operator_without_a_deterministic_form_says_which(capsys):
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(SystemExit):
            ending.run(lambda: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)))
    finally:
        torch.use_deterministic_algorithms(False)
    sentence = "put_ does not have a deterministic implementation on this device"
    assert capsys.readouterr().err == f"error: {sentence}: leave out --deterministic\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4"),
        DistBackendError("NCCL error in: NCCLUtils.cpp: remote process exited, ncclRemoteError: A"),
    ],
)
def test_a_rank_whose_peer_has_gone_says_so(error, monkeypatch, capsys):
    def main():
        raise error

    def exit(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(ending.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ending.os, "_exit", exit)
    with pytest.raises(SystemExit) as stopped:
        ending.run(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: another process has exited\n"
