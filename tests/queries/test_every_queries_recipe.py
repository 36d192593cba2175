"""Every shipped recipe makes queries of the tiny documents, its model and endpoint replaced by tiny ones."""

from __future__ import annotations

from pathlib import Path

import faulty_server
import pytest
import tiny_language_models as tiny_lm
import tiny_queries

from retrieval_kd.queries.make import make_queries
from retrieval_kd.verify import check

RECIPES = sorted((Path(__file__).parent.parent.parent / "queries").glob("*.yaml"))
DOCUMENTS = {
    "d1": ("w1 w2", "w3 w4 w5 w6 w7. w8 w9 w10 w11 w12."),
    "d2": ("w13 w14", "w15 w16 w17 w18."),
    "d4": ("w20 w21", "w22 w23 w24."),
}
EXPECTED = {"titles": 3, "first-sentences": 3, "query-log": 2, "api": 2}
"""How many distinct queries there are, where no random number decides it."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_makes_queries(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tiny_queries.make_documents(tmp_path, DOCUMENTS)
    log = tmp_path / "log.txt"
    log.write_text("one query\nanother query\n")
    overrides = ["split=made"]
    if path.stem == "doc2query":
        model = tiny_lm.make_encoder_decoder(tmp_path / "model")
        overrides += [f"model={model}", "query_length=8"]
    elif path.stem == "llm":
        overrides += [f"model={tiny_lm.make_causal(tmp_path / 'model')}", "answer_length=16"]
    with faulty_server.running() as server:
        server.content = lambda body: "1. what is it\n2. how does it work\n3. it"
        if path.stem == "api":
            overrides += [f"base_url={server.base_url}", "key_env=null"]
        query_log = log if path.stem == "query-log" else None
        made = make_queries(
            str(path), collection=source, out=tmp_path / "made", query_log=query_log, overrides=overrides
        )
    found = len(made.queries("made"))
    assert found == made.manifest.counts["synthetic_queries"] == EXPECTED.get(path.stem, found) > 0
    assert {origin.split for origin in made.origins} == {"made"}
    assert check(made.path) == []
