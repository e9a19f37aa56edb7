"""What one request asks for: its form in `SamplingParams.extra_args`, and the checks before it is admitted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from gemmascope_fast.attach.edits import (
    Ablate,
    Add,
    Clamp,
    Direction,
    Edit,
    Mask,
    MinClamp,
    Scale,
    check_edits,
)  # fmt: skip
from gemmascope_fast.attach.vllm.saes import KEY, About
from gemmascope_fast.errors import AttachError

MOST_ENTRIES = 256  # observations, edits and alarms of one request, each
MOST_FEATURES = 4096  # features that one request names
MOST_BYTES = 1 << 20  # of a request's JSON text
EDITS: dict[str, type[Edit]] = {
    "clamp": Clamp, "ablate": Ablate, "scale": Scale, "add": Add, "min_clamp": MinClamp, "mask": Mask,
    "direction": Direction,
}  # fmt: skip
_NAMES = {kind: name for name, kind in EDITS.items()}
_PARTS = {"observe", "steer", "alarm", "tokens", "cached"}


class RequestError(AttachError, ValueError):
    """A request's "gemmascope" argument is malformed, or does not fit the engine's SAEs."""


@dataclass(frozen=True)
class Observe:
    """where: an edit that does nothing, for its selection of rows.  features: None for all.  top: the k largest."""

    sae: str
    where: Edit
    features: tuple[int, ...] | None = None
    top: int | None = None


@dataclass(frozen=True)
class Stop:
    """Ends the request when the feature is above the threshold on a selected row."""

    sae: str
    where: Edit
    feature: int
    threshold: float


@dataclass
class Asked:
    """One request, checked.  steer: edits by SAE.  text: it came as JSON text, so its answer goes out as JSON."""

    observe: list[Observe] = field(default_factory=list)
    steer: dict[str, list[Edit]] = field(default_factory=dict)
    alarm: list[Stop] = field(default_factory=list)
    tokens: str = "content"
    cached: str = "compute"
    text: bool = False

    def saes(self) -> list[str]:
        """The names of the SAEs that it needs, without repeats."""
        return list(dict.fromkeys([*(o.sae for o in self.observe), *self.steer, *(a.sae for a in self.alarm)]))


def request(
    observe: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (),
    steer: Edit | Mapping[str, Any] | Sequence[Edit | Mapping[str, Any]] = (),
    alarm: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    *,
    tokens: str = "content",
    cached: str = "compute",
) -> dict[str, Any]:
    """The `extra_args` of one request: `SamplingParams(extra_args=request(observe="name"))`.

    observe: names of SAEs, or dicts {"sae", "positions", "features"}.  features: "all", a list, or {"top": k}.
    steer: edits such as `Clamp(feature, value)`, whose `site` is the SAE's name, or dicts {"edit": "clamp", "sae",
    "feature", "value", "positions"}; the edits are clamp, ablate, scale, add, min_clamp, mask and direction.
    alarm: dicts {"sae", "feature", "threshold", "positions"}; a feature above the threshold ends the request.
    "sae" may be left out if the engine has only one.  positions: "all" (default), "prompt", "generated", "last" (the
    prompt's last token) or [begin, end).
    tokens: "content" leaves out special tokens as in `attach`; "all".
    cached: "compute" computes observed prompt positions even if the prefix cache has them; "report" reads the cache,
    and `Features.cached` says how many positions at the beginning came from it.

    It is checked when the engine receives it; here only edits that cannot be sent are a RequestError.
    """
    given = {"observe": _several(observe), "alarm": _several(alarm), "tokens": tokens, "cached": cached}
    given["steer"] = [_as_json(edit) if isinstance(edit, Edit) else edit for edit in _several(steer)]
    return {KEY: given}


def _several(given: Any) -> list[Any]:
    return [given] if isinstance(given, (str, Mapping, Edit)) else list(given)


def _as_json(edit: Edit) -> dict[str, Any]:
    if type(edit) not in _NAMES:
        raise RequestError(f"steer: expected one of {', '.join(EDITS)}, got {type(edit).__name__}")
    if edit.sequences is not None or not edit.on or not isinstance(edit.positions, (str, list, tuple)):
        raise RequestError(f"steer: in vLLM an edit has no `sequences`, `on` or mask of positions, got {edit}")
    sent: dict[str, Any] = {"edit": _NAMES[type(edit)], "positions": edit.positions}
    for each in fields(edit):
        if each.init and each.name not in ("positions", "sequences", "on", "site"):
            value = getattr(edit, each.name)
            sent[each.name] = value.tolist() if isinstance(value, torch.Tensor) else value
    if isinstance(edit, Mask):
        sent["features"] = list(edit.features)
    if edit.site is not None:
        sent["sae"] = edit.site
    return sent


def parse(given: Any, saes: Mapping[str, About], prompt: int, limit: int) -> Asked:
    """Check a request's "gemmascope" argument.  RequestError, EditError or FeatureIndexError says what is wrong.

    given: a dict, or its JSON text.  prompt: number of prompt tokens.  limit: the engine's maximal length.
    """
    text = isinstance(given, str)
    if isinstance(given, str):
        if len(given) > MOST_BYTES:
            raise RequestError(f"{KEY}: expected at most {MOST_BYTES} bytes of JSON, got {len(given)}")
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{KEY}: expected JSON: {error}") from error
    return _Parser(saes, prompt, limit).request(given, text)


class _Parser:
    def __init__(self, saes: Mapping[str, About], prompt: int, limit: int) -> None:
        self.saes, self.prompt, self.limit = saes, prompt, limit
        self.named = 0

    def request(self, given: Any, text: bool) -> Asked:
        _dict(given, KEY, _PARTS)
        asked = Asked(text=text)
        for name, known in (("tokens", ("content", "all")), ("cached", ("compute", "report"))):
            value = given.get(name, known[0])
            if value not in known:
                raise RequestError(f"{name}: expected {' or '.join(known)}, got {value!r}")
            setattr(asked, name, value)
        asked.observe = [self.observe(each) for each in _list(given, "observe")]
        for sae, edit in [self.edit(each) for each in _list(given, "steer")]:
            asked.steer.setdefault(sae, []).append(edit)
        asked.alarm = [self.alarm(each) for each in _list(given, "alarm")]
        seen = [o.sae for o in asked.observe]
        if len(set(seen)) < len(seen):
            raise RequestError(f"observe: expected each SAE once, got {seen}")
        layers = [self.saes[sae].layer for sae in asked.steer]
        if len(set(layers)) < len(layers):
            raise RequestError(f"steer: expected at most one SAE per layer, got {sorted(asked.steer)}")
        for sae, edits in asked.steer.items():
            check_edits(edits, self.saes[sae].d_sae, self.saes[sae].d_in)
        return asked

    def observe(self, given: Any) -> Observe:
        given = {"sae": given} if isinstance(given, str) else given
        _dict(given, "observe", {"sae", "positions", "features"})
        sae, wanted = self.sae(given, "observe"), given.get("features", "all")
        where = Edit(positions=self.positions(given))
        if wanted == "all":
            return Observe(sae, where)
        if isinstance(wanted, Mapping):
            _dict(wanted, "features", {"top"})
            k: Any = wanted.get("top")
            if not _whole(k) or not 1 <= k <= self.saes[sae].d_sae:
                raise RequestError(f"top: expected 1 to {self.saes[sae].d_sae}, got {k!r}")
            return Observe(sae, where, top=k)
        if not isinstance(wanted, list) or not wanted:
            raise RequestError(f'features: expected "all", a list or {{"top": k}}, got {_short(wanted)}')
        return Observe(sae, where, tuple(sorted({self.feature(f, sae) for f in wanted})))

    def alarm(self, given: Any) -> Stop:
        _dict(given, "alarm", {"sae", "feature", "threshold", "positions"})
        sae = self.sae(given, "alarm")
        threshold = given.get("threshold")
        if not _number(threshold) or threshold < 0:
            raise RequestError(f"threshold: expected a finite number from 0 on, got {_short(threshold)}")
        where = Edit(positions=self.positions(given))
        return Stop(sae, where, self.feature(given.get("feature"), sae), float(threshold))

    def edit(self, given: Any) -> tuple[str, Edit]:
        name = given.get("edit") if isinstance(given, Mapping) else None
        if name not in EDITS:
            raise RequestError(f"edit: expected one of {', '.join(EDITS)}, got {_short(name)}")
        kind = EDITS[name]
        own = [f for f in fields(kind) if f.init and f.name not in ("positions", "sequences", "on", "site")]
        _dict(given, name, {"edit", "sae", "positions", *(f.name for f in own)})
        sae = self.sae(given, "steer")
        values = {}
        for each in own:
            if each.name not in given:
                if each.name == "strength" and kind is Direction:
                    continue
                raise RequestError(f"{name}: expected {each.name!r}, got {sorted(given)}")
            values[each.name] = self.value(each.name, given[each.name], sae)
        return sae, kind(positions=self.positions(given), **values)

    def value(self, name: str, given: Any, sae: str) -> Any:
        if name in ("feature", "features"):
            if isinstance(given, list) and given:
                return [self.feature(f, sae) for f in given]
            return self.feature(given, sae) if name == "feature" else [self.feature(given, sae)]
        if name == "vector":
            if not isinstance(given, list) or not all(_number(v) for v in given):
                raise RequestError(f"vector: expected a list of finite numbers, got {_short(given)}")
            return torch.tensor(given, dtype=torch.float32)
        if not _number(given):
            raise RequestError(f"{name}: expected a finite number, got {_short(given)}")
        return float(given)

    def sae(self, given: Mapping[str, Any], part: str) -> str:
        name = given.get("sae")
        if name is None and len(self.saes) == 1:
            return next(iter(self.saes))
        if not isinstance(name, str) or name not in self.saes:
            raise RequestError(f"{part}: sae: expected one of {', '.join(self.saes)}, got {_short(name)}")
        return name

    def feature(self, given: Any, sae: str) -> int:
        self.named += 1
        if self.named > MOST_FEATURES:
            raise RequestError(f"{KEY}: expected at most {MOST_FEATURES} named features in a request")
        if not _whole(given) or not 0 <= given < self.saes[sae].d_sae:
            raise RequestError(f"feature: expected 0 to {self.saes[sae].d_sae - 1}, got {_short(given)}")
        return int(given)

    def positions(self, given: Mapping[str, Any]) -> Any:
        """As `Edit.positions` takes them; a range becomes a mask over the longest sequence."""
        wanted = given.get("positions", "all")
        if wanted in ("all", "prompt", "generated"):
            return wanted
        if wanted == "last":
            wanted = [self.prompt - 1, self.prompt]
        if not isinstance(wanted, (list, tuple)) or len(wanted) != 2 or not all(_whole(p) for p in wanted):
            raise RequestError(
                f"positions: expected all, prompt, generated, last or [begin, end], got {_short(wanted)}"
            )
        begin, end = wanted
        if not 0 <= begin < end:
            raise RequestError(f"positions: expected 0 <= begin < end, got {wanted}")
        mask = torch.zeros(max(self.limit, self.prompt), dtype=torch.bool)
        mask[begin:end] = True
        return mask


def _dict(given: Any, name: str, known: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise RequestError(f"{name}: expected an object, got {_short(given)}")
    unknown = sorted(str(key) for key in set(given) - known)
    if unknown:
        raise RequestError(f"{name}: expected {', '.join(sorted(known))}, got {_short(unknown[0])}")


def _list(given: Mapping[str, Any], name: str) -> list[Any]:
    found = given.get(name, [])
    found = [found] if isinstance(found, (str, Mapping)) else found
    if not isinstance(found, (list, tuple)):
        raise RequestError(f"{name}: expected a list, got {_short(found)}")
    if len(found) > MOST_ENTRIES:
        raise RequestError(f"{name}: expected at most {MOST_ENTRIES} entries, got {len(found)}")
    return list(found)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
