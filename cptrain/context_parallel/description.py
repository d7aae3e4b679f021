"""A plan in words: which modules it serves, how their keys travel, and what that sends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from cptrain.context_parallel.attention import sends_needed_only
from cptrain.context_parallel.hops import batches, groups_of, hops_at_once, ring_pace
from cptrain.context_parallel.launches import num_tokens
from cptrain.context_parallel.layout import Layout
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.traffic import Call, Traffic, attention_traffic

if TYPE_CHECKING:
    from cptrain.context_parallel.api import ContextParallel

KIB = 1024


def summary(plan: ContextParallel) -> str:
    """One line: method, degrees, layout and hops."""
    if plan.degree == 1:
        return "no context parallelism (one rank holds the whole sequence)"
    parts = [f"ring {plan.ring_degree} x ulysses {plan.ulysses_degree}"]
    if plan.ring_degree > 1:
        parts.append(plan.layout)
        if plan.ring_inner_degree > 1:
            parts.append(f"inner rings of {plan.ring_inner_degree}")
        if plan.method != "all_gather":
            hops = plan.ring_degree - 1
            parts.append(f"{hops} hop{'s' if hops > 1 else ''}")
    return f"{plan.method} ({', '.join(parts)})"


def describe(plan: ContextParallel, applied: Sequence[tuple[str, int]], seq_len: int | None, call: Call | None) -> str:
    """The summary, then a line for each kind of module that the plan was applied to, by name and window (0: none).

    With the length of a sequence and the shapes of a call, what this rank sends in it, and the buffers.
    Raises ValueError for a call without the length.
    """
    if call is not None and seq_len is None:
        raise ValueError("what a call sends depends on the length of the sequence: give seq_len too")
    lines = [summary(plan)]
    by_window: dict[int, list[str]] = {}
    for name, window in applied:
        by_window.setdefault(window, []).append(name)
    for window, names in (by_window or {0: []}).items():
        shown = [name or "the model itself" for name in names]
        where = f"{len(names)} modules, {shown[0]} .. {shown[-1]}" if len(names) > 1 else "".join(shown)
        where = where or "no module applied yet"
        mask = Mask(causal=True, window=window)
        seen = f"window {window}" if window else "no window"
        lines.append(f"{where}: {seen}, {carried(plan, mask, seq_len)}")
        if call is not None and seq_len is not None and plan.layout != "balanced":
            lines += [f"  {line}" for line in _sent(plan, mask, seq_len, call)]
    return "\n".join(lines)


def carried(plan: ContextParallel, mask: Mask, seq_len: int | None) -> str:
    """How keys get to the queries of layers with this mask; needed-only sending depends on the length."""
    parts = []
    if plan.ulysses_degree > 1:
        parts.append(f"all-to-all over {plan.ulysses_degree} ranks")
    if plan.ring_degree > 1:
        ring, balanced = plan.ring_degree, plan.layout == "balanced"
        needed_only = not balanced and seq_len is not None and sends_needed_only(plan.ring_layout(seq_len), mask)
        inner = f" with inner rings of {plan.ring_inner_degree}" if plan.ring_inner_degree > 1 else ""
        straight = "needed keys straight from their owners"
        if needed_only:
            how = f"{straight}, of {ring} ranks"
        elif plan.method == "all_gather":
            how = f"keys gathered over {ring} ranks one head at a time"
        else:
            how = f"ring of {ring}{inner}"
        if balanced and (plan.method != "all_gather" or mask.window):
            how = f"{how} or {straight}, by the batch"
        parts.append(f"{how}, {plan.layout}")
    return " and ".join(parts) or "whole sequences on each rank"


def _sent(plan: ContextParallel, mask: Mask, seq_len: int, call: Call) -> list[str]:
    layout = plan.ring_layout(seq_len)
    forward, backward = attention_traffic(
        call,
        mask,
        layout,
        ring_rank=plan.ring_rank,
        gathers=plan.method == "all_gather",
        ulysses_degree=plan.ulysses_degree,
    )
    lines = [f"forward sends {_messages(forward)}", f"backward sends {_messages(backward)}"]
    kv_heads, tokens = max(call.kv_heads, plan.ulysses_degree), layout.shard_length // plan.ulysses_degree
    if plan.ulysses_degree > 1:
        widths = ((call.heads, call.key_dim), (kv_heads, call.key_dim), (kv_heads, call.value_dim))
        sizes = [_size(call.batch * tokens * heads * dim * call.itemsize) for heads, dim in widths]
        out = _size(call.batch * tokens * call.heads * call.value_dim * call.itemsize)
        lines.append(f"exchanged q, k, v and out of {', '.join([*sizes, out])}")
    of_token = call.batch * kv_heads // plan.ulysses_degree * (call.key_dim + call.value_dim)  # elements
    if plan.ring_degree == 1:
        pass
    elif sends_needed_only(layout, mask):
        arriving = _most_arriving(plan, layout, mask, call) * of_token * call.itemsize
        lines.append(f"holds at most {_size(arriving)} of others' keys")
    elif plan.method == "all_gather":
        lines.append(_gathered_buffers(plan, layout, call))
    else:
        lines.append(_key_buffers(plan, layout, call, _size(layout.shard_length * of_token * call.itemsize)))
    return lines


def _heads_per_key(plan: ContextParallel, call: Call) -> int:
    return call.heads // max(call.kv_heads, plan.ulysses_degree)


def _most_arriving(plan: ContextParallel, layout: Layout, mask: Mask, call: Call) -> int:
    """Tokens of others that this rank holds at once: of some hops and the next, and in order where hops go together."""
    fast = plan._groups.is_fast and plan._groups.inner == plan._groups.ring
    at_once = hops_at_once(layout, plan.mesh.device_type, heads_per_key=_heads_per_key(plan, call), fast=fast)
    groups = [group for group in groups_of(layout, mask, plan.ring_rank, at_once) if group.hops]
    held = [sum(num_tokens(hop.incoming) for hop in group.hops) for group in groups]
    ordered = [group.keys.num_keys if len(group.hops) > 1 else 0 for group in groups]
    return max((sum(three) for three in zip(held, [*held[1:], 0], ordered, strict=True)), default=0)


def _gathered_buffers(plan: ContextParallel, layout: Layout, call: Call) -> str:
    """Keys and values of one head: as they came, in order, and those of the next head; backward also gradients."""
    heads = max(call.kv_heads, plan.ulysses_degree) // plan.ulysses_degree
    elements = call.batch * layout.length * (call.key_dim + call.value_dim)
    keys, gradients = _size(elements * call.itemsize), _size(elements * call.wide_itemsize)
    return f"{min(heads, 2) + 1} gathered key buffers of {keys}, backward 2 gradient buffers of {gradients}"


def _key_buffers(plan: ContextParallel, layout: Layout, call: Call, each: str) -> str:
    """At most: held and arriving ones, copies of hops computed together, of a double ring what leaves and comes."""
    double = 1 < plan.ring_inner_degree < plan.ring_degree
    size = plan.ring_inner_degree if double else plan.ring_degree
    heads_per_key, fast = _heads_per_key(plan, call), plan._groups.is_fast
    pace = ring_pace(layout, plan.mesh.device_type, heads_per_key=heads_per_key, fast=fast)
    sizes = [len(batch) for batch in batches(range(size), pace)]
    copies = max(sizes) if max(sizes) > 1 else 0
    text = f"{max(sum(pair) for pair in pairwise(sizes)) + copies + (2 if double else 0)} key buffers of {each}"
    return f"{text}, hops computed together: {', '.join(map(str, sizes))}" if copies else text


def _messages(traffic: Traffic) -> str:
    texts = [f"{count} x {_size(message.num_bytes)} ({message.kind})" for message, count in traffic.items()]
    return ", ".join(texts) or "nothing"


def _size(num_bytes: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= KIB**power:
            return f"{num_bytes / KIB**power:.4g} {unit}"
    return f"{num_bytes} B"
