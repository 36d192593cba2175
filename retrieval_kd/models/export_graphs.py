"""Writing a torch model as ONNX graphs, tables and tokenizers, and what must be known to run them without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.data.vector_writer import write_vocabulary
from retrieval_kd.errors import InputError
from retrieval_kd.models.cross_encoder import pair_limit, query_prompt, scores_only
from retrieval_kd.models.export_reference import TorchEncoder
from retrieval_kd.models.multi_vector_encoder import MultiVectorEncoder
from retrieval_kd.models.onnx import export_onnx, quantize_int8
from retrieval_kd.models.sparse_encoder import SparseEncoder

if TYPE_CHECKING:
    from torch import Tensor, nn

_TEXTS = ["what is exported here", "two"]
"""What the network is traced with: two texts of different lengths."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class GraphWriter:
    """Writes the parts of one model into a folder, each graph and tokenizer once."""

    def __init__(self, folder: Path, name: str, *, int8: bool) -> None:
        self.folder = folder
        self.name = name
        """What the model is called in errors."""
        self._int8 = int8

    def encoder(self, encoder: TorchEncoder) -> dict[str, Any]:
        """The settings of an exported bi-encoder, whose files are now in the folder.

        A model with routes (`Router`) has a graph, or a table, for queries and one for documents. Raises `InputError`
        for what cannot be exported.
        """
        document, query = (_route(encoder.model, task) for task in ("document", "query"))
        shared = [*map(id, query)] == [*map(id, document)]
        settings: dict[str, Any] = {
            "query": self._reading(encoder, "query", query, "tokenizer.json" if shared else "query_tokenizer.json"),
            "document": self._reading(encoder, "document", document, "tokenizer.json"),
        }
        if isinstance(encoder, MultiVectorEncoder):
            settings["query"] |= self._late_interaction(query, "query")
            settings["document"] |= self._late_interaction(document, "document")
        settings["document"] |= self._files(encoder, document, "tokenizer.json", "model")
        files = ("graph", "table")
        settings["query"] |= (
            {name: settings["document"][name] for name in files if name in settings["document"]}
            if shared
            else self._files(encoder, query, "query_tokenizer.json", "query")
        )
        if isinstance(encoder, SparseEncoder):
            encoder.encode(_TEXTS, "document")  # a SPLADE pooling knows its width after its first text only
            write_vocabulary(self.folder, encoder.vocabulary)
            settings |= {"pruning": encoder.pruning, "max_active_dims": encoder.model.max_active_dims}
        else:
            settings["dimension"] = int(encoder.model.get_embedding_dimension() or 0)
        return settings

    def cross_encoder(self, model: Any) -> dict[str, Any]:
        """The settings of an exported cross-encoder, whose files are now in the folder."""
        self._tokenizer(model.tokenizer, "tokenizer.json")
        self._graph(scores_only(model), _tensors(model.preprocess([(text, text) for text in _TEXTS])), "model.onnx")
        reading = _reading_of(model.tokenizer, "tokenizer.json", query_prompt(model), pair_limit(model), special=True)
        return {"pair": {"graph": "model.onnx", **reading}}

    def _files(self, encoder: TorchEncoder, modules: Sequence[Any], tokenizer: str, name: str) -> dict[str, str]:
        """Writes what computes the vectors of a route: a tokenizer and a graph, or a table of term weights."""
        from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

        first = modules[0]
        self._tokenizer(first.tokenizer, tokenizer)
        if isinstance(first, SparseStaticEmbedding):
            np.save(self.folder / f"{name}.npy", first.weight.detach().float().numpy())
            return {"table": f"{name}.npy"}
        network = _network(encoder.model, _in_graph(modules))
        self._graph(network, _tensors(first.preprocess(_TEXTS, task="document")), f"{name}.onnx")
        return {"graph": f"{name}.onnx"}

    def _graph(self, network: nn.Module, example: dict[str, Tensor], name: str) -> None:
        if not self._int8:
            return export_onnx(network, example, self.folder / name, output="output")
        whole = self.folder / f"float32-{name}"
        export_onnx(network, example, whole, output="output")
        quantize_int8(whole, self.folder / name)
        for file in (whole, whole.with_name(whole.name + ".data")):
            file.unlink(missing_ok=True)

    def _tokenizer(self, tokenizer: Any, name: str) -> None:
        """Writes a tokenizer as it works now, which needs nothing but the `tokenizers` library."""
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{self.name}: its tokenizer ({type(tokenizer).__name__}) has no form that works without transformers"
            )
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.save(str(self.folder / name))

    def _reading(self, encoder: TorchEncoder, task: str, modules: Sequence[Any], tokenizer: str) -> dict[str, Any]:
        """How the texts of a route are read; `InputError` for what can only be done in torch."""
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
        from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

        first, reader = modules[0], encoder.readers[task]
        looked_up = isinstance(first, SparseStaticEmbedding)
        if not isinstance(first, Transformer | SparseStaticEmbedding):
            raise InputError(f"{self.name} starts with a {type(first).__name__}; only transformers can be exported")
        if looked_up and len(modules) > 1:
            raise InputError(f"{self.name}: what follows its table of term weights cannot be exported")
        if reader.prompt and any(isinstance(module, Pooling) and not module.include_prompt for module in modules):
            raise InputError(f"{self.name} leaves its prompts out of the pooling; this cannot be exported")
        if "message" in getattr(first, "modality_config", {}):
            raise InputError(f"{self.name} puts its texts into a chat template; this cannot be exported")
        if getattr(first, "processing_kwargs", None):
            raise InputError(f"{self.name} changes how its tokenizer is called (processing_kwargs); export knows none")
        reading = _reading_of(first.tokenizer, tokenizer, reader.prompt, reader.limit, special=not looked_up)
        expansion = getattr(first, "query_expansion", None) if task == "query" else None
        return reading | ({"expansion": self._expansion(first.tokenizer, expansion)} if expansion else {})

    def _expansion(self, tokenizer: Any, expansion: dict[str, Any]) -> dict[str, Any]:
        if tokenizer.padding_side != "right":
            raise InputError(f"{self.name} fills queries up on the left; this cannot be exported")
        token = expansion["token"]
        fallback = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.eos_token_id
        number = fallback if token is None else tokenizer.convert_tokens_to_ids(token)
        if number is None:
            raise InputError(f"{self.name} fills queries up, but its tokenizer has no token for it")
        return {"length": expansion["length"], "id": int(number), "attend": bool(expansion["attend"])}

    def _late_interaction(self, modules: Sequence[Any], task: str) -> dict[str, Any]:
        """Which tokens count in MaxSim and how they are pooled: what is done outside of the graph."""
        from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask

        settings: dict[str, Any] = {"mask": None, "token_pooling": None}
        for module in modules[len(_in_graph(modules)) :]:
            if isinstance(module, MultiVectorMask) and settings["mask"] is settings["token_pooling"] is None:
                skip = module._skiplist_ids if task in module.skiplist_tasks else None
                only = module.keep_only_token_ids if task != "query" else None
                settings["mask"] = {"skip": [] if skip is None else skip.tolist(), "only": list(only or [])}
            elif isinstance(module, HierarchicalTokenPooling) and settings["token_pooling"] is None:
                if module.applies_to(task):
                    names = ("pool_factor", "num_protected_tokens", "normalize_embeddings")
                    settings["token_pooling"] = {name: getattr(module, name) for name in names}
            else:
                raise InputError(f"{self.name}: its {type(module).__name__} cannot be exported")
        return settings


def _route(model: Any, task: str) -> list[Any]:
    """The modules that a text of ``task`` goes through."""
    from sentence_transformers.base.modules import Router

    modules: list[Any] = []
    for module in model:
        if isinstance(module, Router):
            modules += module.sub_modules[module._resolve_route(task=task, modality="text")]
        else:
            modules.append(module)
    return modules


def _in_graph(modules: Sequence[Any]) -> list[Any]:
    """The modules before the first one that decides which tokens count."""
    from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling, MultiVectorMask

    outside = [i for i, module in enumerate(modules) if isinstance(module, MultiVectorMask | BaseTokenPooling)]
    return list(modules[: min(outside, default=len(modules))])


def _network(model: Any, modules: Sequence[Any]) -> nn.Module:
    """A module from features to the model's vectors [B, d], or to those of tokens [B, S, d]."""
    import torch
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    output = "token_embeddings" if type(model).__name__ == "MultiVectorEncoder" else "sentence_embedding"
    most = getattr(model, "truncate_dim", None)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([_splade(m) if isinstance(m, SpladePooling) else m for m in modules])

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            features = dict(features)
            for part in self.parts:
                features = part(features)
            return features[output][..., :most]

    return Network()


def _splade(pooling: Any) -> nn.Module:
    """What a ``SpladePooling`` computes, without its loop over chunks, which would fix the length of the graph."""
    import torch

    class Splade(torch.nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            weights = (features["token_embeddings"] * features["attention_mask"][..., None]).relu().log1p()
            if pooling.activation_function == "log1p_relu":
                weights = weights.log1p()
            pooled = weights.amax(dim=1) if pooling.pooling_strategy == "max" else weights.sum(dim=1)
            return {**features, "sentence_embedding": pooled}

    return Splade()


def _tensors(features: dict[str, Any]) -> dict[str, Tensor]:
    """What the network reads of preprocessed texts."""
    return {name: features[name] for name in _INPUTS if name in features}


def _reading_of(tokenizer: Any, file: str, prompt: str, limit: int | None, *, special: bool) -> dict[str, Any]:
    pad = tokenizer.pad_token_id
    return {
        "tokenizer": file,
        "special_tokens": special,
        "prompt": prompt,
        "max_length": limit,
        "cut_side": tokenizer.truncation_side,
        "padding": {
            "side": tokenizer.padding_side,
            "id": int(pad) if pad is not None else 0,
            "type_id": int(tokenizer.pad_token_type_id),
        },
    }
