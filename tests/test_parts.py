"""Parts of a tensor for several peers: the right tokens, contiguous for messages, in few operations."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cptrain.context_parallel import memory_order, parts
from cptrain.context_parallel.parts import empty_parts, parts_of

RANGES = (((3, 5), (9, 12)), (), ((5, 6),), ((0, 24),), tuple((i, i + 1) for i in range(0, 24, 2)))


@pytest.fixture(params=["by head", "by token"])
def by_head(request, monkeypatch):
    for module in (memory_order, parts):
        monkeypatch.setattr(module, "by_head", lambda device: request.param == "by head")
    return request.param == "by head"


def tokens(x: torch.Tensor, ranges: tuple) -> torch.Tensor:
    return x[:, :, [token for start, stop in ranges for token in range(start, stop)]]


@pytest.mark.parametrize("stored_by_head", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_parts_hold_each_peers_tokens_contiguously(by_head, batch, heads, stored_by_head):
    x = torch.randn(batch, heads, 24, 4)
    if not stored_by_head:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    before = x.clone()
    sent = parts_of(x, RANGES)
    for part, message, ranges in zip(sent.tensors, sent.messages(), RANGES, strict=True):
        assert torch.equal(part, tokens(x, ranges))
        # the bytes of a message do not depend on how the sender's tensor lies in memory
        assert message.is_contiguous()
        assert torch.equal(message, part if by_head else part.transpose(1, 2))

    lengths = [part.size(2) for part in sent.tensors]
    received = empty_parts(x, lengths)
    for there, here in zip(received.messages(), sent.messages(), strict=True):
        assert there.is_contiguous() and there.shape == here.shape
        there.copy_(here)
    places, before_it = [], 0
    for length in lengths:
        places.append(((before_it, before_it + length),) if length else ())
        before_it += length
    whole = torch.full((batch, heads, before_it, 4), torch.nan)
    received.put_into(whole, places)
    assert torch.equal(whole, torch.cat(sent.tensors, 2))
    assert torch.equal(x, before)


def test_parts_are_copied_by_one_operation_where_tokens_are_outermost(by_head):
    x = torch.randn(1, 3, 24, 4).transpose(1, 2).contiguous().transpose(1, 2)
    with mock.patch.object(parts, "take", wraps=parts.take) as take, mock.patch.object(parts, "put") as put:
        found = parts_of(x, RANGES)
        found.put_into(torch.empty(1, 3, 100, 4), RANGES)
        assert (take.call_count, put.call_count) == ((5, 5) if by_head else (1, 1))


def test_parts_that_lie_as_they_should_are_not_copied(by_head):
    x = torch.randn(1, 3, 24, 4)
    x = x if by_head else x.transpose(1, 2).contiguous().transpose(1, 2)
    (whole,) = parts_of(x, [((0, 24),)]).tensors
    assert whole.data_ptr() == x.data_ptr()
