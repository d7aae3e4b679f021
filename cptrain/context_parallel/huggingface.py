"""How models of Hugging Face transformers reach context parallelism: through their own extension points.

[Note: transformers models]
A transformers model builds its mask outside of the attention modules, from position_ids: where they do not go on by
one it begins a document, so that any shard looks to it like packed documents, and a shard of packed documents like
others than they are. So it is given an attention implementation of its own name. The mask function of that name builds
nothing, and refuses what was asked for in earnest; the attention function calls F.scaled_dot_product_attention, which
`dispatch` replaces inside the applied modules, as in any model. The name is one for all plans: a module finds its plan
in its own forward, and the plan knows the documents of the batch that was entered. Positions only say where tokens are:
they have to be those of the plan or the batch. transformers does not write the name into the config it saves. What such
a model would get wrong without saying so is refused before it happens, see `huggingface_checks`.

Nothing here imports transformers: whoever has one of its models has loaded it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cptrain.context_parallel import dispatch
from cptrain.context_parallel.huggingface_checks import Inputs, check_inputs, default_positions, problems

# The implementation's name in transformers' registries. It must not contain the name of another ("sdpa", "flash"):
# transformers looks for those inside of it.
NAME = "cptrain"
INPUTS = "_context_parallel_inputs"  # where a model keeps what its inputs are checked against
# What transformers hands to `attention` beyond its own arguments without a meaning for it.
MEANINGLESS = {
    "cache_position",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "shift_labels",
    "use_cache",
}
# What to do instead of something else that it is handed.
WAYS_OUT = {
    "cu_seq_lens_q": 'leave it out; documents packed into one row need a plan with layout="balanced" and its cp.pack',
    "output_attentions": "the weights are never held, leave it out",
    "position_bias": "a model without a bias on the scores is needed",
    "s_aux": "a model without attention sinks is needed",
    "softcap": "set the config's attn_logit_softcapping to None",
}


def prepare(
    model: nn.Module,
    matched: Mapping[str, nn.Module],
    *,
    positions: Callable[[int], tuple[torch.Tensor, ...]],
    degree: int,
    window_size: int | None,
    packed: bool,
) -> dict[str, int | None]:
    """Window of each matched module that is part of a transformers model; these models are set up, if there are any.

    positions: gives what this rank's positions may be, see `Inputs`; degree: ranks that share a sequence; packed:
    whether a batch of packed documents is entered for every call.
    Raises NotImplementedError for a model whose attention would not be exact, with everything that is wrong in it, and
    ValueError for a window_size, since these models have their own; nothing is changed then.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    for name, module in matched.items():
        if modeling and any(isinstance(part, modeling.PreTrainedModel) for part in module.modules()):
            raise ValueError(
                f"{name or 'the model itself'} is or contains a transformers model: name the modules in it that call "
                'attention themselves, as "*.self_attn"'
            )
    around = {name: _models_around(model, name) for name in matched}
    ours = {name: matched[name] for name in matched if around[name]}
    if not ours:
        return {}
    if window_size is not None:
        raise ValueError(
            f"window_size = {window_size}: a transformers model says itself which layers have a window; leave it out, "
            "and set config.sliding_window"
        )
    inner: dict[int, Any] = {id(around[name][-1]): around[name][-1] for name in ours}
    # Once each: the encoder and the decoder of a model may have the same problem.
    found = {
        f"\n- {problem}" for owner in inner.values() for problem in problems(owner, list(ours.values()), known=NAME)
    }
    if found:
        raise NotImplementedError(f"{type(model).__name__} can not be made context parallel:{''.join(sorted(found))}")
    library: Any = sys.modules["transformers"]
    library.AttentionInterface.register(NAME, attention)
    library.AttentionMaskInterface.register(NAME, no_mask)
    for owner in inner.values():
        owner.set_attn_implementation(NAME)
    for outer in {id(outer): outer for name in ours for outer in around[name]}.values():
        _watch(outer, Inputs(positions, degree, packed, reads_positions=id(outer) in inner))
    return {name: _window_of(module) for name, module in ours.items()}


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls inside an attention module: the output [B, T, H, Dv], and no attention weights.

    Shapes: query [B, H, T, D], key [B, Hk, T, D], value [B, Hk, T, Dv]; kv heads are not repeated.
    Raises RuntimeError in a module that was not applied, NotImplementedError for what would not be exact.
    """
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    switch = dispatch.switch_of(module)
    if switch is None:
        raise RuntimeError(
            f"{where} was not made context parallel, but its config was: name it in modules=... (the modules that "
            'call attention themselves, as "*.self_attn"); or, where two models share one config object, build the '
            "other one from a copy of the config with attn_implementation='sdpa'"
        )
    for name, x in others.items():
        if name not in MEANINGLESS and x is not None and x is not False:
            way_out = WAYS_OUT.get(name, "a model that does not use it is needed")
            raise NotImplementedError(f"{where} asks for {name}: not supported under context parallelism; {way_out}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"{where} is not causal: only causal attention is supported in transformers models")
    if sliding_window != switch.window_size:
        raise RuntimeError(
            f"{where} asks for a window of {sliding_window}, by its config it had {switch.window_size} when it was "
            "applied: apply the plan again after a change of the config; a model without one is not supported"
        )
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def no_mask(
    *,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    q_length: int | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str | None = None,
    **others: Any,
) -> None:
    """None, since the plan knows the mask. transformers calls this where a model would build one.

    Raises NotImplementedError for padding and for anything that is neither causal nor the window of the config. The
    documents that transformers finds in the positions only hide more: whether positions are right is seen before
    (`check_inputs`). Under torch.compile no values are looked at.
    """
    if use_vmap:
        raise NotImplementedError("this model lays a pattern of its own over the causal mask: not supported")
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise NotImplementedError(f"attention within {local_size} tokens is not the config's sliding window")
    if torch.compiler.is_compiling():
        return
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError(
            "attention_mask has zeros (padding), which is not supported under context parallelism: leave it out, pad "
            "at the end and give padding the label -100; under a causal mask no other token sees it"
        )
    if q_length is not None and q_length > 1:
        # Windows and packing only ever hide more: a later token in sight is somebody's request.
        token = torch.arange(q_length - 1, device=device)[None, None, :]
        first = torch.zeros_like(token)
        if bool(mask_function(first, first, token, token + 1).any()):
            raise NotImplementedError(
                "this model lets tokens see later ones (bidirectional, or in blocks): only causal attention is "
                "supported in transformers models"
            )


def _models_around(model: nn.Module, name: str) -> list[nn.Module]:
    """The transformers models that hold the module of this name, the innermost last."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return []
    parts = name.split(".")
    chain = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return [module for module in chain if isinstance(module, library.PreTrainedModel)]


def _window_of(module: nn.Module) -> int | None:
    """The sliding window by the module's config and its own word; `attention` compares it with what is asked for."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds: Any = getattr(config, "layer_types", None)
    if kinds is not None and layer is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))  # type: ignore[arg-type]


def _watch(model: nn.Module, inputs: Inputs) -> None:
    """Check what this transformers model is called with, from now on."""
    before: Inputs | None = getattr(model, INPUTS, None)
    model.__dict__[INPUTS] = inputs
    if before is not None:
        reads_positions = inputs.reads_positions or before.reads_positions
        model.__dict__[INPUTS] = replace(inputs, reads_positions=reads_positions)
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]

    def with_checks(self: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given, inputs = dict(zip(names, args, strict=False)) | kwargs, self._context_parallel_inputs
        if inputs.reads_positions and self.config._attn_implementation != NAME:
            raise RuntimeError(
                f'the attention implementation was set to "{self.config._attn_implementation}" after the model was '
                'made context parallel: set it to "sdpa" and apply the plan again'
            )
        check_inputs(inputs, given)
        if inputs.packed and inputs.reads_positions and given.get("position_ids") is None:
            given["position_ids"] = default_positions(inputs, given)
        if "use_cache" in names:
            # Keys of a shard are of no use to a later call, and would only be held.
            given["use_cache"] = False
        return forward(**given)

    dispatch.wrap_forward(model, with_checks)
