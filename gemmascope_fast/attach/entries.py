"""Interprets the argument `saes` of `attach`: which coder reads and writes where, and under which key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.attach.edits import Edit
from gemmascope_fast.attach.origin import check_model, check_site
from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.bank import Bank, BankedSAE
from gemmascope_fast.errors import AttachError
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.multi_site import Crosscoder, CrossLayerTranscoder
from gemmascope_fast.sae.sites import PREFIX, Site

Key = Any


@dataclass
class Activations:
    """Use it in place of an SAE in `saes` to record the activations of the selected tokens.

    sink: called as sink(x, tokens) in every call, with x [n, d] in the activation's dtype and tokens its n rows. Copy x
    if you keep it, because the model may overwrite it in place.  Without a sink, `run.activations[key]` has all
    of them, [n, d].
    """

    sink: Callable[[Tensor, Any], None] | None = None
    parts: list[Tensor] = field(default_factory=list)


Attached = Coder | BankedSAE | Activations | None  # None: nothing is read, there are only edits that need no SAE
SAES = (Coder, BankedSAE)
# What `attach` takes.  A mapping has keys of one kind, since a type checker does not let a dict of one kind of key pass
# for one of several.
Attachable = Coder | BankedSAE | CrossLayerTranscoder | Activations
Attachables = (
    Attachable
    | Bank
    | Sequence[Attachable]
    | Mapping[int, Attachable]
    | Mapping[tuple[int, str], Attachable]
    | Mapping[str, Attachable]
    | Mapping[Site, Attachable]
    | Mapping[tuple[Site, ...], Attachable]
    | Mapping[Any, Attachable]
)


@dataclass(frozen=True)
class Part:
    """Which layer of a coder of several layers an entry belongs to."""

    whole: CrossLayerTranscoder
    layer: int


@dataclass
class Entry:
    """One coder: its key in `run.latents`, where it reads, and where it writes (for a transcoder: elsewhere).

    more: the other sites that a crosscoder reads.  part: set for each layer of a cross-layer transcoder.
    """

    key: Key
    coder: Attached
    site: Site
    site_out: Site
    more: tuple[Site, ...] = ()
    part: Part | None = None
    aliases: frozenset[Site] = frozenset()  # other names of its sites in the model

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.site, self.site_out, *self.more, *self.aliases


def entries(saes: Any, structure: Structure | None = None, anywhere: bool = False) -> list[Entry]:
    """Entries from an SAE, a list, a dict, or a bank (its SAEs of this model; all if no model is given).

    AttachError if a site is missing, a key is given twice, or a key names another site than the checkpoint
    (allowed with `anywhere`).  Warns if an SAE was not trained on this model.
    """
    if isinstance(saes, Bank):
        found = _banked(saes if structure is None else saes.for_model(structure.model))
        return _in_model(found, structure)
    found = []
    for key, coder in _pairs(saes):
        if isinstance(coder, (Crosscoder, CrossLayerTranscoder)):
            found += _several(key, coder)
        else:
            found.append(_entry(key, coder, structure, anywhere))
    seen: dict[Any, int] = {}
    for entry in found:
        seen[entry.key] = seen.get(entry.key, 0) + 1
    twice = [key for key, times in seen.items() if times > 1]
    if twice:
        raise AttachError(f"saes: {len(twice)} sites have several SAEs ({twice[0]}): give a dict with a key for each")
    return _in_model(found, structure)


def _in_model(found: list[Entry], structure: Structure | None) -> list[Entry]:
    """The entries, with the other names of their sites in the model."""
    if structure is None:
        return found
    trained_on = []
    for entry in found:
        if isinstance(entry.coder, SAES):
            whole = entry.coder if entry.part is None else entry.part.whole
            trained_on.append(whole.cfg.metadata.model_name)
        names: set[Site] = set()
        for site in dict.fromkeys(entry.sites):
            try:
                names |= structure.aliases(site)
            except AttachError:
                continue  # the tap reports what is wrong with it
        entry.aliases = frozenset(names)
    for name in dict.fromkeys(trained_on):
        check_model(name, structure.model)
    return found


def _banked(bank: Bank) -> list[Entry]:
    """Keyed by site; if several are at one site, by their names."""
    found = [(name, _entry(None, coder)) for name, coder in bank.items()]
    sites = Counter(entry.site for _, entry in found)
    return [e if sites[e.site] == 1 else Entry(name, e.coder, e.site, e.site_out) for name, e in found]


def _pairs(saes: Any) -> Iterator[tuple[Key, Any]]:
    if _is_coder(saes):
        yield None, saes
    elif isinstance(saes, Mapping) or hasattr(saes, "items"):
        yield from saes.items()
    elif isinstance(saes, Iterable):
        for sae in saes:
            yield None, sae
    else:
        raise TypeError(f"saes: expected an SAE, a list or a dict of them, got {type(saes).__name__}")


def _is_coder(value: Any) -> bool:
    return isinstance(value, (Activations, CrossLayerTranscoder, *SAES))


def _several(key: Key, coder: Crosscoder | CrossLayerTranscoder) -> list[Entry]:
    """For a cross-layer transcoder one entry per layer, keyed by where it reads; for a crosscoder one, keyed by sites.

    They use the sites in their checkpoints, because one key cannot name all of them.
    """
    sites = coder.sites if isinstance(coder, Crosscoder) else coder.cfg.sites
    known = tuple(site for site in sites if site is not None)
    name = f"this {coder.kind.replace('_', ' ')}"
    if key is not None:
        raise AttachError(f"saes: {name} has {coder.n_layers} sites: give it in a list, not under {key!r}")
    if len(known) != coder.n_layers or not known:
        raise AttachError(f"saes: {name} names {len(known)} of its {coder.n_layers} sites: set them")
    if isinstance(coder, Crosscoder):
        return [Entry(known, coder, known[0], known[0], known[1:])]
    outs = coder.cfg.sites_out
    if None in outs or len(outs) != coder.n_layers:
        raise AttachError(f"saes: {name} does not name every site that it writes: set cfg.sites_out")
    return [
        Entry(site, layer, site, out, part=Part(coder, i))  # type: ignore[arg-type]
        for i, (layer, site, out) in enumerate(zip(coder.layers, known, outs, strict=True))
    ]


def _entry(key: Key, coder: Any, structure: Structure | None = None, anywhere: bool = False) -> Entry:
    if not _is_coder(coder):
        raise TypeError(f"saes: expected SAEs, got {type(coder).__name__} under {key!r}")
    cfg = getattr(coder, "cfg", None)
    own, own_out = getattr(cfg, "site", None), getattr(cfg, "site_out", None)
    if key is None:
        if own is None:
            raise AttachError("saes: this SAE's checkpoint names no site; give a dict keyed by layer or module path")
        site, key = own, own
    else:
        site = site_of(key, own)
    if isinstance(coder, Activations):
        return Entry(key, coder, site, site)
    if "transcoder" not in coder.kind:
        if own is not None and not anywhere:
            check_site(key, site, own, structure)
        return Entry(key, coder, site, site)
    if own_out is None or own is None:
        raise AttachError(
            f"saes: the transcoder under {key!r} names no sites to read and write: set cfg.site, site_out"
        )
    if site.kind != "path" and site.kind not in (own.kind, own_out.kind, "resid"):
        raise AttachError(f"saes: key {key!r}: the transcoder reads {own.hook_name} and writes {own_out.hook_name}")
    layer = site.at_layer
    reads = site if site.kind == "path" else own if layer is None else own.at(layer)
    if not anywhere:
        check_site(key, reads, own, structure)
    moved = layer is not None and (own is None or layer != own.at_layer)
    return Entry(key, coder, reads, own_out.at(layer) if moved else own_out)


def site_of(key: Key, own: Site | None = None) -> Site:
    """The site that a key names.  A bare layer means the SAE's kind there (the residual stream if it has none); text
    is the path of a module, and means that module."""
    if isinstance(key, Site):
        return key
    if isinstance(key, bool):
        raise AttachError(f"saes: expected a key that names a site, got {key!r}")
    if isinstance(key, int):
        if key < 0:
            raise AttachError(f"saes: expected a layer as key, got {key}")
        return Site("resid", key) if own is None else own.at(key)
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], int) and isinstance(key[1], str):
        try:
            return Site(key[1], key[0])
        except ValueError as error:
            raise AttachError(f"saes: key {key!r}: {error}") from error
    if isinstance(key, str):
        return Site("path", path=key.removeprefix(PREFIX))
    raise AttachError(f"saes: expected a layer, (layer, kind), a Site or a module path as key, got {key!r}")


def find_key(asked: Key, known: Iterable[Entry]) -> Key:
    """The key of the entry that `asked` names: the key itself, or another name of its site.  Else KeyError."""
    known = list(known)
    for entry in known:
        if type(entry.key) is type(asked) and entry.key == asked:
            return entry.key
    try:
        site = site_of(asked)
    except AttachError:
        site = None
    same = [e for e in known if site is not None and site in e.sites]
    if not same and isinstance(asked, int):
        # a bare layer, if only one SAE reads there
        same = [e for e in known if any(s.layer == asked for s in e.sites)]
    if len(same) != 1:
        raise KeyError(f"{asked!r}: expected one of {[e.key for e in known]}")
    return same[0].key


def assign(edits: Any, known: list[Entry]) -> list[tuple[Entry, list[Edit]]]:
    """Each entry with its edits: from one edit, a list, or a dict keyed as `saes` (or by sites without an SAE).

    An edit with neither key nor `site` is for the only SAE.  AttachError if there are several.
    """
    if isinstance(edits, Edit):
        edits = [edits]
    keyed: list[tuple[Key, Edit]] = []
    for key, given in edits.items() if isinstance(edits, Mapping) else [(None, edits)]:
        for edit in [given] if isinstance(given, Edit) else given:
            if not isinstance(edit, Edit):
                raise TypeError(f"edits: expected edits such as Clamp or Scale, got {type(edit).__name__}")
            keyed.append((edit.site if key is None else key, edit))
    found = [(entry, list[Edit]()) for entry in known]
    for key, edit in keyed:
        _edits_at(key, edit, found).append(edit)
    return found


def _edits_at(key: Key, edit: Edit, found: list[tuple[Entry, list[Edit]]]) -> list[Edit]:
    if key is None:
        own = [edits for entry, edits in found if isinstance(entry.coder, SAES)]
        if len(own) != 1:
            raise AttachError(f"edits: {edit} names no site, and {len(own)} SAEs are attached: expected one")
        return own[0]
    try:
        wanted = find_key(key, [entry for entry, _ in found if not isinstance(entry.coder, Activations)])
    except KeyError:
        site = site_of(key)
        found.append((Entry(key, None, site, site), []))
        return found[-1][1]
    return next(edits for entry, edits in found if type(entry.key) is type(wanted) and entry.key == wanted)


def spread(latents: SparseLatents, chosen: Tensor | None) -> SparseLatents:
    """Rows of the selected tokens → rows of all tokens; the others are empty. chosen: bool [N] with n true, or None."""
    if chosen is None:
        return latents
    chosen = chosen.to(latents.crow_indices.device)
    counts = torch.zeros(chosen.numel(), dtype=torch.int64, device=chosen.device)
    counts[chosen] = latents.crow_indices.diff()
    crow = torch.zeros(chosen.numel() + 1, dtype=torch.int64, device=chosen.device)
    crow[1:] = counts.cumsum(0)
    return SparseLatents(crow, latents.col_indices, latents.values, (chosen.numel(), latents.d_sae))
