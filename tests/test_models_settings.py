"""[model] settings: known shapes are the published ones, keys combine as their help says, problems come all at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from cptrain.models.flavors import FLAVORS
from cptrain.models.llama import Llama
from cptrain.models.settings import ModelConfig, known_sizes, resolve
from cptrain.models.shape import RopeScaling, num_parameters

BYTES = 259

# Totals that the publishers give (weights files; tied embeddings once).
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
LLAMA31 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192)
LLAMA32 = RopeScaling(kind="llama3", factor=32.0, original_max_position_embeddings=8192)
PLAIN = RopeScaling()
# What a parameter count cannot see: heads, head_dim, theta, scaling, eps.
UNSEEN = {
    "llama2-7b": (32, 128, 10_000.0, PLAIN, 1e-5),
    "llama2-70b": (64, 128, 10_000.0, PLAIN, 1e-5),
    "llama3-8b": (32, 128, 500_000.0, PLAIN, 1e-5),
    "llama3.1-8b": (32, 128, 500_000.0, LLAMA31, 1e-5),
    "llama3.1-405b": (128, 128, 500_000.0, LLAMA31, 1e-5),
    "llama3.2-1b": (32, 64, 500_000.0, LLAMA32, 1e-5),
    "llama3.2-3b": (24, 128, 500_000.0, LLAMA32, 1e-5),
    "mistral-7b-v0.1": (32, 128, 10_000.0, PLAIN, 1e-5),
    "mistral-7b-v0.3": (32, 128, 1_000_000.0, PLAIN, 1e-5),
    "qwen2-0.5b": (14, 64, 1_000_000.0, PLAIN, 1e-6),
    "qwen2.5-7b": (28, 128, 1_000_000.0, PLAIN, 1e-6),
    "qwen2.5-72b": (64, 128, 1_000_000.0, PLAIN, 1e-5),
    "qwen3-0.6b": (16, 128, 1_000_000.0, PLAIN, 1e-6),
    "qwen3-32b": (64, 128, 1_000_000.0, PLAIN, 1e-6),
}
SMALL = {"dim": 48, "num_layers": 2, "num_heads": 4}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_scaling": "llama3"}


def rules(config: ModelConfig) -> dict[str, str]:
    return {problem.key: f"{problem.rule}; {problem.fix}" for problem in config.problems()}


def test_models_settings_every_flavor_has_a_published_count():
    assert set(PUBLISHED) == set(FLAVORS) - {"debug"}


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_models_settings_flavor_has_the_published_parameter_count(flavor):
    assert num_parameters(resolve(ModelConfig(flavor=flavor), BYTES)) == PUBLISHED[flavor]


@pytest.mark.parametrize("flavor", UNSEEN)
def test_models_settings_flavor_has_the_published_heads_and_rope(flavor):
    shape = resolve(ModelConfig(flavor=flavor), BYTES)
    assert (shape.num_heads, shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.norm_eps) == UNSEEN[flavor]


@pytest.mark.parametrize(
    "keys",
    [{"flavor": name} for name in ("debug", "llama3.2-1b", "llama3.1-405b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-32b")]
    + [SMALL, SMALL | {"qkv_bias": True, "num_kv_heads": 2}, SMALL | {"qk_norm": True, "head_dim": 6}],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_models_settings_num_parameters_counts_the_built_model(keys):
    shape = resolve(ModelConfig(**keys), BYTES)
    with torch.device("meta"):
        model = Llama(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape)


def test_models_settings_custom_shape_fills_the_rest_by_rule():
    shape = resolve(ModelConfig(**SMALL), BYTES)
    assert (shape.num_kv_heads, shape.head_dim, shape.ffn_dim, shape.vocab_size) == (4, 12, 256, BYTES)
    assert (shape.norm_eps, shape.rope_theta, shape.rope_scaling) == (1e-5, 500_000.0, RopeScaling())
    assert not (shape.tied_embeddings or shape.qkv_bias or shape.qk_norm)


# For each key: a configuration and another value of that key.
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "flavor": ({"flavor": "llama3-8b"}, "llama3.1-8b"),
    "dim": (SMALL, 96),
    "num_layers": (SMALL, 3),
    "num_heads": (SMALL, 2),
    "num_kv_heads": (SMALL, 2),
    "head_dim": (SMALL, 6),
    "ffn_dim": (SMALL, 100),
    "vocab_size": (SMALL, 512),
    "norm_eps": (SMALL, 1e-3),
    "rope_theta": (SMALL, 77.0),
    "rope_scaling": (YARN, "linear"),
    "rope_factor": (YARN, 8.0),
    "rope_original_max_position_embeddings": (YARN, 128),
    "rope_low_freq_factor": (LLAMA3, 2.0),
    "rope_high_freq_factor": (LLAMA3, 8.0),
    "rope_beta_fast": (YARN, 16.0),
    "rope_beta_slow": (YARN, 2.0),
    "rope_attention_factor": (YARN, 1.5),
    "tied_embeddings": (SMALL, True),
    "qkv_bias": (SMALL, True),
    "qk_norm": (SMALL, True),
    "attention_mask": (SMALL, "full"),
    "window_size": (SMALL, 100),
    "full_attention_every": (SMALL | {"window_size": 100}, 2),
}


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(ModelConfig)])
def test_models_settings_every_key_is_read(key):
    base, value = CHANGES[key]
    if key.startswith("rope_") and key != "rope_theta":
        base = SMALL | base
        if key == "rope_scaling":  # linear refuses the key that only YaRN reads
            changed = {k: v for k, v in base.items() if k != "rope_original_max_position_embeddings"} | {key: value}
        else:
            changed = base | {key: value}
    else:
        changed = base | {key: value}
    before, after = resolve(ModelConfig(**base), BYTES), resolve(ModelConfig(**changed), BYTES)
    assert after != before
    if key.startswith("rope_") and key not in ("rope_theta", "rope_scaling"):
        assert getattr(after.rope_scaling, key.removeprefix("rope_")) == value
    elif key not in ("flavor", "rope_scaling"):
        assert getattr(after, key) == value


@pytest.mark.parametrize("flavor", FLAVORS)
def test_models_settings_explicit_keys_replace_the_flavors(flavor):
    plain = resolve(ModelConfig(flavor=flavor), BYTES)
    changed = resolve(ModelConfig(flavor=flavor, num_layers=2, rope_theta=123.0, tied_embeddings=False), BYTES)
    assert changed == dataclasses.replace(plain, num_layers=2, rope_theta=123.0, tied_embeddings=False)


def test_models_settings_known_flavor_keeps_its_padded_vocabulary():
    assert resolve(ModelConfig(flavor="qwen3-8b"), BYTES).vocab_size == 151_936


def test_models_settings_debug_flavor_takes_the_tokenizers_vocabulary():
    assert resolve(ModelConfig(flavor="debug"), 300).vocab_size == 300


@pytest.mark.parametrize("keys", [SMALL | {"vocab_size": 258}, {"flavor": "llama2-7b"}])
def test_models_settings_vocabulary_smaller_than_the_tokenizers_is_refused(keys):
    tokens = BYTES if "dim" in keys else 32_001
    with pytest.raises(
        ValueError, match=rf"model.vocab_size = \d+: the tokenizer has {tokens} ids; set it to {tokens}"
    ):
        resolve(ModelConfig(**keys), tokens)


def test_models_settings_another_scaling_drops_the_flavors_factor_but_not_its_length():
    assert "rope_factor" in rules(ModelConfig(flavor="llama3.1-8b", rope_scaling="yarn"))
    scaling = resolve(ModelConfig(flavor="llama3.1-8b", rope_scaling="yarn", rope_factor=16.0), BYTES).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_position_embeddings) == ("yarn", 16.0, 8192)


def test_models_settings_another_factor_keeps_the_flavors_scaling():
    scaling = resolve(ModelConfig(flavor="llama3.1-8b", rope_factor=64.0), BYTES).rope_scaling
    assert scaling == dataclasses.replace(LLAMA31, factor=64.0)


def test_models_settings_defaults_lack_only_the_sizes_of_a_custom_shape():
    assert set(rules(ModelConfig())) == {"dim", "num_layers", "num_heads"}


def test_models_settings_problems_are_reported_all_at_once():
    config = ModelConfig(
        **SMALL | {"num_kv_heads": 3, "head_dim": 7, "num_layers": 0, "norm_eps": 0.0, "rope_factor": 2.0},
        rope_scaling="none",
        rope_theta=1.0,
        ffn_dim=-1,
    )
    found = rules(config)
    assert set(found) == {"num_kv_heads", "head_dim", "num_layers", "norm_eps", "rope_factor", "rope_theta", "ffn_dim"}
    assert found["num_kv_heads"].startswith("must divide the 4 query heads (here 3): 1, 2, 4")
    with pytest.raises(ValueError, match=r"model\.num_kv_heads: must divide") as error:
        resolve(config, BYTES)
    assert all(f"model.{key}: " in str(error.value) for key in found)


@pytest.mark.parametrize(
    ("keys", "blamed"),
    [
        ({"dim": 50}, "num_heads"),  # 50 is no multiple of 4 heads
        ({"dim": 12}, "num_heads"),  # head_dim 3 is odd
        ({"head_dim": 3}, "head_dim"),
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, "rope_original_max_position_embeddings"),
        ({"rope_scaling": "linear"}, "rope_factor"),
        (YARN | {"rope_factor": 0.5}, "rope_factor"),
        (YARN | {"rope_beta_fast": 1.0}, "rope_beta_fast"),
        (LLAMA3 | {"rope_high_freq_factor": 1.0}, "rope_high_freq_factor"),
        (LLAMA3 | {"rope_beta_slow": 2.0}, "rope_beta_slow"),  # has no effect
        ({"rope_attention_factor": 1.2}, "rope_attention_factor"),  # has no effect
    ],
)
def test_models_settings_problem_names_its_key(keys, blamed):
    assert set(rules(ModelConfig(**SMALL | keys))) == {blamed}


@pytest.mark.parametrize(
    ("written", "meant"),
    [("Llama-3.1-8B", "llama3.1-8b"), ("llama3_8b", "llama3-8b"), ("qwen25-7b", "qwen2.5-7b"), ("dbg", "debug")],
)
def test_models_settings_unknown_flavor_is_answered_with_the_nearest(written, meant):
    assert rules(ModelConfig(flavor=written))["flavor"].endswith(f'did you mean "{meant}"?')


def test_models_settings_odd_head_is_told_of_only_where_it_is_a_size():
    assert rules(ModelConfig(**SMALL, head_dim=-3)) == {"head_dim": "must be at least 1; "}


def test_models_settings_known_sizes_are_those_of_the_shape_without_the_wrong_ones_and_what_follows():
    right = SMALL | {"window_size": 8, "full_attention_every": 2}
    shape, known = dataclasses.asdict(resolve(ModelConfig(**right), BYTES)), known_sizes(ModelConfig(**right), BYTES)
    assert known == {key: shape[key] for key in known}
    wrong = known_sizes(ModelConfig(**right | {"num_heads": 0, "rope_factor": 0.5, "vocab_size": -1}), BYTES)
    assert wrong == known | {"num_heads": 0, "num_kv_heads": 0, "head_dim": 0, "vocab_size": 0}
    other = known_sizes(ModelConfig(flavor="x", num_heads=4), BYTES)
    assert {key for key, size in other.items() if size} == {"num_heads"}


def test_models_settings_need_no_torch():
    code = "import sys, cptrain.models.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
