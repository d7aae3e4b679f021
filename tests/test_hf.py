"""Models of Hugging Face transformers under one `cp.apply`: exact, or refused by name.

transformers is imported by the workers only: they are few, and it takes seconds.
"""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tolerance import assert_matches
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from cptrain.context_parallel import ContextParallel

LENGTH, VOCABULARY, WINDOW = 24, 32, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "exaone4, one layer with a window": (
        "Exaone4",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
CLASSES = {
    "Bert": "BertForMaskedLM",
    "GPT2": "GPT2LMHeadModel",
    "Llama4Text": "Llama4ForCausalLM",
    "T5": "T5ForConditionalGeneration",
}
# What calls attention itself, where its name is not self_attn.
ATTENTION = {"Bert": "*.attention.self", "Bloom": "*.self_attention", "GPT2": "*.attn", "T5": "*.SelfAttention"}
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "ring 2": (2, {"ring": 2}),
    "ulysses 2": (2, {"ulysses": 2}),
    "all-gather 2": (2, {"ring": 2, "method": "all_gather"}),
    "ring 2 x ulysses 2": (4, {"ring": 2, "ulysses": 2}),
}


def make_plan(*, ring: int = 1, ulysses: int = 1, **options: Any) -> ContextParallel:
    return ContextParallel(init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses")), **options)


def make_model(family: str = "Llama", **keys: Any) -> Any:
    """A causal LM with random weights, the same on every rank, in fp64."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | keys)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).double()
    for weight in model.parameters():
        # Stronger than as initialised: attention is far from uniform then, and a wrong mask shows.
        torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.3)
    return set_scale(model).train()


def set_scale(model: Any) -> Any:
    """The model with a scale of the scores that is not what is taken where none is given."""
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = 0.8
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Global tokens, labels (shifted) and positions."""
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:], torch.arange(LENGTH).expand(2, -1)


def loss_sum(model: Any, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits = model(tokens, position_ids=positions).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def assert_equal_to_one_process(model: Any, reference: Any, cp: ContextParallel) -> None:
    """Loss and every gradient of an applied model are those of the reference on the whole sequence."""
    model.zero_grad()
    reference.zero_grad()
    expected = loss_sum(reference, *batch())
    expected.backward()
    loss = loss_sum(model, *cp.shard(*batch()))
    loss.backward()
    assert_matches(total(loss), expected.detach())
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        try:
            assert_matches(total(ours.grad), theirs.grad)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def parity(rank: int, world: int, family: str, options: dict[str, Any]) -> None:
    name, keys = FAMILIES[family]
    model, cp = make_model(name, **keys), make_plan(**options)
    reference = copy.deepcopy(model)
    assert cp.apply(model, modules="*.self_attn") == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    calls: list[Any] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    assert_equal_to_one_process(model, reference, cp)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    assert_equal_to_one_process(model, reference, cp)
    assert len(calls) == 3, "checkpointing recomputed nothing"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_loss_and_every_gradient_equal_one_process_with_and_without_checkpointing(pool, family, plan):
    world, options = PLANS[plan]
    pool.run(world, parity, family, options)


def switch_plans(rank: int, world: int) -> None:
    model = make_model("Mistral", sliding_window=WINDOW)
    reference = copy.deepcopy(model)
    cp = make_plan(ring=4)
    for plan in (cp, cp.regroup(ring=1, ulysses=4), cp.regroup(ring=2, ulysses=2), cp):
        plan.apply(model, modules="*.self_attn")
        assert_equal_to_one_process(model, reference, plan)


def test_hf_takes_another_plan_at_each_apply(pool):
    pool.run(4, switch_plans)


def two_models(rank: int, world: int) -> None:
    first, second = make_model("Llama"), make_model("Mistral", sliding_window=WINDOW)
    references = copy.deepcopy(first), copy.deepcopy(second)
    ring, ulysses = make_plan(ring=2), make_plan(ulysses=2, layout="contiguous")
    ring.apply(first, modules="*.self_attn")
    ulysses.apply(second, modules="*.self_attn")
    assert_equal_to_one_process(first, references[0], ring)
    assert_equal_to_one_process(second, references[1], ulysses)
    assert_equal_to_one_process(first, references[0], ring)


def test_hf_models_in_one_process_keep_their_own_plans(pool):
    pool.run(2, two_models)


def deep_copy(rank: int, world: int) -> None:
    model, cp = make_model(), make_plan(ring=2)
    cp.apply(model, modules="*.self_attn")
    reference, twin = make_model(), copy.deepcopy(model)
    for x in (reference, twin):
        torch.nn.init.ones_(x.model.layers[0].self_attn.q_proj.weight)
    assert_equal_to_one_process(twin, reference, cp)
    other = make_plan(ulysses=2)
    other.apply(twin, modules="*.self_attn")
    assert_equal_to_one_process(twin, reference, other)
    assert_equal_to_one_process(model, make_model(), cp)


def test_hf_deep_copy_computes_with_its_own_weights_and_plan(pool):
    pool.run(2, deep_copy)


def own_training_loop(rank: int, world: int) -> None:
    """Two steps of a loop as a user writes it, with FSDP2 over the ranks that share the sequence."""
    model, reference = make_model("Qwen3"), make_model("Qwen3")
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ring",))
    cp = ContextParallel(mesh, ulysses=None)
    cp.apply(model, modules="*.self_attn")
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (reference, model)]
    for _ in range(2):
        losses = [loss_sum(reference, *batch()), loss_sum(model, *cp.shard(*batch()))]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            (loss / (2 * LENGTH)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_matches(total(losses[1]), losses[0].detach())


def test_hf_training_with_fsdp_equals_one_process(pool):
    pool.run(2, own_training_loop)


def autocast(rank: int, world: int) -> None:
    model = make_model().float()
    reference, cp = copy.deepcopy(model), make_plan(ring=2)
    cp.apply(model, modules="*.self_attn")
    dtypes: list[torch.dtype] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = total(loss_sum(model, *cp.shard(*batch()))), loss_sum(reference, *batch()).detach()
    assert dtypes == [torch.bfloat16]
    exact = loss_sum(reference, *batch()).detach()
    assert (loss - exact).abs() <= 2 * (expected - exact).abs() + 1e-3 * exact


def test_hf_under_autocast_attends_in_its_dtype(pool):
    pool.run(2, autocast)


def own_loss(rank: int, world: int) -> None:
    model, cp = make_model(), make_plan(ring=2)
    cp.apply(model, modules="*.self_attn")
    tokens, labels, positions = cp.shard(*batch())
    keys = {"labels": labels, "shift_labels": labels, "num_items_in_batch": 2 * LENGTH}
    loss = model(tokens, position_ids=positions, **keys).loss
    expected = loss_sum(make_model(), *batch()).detach() / (2 * LENGTH)
    assert abs(total(loss).item() - expected.item()) < 1e-5  # transformers computes its loss in fp32


def test_hf_own_loss_is_exact_with_shifted_labels_and_a_global_count(pool):
    pool.run(2, own_loss)


def no_cache(rank: int, world: int) -> None:
    model, cp = make_model(), make_plan(ring=2)
    cp.apply(model, modules="*.self_attn")
    tokens, _, positions = cp.shard(*batch())
    assert make_model()(tokens).past_key_values is not None
    assert model(tokens, position_ids=positions).past_key_values is None
    assert model(tokens, position_ids=positions, use_cache=True).past_key_values is None


def test_hf_keeps_no_keys_for_a_later_call(pool):
    pool.run(2, no_cache)


def saved(rank: int, world: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    model, cp = make_model(), make_plan(ring=2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    cp.apply(model, modules="*.self_attn")
    if rank == 0:
        model.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            assert "cptrain" not in path.read_text(), path
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert loaded.config._attn_implementation == "sdpa"
        assert all(torch.equal(x, before[name]) for name, x in loaded.state_dict().items())
        assert_matches(loss_sum(set_scale(loaded), *batch()).detach(), loss_sum(make_model(), *batch()).detach())


def test_hf_saves_a_model_that_knows_nothing_of_the_plan(pool, tmp_path):
    pool.run(2, saved, str(tmp_path))


def raised(function: Any, *args: Any, **kwargs: Any) -> str:
    """Kind and text of the error: a worker that lets one out is replaced, and would import everything again."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# family, keys of the config, what the refusal says
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "eager": ("Llama", {"attn_implementation": "eager"}, r'implementation "eager": load .*="sdpa"'),
    "flex": ("Llama", {"attn_implementation": "flex_attention"}, r'implementation "flex_attention": load .*="sdpa"'),
    "weights": ("Llama", {"output_attentions": True}, r"config\.output_attentions.*set it to False"),
    "dropout": ("Llama", {"attention_dropout": 0.1}, r"config\.attention_dropout = 0\.1: set it to 0\.0"),
    "softcap": ("Gemma2", {}, r"config\.attn_logit_softcapping = 50\.0: supported is None"),
    "sinks": ("GptOss", {"num_local_experts": 2}, r"layers\.0\.self_attn, layers\.1\.self_attn: attention sinks"),
    "router": ("Mixtral", {"output_router_logits": True, "num_local_experts": 2}, r"config\.output_router_logits"),
    "chunks": ("Llama4Text", {"num_local_experts": 2}, r"config\.layer_types has chunked_attention"),
    "linear": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, r"layers\.0\.conv\.conv \(Conv1d\): would mix"),
    "dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        r'rope_type "dynamic" follows the largest position',
    ),
    "longrope": (
        "Phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "long_factor": [2.0, 2.0],
                "short_factor": [1.0, 1.0],
            },
        },
        r'rope_type "longrope" follows the largest position',
    ),
    "alibi": ("Bloom", {}, r"BloomModel computes attention in its own way \(a bias"),
    "encoder": ("Bert", {}, r"encoder\.layer\.1\.attention\.self: attention is not causal"),
    "encoder and decoder": ("T5", {}, r"T5Stack is not a causal decoder"),
    "counts from 0": ("Bart", {"d_model": 16}, r"BartDecoder takes no position_ids"),
}


def refuse_models(rank: int, world: int) -> dict[str, str]:
    import transformers

    transformers.logging.set_verbosity_error()
    cp, found = make_plan(ring=2), {}
    for name, (family, keys, _) in MODELS.items():
        config = getattr(transformers, f"{family}Config")(**SIZES | keys)
        with torch.device("meta"):
            model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
        before = config._attn_implementation
        found[name] = raised(cp.apply, model, modules=ATTENTION.get(family, "*.self_attn"))
        changed = [module for module, x in model.named_modules() if "forward" in vars(x)]
        assert config._attn_implementation == before and not changed, name
    return found


@pytest.fixture(scope="module")
def refused_models(pool) -> dict[str, str]:
    """What `apply` says to each of the models."""
    return pool.run(2, refuse_models)[0]


@pytest.mark.parametrize("name", MODELS)
def test_hf_refuses_a_model_that_would_not_be_exact_and_leaves_it_alone(refused_models, name):
    message = refused_models[name]
    assert message.startswith("NotImplementedError: "), message
    assert re.search(MODELS[name][2], message), message


def refuse_whole_models(rank: int, world: int) -> list[str]:
    model, cp = make_model(), make_plan()
    return [raised(cp.apply, model, modules=name) for name in ("", "model")]


def test_hf_refuses_a_match_that_holds_a_whole_model(pool):
    itself, inner = pool.run(1, refuse_whole_models)[0]
    assert itself.startswith("ValueError: the model itself is or contains a transformers model: name the modules in it")
    assert inner.startswith("ValueError: model is or contains a transformers model: ")


def calls(cp: ContextParallel) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], str]]:
    """Arguments of a call and what the refusal says."""
    import transformers

    tokens, labels, positions = cp.shard(*batch())
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(tokens)
    good = {"position_ids": positions}
    begun_anew = cp.shard(batch()[2] % (LENGTH // 2), dim=1)
    return {
        "no positions": ((tokens,), {}, r"^ValueError: position_ids is missing: .* cp\.shard\("),
        "positions counted from 0": (
            (tokens,),
            {"position_ids": torch.arange(tokens.size(1))[None]},
            r"^ValueError: position_ids\[0, \d+\] = \d+, but this rank holds position \d+ there",
        ),
        "positions of the whole sequence, by place": (
            (tokens, None, batch()[2]),
            {},
            r"^ValueError: position_ids\[0, \d+\] = \d+, but this rank holds",
        ),
        "wrong where 0 is right": (
            (tokens,),
            {"position_ids": torch.where(positions == positions.min(), 90, positions)},
            r"^ValueError: position_ids\[0, 0\] = 90, but this rank holds position (0|6) there",
        ),
        "packed documents": (
            (tokens,),
            {"position_ids": begun_anew},
            r'^ValueError: .*begin anew .* layout="balanced"',
        ),
        "packed documents, flash": (
            (tokens,),
            good | {"cu_seq_lens_q": torch.tensor([0, 4, 12])},
            r'^NotImplementedError: LlamaAttention of layer 0 asks for cu_seq_lens_q: .*; leave it out; .*="balanced"',
        ),
        "three positions per token": (
            (tokens,),
            {"position_ids": positions.expand(3, -1, -1)},
            r"^NotImplementedError: position_ids \(3, 2, 12\): supported is one",
        ),
        "padding": (
            (tokens,),
            good | {"attention_mask": torch.cat([zeros[:, :1], ones[:, 1:]], 1)},
            r"^NotImplementedError: attention_mask has zeros \(padding\)",
        ),
        "dense mask": (
            (tokens,),
            good | {"attention_mask": torch.ones(2, 1, 12, 12).bool()},
            r"^NotImplementedError: attn_mask \(2, 1, 12, 12\): a dense mask",
        ),
        "full attention": ((tokens,), good | {"is_causal": False}, r"^NotImplementedError: .*only causal"),
        "labels": ((tokens,), good | {"labels": labels}, r"^ValueError: labels: the model would shift them inside"),
        "labels, averaged": (
            (tokens,),
            good | {"labels": labels, "shift_labels": labels},
            r"^ValueError: labels: the model would shift them inside each shard and average",
        ),
        "cache": (
            (tokens,),
            good | {"past_key_values": transformers.DynamicCache()},
            r"^NotImplementedError: past_key_values: .*no KV cache",
        ),
        "weights": ((tokens,), good | {"output_attentions": True}, r"^NotImplementedError: output_attentions"),
        "nothing": ((tokens,), good | {"attention_mask": ones}, r"^nothing was raised$"),
        "nothing, row of positions": ((tokens,), {"position_ids": positions[:1]}, r"^nothing was raised$"),
    }


CALLS = [
    "no positions",
    "positions counted from 0",
    "positions of the whole sequence, by place",
    "wrong where 0 is right",
    "packed documents",
    "packed documents, flash",
    "three positions per token",
    "padding",
    "dense mask",
    "full attention",
    "labels",
    "labels, averaged",
    "cache",
    "weights",
    "nothing",
    "nothing, row of positions",
]


def refuse_calls(rank: int, world: int) -> dict[str, tuple[str, str]]:
    cp, model = make_plan(ring=2), make_model()
    cp.apply(model, modules="*.self_attn")
    cases = calls(cp)
    assert list(cases) == CALLS
    return {name: (raised(model, *args, **kwargs), text) for name, (args, kwargs, text) in cases.items()}


@pytest.fixture(scope="module")
def refused_calls(pool) -> list[dict[str, tuple[str, str]]]:
    """On each rank, what an applied model says to each of the calls, and what it should say."""
    return pool.run(2, refuse_calls)


@pytest.mark.parametrize("name", CALLS)
def test_hf_refuses_a_call_that_would_not_be_exact(refused_calls, name):
    for rank in refused_calls:
        message, text = rank[name]
        assert re.search(text, message), message


def refuse_the_rest(rank: int, world: int) -> dict[str, str]:
    cp, model = make_plan(ring=2), make_model("Mistral", sliding_window=WINDOW)
    tokens, _, positions = cp.shard(*batch())
    found = {"a part": raised(cp.apply, model, modules="*.0.self_attn")}
    found["a window"] = raised(cp.apply, model, modules="*.self_attn", window_size=3)
    cp.apply(model, modules="*.self_attn")
    twin = type(model)(model.config)
    found["a model of the same config"] = raised(twin, tokens, position_ids=positions)
    model.config.sliding_window = WINDOW + 1
    found["a changed window"] = raised(model, tokens, position_ids=positions)
    model.config.sliding_window = WINDOW
    model.model.layers[0].self_attn.attention_dropout = 0.1
    found["dropout set later"] = raised(model, tokens, position_ids=positions)
    model.set_attn_implementation("eager")
    found["eager set later"] = raised(model, tokens, position_ids=positions)
    model.set_attn_implementation("sdpa")
    model.model.layers[0].self_attn.attention_dropout = 0.0
    cp.apply(model, modules="*.self_attn")
    found["sdpa, and applied again"] = raised(model, tokens, position_ids=positions)
    bare = make_model().model
    cp.apply(bare, modules="*.self_attn")
    bare.layers[0].self_attn.config = copy.copy(bare.config)
    bare.layers[0].self_attn.config._attn_implementation = "eager"
    found["eager set in one place"] = raised(bare, tokens, position_ids=positions)
    layers = make_model()
    found["whole layers"] = raised(cp.apply, layers, modules="model.layers.?") + raised(
        layers, tokens, position_ids=positions
    )
    return found


REST = {
    "a part": r"^NotImplementedError: (?s:.*)layers\.1\.self_attn \(MistralAttention\): would mix",
    "a window": r"^ValueError: window_size = 3: a transformers model says itself",
    "a model of the same config": r"^RuntimeError: MistralAttention of layer 0 was not made .* share one config object",
    "a changed window": r"^RuntimeError: MistralAttention of layer 0 asks for a window of 6, by its config it had 5",
    "dropout set later": r"^NotImplementedError: dropout_p = 0\.1",
    "eager set later": r'^RuntimeError: the attention implementation was set to "eager" after .*: set it to "sdpa" and',
    "sdpa, and applied again": r"^nothing was raised$",
    "eager set in one place": r"^RuntimeError: layers\.0\.self_attn was made context parallel, but its forward never",
    "whole layers": r"nothing was raisedRuntimeError: LlamaAttention of layer 0 was not made context parallel",
}


@pytest.fixture(scope="module")
def refused_rest(pool) -> dict[str, str]:
    return pool.run(2, refuse_the_rest)[0]


@pytest.mark.parametrize("name", REST)
def test_hf_refuses_to_be_half_applied(refused_rest, name):
    assert re.search(REST[name], refused_rest[name]), refused_rest[name]


# Learned positions (GPT-2) show where each document begins; rotary ones only distances inside of it.
PACKED_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "gpt-2": ("GPT2", {"n_positions": LENGTH, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}
PACKED_PLANS = PLANS | {"one rank": (1, {}), "ring 4": (4, {"ring": 4})}
# Lengths of the documents of each row; a negative one is padding.
PACKS = (((10, 1, 13), (2, 15, -7)), ((LENGTH,), (-1, 5, 7, 11)))


def packed_batch(rows: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Global tokens, labels (shifted inside of documents), positions (anew in each) and ids of documents."""
    tokens, labels, _ = batch()
    labels, positions, ids = labels.clone(), torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for row, number, span in spans(rows):
        positions[row, span] = torch.arange(span.stop - span.start)
        ids[row, span] = number
        labels[row, span.stop - 1] = -100
    return tokens, labels.masked_fill(ids < 0, -100), positions, ids


def spans(rows: tuple[tuple[int, ...], ...]) -> list[tuple[int, int, slice]]:
    """Row, number in it and tokens of every document."""
    found = []
    for row, lengths in enumerate(rows):
        ends = list(itertools.accumulate(abs(n) for n in lengths))
        found += [(row, k, slice(end - n, end)) for k, (n, end) in enumerate(zip(lengths, ends, strict=True)) if n > 0]
    return found


def assert_equal_to_each_document_by_itself(
    model: Any, reference: Any, cp: ContextParallel, rows: tuple[tuple[int, ...], ...], *, give_positions: bool
) -> None:
    """Logits and every gradient of an applied model are those of the reference called once for every document."""
    model.zero_grad()
    reference.zero_grad()
    tokens, labels, positions, ids = packed_batch(rows)
    expected = torch.zeros(*tokens.shape, VOCABULARY, dtype=torch.float64)
    for row, _, span in spans(rows):
        logits = reference(input_ids=tokens[row : row + 1, span]).logits[0]
        F.cross_entropy(logits, labels[row, span], reduction="sum").backward()
        expected[row, span] = logits.detach()
    packed = cp.pack(ids)
    tokens, labels, positions = packed.shard(tokens, labels, positions)
    with packed:
        logits = model(input_ids=tokens, **({"position_ids": positions} if give_positions else {})).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert_matches(packed.unshard(logits.detach(), dim=1)[ids >= 0], expected[ids >= 0])
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        try:
            assert_matches(total(ours.grad), theirs.grad)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def packed_parity(rank: int, world: int, options: dict[str, Any]) -> None:
    cp = make_plan(layout="balanced", chunk_size=3, **options)
    for family, keys in PACKED_FAMILIES.values():
        model = make_model(family, **keys)
        reference, masks = copy.deepcopy(model), []
        first = model.get_submodule(cp.apply(model, modules=ATTENTION.get(family, "*.self_attn"))[0])
        first.register_forward_pre_hook(
            lambda _, args, given, m=masks: m.append(given["attention_mask"]), with_kwargs=True
        )
        assert_equal_to_each_document_by_itself(model, reference, cp, PACKS[0], give_positions=True)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_equal_to_each_document_by_itself(model, reference, cp, PACKS[1], give_positions=False)
        assert masks == [None] * 3, "checkpointing recomputed nothing, or there was a mask"


@pytest.mark.parametrize("plan", PACKED_PLANS)
def test_hf_packed_logits_and_every_gradient_equal_each_document_by_itself(pool, plan):
    world, options = PACKED_PLANS[plan]
    pool.run(world, packed_parity, options)


def packed_calls(cp: ContextParallel) -> dict[str, tuple[dict[str, Any], str]]:
    """Arguments of a call inside of the first pack, and what the refusal says."""
    import transformers

    tokens, labels, positions, ids = packed_batch(PACKS[0])
    packed, other = cp.pack(ids), cp.pack(packed_batch(PACKS[1])[3])
    in_rows, whole = packed.shard(batch()[2]), positions
    of_other = other.shard(packed_batch(PACKS[1])[2])
    shifted = packed.shard(positions + (positions > 0))
    tokens, labels, positions, ids = packed.shard(tokens, labels, positions, ids)
    ones, good = torch.ones_like(tokens), {"input_ids": tokens, "position_ids": positions}
    differ = r"^ValueError: position_ids\[\d, \d+\] = \d+, but this rank holds position \d+ there: .*batch\.shard"
    return {
        "nothing": (good, r"^nothing was raised$"),
        "nothing, positions of rows": (good | {"position_ids": in_rows}, r"^nothing was raised$"),
        "nothing, positions in padding": (
            good | {"position_ids": positions.masked_fill(ids < 0, 7)},
            r"^nothing was raised$",
        ),
        "nothing, no padding": (good | {"attention_mask": ones}, r"^nothing was raised$"),
        "positions counted from 0": (good | {"position_ids": torch.arange(tokens.size(1)).expand(2, -1)}, differ),
        "positions of one row": (good | {"position_ids": positions[:1]}, differ),
        "positions of other documents": (good | {"position_ids": of_other}, differ),
        "positions that skip one": (good | {"position_ids": shifted}, differ),
        "positions of the whole rows": (
            good | {"position_ids": whole},
            r"^ValueError: position_ids \(2, 24\): .* this rank holds \(2, 12\) tokens; cut .*batch\.shard",
        ),
        "tokens of the whole rows": (
            {"input_ids": batch()[0]},
            r"^ValueError: \(2, 24\) tokens are given; .* this rank holds \(2, 12\): cut them with batch\.shard",
        ),
        "padding": (
            good | {"attention_mask": (ids >= 0).long()},
            r"^NotImplementedError: attention_mask \(padding\) together .* negative id in the document_ids",
        ),
        "dense mask": (
            good | {"attention_mask": torch.ones(2, 1, 12, 12).bool()},
            r"^NotImplementedError: attn_mask \(2, 1, 12, 12\): a dense mask",
        ),
        "documents, flash": (
            good | {"cu_seq_lens_q": torch.tensor([0, 4, 12])},
            r"^NotImplementedError: LlamaAttention of layer 0 asks for cu_seq_lens_q: .*; leave it out",
        ),
        "labels": (
            good | {"labels": labels},
            r"^ValueError: labels: the model would shift them .* across documents .* before batch\.shard",
        ),
        "cache": (
            good | {"past_key_values": transformers.DynamicCache()},
            r"^NotImplementedError: past_key_values: .*no KV cache",
        ),
    }


PACKED_CALLS = [
    "nothing",
    "nothing, positions of rows",
    "nothing, positions in padding",
    "nothing, no padding",
    "positions counted from 0",
    "positions of one row",
    "positions of other documents",
    "positions that skip one",
    "positions of the whole rows",
    "tokens of the whole rows",
    "padding",
    "dense mask",
    "documents, flash",
    "labels",
    "cache",
]
OUTSIDE = r"^RuntimeError: attention of a plan .* outside of a batch: forward and backward \(which may recompute\)"
PACKED_REST = {
    "outside, positions given": OUTSIDE,
    "outside, no positions": OUTSIDE,
    "recompute outside": OUTSIDE,
    "labels on one rank": r"^ValueError: labels: the model would shift them .* across documents",
    "layers with a state": r"^NotImplementedError: (?s:.*)layers\.0\.conv\.conv \(Conv1d\): would mix",
}


def refuse_packed(rank: int, world: int) -> dict[str, tuple[str, str]]:
    """What a model that takes another plan, of packed documents, says to each of the calls, and what it should say."""
    import transformers

    model, cp = make_model(), make_plan(ring=2, layout="balanced", chunk_size=3)
    make_plan(ring=2).apply(model, modules="*.self_attn")
    cp.apply(model, modules="*.self_attn")
    cases, packed = packed_calls(cp), cp.pack(packed_batch(PACKS[0])[3])
    assert list(cases) == PACKED_CALLS
    with packed:
        found = {name: (raised(model, **given), text) for name, (given, text) in cases.items()}
        assert model(**cases["nothing"][0], use_cache=True).past_key_values is None
    good = cases["nothing"][0]
    rest = {"outside, positions given": raised(model, **good)}
    rest["outside, no positions"] = raised(model, input_ids=good["input_ids"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with packed:
        loss = model(**good).logits.sum()
    rest["recompute outside"] = raised(loss.backward)
    alone, one = make_model(), ContextParallel(cp.mesh, ring=None, ulysses=None, layout="balanced")
    one.apply(alone, modules="*.self_attn")
    tokens, labels, _, ids = packed_batch(PACKS[0])
    with one.pack(ids):
        rest["labels on one rank"] = raised(alone, input_ids=tokens, labels=labels)
    with torch.device("meta"):
        hybrid = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SIZES | MODELS["linear"][1]))
    rest["layers with a state"] = raised(cp.apply, hybrid, modules="*.self_attn")
    return found | {name: (message, PACKED_REST[name]) for name, message in rest.items()}


@pytest.fixture(scope="module")
def refused_packed(pool) -> list[dict[str, tuple[str, str]]]:
    return pool.run(2, refuse_packed)


@pytest.mark.parametrize("name", [*PACKED_CALLS, *PACKED_REST])
def test_hf_packed_call_that_would_not_be_exact_is_refused(refused_packed, name):
    for rank in refused_packed:
        message, text = rank[name]
        assert re.search(text, message), message
