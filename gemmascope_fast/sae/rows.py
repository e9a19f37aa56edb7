"""Where the rows of an SAE are stored: in memory (this file), in pinned host memory (sae/pinned.py) or in a file
(checkpoints/mapped.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def as_rows(W_enc: Tensor) -> Tensor:
    """W_enc [d_in, d_sae] as the transposed view of contiguous [d_sae, d_in] storage."""
    rows = W_enc.t()
    return W_enc if rows.is_contiguous() else rows.contiguous().t()


class Rows:
    """Rows in memory.  Every SAE has one of these; subclasses handle rows stored elsewhere."""

    only_through_screen = False  # True: reading all rows is too slow, so every encode uses the screen
    in_memory = True  # large pages help rows in memory; for a mapped file they would read all of it

    def check(self) -> None:
        """Raise CheckpointError if the file behind the rows has changed since it was opened."""

    def lay_out(self, W_enc: Tensor) -> None:
        """Give the parameter W_enc [d_in, d_sae] the layout that kernels read, if it has another.

        Called once after a change of the weights: assignment, `.data =` and casts can bring another layout.
        """
        laid_out = self.laid_out(W_enc.data)
        if laid_out is not W_enc.data:
            W_enc.data = laid_out

    def laid_out(self, W_enc: Tensor) -> Tensor:
        """The same values in that layout; W_enc itself if it has it."""
        return as_rows(W_enc)

    def holds(self, weight: Tensor) -> bool:
        """Whether this weight is stored in a mapped file."""
        return False

    def prefetch(self, weight: Tensor, ids: Tensor) -> None:
        """Prefetch the rows of a weight that are read next, if that helps."""

    def after_change(self, sae: Any) -> Rows:
        """The `Rows` to use after the parameters were cast, moved or replaced."""
        return self

    def before_copy(self, sae: Any, memo: dict[int, Any]) -> None:
        """Add to the memo of a deepcopy what must not be copied."""

    def before_pickle(self) -> None:
        """Raise TypeError if the rows cannot be pickled."""
