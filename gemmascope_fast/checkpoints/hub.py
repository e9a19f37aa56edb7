"""Checks once, briefly, whether Hugging Face can be reached. Its client would retry for about 25 seconds without a
network."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemmascope_fast.errors import GemmaScopeFastError

ANSWER_SECONDS = 2.0


def no_answer(repo: str, revision: str | None = None, seconds: float | None = None) -> str | None:
    """Why Hugging Face does not answer about a repository, in one line; None if it answers, even with an error.

    seconds: how long to wait; the default is $HF_HUB_ETAG_TIMEOUT, or 2.
    """
    wait = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER_SECONDS) if seconds is None else seconds
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    # In a thread, because the lookup of the host name has no timeout and could wait for a dead name server.
    threading.Thread(target=_ask, args=(repo, revision, wait, answers), daemon=True).start()
    try:
        error = answers.get(timeout=wait + 0.5)
    except queue.Empty:
        return f"no answer in {wait:g} seconds"
    if error is None:
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    # an impossible repository name is an error before any request
    answered = type(error).__name__ == "HFValidationError" if status is None else status < 500
    return None if answered else first_line(error)


@contextmanager
def from_hub_or_cache(name: str) -> Iterator[dict[str, Any]]:
    """Options for transformers' `from_pretrained`: {"local_files_only": True} if Hugging Face does not answer. Raises
    GemmaScopeFastError if then the model is not in the cache."""
    silent = None if Path(name).exists() else no_answer(name)
    try:
        yield {} if silent is None else {"local_files_only": True}
    except OSError as error:
        if silent is None:
            raise
        raise GemmaScopeFastError(
            f"model {name}: not a local path, not in the cache, and Hugging Face cannot be reached ({silent})"
        ) from error


def first_line(error: Exception) -> str:
    """First line of an error of the hub's client; the rest is advice about its options."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _ask(repo: str, revision: str | None, seconds: float, answers: queue.SimpleQueue[Exception | None]) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(repo, revision=revision, timeout=seconds)
    except Exception as error:  # noqa: BLE001  (passed to the caller's thread, which handles it)
        answers.put(error)
    else:
        answers.put(None)
