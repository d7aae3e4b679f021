"""The decoder: against a plain re-statement of it, and the promises that sharding relies on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_matches
from torch import Tensor, nn

from cptrain.models.init import initialise
from cptrain.models.llama import Attention, Llama
from cptrain.models.rope import inverse_frequencies, rotary_tables
from cptrain.models.settings import ModelConfig, resolve
from cptrain.models.shape import ModelShape

KEYS: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "vocab_size": 40}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_shape(**keys: Any) -> ModelShape:
    return resolve(ModelConfig(**KEYS | keys), 40)


def make_model(dtype: torch.dtype = torch.float64, **keys: Any) -> Llama:
    """A small model whose every parameter differs from its neighbours, biases and norms too."""
    model = Llama(make_shape(**keys)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    return model


def make_batch(length: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 40, (2, length), generator=generator)
    return tokens, torch.arange(length).expand(2, -1)


def plain_decoder(model: Llama, tokens: Tensor, positions: Tensor) -> Tensor:
    """The same mathematics written out with matrix products, one kv head repeated per query head."""
    s, state = model.shape, dict(model.named_parameters(remove_duplicate=False))

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + s.norm_eps).sqrt() * state[f"{name}.weight"]

    def project(x: Tensor, name: str, heads: int) -> Tensor:
        out = x @ state[f"{name}.weight"].T
        if f"{name}.bias" in state:
            out = out + state[f"{name}.bias"]
        return out.unflatten(-1, (heads, s.head_dim))

    def turn(x: Tensor) -> Tensor:
        angles = (positions[..., None] * inverse_frequencies(s))[:, :, None].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)
        return turned * s.rope_scaling.attention_factor

    x = state["tok_embeddings.weight"][tokens]
    for i in range(s.num_layers):
        p = f"layers.{i}"
        y = norm(x, f"{p}.attention_norm")
        q = project(y, f"{p}.attention.wq", s.num_heads)
        k = project(y, f"{p}.attention.wk", s.num_kv_heads)
        v = project(y, f"{p}.attention.wv", s.num_kv_heads)
        if s.qk_norm:
            q, k = norm(q, f"{p}.attention.q_norm"), norm(k, f"{p}.attention.k_norm")
        q, k = turn(q), turn(k)
        k, v = (z.repeat_interleave(s.num_heads // s.num_kv_heads, dim=2) for z in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / s.head_dim**0.5
        if s.attention_mask == "causal":
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + out @ state[f"{p}.attention.wo.weight"].T
        y = norm(x, f"{p}.ffn_norm")
        gate, up = y @ state[f"{p}.feed_forward.w1.weight"].T, y @ state[f"{p}.feed_forward.w3.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ state[f"{p}.feed_forward.w2.weight"].T
    return norm(x, "norm") @ state["output.weight"].T


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"attention_mask": "full"},
        {"qkv_bias": True, "tied_embeddings": True},
        {"qk_norm": True, "head_dim": 6},
        {"norm_eps": 0.1, "rope_theta": 50.0},
        YARN,
    ],
    ids=lambda keys: "-".join(map(str, keys)) or "default",
)
def test_models_llama_matches_a_plain_decoder(keys):
    model, (tokens, positions) = make_model(**keys), make_batch()
    assert_matches(model(tokens, positions), plain_decoder(model, tokens, positions))


def test_models_llama_parameter_names_are_stable():
    model = make_model(qkv_bias=True, qk_norm=True)
    first = [name.removeprefix("layers.0.") for name in model.state_dict() if name.startswith("layers.0.")]
    assert sorted(first) == sorted(
        [f"attention.w{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")]
        + [f"feed_forward.w{i}.weight" for i in (1, 2, 3)]
        + ["attention.wo.weight", "attention.q_norm.weight", "attention.k_norm.weight"]
        + ["attention_norm.weight", "ffn_norm.weight"]
    )
    others = {name for name in model.state_dict() if not name.startswith("layers.")}
    assert others == {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert list(dict(model.layers.named_children())) == ["0", "1"]


def test_models_llama_has_no_buffers():
    assert not list(make_model(**YARN).buffers())


def test_models_llama_order_of_tokens_is_only_in_their_positions():
    model, (tokens, positions) = make_model(attention_mask="full"), make_batch()
    order = torch.randperm(12)
    assert_matches(model(tokens[:, order], positions[:, order]), model(tokens, positions)[:, order])
    # Without their positions, shuffled tokens are another text.
    assert not torch.allclose(model(tokens[:, order], positions), model(tokens, positions)[:, order])


def test_models_llama_needs_distances_not_absolute_positions():
    model, (tokens, positions) = make_model(), make_batch()
    assert_matches(model(tokens, positions + 5000), model(tokens, positions), atol=1e-8)


def test_models_llama_each_row_has_its_own_positions():
    model, (tokens, positions) = make_model(), make_batch()
    positions = torch.stack((positions[0], positions[0] * 3))
    together = model(tokens, positions)
    assert_matches(together[1:], model(tokens[1:], positions[1:]))


def test_models_llama_grouped_heads_equal_expanded_heads():
    grouped, (tokens, positions) = make_model(num_kv_heads=2, qkv_bias=True), make_batch()
    expanded = make_model(num_kv_heads=4, qkv_bias=True)
    state = grouped.state_dict()
    for name, tensor in state.items():
        if ".wk." in name or ".wv." in name:
            state[name] = tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    expanded.load_state_dict(state)
    assert_matches(grouped(tokens, positions), expanded(tokens, positions))


def test_models_llama_calls_plain_attention_with_unexpanded_heads(monkeypatch):
    seen = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q.shape, k.shape, v.shape, options))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    tokens, positions = make_batch()
    for kv_heads, mask in ((2, "causal"), (4, "full")):
        make_model(num_kv_heads=kv_heads, attention_mask=mask)(tokens, positions)
        expected = {"is_causal": mask == "causal", "enable_gqa": kv_heads != 4}
        kv = (2, kv_heads, 12, 8)
        assert seen == [((2, 4, 12, 8), kv, kv, expected)] * 2
        seen.clear()


def test_models_llama_attention_follows_the_heads_it_is_given():
    shape = make_shape(qkv_bias=True)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    rope = rotary_tables(torch.arange(6).expand(2, -1), shape, x.dtype)
    whole = Attention(shape).double()
    parts = torch.zeros_like(x)
    for half in range(2):  # what column- and row-parallel projections leave on each of two ranks
        local = Attention(shape).double()
        local.load_state_dict(whole.state_dict())
        for linear in (local.wq, local.wk, local.wv):
            linear.weight = nn.Parameter(linear.weight.chunk(2, dim=0)[half])
            linear.bias = nn.Parameter(linear.bias.chunk(2, dim=0)[half])
        local.wo.weight = nn.Parameter(local.wo.weight.chunk(2, dim=1)[half])
        parts = parts + local(x, rope)
    assert_matches(parts, whole(x, rope))


def test_models_llama_head_replaces_the_output_projection():
    model, (tokens, positions) = make_model(), make_batch()

    def last_two(hidden: Tensor, output: nn.Linear) -> Tensor:
        assert hidden.shape == (2, 12, 32)
        assert output is model.output
        return output(hidden[:, -2:])

    assert_matches(model(tokens, positions, head=last_two), model(tokens, positions)[:, -2:])


def test_models_llama_with_a_head_never_makes_all_logits(monkeypatch):
    model, (tokens, positions) = make_model(), make_batch()
    monkeypatch.setattr(model.output, "forward", lambda x: pytest.fail("the output projection ran"))
    assert model(tokens, positions, head=lambda hidden, _: hidden.sum()).shape == ()


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 11)])
def test_models_llama_refuses_positions_that_are_not_one_per_token(shape):
    with pytest.raises(ValueError, match="must be one per token"):
        make_model()(make_batch()[0], torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_models_llama_runs_in_its_parameters_dtype(dtype):
    model, (tokens, positions) = make_model(dtype), make_batch()
    exact = make_model(torch.float64)(tokens, positions)
    logits = model(tokens, positions)
    assert logits.dtype == dtype
    assert (logits.double() - exact).abs().max() < exact.abs().max() * (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_models_llama_gradients_reach_every_parameter():
    model, (tokens, positions) = make_model(qkv_bias=True, qk_norm=True), make_batch()
    model(tokens, positions).pow(2).mean().backward()
    # A key bias would leave softmax unchanged without the rotation and norm after it; here all have an effect.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_models_llama_tied_weights_survive_materialising_and_casts():
    shape = make_shape(tied_embeddings=True)
    with torch.device("meta"):
        model = Llama(shape)
    model.to_empty(device="cpu")
    initialise(model, 0)
    assert model.output.weight is model.tok_embeddings.weight
    model.double()
    assert model.output.weight is model.tok_embeddings.weight
    assert model.output.weight.dtype == torch.float64


def test_models_llama_untied_weights_stay_apart():
    model = make_model()
    assert model.output.weight is not model.tok_embeddings.weight


def test_models_llama_meta_build_computes_what_a_direct_build_does():
    shape = dataclasses.replace(make_shape(**YARN), qkv_bias=True)
    with torch.device("meta"):
        late = Llama(shape)
    late.to_empty(device="cpu")
    direct = Llama(shape)
    for model in (late, direct):
        initialise(model, 3)
    tokens, positions = make_batch()
    assert torch.equal(late(tokens, positions), direct(tokens, positions))
