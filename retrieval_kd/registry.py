"""The kinds of every stage: one literal table each, kind → lazy import path and the extra it needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from retrieval_kd.errors import MissingExtraError, RecipeError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """Where a kind is implemented (``module:Name``), what it is, and the extra that must be installed for it."""

    target: str
    summary: str
    extra: str | None = None


TEACHERS = {
    "api": Entry("retrieval_kd.teachers.api.teacher:ApiTeacher", "a model behind an OpenAI-compatible endpoint", "api"),
    "bi-encoder": Entry(
        "retrieval_kd.teachers.bi_encoder:BiEncoderTeacher", "cosine or dot of any sentence-transformers model"
    ),
    "bm25": Entry("retrieval_kd.teachers.bm25:BM25Teacher", "BM25 over the collection, no model"),
    "cross-encoder": Entry("retrieval_kd.teachers.cross_encoder:CrossEncoderTeacher", "raw logits of a cross-encoder"),
    "ensemble": Entry(
        "retrieval_kd.teachers.ensemble:Ensemble", "finished score files, normalised and combined (`scores ensemble`)"
    ),
    "late-interaction": Entry(
        "retrieval_kd.teachers.late_interaction:LateInteractionTeacher", "MaxSim of a multi-vector model"
    ),
    "llm-listwise": Entry(
        "retrieval_kd.teachers.llm_listwise:LLMListwiseTeacher", "ranks of a language model that orders windows"
    ),
    "llm-pointwise": Entry(
        "retrieval_kd.teachers.llm_pointwise:LLMPointwiseTeacher", "log-odds of a language model's yes and no"
    ),
    "sparse": Entry("retrieval_kd.teachers.sparse:SparseTeacher", "dot product of learned sparse vectors"),
}
QUERIES = {
    "api": Entry(
        "retrieval_kd.queries.api:ApiQueries", "queries by a model behind an OpenAI-compatible endpoint", "api"
    ),
    "first-sentence": Entry("retrieval_kd.queries.first_sentence:FirstSentenceQueries", "a document's first sentence"),
    "ict": Entry("retrieval_kd.queries.ict:ICTQueries", "random sentences or runs of words of a document"),
    "llm": Entry("retrieval_kd.queries.llm:LLMQueries", "queries by a language model that is asked by a prompt"),
    "query-log": Entry("retrieval_kd.queries.query_log:QueryLog", "the queries of a log, without documents or qrels"),
    "seq2seq": Entry(
        "retrieval_kd.queries.seq2seq:Seq2SeqQueries", "queries sampled from an encoder-decoder (doc2query)"
    ),
    "title": Entry("retrieval_kd.queries.title:TitleQueries", "a document's title"),
}
STUDENTS = {
    "cross-encoder": Entry(
        "retrieval_kd.students.cross_encoder:CrossEncoderStudent", "a re-ranker, fine-tuned or distilled"
    ),
    "dense": Entry("retrieval_kd.students.dense:DenseStudent", "a bi-encoder: one vector a text"),
    "late-interaction": Entry(
        "retrieval_kd.students.late_interaction:LateInteractionStudent", "a vector a token, MaxSim (ColBERT, XTR)"
    ),
    "llm-listwise": Entry(
        "retrieval_kd.students.llm_listwise:ListwiseStudent",
        "a language model that ranks by its first token (FIRST)",
        "lora",
    ),
    "prettr": Entry("retrieval_kd.students.prettr:PreTTRStudent", "a re-ranker with document layers computed ahead"),
    "query-tower": Entry(
        "retrieval_kd.students.query_tower:QueryTowerStudent", "a small query encoder for a large model's index"
    ),
    "splade": Entry("retrieval_kd.students.splade:SpladeStudent", "learned sparse vectors over the vocabulary"),
    "splade-doc": Entry(
        "retrieval_kd.students.splade_doc:SpladeDocStudent", "learned sparse documents, queries without a network"
    ),
    "tk": Entry("retrieval_kd.students.tk:TKStudent", "a re-ranker by kernels, without a pre-trained transformer"),
}
INDEXES = {
    "bm25": Entry("retrieval_kd.indexes.bm25:BM25Index", "BM25 without a JVM (bm25s)"),
    "distill-vq": Entry(
        "retrieval_kd.indexes.distill_vq.engine:DistillVQIndex",
        "PQ or RQ codes and IVF lists that learn a teacher's relevance; a stock FAISS index",
        "cpu",
    ),
    "faiss": Entry("retrieval_kd.indexes.faiss_index:FaissIndex", "any FAISS factory string over dense vectors", "cpu"),
    "late-interaction": Entry(
        "retrieval_kd.indexes.late_interaction:LateInteractionIndex",
        "FAISS over tokens: candidates and their MaxSim (PLAID), or retrieved tokens alone (XTR)",
        "cpu",
    ),
    "lucene": Entry("retrieval_kd.indexes.lucene:LuceneBM25Index", "BM25 in Lucene, by pyserini", "lucene"),
    "lucene-impact": Entry(
        "retrieval_kd.indexes.lucene:LuceneImpactIndex", "sparse vectors as whole impacts in Lucene", "lucene"
    ),
    "maxsim-exact": Entry("retrieval_kd.indexes.maxsim_exact:MaxSimExactIndex", "exact MaxSim over token vectors"),
    "seismic": Entry("retrieval_kd.indexes.seismic:SeismicIndex", "sparse vectors, approximate and fast", "seismic"),
    "sparse-exact": Entry("retrieval_kd.indexes.sparse_exact:SparseExactIndex", "exact products of sparse vectors"),
}
EVALUATIONS = {
    "evaluation": Entry(
        "retrieval_kd.eval.evaluate:Evaluation", "measures, tests, efficiency and a report on one split"
    ),
}
PIPELINES = {
    "pipeline": Entry("retrieval_kd.pipeline:Pipeline", "a whole run: steps that name one another"),
}

STAGES: dict[str, dict[str, Entry]] = {
    "queries": QUERIES,
    "teachers": TEACHERS,
    "students": STUDENTS,
    "indexes": INDEXES,
    "eval": EVALUATIONS,
    "pipelines": PIPELINES,
}
"""Stage (the name of its recipe folder) → its kinds."""


def implementation(stage: str, kind: str) -> Any:
    """The class behind a kind. Raises `RecipeError` for an unknown kind, `MissingExtraError` for a missing package."""
    table = STAGES[stage]
    entry = table.get(kind)
    if entry is None:
        raise RecipeError(f"unknown kind '{kind}' in {stage}{did_you_mean(kind, table)}")
    module, _, name = entry.target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if entry.extra is None or (error.name or "").startswith("retrieval_kd"):
            raise
        raise MissingExtraError(f"kind '{kind}' needs the package '{error.name}'", entry.extra) from error
