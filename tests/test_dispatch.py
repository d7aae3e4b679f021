"""F.scaled_dot_product_attention inside chosen modules is replaced, exactly there, and only by what is exact."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from cptrain.context_parallel.dispatch import apply, switch_of


class Attention(nn.Module):
    """Calls `function` on itself; options go through."""

    def __init__(self, function=None, **options) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.function, self.options = function, options

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        x = x * self.weight
        return (self.function or F.scaled_dot_product_attention)(x, x, x, *args, **self.options)


class Layer(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = part(x)
        return x


class Recorder:
    """An attention that remembers how it was called and returns the queries, tripled."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, q, k, v, **options):
        self.calls.append(options)
        return 3 * q


X = torch.arange(1 * 2 * 4 * 3, dtype=torch.float64).view(1, 2, 4, 3)


class NeverCalls(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_dispatch_returns_and_replaces_the_modules_that_match():
    model, recorder = nn.Sequential(Layer(attention=Attention()), Layer(attention=Attention())), Recorder()
    assert apply(model, modules="*.attention", attention=recorder) == ["0.attention", "1.attention"]
    assert torch.equal(model(X), 9 * X)
    assert len(recorder.calls) == 2


def test_dispatch_leaves_modules_that_do_not_match_alone():
    model, recorder = nn.Sequential(Layer(attention=Attention()), Layer(memory=Attention())), Recorder()
    apply(model, modules="*.attention", attention=recorder)
    plain = F.scaled_dot_product_attention(3 * X, 3 * X, 3 * X)
    assert torch.equal(model(X), plain)
    assert len(recorder.calls) == 1


def test_dispatch_ends_with_the_forward_of_the_module():
    model, recorder = nn.Sequential(Attention()), Recorder()
    apply(model, modules="0", attention=recorder)
    plain = F.scaled_dot_product_attention(X, X, X)
    model(X)
    assert torch.equal(F.scaled_dot_product_attention(X, X, X), plain)
    assert len(recorder.calls) == 1


def test_dispatch_ends_when_the_forward_raises():
    model, recorder = nn.Sequential(Attention()), Recorder()
    apply(model, modules="0", attention=recorder)
    with pytest.raises(TypeError):
        model[0](X, None, 0.0, True, None, False, "one argument too many")
    F.scaled_dot_product_attention(X, X, X)
    assert recorder.calls == []


@pytest.mark.parametrize(
    "function",
    [scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention],
    ids=["imported from", "the builtin"],
)
def test_dispatch_catches_the_function_however_it_was_imported(function):
    model, recorder = nn.Sequential(Attention(function)), Recorder()
    apply(model, modules="0", attention=recorder)
    assert torch.equal(model(X), 3 * X)


def test_dispatch_passes_mask_and_scale_given_by_position_or_name():
    model, recorder = nn.Sequential(Attention(), Attention(is_causal=True, scale=0.5)), Recorder()
    apply(model, modules="?", attention=recorder)
    model[0](X, None, 0.0, True)
    model[1](X)
    assert recorder.calls == [
        {"is_causal": True, "window_size": None, "scale": None},
        {"is_causal": True, "window_size": None, "scale": 0.5},
    ]


def test_dispatch_gives_each_module_the_window_it_was_applied_with():
    model, recorder = nn.Sequential(Attention(is_causal=True), Attention(is_causal=True), Attention()), Recorder()
    apply(model, modules=["0", "2"], attention=recorder, window_size=5)
    apply(model, modules="1", attention=recorder)
    model[0](X)
    model[1](X)
    assert [call["window_size"] for call in recorder.calls] == [5, None]
    with pytest.raises(ValueError, match="window_size = 5: these modules call attention without is_causal=True"):
        model[2](X)


def test_dispatch_leaves_nothing_of_an_earlier_window():
    model, recorder = nn.Sequential(Attention(is_causal=True)), Recorder()
    apply(model, modules="0", attention=recorder, window_size=5)
    apply(model, modules="0", attention=recorder)
    model(X)
    assert [call["window_size"] for call in recorder.calls] == [None]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("modules", ["0", "0*"])
def test_dispatch_finds_what_is_wrapped_for_checkpointing_by_its_own_name(use_reentrant: bool, modules: str):
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    wrapped, recorder = nn.Sequential(checkpoint_wrapper(Attention(is_causal=True), kind)), Recorder()
    assert apply(wrapped, modules=modules, attention=recorder) == ["0"]
    x = X.clone().requires_grad_()
    out = wrapped(x)
    out.sum().backward()
    assert torch.equal(out, 3 * X)
    assert torch.equal(x.grad, torch.full_like(X, 3.0))
    assert recorder.calls


def test_dispatch_finds_what_is_inside_of_a_block_that_is_wrapped_for_checkpointing():
    model, recorder = nn.Sequential(checkpoint_wrapper(Layer(attention=Attention(is_causal=True)))), Recorder()
    assert apply(model, modules="0.attention", attention=recorder) == ["0.attention"]
    assert torch.equal(model(X), 3 * X)


def replaced_by_hand() -> nn.Module:
    module, other = Attention(), Attention()
    module.forward = lambda x, *, scale=None: other(x)
    return module


@pytest.mark.parametrize("made", [Attention, replaced_by_hand], ids=["its own forward", "one that was replaced"])
def test_dispatch_leaves_the_signature_of_a_forward_as_it_was(made):
    model = nn.Sequential(made())
    before = inspect.signature(model[0].forward)
    apply(model, modules="0", attention=Recorder())
    assert inspect.signature(model[0].forward) == before
    assert torch.equal(model(X), 3 * X)


def test_dispatch_of_a_deep_copy_does_not_keep_the_first_module_alive():
    model = nn.Sequential(Attention())
    apply(model, modules="0", attention=Recorder())
    twin, first = copy.deepcopy(model), weakref.ref(model[0])
    del model
    gc.collect()
    assert first() is None
    assert torch.equal(twin(X), 3 * X)


def test_dispatch_follows_a_deep_copy_to_the_parameters_of_the_copy():
    model, recorder = nn.Sequential(Attention()), Recorder()
    apply(model, modules="0", attention=recorder)
    twin = copy.deepcopy(model)
    nn.init.constant_(twin[0].weight, 10.0)
    assert torch.equal(twin(X), 30 * X)
    assert torch.equal(model(X), 3 * X)


def test_dispatch_of_a_deep_copy_takes_its_own_plan():
    model, recorder, other = nn.Sequential(Attention(is_causal=True)), Recorder(), Recorder()
    apply(model, modules="0", attention=recorder)
    twin = copy.deepcopy(model)
    apply(twin, modules="0", attention=other, window_size=4)
    model(X)
    twin(X)
    assert [call["window_size"] for call in recorder.calls] == [None]
    assert [call["window_size"] for call in other.calls] == [4]


def test_dispatch_of_a_pattern_that_matches_nothing_lists_what_looks_like_attention():
    model = nn.Sequential(Layer(self_attn=Attention(), mlp=nn.Identity()), Layer(self_attn=Attention()))
    with pytest.raises(
        ValueError, match=r"'\*\.attention' matches no module of Sequential.*0\.self_attn, 1\.self_attn$"
    ):
        apply(model, modules="*.attention", attention=Recorder())


def test_dispatch_of_several_patterns_names_every_one_that_matches_nothing():
    model = nn.Sequential(Layer(self_attn=Attention(), cross_attn=Attention(), experts=NeverCalls()))
    message = r"^modules = '\*\.cros_attn', '\*\.expert' matches no .*: 0\.cross_attn, 0\.experts, 0\.self_attn$"
    with pytest.raises(ValueError, match=message):
        apply(model, modules=["*.self_attn", "*.cros_attn", "*.expert"], attention=Recorder())
    assert switch_of(model[0].self_attn) is None


def shared_attention() -> nn.Module:
    """One attention that is registered in the model and in its first layer, and another one."""
    model = Layer(shared=Attention(), layers=nn.ModuleList([Layer(), Layer(attention=Attention())]))
    model.layers[0].attention = model.shared
    return model


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        ("layers.*.attention", ["layers.0.attention", "layers.1.attention"]),
        (["shared", "layers.0.attention"], ["shared"]),
    ],
    ids=["a later name", "both names"],
)
def test_dispatch_finds_a_shared_module_by_any_of_its_names_and_replaces_it_once(modules, names):
    model, recorder = shared_attention(), Recorder()
    assert apply(model, modules=modules, attention=recorder) == names
    assert torch.equal(model.shared(X), 3 * X)
    assert len(recorder.calls) == 1


def test_dispatch_refuses_a_match_that_is_inside_another_by_a_name_elsewhere():
    model = shared_attention()
    with pytest.raises(ValueError, match=r"matches layers\.0 and shared inside it"):
        apply(model, modules=["shared", "layers.0"], attention=Recorder())


def test_dispatch_of_the_model_itself():
    model, recorder = Attention(), Recorder()
    assert apply(model, modules="", attention=recorder) == [""]
    assert torch.equal(model(X), 3 * X)


def test_dispatch_of_what_cannot_call_attention_points_to_the_model_itself():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"'\*' matches 0, a Linear of torch, which never .* \"\" is the model itself"):
        apply(model, modules="*", attention=Recorder())


class Also(nn.Module):
    """Attends by the function that is replaced, and by another one."""

    def __init__(self, other) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x) + self.other(x)


def multi_head(x: torch.Tensor) -> torch.Tensor:
    tokens, weights = x.transpose(1, 2).flatten(2).transpose(0, 1).contiguous(), torch.eye(6, dtype=x.dtype)
    options = {"in_proj_weight": weights.repeat(3, 1), "in_proj_bias": None, "bias_k": None, "bias_v": None}
    options |= {"add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": weights, "out_proj_bias": None}
    out = F.multi_head_attention_forward(tokens, tokens, tokens, 6, 2, **options, need_weights=False)[0]
    return out.transpose(0, 1).unflatten(2, (2, 3)).transpose(1, 2)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (multi_head, "multi_head_attention_forward"),
        (lambda x: torch.ops.aten.scaled_dot_product_attention(x, x, x), "scaled_dot_product_attention"),
        pytest.param(
            lambda x: flex_attention(*[x.float()] * 3),
            "flex_attention",
            # It compiles itself, says that it had better be compiled, and torch's compiler warns of its own calls.
            marks=pytest.mark.filterwarnings("ignore"),
        ),
    ],
    ids=["multi-head", "operator", "flex"],
)
def test_dispatch_refuses_another_attention_in_the_same_forward_by_name(other, name):
    model = nn.Sequential(Also(other))
    apply(model, modules="0", attention=Recorder())
    with pytest.raises(NotImplementedError, match=f"^0 calls {name}, .*: call F.scaled_dot_product_attention instead"):
        model(X)


def test_dispatch_of_a_module_that_never_calls_attention_fails_at_its_first_forward():
    model = nn.Sequential(Layer(attention=NeverCalls()))
    apply(model, modules="*.attention", attention=Recorder())
    with pytest.raises(RuntimeError, match=r"^0\.attention .*never called F\.scaled_dot_product_attention"):
        model(X)


def test_dispatch_refuses_a_match_inside_another():
    model = nn.Sequential(Layer(attention=Attention()))
    with pytest.raises(ValueError, match=r"'0\*' matches 0 and 0\.attention inside it"):
        apply(model, modules="0*", attention=Recorder())


def test_dispatch_of_a_module_that_is_context_parallel_already_switches_it_over():
    model, before, after = nn.Sequential(Attention(is_causal=True), Attention(is_causal=True)), Recorder(), Recorder()
    apply(model, modules="?", attention=before)
    assert apply(model, modules="1", attention=after, window_size=2) == ["1"]
    assert torch.equal(model(X), 9 * X)
    assert [call["window_size"] for call in before.calls] == [None]
    assert [call["window_size"] for call in after.calls] == [2]


def test_dispatch_that_is_refused_changes_nothing():
    model = nn.Sequential(Attention(), Layer(attention=Attention()), Attention())
    apply(model, modules="2", attention=Recorder())
    with pytest.raises(ValueError, match="inside it"):
        apply(model, modules="[01]*", attention=Recorder())
    assert [name for name, module in model.named_modules() if switch_of(module)] == ["2"]


@pytest.mark.parametrize(
    ("options", "refusal", "message"),
    [
        ({"attn_mask": torch.ones(4, 4).bool()}, NotImplementedError, r"attn_mask \(4, 4\).*use is_causal=True"),
        ({"dropout_p": 0.1}, NotImplementedError, r"dropout_p = 0\.1.*set it to 0\.0"),
    ],
    ids=["mask", "dropout"],
)
def test_dispatch_refuses_what_would_not_be_exact(options, refusal, message):
    model, recorder = nn.Sequential(Attention(**options)), Recorder()
    apply(model, modules="0", attention=recorder)
    with pytest.raises(refusal, match=message):
        model(X)
    assert recorder.calls == []


def test_dispatch_refuses_fewer_kv_heads_without_enable_gqa():
    grouped = Attention(lambda q, k, v, **options: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], **options))
    model, recorder, x = nn.Sequential(grouped), Recorder(), torch.ones(1, 4, 4, 3)
    apply(model, modules="0", attention=recorder)
    with pytest.raises(ValueError, match="4 query heads and 2 kv heads need enable_gqa=True"):
        model(x)
    grouped.options["enable_gqa"] = True
    model(x)
    assert len(recorder.calls) == 1


def test_dispatch_takes_a_single_kv_head_as_one_device_does():
    model = nn.Sequential(Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1])))
    assert model(X).shape == X.shape
    apply(model, modules="0", attention=Recorder())
    assert torch.equal(model(X), 3 * X)


def test_dispatch_refuses_to_pickle_what_a_pickle_would_leave_out():
    model, recorder = nn.Sequential(Attention()), Recorder()
    pickle.dumps(model)
    apply(model, modules="0", attention=recorder)
    with pytest.raises(pickle.PicklingError, match="save its state_dict"):
        pickle.dumps(model)
    assert torch.equal(copy.deepcopy(model)(X), 3 * X)


@pytest.mark.parametrize("pattern", ["attention", "layer"])
def test_dispatch_refuses_attention_that_it_cannot_replace(pattern):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "layer": nn.TransformerEncoderLayer(8, 2, 8)})
    with pytest.raises(NotImplementedError, match=f"{pattern} is or contains nn.MultiheadAttention"):
        apply(model, modules=pattern, attention=Recorder())


class CheckpointsItself(Attention):
    reentrant = True

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dispatch_refuses_checkpointing_of_a_part_of_a_forward(reentrant):
    model = nn.Sequential(CheckpointsItself())
    model[0].reentrant = reentrant
    apply(model, modules="0", attention=Recorder())
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="checkpoint the whole module"):
        model(x)
    with pytest.raises(NotImplementedError, match="checkpoint the whole module"):
        checkpoint(model, x, use_reentrant=False)
    with torch.no_grad():
        assert torch.equal(model(x), 3 * x)


def test_dispatch_lets_saved_tensors_of_a_part_of_a_forward_be_offloaded():
    def offloads(q, k, v):
        with save_on_cpu():
            return F.scaled_dot_product_attention(q, k, v)

    model, x = nn.Sequential(Attention(offloads)), X.clone().requires_grad_()
    apply(model, modules="0", attention=Recorder())
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, torch.full_like(X, 3))


def test_dispatch_lets_a_whole_module_be_checkpointed_either_way():
    for reentrant in (True, False):
        model, x = nn.Sequential(Attention()), X.clone().requires_grad_()
        apply(model, modules="0", attention=Recorder())
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, torch.full_like(X, 3))
