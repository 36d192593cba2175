"""The tokens of multi-vector vectors as dense vectors, which FAISS is trained on and filled with."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import numpy as np

from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import InputError, UsageError


class Tokens(Vectors):
    """The tokens of texts as dense vectors, one a row, with ids such as ``d7[0]``."""

    def __init__(self, texts: Vectors) -> None:
        super().__init__(texts.path, texts.manifest)
        self.texts = texts

    @classmethod
    def of_documents(cls, documents: Vectors | None) -> Self:
        """The tokens of an index's source; `InputError` when there are none."""
        if documents is None:
            raise UsageError("a late-interaction index is built from vectors")
        if not len(documents.multi_vector.tokens):
            raise InputError(f"{documents.path}: none of the {len(documents)} documents has a token to index")
        return cls(documents)

    @cached_property
    def matrix(self) -> np.ndarray:
        """Tokens [T, d] float32 or float16."""
        return self.texts.multi_vector.tokens

    @cached_property
    def ids(self) -> list[str]:
        """The id of each token: its text's and its number there."""
        texts = zip(self.texts.ids, self.texts.lengths.tolist(), strict=True)
        return [f"{id_}[{number}]" for id_, length in texts for number in range(length)]

    @cached_property
    def arrow_ids(self) -> Any:
        """The same as an Arrow array of strings."""
        import pyarrow as pa

        return pa.array(self.ids, pa.string())

    def __len__(self) -> int:
        return len(self.matrix)
