"""What MiniLM's relations need: queries, keys and values of the last layer, of the student and of a frozen teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrieval_kd.errors import InputError
from retrieval_kd.models.load import find_model

if TYPE_CHECKING:
    from retrieval_kd.losses.objective import Outputs
    from retrieval_kd.students.bi_encoder import BiEncoderStudent

_STATES = ("query", "key", "value")


class RelationTeacher:
    """A frozen network that reads the student's own tokens.

    Raises `InputError` for another tokenizer, fewer positions than the student reads, or a network whose attention is
    not BERT's.
    """

    def __init__(self, name: str, student: Any) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer

        path = find_model(name).path
        module = SentenceTransformer(str(path))[0] if (path / "modules.json").is_file() else Transformer(str(path))
        self.network = module.auto_model.eval().requires_grad_(False)
        if module.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise InputError(f"relations_from: {name} has another tokenizer than the student: their tokens differ")
        positions = getattr(self.network.config, "max_position_embeddings", None)
        reads = max(
            length
            for length in (student[0].query_length, student[0].document_length, student.max_seq_length, 0)
            if length is not None
        )
        if positions is not None and positions < reads:
            raise InputError(f"relations_from: {name} reads {positions} tokens, the student up to {reads}")
        for network in (self.network, student[0].auto_model):
            last_attention(network)

    def states(self, features: dict[str, Any]) -> Tensor:
        """Queries, keys and values [n, S, 3·H] of the last layer."""
        device = features["input_ids"].device
        if self.network.device != device:
            self.network.to(device)
        with caught_states(self.network) as caught:
            read = ("input_ids", "attention_mask", "token_type_ids")
            self.network(**{key: features[key] for key in read if key in features})
        return joined(caught)


@contextmanager
def caught_states(network: Any) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass leaves its last layer's ``query``, ``key`` and ``value`` [n, S, H] here."""
    attention, caught = last_attention(network), {}

    def catching(name: str) -> Any:
        def catch(module: Any, inputs: Any, output: Tensor) -> None:
            caught[name] = output

        return catch

    hooks = [getattr(attention, name).register_forward_hook(catching(name)) for name in _STATES]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def joined(caught: dict[str, Tensor]) -> Tensor:
    """Queries, keys and values side by side [n, S, 3·H]."""
    return torch.cat([caught[name] for name in _STATES], dim=2)


def outputs_with_relations(
    student: BiEncoderStudent,
    teacher: RelationTeacher,
    model: Any,
    parameters: Any,
    features: Any,
    labels: dict[str, Tensor],
) -> Outputs:
    """A student's outputs with pairs of its and the teacher's queries, keys and values of the last layer."""
    bare = getattr(model, "module", model)  # of the wrapper that other processes need
    dimension, width = int(bare.get_embedding_dimension()), 3 * last_attention(bare[0].auto_model).query.out_features

    def vector_and_states(part: dict[str, Any]) -> Tensor:
        with caught_states(bare[0].auto_model) as caught:
            vector = model(part)["sentence_embedding"].unsqueeze(1)
        states = joined(caught)
        longest = max(dimension, width)
        return torch.cat([pad(vector, [0, longest - dimension]), pad(states, [0, longest - width])], dim=1)

    packed = [student.in_parts(vector_and_states, column) for column in features]
    with torch.no_grad():
        theirs = [student.in_parts(teacher.states, column) for column in features]
    longest = max(states.shape[1] for states in theirs)
    mine, theirs, masks = (
        torch.cat([pad(x, [0, 0] * (x.dim() - 2) + [0, longest - x.shape[1]]) for x in side])
        for side in (
            [x[:, 1:, :width] for x in packed],
            theirs,
            [column["attention_mask"].bool()[:, :longest] for column in features],
        )
    )
    outputs = student.outputs_of([x[:, 0, :dimension] for x in packed], parameters, labels)
    pairs = list(zip(mine.chunk(3, dim=2), theirs.chunk(3, dim=2), strict=True))
    return dataclasses.replace(outputs, relations=pairs, token_mask=masks)


def last_attention(network: Any) -> Any:
    """The last self-attention of a network like BERT; `InputError` for another architecture."""
    found = [
        module
        for module in network.modules()
        if all(hasattr(getattr(module, name, None), "weight") for name in _STATES)
    ]
    if not found:
        raise InputError(
            f"minilm-relations: {type(network).__name__} has no attention with query, key and value layers as BERT's; "
            "take a BERT, RoBERTa, ELECTRA or MiniLM"
        )
    return found[-1]
