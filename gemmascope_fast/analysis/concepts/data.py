"""Labelled texts: JSON lines of text, concept, label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gemmascope_fast.analysis.extraction.sources import json_lines, string, text
from gemmascope_fast.checkpoints.bundled import DATA

BUNDLED = DATA / "concepts.jsonl"


@dataclass(frozen=True)
class Example:
    """label 1: a text of the concept.  Label 0: a hard negative, with similar words but without the concept."""

    text: str
    concept: str
    label: int


@dataclass(frozen=True)
class Split:
    """Indices of examples for one concept: `positive` are its texts, `negative` texts of other concepts, `hard` its
    hard negatives, which are used only for the test."""

    concept: str
    train_positive: list[int]
    train_negative: list[int]
    test_positive: list[int]
    test_negative: list[int]
    hard: list[int]

    @property
    def train(self) -> list[int]:
        return self.train_positive + self.train_negative

    @property
    def test(self) -> list[int]:
        return self.test_positive + self.test_negative + self.hard


def load_examples(path: str | Path) -> list[Example]:
    """Raises ValueError naming the line of an invalid record."""
    found = []
    for number, value in json_lines(Path(path)):
        where = f"{path}, line {number}"
        own, concept = text(value, "text", where), string(value, "concept", where)
        label = value.get("label")
        if label not in (0, 1) or not own:
            raise ValueError(f"{where}: expected a text and a label of 0 or 1, got {own!r:.40}, {label!r}")
        found.append(Example(own, concept, int(label)))
    if not found:
        raise ValueError(f"{path}: expected at least one text")
    return found


def split(examples: Sequence[Example], seed: int = 0) -> list[Split]:
    """One split for each concept: half of every concept's texts are for training, the other half for the test.

    Raises ValueError if a concept has fewer than four texts, or there are no texts without it.
    """
    concepts = sorted({e.concept for e in examples})
    generator = torch.Generator().manual_seed(seed)
    halves: dict[str, tuple[list[int], list[int]]] = {}
    for concept in concepts:
        own = [i for i, e in enumerate(examples) if e.concept == concept and e.label == 1]
        if len(own) < 4:
            raise ValueError(f"concept {concept!r}: expected at least 4 texts of label 1, got {len(own)}")
        order = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
        halves[concept] = sorted(order[: len(own) // 2]), sorted(order[len(own) // 2 :])
    found = []
    for concept in concepts:
        hard = [i for i, e in enumerate(examples) if e.concept == concept and e.label == 0]
        others = [halves[c] for c in concepts if c != concept]
        if not others and len(hard) < 4:
            raise ValueError(f"concept {concept!r}: expected another concept, or 4 texts of label 0, got {len(hard)}")
        if others:
            train_negative, test_negative = (sorted(i for half in others for i in half[side]) for side in (0, 1))
        else:  # only one concept: its hard negatives are used for both
            train_negative, test_negative, hard = hard[::2], hard[1::2], []
        train, test = halves[concept]
        found.append(Split(concept, train, train_negative, test, test_negative, hard))
    return found
