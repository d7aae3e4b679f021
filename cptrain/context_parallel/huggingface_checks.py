"""What a transformers model would get wrong on a shard without saying so: in the model itself, and in a call of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# How positions are cut for a plan, and for a batch of packed documents.
CUT_IN_ROWS = (
    "cut positions 0 to S - 1 with cp.shard, as the tokens; positions that begin anew (documents packed into one row) "
    'need a plan with layout="balanced" and its cp.pack'
)
CUT_IN_DOCUMENTS = "cut positions that begin at 0 in each document, or in each row, with batch.shard, as the tokens"


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a model are checked against: what `apply` puts into it, and replaces when the plan changes.

    positions: what this rank's positions may be when it holds so many tokens of a row, each way [rows, tokens], the
    first by default, where -1 leaves one open. degree: ranks that share a sequence. packed: calls are inside of a batch
    of packed documents. reads_positions: this is the model that computes with them, not one around it.
    """

    positions: Callable[[int], tuple[torch.Tensor, ...]]
    degree: int
    packed: bool
    reads_positions: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Inputs:
        """The same: it never changes, and `apply` to one of the models replaces it there alone."""
        return self


def problems(owner: Any, matched: Sequence[nn.Module], *, known: str) -> Iterator[str]:
    """Everything about a transformers model that would not be exact, each with a way out.

    matched: the modules that become context parallel, of this model or others; known: the name of the attention
    implementation that it gets.
    """
    config, kind = owner.config, type(owner).__name__
    # Models that flash attention serves do without a dense mask: they hand windows, sinks and so on to the function.
    if not (getattr(owner, "_supports_flash_attn", False) and type(owner)._can_set_attn_implementation()):
        yield f"{kind} computes attention in its own way (a bias, a dense mask, old code): another model is needed"
    asked = config._attn_implementation
    if asked not in ("sdpa", known) and "flash" not in str(asked):
        yield f'attention implementation "{asked}": load the model with attn_implementation="sdpa"'
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
        yield f"{kind} is not a causal decoder: only causal attention is supported"
    if "position_ids" not in inspect.signature(owner.forward).parameters:
        yield f"{kind} takes no position_ids: it would count the tokens of each shard from 0"
    if getattr(config, "output_attentions", False):
        yield "config.output_attentions: the weights are never held; set it to False"
    if getattr(config, "output_router_logits", False):
        yield "config.output_router_logits: the balance loss of a shard is not that of the sequence; set it to False"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if kinds:
        yield f"config.layer_types has {', '.join(kinds)}: supported are {', '.join(sorted(KNOWN_LAYERS))}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield f"config.attn_logit_softcapping = {config.attn_logit_softcapping}: supported is None"
    if owner.training and (getattr(config, "attention_dropout", None) or 0.0) > 0.0:
        yield f"config.attention_dropout = {config.attention_dropout}: set it to 0.0 before the model is made"
    yield from _module_problems(owner, matched)


def _module_problems(owner: nn.Module, matched: Sequence[nn.Module]) -> Iterator[str]:
    """What the modules of a transformers model tell about it."""
    chosen = {id(module) for module in matched}
    covered = {id(part) for module in matched for part in module.modules()}
    ropes, sinks, blind, others = [], [], [], []
    for name, module in owner.named_modules():
        rope = getattr(module, "rope_type", None)
        kinds = rope.values() if isinstance(rope, dict) else [rope]
        ropes += [kind for kind in kinds if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")]
        if id(module) in chosen:
            sinks += [name] if getattr(module, "sinks", None) is not None else []
            blind += [name] if getattr(module, "is_causal", True) is False else []
        elif id(module) not in covered and not any(id(part) in chosen for part in module.modules()):
            mixes = isinstance(module, nn.Conv1d) or type(module).__name__.endswith("Attention")
            others += [f"{name} ({type(module).__name__})"] if mixes else []
    if ropes:
        yield (
            f'rope_type "{ropes[0]}" follows the largest position, which differs between shards; use "yarn", "llama3" '
            'or "linear" scaling'
        )
    if sinks:
        yield f"{_few(sinks)}: attention sinks are not supported; another model is needed"
    if blind:
        yield f"{_few(blind)}: attention is not causal; name the modules of a causal decoder only"
    if others:
        yield f"{_few(others)}: would mix the tokens of a shard only; name it in modules=... if it is attention"


def _few(names: list[str]) -> str:
    """Up to three of the names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_inputs(inputs: Inputs, given: Mapping[str, Any]) -> None:
    """Refuse what a caller may give to a transformers model, by name of the argument, that is not exact on a shard."""
    if given.get("past_key_values") is not None:
        raise NotImplementedError(
            "past_key_values: a context-parallel model takes no KV cache; generate with a model that has no plan"
        )
    if given.get("output_attentions"):
        raise NotImplementedError("output_attentions: the weights are never held under context parallelism")
    if inputs.degree > 1 or inputs.packed:
        _check_loss(inputs, given)
    if inputs.reads_positions:
        if inputs.packed:
            _check_batch(inputs, given)
        _check_positions(inputs, given.get("position_ids"))


def default_positions(inputs: Inputs, given: Mapping[str, Any]) -> torch.Tensor:
    """Positions [B, T] for a call without: from 0 in each document of the batch that is entered."""
    tokens = _tokens(given)
    return inputs.positions(tokens.size(1))[0].clamp(min=0).to(tokens.device)


def _tokens(given: Mapping[str, Any]) -> torch.Tensor:
    """What says how many tokens there are: ids [B, T], or embeddings [B, T, E]."""
    tokens = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
    if not tokens:
        raise ValueError("neither input_ids nor inputs_embeds is given: pass one of them")
    return tokens[0]


def _check_loss(inputs: Inputs, given: Mapping[str, Any]) -> None:
    # With both of these a transformers model sums over the tokens it has, and divides by what it is told.
    exact = given.get("shift_labels") is not None and given.get("num_items_in_batch") is not None
    if given.get("labels") is not None and not exact:
        across, shard = (" and across documents", "batch.shard") if inputs.packed else ("", "cp.shard")
        raise ValueError(
            f"labels: the model would shift them inside each shard{across} and average over it; shift the labels "
            f"before {shard} and compute the loss from the logits, as a sum over tokens divided by the global count"
        )
    if given.get("output_router_logits"):
        raise NotImplementedError(
            "output_router_logits: the balance loss of a shard is not that of the sequence; leave it out"
        )


def _check_batch(inputs: Inputs, given: Mapping[str, Any]) -> None:
    """Refuse what is not of the batch that is entered: tokens of another shape, and padding of the caller's own."""
    mask, compiling = given.get("attention_mask"), torch.compiler.is_compiling()
    # Without a look at its values, any mask may hide something.
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and (compiling or not bool(mask.all())):
        raise NotImplementedError(
            "attention_mask (padding) together with packed documents is not supported: leave it out, and give padding "
            "a negative id in the document_ids of cp.pack"
        )
    if compiling:
        return
    tokens = _tokens(given)
    expected = inputs.positions(tokens.size(1))[0].shape
    if tokens.shape[:2] != expected:
        raise ValueError(
            f"{tuple(tokens.shape[:2])} tokens are given; of the batch that is entered this rank holds "
            f"{tuple(expected)}: cut them with batch.shard"
        )


def _check_positions(inputs: Inputs, position_ids: Any) -> None:
    """Refuse positions that are not those of the plan, or of the batch: not given, not sharded, of other documents."""
    compiling = torch.compiler.is_compiling()
    cut = "batch.shard" if inputs.packed else "cp.shard"
    if position_ids is None:
        # Those of a batch are filled in, by `default_positions`, but not into a graph, which would keep the first.
        if compiling if inputs.packed else inputs.degree > 1:
            raise ValueError(
                "position_ids is missing: every rank would count its tokens from 0; shard positions with the tokens, "
                f"tokens, labels, positions = {cut}(tokens, labels, positions), and pass position_ids=positions"
            )
        return
    if position_ids.ndim != 2:
        raise NotImplementedError(
            f"position_ids {tuple(position_ids.shape)}: supported is one position per token, [B, T]"
        )
    if not compiling:
        _check_values(inputs, position_ids)


def _check_values(inputs: Inputs, position_ids: torch.Tensor) -> None:
    """Refuse positions that are not, in every place, what they may be in one of the ways."""
    # transformers reads these values too, to look for packed documents: the wait for the device is not a second one.
    allowed = [x.to(position_ids.device) for x in inputs.positions(position_ids.size(1))]
    shape, way_out = tuple(allowed[0].shape), CUT_IN_DOCUMENTS if inputs.packed else CUT_IN_ROWS
    if inputs.packed and tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise ValueError(
            f"position_ids {tuple(position_ids.shape)}: of the batch that is entered this rank holds {shape} tokens; "
            f"{way_out}"
        )
    wrong = [((position_ids != x) & (x >= 0)).nonzero() for x in allowed]
    if all(len(places) for places in wrong):
        row, token = wrong[0][0].tolist()
        given, expected = (int(x[row % x.size(0), token]) for x in (position_ids, allowed[0]))
        raise ValueError(
            f"position_ids[{row}, {token}] = {given}, but this rank holds position {expected} there: {way_out}"
        )
