"""The sentences of a text, by its punctuation alone, so that any language and text in small letters will do."""

from __future__ import annotations

import re
from itertools import pairwise

_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s)|[。！？]+["'”’」』）]*|\n\s*\n""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[])(?:[^\W\d_]|(?:\w+\.)+\w+|al|approx|cf|dr|eq|etc|fig|figs|mr|mrs|ms|no|pp|prof|ref|st|vol|vs)\.$",
    re.IGNORECASE,
)
"""A full stop that ends none: after one letter, after a word with another full stop in it, after an abbreviation."""
_LONGEST_ABBREVIATION = 16


def sentences(text: str) -> list[str]:
    """The sentences in their order, on one line each. Empty lines end one too."""
    ends = [match.end() for match in _END.finditer(text)]
    ends = [end for end in ends if not _ABBREVIATION.search(text[max(0, end - _LONGEST_ABBREVIATION) : end])]
    parts = (" ".join(text[start:stop].split()) for start, stop in pairwise([0, *ends, len(text)]))
    return [part for part in parts if part]
