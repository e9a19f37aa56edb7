"""Extraction on Ray Data (`--engine ray`). One task reads and splits the text, workers with model and SAE convert
blocks to tables, and the caller writes them in order.  Blocks and tables are those of an extraction without Ray, so
the bytes are the same too, if the workers are machines of one kind."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemmascope_fast.analysis.extraction.run import Made
from gemmascope_fast.analysis.extraction.store import Columns
from gemmascope_fast.analysis.extraction.windows import Block, Cursor

Row = dict[str, np.ndarray]
# CPUs as Ray counts them: n workers and the reader fit on n.  They must differ, because Ray fuses stages with equal
# resources, and then one worker would read the text and do everything.
READER, WORKER = 0.25, 0.75


@dataclass
class RayEngine:
    """An `engine` for `extract`.  A worker that dies is replaced, and its block is computed again.

    make() returns what a worker makes tables with, an Extractor; it is pickled and sent there.  threads: number per
    worker (another number could round differently).  made_by: the process that made each block, in order.
    """

    make: Callable[[], Callable[[Block], dict[str, Columns]]]
    workers: int = 2
    threads: int = 1
    made_by: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers: expected at least 1, got {self.workers}")

    def __call__(self, fresh: Callable[[Cursor], Iterable[Block]], start: Cursor) -> Iterator[Made]:
        """Blocks and their tables, in order.  If the text cannot be read, ValueError after the blocks before that."""
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        if not ray.is_initialized():
            ray.init(log_to_driver=False)  # uses an existing Ray if RAY_ADDRESS names one
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # bytes: one of our blocks is one of Ray's, however small
        context.enable_progress_bars = False
        with DataContext.current(context):
            source = ray.data.from_items([0], override_num_blocks=1).map_batches(
                _reader(fresh, start), batch_size=1, num_cpus=READER
            )
            made = source.map_batches(
                _Worker,
                fn_constructor_args=(self.make, self.threads),
                batch_size=1,
                compute=ActorPoolStrategy(size=self.workers),
                num_cpus=WORKER,
            )
            for row in made.iter_rows():
                block, tables, error, pid = pickle.loads(row["made"])
                if error is not None:
                    raise ValueError(error)
                self.made_by.append(pid)
                yield block, tables


def _reader(fresh: Callable[[Cursor], Iterable[Block]], start: Cursor) -> Callable[[Row], Iterator[Row]]:
    def read(_row: Row) -> Iterator[Row]:
        try:
            for block in fresh(start):
                yield _row_of("block", (block, None))
        except ValueError as error:
            # raising here would lose the earlier blocks
            yield _row_of("block", (None, str(error)))

    return read


class _Worker:
    def __init__(self, make: Callable[[], Callable[[Block], dict[str, Columns]]], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.extractor = make()

    def __call__(self, batch: Row) -> Row:
        block, error = pickle.loads(batch["block"][0])
        if block is None:
            return _row_of("made", (None, None, error, os.getpid()))
        tables = self.extractor(block)
        block.windows.clear()  # the caller needs the end of the block, not its contents
        return _row_of("made", (block, tables, None, os.getpid()))


def _row_of(name: str, value: Any) -> Row:
    return {name: np.array([pickle.dumps(value)], dtype=object)}
