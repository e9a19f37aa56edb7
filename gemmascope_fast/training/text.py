"""English text that needs no network: included in every Python, or written by the model itself."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemmascope_fast.files.progress import bar

HELD_OUT = 0.1  # the last tenth of each text is for evaluation, never for training
# Beginnings that the model continues, because the standard library's texts are only about Python.
OPENINGS = (
    "The history of", "In this article we", "Once upon a time", "The city of", "She looked at",
    "According to a new study,", "The first time I", "When he was born in", "During the war,",
    "The main difference between", "How to", "A few years ago,", "The company announced", "In the early morning",
    "Scientists have discovered", "My grandmother used to", "The river flows", "It was a cold", "The government has",
    "For many people,", "The museum was", "He opened the door and", "The team won", "In economics,",
    "The patient was", "Plants and animals", "The ship sailed", "Chapter one.", "Dear Sir,", "The court ruled",
    "The recipe calls for", "On the island of", "The king and his", "In mathematics,", "The film tells the story of",
    "Researchers at the university", "We left the village", "The engine of", "The price of", "Many students find",
    "Across the mountains,", "The album was released", "The railway between", "The committee met", "Children often",
    "The weather in", "After the election,", "The house stood", "Water is", "The battle of", "I remember",
    "The author argues", "The species is found", "A letter from", "They walked", "In the twentieth century,",
    "The theory of", "The doctor said", "Last summer", "The old man", "If you want to", "The computer",
    "The people who", "In the garden",
)  # fmt: skip


class Text(NamedTuple):
    """A named text."""

    name: str
    text: str

    def split(self) -> tuple[str, str]:
        """(text for training, the held-out last tenth), cut at a character."""
        cut = len(self.text) - int(len(self.text) * HELD_OUT)
        return self.text[:cut], self.text[cut:]


def pydoc_topics() -> str:
    """`pydoc_data.topics`: Python's language reference, about 465,000 characters in 3.11."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def stdlib_docstrings(least: int = 200) -> str:
    """All docstrings of at least `least` characters in the standard library, once each, in the order of the files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "ensurepip"}
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if left_out & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # some files contain errors on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) >= least:
                    found[doc] = None
    return "\n\n".join(found)


def sampled(model: Any, tokenizer: Any, rounds: int = 4, tokens: int = 250, seed: int = 0) -> str:
    """Text that the model writes from `OPENINGS`: rounds × 64 × `tokens` tokens, temperature 1, top 64.

    The same seed gives the same text on the same machine; on another one, rounding may change it.
    """
    inputs = tokenizer(list(OPENINGS), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    written: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for _ in bar(range(rounds), desc="the model writes", unit="round"):
            ids = model.generate(**inputs, do_sample=True, top_k=64, top_p=1.0, temperature=1.0, max_new_tokens=tokens)
            written += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return "\n\n".join(piece.strip() for piece in written)


# What a name stands for in --text, besides a file.
NAMED: dict[str, Callable[[], str]] = {
    "pydoc": pydoc_topics,
    "stdlib": stdlib_docstrings,
    "-": lambda: sys.stdin.read(),
}


def read_text(name: str) -> str:
    """The text of a name: "pydoc", "stdlib", "-" for standard input, or a UTF-8 file."""
    return NAMED[name]() if name in NAMED else Path(name).read_text("utf-8")


def read_texts(names: list[str], model: Any, tokenizer: Any) -> list[Text]:
    """Each of `names`: "sampled", or as `read_text` takes it.  ValueError for a text that is empty."""
    texts = []
    for name in names:
        text = sampled(model, tokenizer) if name == "sampled" else read_text(name)
        if not text.strip():
            raise ValueError(f"--text {name}: expected English text, got none")
        texts.append(Text(name, text))
    return texts
