"""SAEs larger than memory: rows are mapped from a packed file (packed.py), only the 8-bit screen is in memory."""

from __future__ import annotations

import math
import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemmascope_fast import backends
from gemmascope_fast.checkpoints.base import Checkpoint, hook_site
from gemmascope_fast.checkpoints.kinds import KINDS
from gemmascope_fast.checkpoints.packed import ROWS, Layout, checksum, open_layout, source_of
from gemmascope_fast.checkpoints.stored_screen import check_screen
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.progress import progress_bar
from gemmascope_fast.files.regular import check_regular
from gemmascope_fast.sae.config import SAEConfig, SAEMetadata
from gemmascope_fast.sae.rows import Rows
from gemmascope_fast.sae.screen import Screen

if TYPE_CHECKING:
    from gemmascope_fast.sae.jumprelu import JumpReLUSAE

VECTORS = ("b_enc", "b_dec", "threshold")
# Python names it from 3.13 on; this is Linux's value on all platforms of torch.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0


def open_packed(path: Path, checkpoint: Checkpoint) -> JumpReLUSAE:
    """Open the SAE of a packed file. Rows and decoder are mapped (the decoder in the file where it is stored); codes,
    bounds and vectors are in memory.

    Results are those of the SAE in memory, byte for byte.  What is read now is compared with its checksums; `verify`
    compares the rows too.  Raises CheckpointError naming file and array for a damaged or truncated file. If a file is
    truncated later, the next call raises.
    """
    layout, about = open_layout(path)
    _agree(path, layout, about, checkpoint)
    mapped = Mapped.of(path, layout, about)

    def resident(name: str) -> Tensor:
        dtype, shape, at = layout.arrays()[name]
        tensor = torch.empty(shape, dtype=dtype)
        backends.advise_large_pages(tensor)
        with open(path, "rb") as file:
            file.seek(at)
            if file.readinto(memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)) != tensor.nbytes:
                raise CheckpointError(f"{path}: {name}: truncated")
        _compare(path, layout, about, name, tensor)
        if name in VECTORS and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name}: expected finite values, got NaN or Inf")
        return tensor

    extra: dict[str, Any] = {"figures": checkpoint.figures} if checkpoint.figures else {}
    metadata = SAEMetadata(checkpoint.model_name, checkpoint.extra.get("neuronpedia_id"), extra)
    site, out = (hook_site(path, about.get(name)) for name in ("hook_name", "hook_name_out"))
    site, out = checkpoint.site or site, checkpoint.site_out or checkpoint.site or out
    cfg = SAEConfig(layout.d_in, layout.d_sae, layout.d_out, site, out, metadata)
    vectors = {name: resident(name) for name in VECTORS}
    sae = KINDS[about["kind"]](W_enc=mapped.view(ROWS).t(), W_dec=mapped.view("W_dec"), cfg=cfg, **vectors)
    sae.requires_grad_(False)
    screen = Screen(*(resident(f"screen.{n}") for n in ("code", "code2", "table", "centre")))
    check_screen(path, screen, layout.d_in, layout.d_sae)
    sae.rows = mapped
    sae.screen_cache.adopt(sae, screen)
    return sae


def _agree(path: Path, layout: Layout, about: dict[str, Any], checkpoint: Checkpoint) -> None:
    """CheckpointError if a packed file contradicts its checkpoint."""
    arrays = checkpoint.arrays
    (d_in, d_sae), d_out = arrays["W_enc"].shape, arrays["W_dec"].shape[1]
    said = {"kind": about["kind"], "d_in": layout.d_in, "d_sae": layout.d_sae, "d_out": layout.d_out}
    there = {"kind": checkpoint.kind, "d_in": d_in, "d_sae": d_sae, "d_out": d_out}
    if layout.decoder is not None:
        said |= {"file": about["file"], "decoder": layout.decoder}
        there |= {"file": checkpoint.path.name, "decoder": arrays["W_dec"].at}
    for name, value in there.items():
        if said[name] != value:
            raise CheckpointError(
                f"{path}: {name}: expected {value}, as in {checkpoint.path.name}, got {said[name]}; delete the file to"
                " have it written again"
            )


def verify(path: str | Path, progress: bool | None = None) -> None:
    """Read a whole packed file, including the mapped rows and W_dec wherever it is stored, and compare the checksums.

    progress: show a bar on stderr, as in `from_pretrained`.  Raises CheckpointError naming file and array if not.
    """
    path = Path(path)
    layout, about = open_layout(path)
    mapped = Mapped.of(path, layout, about)
    total = sum(mapped.view(name).nbytes for name in layout.checked())
    with progress_bar(total, path.name, progress) as update:
        for name in layout.checked():
            _compare(path, layout, about, name, mapped.view(name), mapped)
            update(mapped.view(name).nbytes)


def _compare(
    path: Path, layout: Layout, about: dict[str, Any], name: str, tensor: Tensor, mapped: Mapped | None = None
) -> None:
    for number, (index, want) in enumerate(zip(layout.pieces(name), about["checksums"][name], strict=True)):
        if mapped is not None:
            mapped.check()
        if checksum(tensor[index]) != want:
            raise CheckpointError(
                f"{path}: {name}: damaged in panel {number}: its checksum differs; delete the file to have it written"
                " again"
            )


class _Mapping:
    """A file mapped up to its end, with its size and times, because reading past the end of a file that shrank would
    kill the process."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        check_regular(path)
        # open as long as the mapping: a descriptor stays with the same file even if another file gets its name
        self.file = open(path if descriptor is None else descriptor, "rb")  # noqa: SIM115
        self.was = self._is()
        # Private: an edit of the weights stays in this process.  Writable private memory counts against the OS's commit
        # limit, and a mapping larger than memory would be refused without NORESERVE.
        flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        self.buffer = mmap.mmap(self.file.fileno(), self.was[0], flags=flags, prot=prot)
        self._address = torch.frombuffer(self.buffer, dtype=torch.uint8, count=1).data_ptr()

    def _is(self) -> tuple[int, int]:
        stat = os.fstat(self.file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def check(self) -> None:
        """CheckpointError if the file is not the one that was mapped."""
        size, time = self._is()
        if size < self.was[0]:
            raise CheckpointError(f"{self.path}: truncated to {size} bytes of {self.was[0]}")
        if (size, time) != self.was:
            raise CheckpointError(f"{self.path}: written to since it was opened: open it again")

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], at: int) -> Tensor:
        return torch.frombuffer(self.buffer, dtype=dtype, count=math.prod(shape), offset=at).reshape(shape)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and 0 <= tensor.data_ptr() - self._address < self.was[0]

    def again(self) -> _Mapping:
        """Another mapping of the same file, which must not have changed."""
        self.check()
        return _Mapping(self.path, os.dup(self.file.fileno()))


class Mapped(Rows):
    """The mapped arrays of an SAE: those of a packed file, and W_dec from the checkpoint if it is used there."""

    in_memory = False

    def __init__(self, layout: Layout, packed: _Mapping, checkpoint: _Mapping | None) -> None:
        self.path, self.layout, self._packed, self._checkpoint = packed.path, layout, packed, checkpoint
        self.mappings = [packed] if checkpoint is None else [packed, checkpoint]

    @classmethod
    def of(cls, path: Path, layout: Layout, about: dict[str, Any]) -> Mapped:
        """Map the packed file, and the checkpoint next to it if W_dec is used from there; CheckpointError if that is
        not the file that was packed."""
        if layout.decoder is None:
            return cls(layout, _Mapping(path), None)
        checkpoint = path.with_name(about["file"])
        if not checkpoint.is_file() or source_of(checkpoint) != about["source"]:
            raise CheckpointError(f"{path}: W_dec is in {checkpoint}, which is missing or was changed")
        there = _Mapping(checkpoint)
        if layout.decoder < 0 or layout.decoder % 4 or layout.decoder + 4 * layout.d_sae * layout.d_out > there.was[0]:
            raise CheckpointError(f"{path}: W_dec: byte {layout.decoder} of {checkpoint} does not fit its shape")
        return cls(layout, _Mapping(path), there)

    def check(self) -> None:
        """CheckpointError if a file is not the one that was mapped."""
        for mapping in self.mappings:
            mapping.check()

    def view(self, name: str) -> Tensor:
        """An array, without reading it."""
        if name == "W_dec" and self._checkpoint is not None:
            assert self.layout.decoder is not None
            return self._checkpoint.view(torch.float32, (self.layout.d_sae, self.layout.d_out), self.layout.decoder)
        return self._packed.view(*self.layout.arrays()[name])

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is stored in a file."""
        return any(mapping.holds(tensor) for mapping in self.mappings)

    def prefetch(self, weight: Tensor, ids: Tensor) -> None:
        """Prefetch these rows of a matrix, all at once, if it is in the file."""
        if self.holds(weight) and weight.is_contiguous():
            backends.announce_rows(weight, ids)

    def after_change(self, sae: Any) -> Rows:
        # after a cast or a move they are in memory
        return self if any(self.holds(w) for w in (sae.W_enc, sae.W_dec)) else Rows()

    def before_pickle(self) -> None:
        raise TypeError(
            f"{self.path}: an SAE of mapped rows cannot be pickled, as its rows would be written; open its checkpoint"
            ' with rows="mmap" where you need it'
        )

    def before_copy(self, sae: Any, memo: dict[int, Any]) -> None:
        """Add to the memo of a deepcopy of `sae` the rows of a second private mapping. This takes no memory, and edits
        of one SAE do not change the other.

        Raises ValueError if rows were edited in place, because the edits exist only in this mapping.
        """
        twin = None
        for name, array in (("W_enc", ROWS), ("W_dec", "W_dec")):
            weight = getattr(sae, name)
            if id(weight) in memo or not self.holds(weight):
                continue
            if not weight.is_inference() and weight._version != 0:
                raise ValueError(f"{name}: expected the rows of {self.path}; edited rows cannot be copied")
            twin = twin or self._again()
            rows = twin.view(array)
            copied = nn.Parameter(rows.t() if name == "W_enc" else rows, requires_grad=weight.requires_grad)
            memo[id(weight)] = copied
        memo[id(self)] = twin or Rows()  # if the memo already has copied rows, they are in memory

    def _again(self) -> Mapped:
        return Mapped(self.layout, self._packed.again(), self._checkpoint and self._checkpoint.again())
