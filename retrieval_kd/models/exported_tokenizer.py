"""Texts to token numbers by the `tokenizers` library alone: with a prompt, cut at a length, filled up and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """Tokenized texts: numbers and types of each one's tokens, and the tokens [n] int32 that were cut off each."""

    ids: list[list[int]]
    types: list[list[int]]
    lost: np.ndarray


class TextTokenizer:
    """What an exported model reads of texts (or of text pairs), as its settings say it.

    Safe for many threads: nothing of it changes after it was made.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        file = str(folder / settings["tokenizer"])
        self.limit: int | None = settings["max_length"]
        """The most tokens of a text that are read, special tokens included; None: all."""
        self.prompt: str = settings["prompt"]
        self._special: bool = settings["special_tokens"]
        self._pad: Mapping[str, Any] = settings["padding"]
        self._expansion: Mapping[str, Any] | None = settings.get("expansion")
        self._whole, self._cutting = Tokenizer.from_file(file), Tokenizer.from_file(file)
        if self.limit is not None:
            self._cutting.enable_truncation(self.limit, strategy="longest_first", direction=settings["cut_side"])

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tokens:
        """The tokens of each text with prompt (of each text and its partner); only texts too long are read twice."""
        prompted = [self.prompt + text for text in texts]
        inputs: list[Any] = prompted if pairs is None else list(zip(prompted, pairs, strict=True))
        encodings = self._whole.encode_batch(inputs, add_special_tokens=self._special)
        lost = np.zeros(len(inputs), dtype=np.int32)
        long = [i for i, found in enumerate(encodings) if self.limit is not None and len(found) > self.limit]
        again = self._cutting.encode_batch([inputs[i] for i in long], add_special_tokens=self._special)
        for i, cut in zip(long, again, strict=True):
            lost[i] = len(encodings[i]) - len(cut)
            encodings[i] = cut
        return Tokens([found.ids for found in encodings], [found.type_ids for found in encodings], lost)

    @property
    def least(self) -> int:
        """What a text is filled up to: the length of ColBERT's query expansion, else 1."""
        return int(self._expansion["length"]) if self._expansion else 1

    def padded(self, tokens: Tokens, batch: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The features of some of the texts, [B, S] each, S the longest one's length.

        ``filled`` (bool) marks the tokens of a query expansion: they are fed, but the others see them only where the
        model says so (``attend``).
        """
        width = max(self.least, *(len(tokens.ids[i]) for i in batch))
        features = {
            "input_ids": np.full((len(batch), width), self._pad["id"], dtype=np.int64),
            "attention_mask": np.zeros((len(batch), width), dtype=np.int64),
            "token_type_ids": np.full((len(batch), width), self._pad["type_id"], dtype=np.int64),
            "filled": np.zeros((len(batch), width), dtype=bool),
        }
        for row, i in enumerate(batch):
            length = len(tokens.ids[i])
            place = slice(width - length, None) if self._pad["side"] == "left" else slice(length)
            features["input_ids"][row, place] = tokens.ids[i]
            features["attention_mask"][row, place] = 1
            features["token_type_ids"][row, place] = tokens.types[i]
            if self._expansion:
                features["filled"][row, length : self.least] = True
        if self._expansion:
            features["input_ids"][features["filled"]] = self._expansion["id"]
            features["attention_mask"][features["filled"]] = int(self._expansion["attend"])
        return features
