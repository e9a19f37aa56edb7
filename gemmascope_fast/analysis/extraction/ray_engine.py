"""Extraction on Ray Data (`--engine ray`): one task reads and cuts the text, a pool of workers that each hold model
and SAE maps blocks to tables, and the caller writes them in their order.  The blocks, and what is made of each, are
those of an extraction without Ray: so are the bytes, where the workers are machines of one kind."""

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
# CPUs as Ray counts them: n workers and the reader fit on n.  They have to differ: Ray fuses stages of equal needs, and
# one worker would read the text and do everything.
READER, WORKER = 0.25, 0.75


@dataclass
class RayEngine:
    """`engine` of `extract`.  A worker that dies is replaced, and its block is made again.

    make() gives what a worker makes tables with, an Extractor; it is sent there by pickle.  threads: of each worker's
    sums (more or fewer could round otherwise).  made_by: the process that made each block, in order.
    """

    make: Callable[[], Callable[[Block], dict[str, Columns]]]
    workers: int = 2
    threads: int = 1
    made_by: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers: expected at least 1, got {self.workers}")

    def __call__(self, fresh: Callable[[Cursor], Iterable[Block]], start: Cursor) -> Iterator[Made]:
        """Blocks and their tables, in order.  ValueError where the text cannot be read, after what comes before."""
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        if not ray.is_initialized():
            ray.init(log_to_driver=False)  # one that runs already where RAY_ADDRESS names it
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # bytes: one of our blocks is one of Ray's, however small it is
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
            # raised there it would take the blocks along that stand before it
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
        block.windows.clear()  # the caller needs to know where the block ends, and not what is in it
        return _row_of("made", (block, tables, None, os.getpid()))


def _row_of(name: str, value: Any) -> Row:
    return {name: np.array([pickle.dumps(value)], dtype=object)}
