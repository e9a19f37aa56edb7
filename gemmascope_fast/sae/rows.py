"""Where the rows of an SAE live: in memory (here), in pinned host memory (sae/pinned.py), in a file
(checkpoints/mapped.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def as_rows(W_enc: Tensor) -> Tensor:
    """The same [d_in, d_sae] values as the transposed view of contiguous [d_sae, d_in] storage."""
    rows = W_enc.t()
    return W_enc if rows.is_contiguous() else rows.contiguous().t()


class Rows:
    """Rows in memory.  An SAE has one of these; subclasses say what differs where rows live elsewhere."""

    only_through_screen = False  # True: a full read is too slow to offer, so every encode takes the screen
    in_memory = True  # large pages help rows in memory; a mapped file would be read in full

    def check(self) -> None:
        """Raise CheckpointError where what the rows are read from has changed since it was opened."""

    def lay_out(self, W_enc: Tensor) -> Tensor:
        """W_enc [d_in, d_sae] in the layout that kernels read; the same tensor where it has it already.

        Called after the weights were seen to change: assignment, `.data =` and casts can bring another layout.
        """
        return as_rows(W_enc)

    def holds(self, weight: Tensor) -> bool:
        """Whether this weight lies in a mapped file."""
        return False

    def prefetch(self, weight: Tensor, ids: Tensor) -> None:
        """Announce which rows of a weight are read next, where that helps."""

    def after_change(self, sae: Any) -> Rows:
        """The rows of an SAE whose parameters were cast, moved or replaced."""
        return self

    def before_copy(self, sae: Any, memo: dict[int, Any]) -> None:
        """Put into the memo of a deepcopy what must not be copied as it is."""

    def before_pickle(self) -> None:
        """Raise TypeError where the rows cannot be pickled."""
