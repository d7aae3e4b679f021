"""The process groups of a plan: one set for keys, one for gradients, over the ring and its inner and outer parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from cptrain.distributed.transport import check_same_groups, link_speed, warm_up

FAST = 120e9  # bytes/s of a link: NVLink gives 200e9 and more, PCIe and a network's card 50e9 and less


class Groups(NamedTuple):
    """Names of the process groups that carry keys and gradients; "" where an axis has one rank.

    The ring of N ranks is cut into groups of `inner` neighbours; `outer` joins the ranks at the same place of each.
    Gradients have communicators of their own, so that they never queue behind keys.
    """

    ring: str = ""
    ring_grad: str = ""
    inner: str = ""
    inner_grad: str = ""
    outer: str = ""
    outer_grad: str = ""
    link: str = ""  # "fast" if the links between neighbours of `inner` are

    @property
    def is_fast(self) -> bool:
        """Whether keys of many hops come round `inner` while few are computed."""
        return self.link == "fast"


def make_groups(ring: dist.ProcessGroup, inner_degree: int, device: torch.device) -> Groups:
    """The groups of the ring that this rank is in. Collective over its ranks.

    RuntimeError on all of them if some belong to more process groups than others.
    """
    ranks = dist.get_process_group_ranks(ring)
    place = dist.get_rank(ring)
    first = place // inner_degree * inner_degree
    inner = ranks[first : first + inner_degree]
    outer = ranks[place % inner_degree :: inner_degree]
    if inner_degree == 1:
        # One ring over all ranks, which is the outer ring of groups of one.
        inner, outer = ranks, ranks[place : place + 1]
    warm_up(ring, device)
    check_same_groups(ring, device)
    ring_name, ring_grad = ring.group_name, _new_group(ranks, device)
    if inner == ranks:
        return Groups(ring_name, ring_grad, inner=ring_name, inner_grad=ring_grad, link=_link(ring_name, device))
    inner_name = _new_group(inner, device)
    return Groups(
        ring_name,
        ring_grad,
        inner=inner_name,
        inner_grad=_new_group(inner, device),
        outer=_new_group(outer, device),
        outer_grad=_new_group(outer, device),
        link=_link(inner_name, device),
    )


def _link(group: str, device: torch.device) -> str:
    # One of two classes that are far apart: what is computed in which order must not differ from run to run.
    return "fast" if link_speed(group, device) >= FAST else ""


def _new_group(ranks: list[int], device: torch.device) -> str:
    """A communicator of these ranks, who alone take part in making it."""
    if len(ranks) == 1:
        return ""
    group = dist.new_group(ranks, use_local_synchronization=True)
    warm_up(group, device)
    return group.group_name
