"""How BM25 turns text into terms: one analyzer for the index and for the teacher."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Literal

StemmerName = Literal["porter", "english", "none"]
StopWords = Literal["en", "none"]


class Analyzer:
    """Text → terms, the same for documents and queries. One per thread: a stemmer is not shared."""

    # Words of one character count, as in Lucene; bm25s' own pattern drops them and with them "C" and "vitamin D".
    _words = re.compile(r"\w+")

    def __init__(self, stemmer: StemmerName, stop_words: StopWords) -> None:
        import Stemmer
        from bm25s.stopwords import STOPWORDS_EN

        self._stem = None if stemmer == "none" else Stemmer.Stemmer(stemmer).stemWords
        self._stop_words = frozenset() if stop_words == "none" else frozenset(STOPWORDS_EN)

    def terms(self, text: str) -> list[str]:
        """The stems of the lower-cased words that are no stop words."""
        words = [word for word in self._words.findall(text.lower()) if word not in self._stop_words]
        return words if self._stem is None else list(self._stem(words))

    @classmethod
    def version(cls) -> dict[str, str]:
        """What can change the terms besides stemmer and stop words: the pattern and the packages that hold these."""
        return {"words": cls._words.pattern, **{name: metadata.version(name) for name in ("bm25s", "PyStemmer")}}
