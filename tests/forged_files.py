"""Makes forged files: other contents with matching digests and checksums."""

import json
import struct
import zlib

import numpy as np
import torch

from gemmascope_fast.checkpoints import packed
from gemmascope_fast.files.arrays import open_safetensors
from gemmascope_fast.files.write import write_safetensors
from gemmascope_fast.sae.screen import Screen

NAMES = ("code", "code2", "table", "centre", "directions", "scales")


def forged_native(source, target, change):
    """`target`: the SAE with its screen that is in `source`, after `change` of the screen's tensors by name."""
    entries, metadata = open_safetensors(source)
    held = {name: e.read(torch.device("cpu"), e.dtype, finite=False) for name, e in entries.items()}
    screen = {n.removeprefix("screen."): held.pop(n) for n in list(held) if n.startswith("screen.")}
    change(screen)
    about = json.loads(metadata["gemmascope_fast"])
    # the digest is of the tensors in the order of the screen's fields
    about["screen_data"] = Screen(*(screen.get(name) for name in NAMES)).digest()
    write_safetensors(
        target, held | {f"screen.{n}": t for n, t in screen.items()}, {"gemmascope_fast": json.dumps(about)}
    )


class Packed:
    """A packed file to forge."""

    def __init__(self, path):
        self.path, self.data = path, bytearray(path.read_bytes())
        (self.length,) = struct.unpack("<Q", self.data[:8])
        self.header = json.loads(self.data[8 : 8 + self.length])
        self.about = json.loads(self.header["__metadata__"][packed.KEY])
        self.arrays = packed.open_layout(path)[0].arrays()

    def write(self, about=None, raw=None):
        """Another header, over the same arrays."""
        text = json.dumps(self.about if about is None else about) if raw is None else raw
        header = json.dumps(self.header | {"__metadata__": {packed.KEY: text}}).encode()
        self.data[8 : 8 + self.length] = header.ljust(self.length)
        self.path.write_bytes(self.data)

    def change(self, change):
        """Other bytes in the resident arrays, with the checksums they have."""
        about = json.loads(json.dumps(self.about))
        tensors, places = {}, {}
        for name, (dtype, shape, at) in self.arrays.items():
            if name not in (packed.ROWS, "W_dec"):
                kind = np.dtype("f4") if dtype == torch.float32 else np.dtype("u1")
                flat = np.frombuffer(self.data, kind, int(np.prod(shape)), at).copy()
                tensors[name], places[name] = torch.from_numpy(flat).reshape(shape), at
        change(tensors)
        layout = packed.open_layout(self.path)[0]
        for name, tensor in tensors.items():
            raw = tensor.contiguous().numpy().tobytes()
            self.data[places[name] : places[name] + len(raw)] = raw
            pieces = layout.pieces(name)
            about["checksums"][name] = [zlib.crc32(tensor[i].contiguous().numpy().tobytes()) for i in pieces]
        self.write(about)
