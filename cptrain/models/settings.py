"""Settings of the model, the section [model], and `resolve`, which makes a concrete shape of them. No torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cptrain.config import Problem, setting
from cptrain.distributed.divide import divisors
from cptrain.models.flavors import FLAVORS
from cptrain.models.shape import ModelShape, RopeScaling

CUSTOM = "custom"
_SIZES = ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "vocab_size")
_ROPE_KEYS_READ = {
    "none": (),
    "linear": ("rope_factor",),
    "llama3": (
        "rope_factor",
        "rope_original_max_position_embeddings",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
    ),
    "yarn": (
        "rope_factor",
        "rope_original_max_position_embeddings",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_attention_factor",
    ),
}
_ROPE_KEYS = (
    "rope_factor",
    "rope_original_max_position_embeddings",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_beta_fast",
    "rope_beta_slow",
    "rope_attention_factor",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which Llama-family decoder to build: a known flavour, a free shape, or a flavour with some keys replaced."""

    flavor: str = setting(
        CUSTOM, 'known shape ("llama3.1-8b", "qwen3-0.6b", "debug", ...) whose values the "auto" keys take, or "custom"'
    )
    dim: int | Literal["auto"] = setting("auto", "width of the residual stream; custom shapes need it")
    num_layers: int | Literal["auto"] = setting("auto", "decoder blocks; custom shapes need it")
    num_heads: int | Literal["auto"] = setting("auto", "query heads; custom shapes need it")
    num_kv_heads: int | Literal["auto"] = setting("auto", "key/value heads, a divisor of num_heads; custom: num_heads")
    head_dim: int | Literal["auto"] = setting(
        "auto", "width of one head, even; unless the flavor fixes it: dim/num_heads"
    )
    ffn_dim: int | Literal["auto"] = setting("auto", "inner width of SwiGLU; custom: 8/3 dim, rounded up to 256s")
    vocab_size: int | Literal["auto"] = setting("auto", "embedding rows; custom and debug: the tokenizer's vocabulary")
    norm_eps: float | Literal["auto"] = setting("auto", "added to the mean square in RMSNorm; custom: 1e-5")
    rope_theta: float | Literal["auto"] = setting("auto", "base of the rotary frequencies; custom: 500000")
    rope_scaling: Literal["auto", "none", "linear", "llama3", "yarn"] = setting(
        "auto", "how rotary frequencies are stretched to longer contexts; custom: none"
    )
    rope_factor: float | Literal["auto"] = setting("auto", "times by which the context grows (linear, llama3, yarn)")
    rope_original_max_position_embeddings: int | Literal["auto"] = setting(
        "auto", "tokens of context before scaling (llama3, yarn)"
    )
    rope_low_freq_factor: float | Literal["auto"] = setting(
        "auto", "wavelengths above original/this are stretched in full (llama3); 1"
    )
    rope_high_freq_factor: float | Literal["auto"] = setting(
        "auto", "wavelengths below original/this are left alone (llama3); 4"
    )
    rope_beta_fast: float | Literal["auto"] = setting(
        "auto", "rotations within the original length from which a frequency is left alone (yarn); 32"
    )
    rope_beta_slow: float | Literal["auto"] = setting(
        "auto", "rotations within the original length up to which a frequency is stretched in full (yarn); 1"
    )
    rope_attention_factor: float | Literal["auto"] = setting(
        "auto", "scale of rotated queries and keys (yarn); 0.1 ln(rope_factor) + 1"
    )
    tied_embeddings: bool | Literal["auto"] = setting("auto", "output projection shares the embedding; custom: false")
    qkv_bias: bool | Literal["auto"] = setting("auto", "biases on the query, key and value projections; custom: false")
    qk_norm: bool | Literal["auto"] = setting("auto", "RMSNorm on each query and key head; custom: false")
    attention_mask: Literal["causal", "full"] = setting("causal", "which keys a query sees: earlier ones, or all")
    window_size: int | Literal["auto"] = setting(
        "auto", "last keys that a query sees (sliding window); custom: 0 = all"
    )
    full_attention_every: int | Literal["auto"] = setting(
        "auto", "every so many layers one without the window; custom: 0 = none"
    )

    def problems(self) -> Iterator[Problem]:
        """Everything wrong in this section."""
        yield from self._problems_of_values()
        if self.flavor != CUSTOM and self.flavor not in FLAVORS:
            # Without a flavour the "auto" keys have no values, so nothing that combines keys can be checked.
            yield Problem(
                key="flavor", rule=f"must be one of {', '.join([CUSTOM, *FLAVORS])}", fix=_nearest_flavor(self.flavor)
            )
            return
        merged = _merge(self)
        missing = [key for key in ("dim", "num_layers", "num_heads") if merged[key] == "auto"]
        for key in missing:
            yield Problem(key=key, rule="a custom shape needs it", fix="set it, or name a known shape in model.flavor")
        if merged["window_size"] and self.attention_mask == "full":
            yield Problem(key="window_size", rule='a sliding window needs attention_mask = "causal"', fix="set it to 0")
        if self.full_attention_every != "auto" and self.full_attention_every and not merged["window_size"]:
            yield Problem(key="full_attention_every", rule="has no effect without a window_size", fix="set it to 0")
        yield from self._problems_of_heads(merged)
        yield from self._problems_of_rope(merged)

    def _problems_of_values(self) -> Iterator[Problem]:
        for key in (*_SIZES, "rope_original_max_position_embeddings"):
            if _given(value := getattr(self, key)) and value < 1:
                yield Problem(key=key, rule="must be at least 1")
        positive = ("norm_eps", "rope_low_freq_factor", "rope_high_freq_factor", "rope_beta_fast", "rope_beta_slow")
        for key in (*positive, "rope_attention_factor"):
            if _given(value := getattr(self, key)) and not (value > 0 and math.isfinite(value)):
                yield Problem(key=key, rule="must be a positive number")
        for key in ("window_size", "full_attention_every"):
            if _given(value := getattr(self, key)) and value < 0:
                yield Problem(key=key, rule="must not be negative", fix="set it to 0 for none")
        if self.rope_theta != "auto" and not (self.rope_theta > 1 and math.isfinite(self.rope_theta)):
            yield Problem(key="rope_theta", rule="must be above 1", fix="set it to 10000 or 500000")
        if self.rope_factor != "auto" and not (self.rope_factor >= 1 and math.isfinite(self.rope_factor)):
            yield Problem(key="rope_factor", rule="must be at least 1")

    def _problems_of_heads(self, merged: dict[str, Any]) -> Iterator[Problem]:
        dim, heads, kv_heads = merged["dim"], merged["num_heads"], merged["num_kv_heads"]
        if _positive(heads) and _positive(kv_heads) and heads % kv_heads:
            allowed = divisors(heads)
            best = min(allowed, key=lambda d: abs(d - kv_heads))
            yield Problem(
                key="num_kv_heads",
                rule=f"must divide the {heads} query heads (here {kv_heads}): {', '.join(map(str, allowed))}",
                fix=f"set it to {best}",
            )
        if _given(merged["head_dim"]):
            head_dim, where = merged["head_dim"], "head_dim"
        elif _positive(dim) and _positive(heads):
            if dim % heads:
                yield Problem(
                    key="num_heads",
                    rule=f"must divide dim = {dim} (here {heads}) unless head_dim is given",
                    fix="set model.head_dim",
                )
                return
            head_dim, where = dim // heads, "num_heads"
        else:
            return
        if head_dim > 0 and head_dim % 2:
            rule = f"rotary embedding turns pairs of channels: head_dim must be even (here {head_dim})"
            yield Problem(key=where, rule=rule, fix=f"set model.head_dim to {head_dim + 1}")

    def _problems_of_rope(self, merged: dict[str, Any]) -> Iterator[Problem]:
        kind = merged["rope_scaling"]
        for key in _ROPE_KEYS:
            if _given(getattr(self, key)) and key not in _ROPE_KEYS_READ[kind]:
                readers = [f'"{name}"' for name, keys in _ROPE_KEYS_READ.items() if key in keys]
                yield Problem(
                    key=key,
                    rule=f'has no effect with rope_scaling = "{kind}"',
                    fix=f"remove it, or set model.rope_scaling to {' or '.join(readers)}",
                )
        for key in ("rope_factor", "rope_original_max_position_embeddings"):
            if key in _ROPE_KEYS_READ[kind] and merged[key] == "auto":
                yield Problem(key=key, rule=f'rope_scaling = "{kind}" needs it')
        low, high = merged["rope_low_freq_factor"], merged["rope_high_freq_factor"]
        if kind == "llama3" and not high > low:
            yield Problem(
                key="rope_high_freq_factor", rule=f"must be above rope_low_freq_factor (here {high} and {low})"
            )
        slow, fast = merged["rope_beta_slow"], merged["rope_beta_fast"]
        if kind == "yarn" and not fast > slow:
            yield Problem(key="rope_beta_fast", rule=f"must be above rope_beta_slow (here {fast} and {slow})")


def resolve(config: ModelConfig, vocab_size: int) -> ModelShape:
    """The concrete shape: an explicit key wins, then the flavour's value, then the rule in the key's help.

    vocab_size: ids that the tokenizer can produce. It fills `vocab_size = "auto"` where the flavour names none; a known
    flavour keeps its published, usually padded, size, so that its weights load. ValueError if the settings have
    problems or the embedding has too few rows for the tokenizer.
    """
    if problems := list(config.problems()):
        raise ValueError("\n".join(f"model.{p.key}: {p.rule}{f'; {p.fix}' if p.fix else ''}" for p in problems))
    merged = _fill(_merge(config), vocab_size)
    if merged["vocab_size"] < vocab_size:
        raise ValueError(
            f"model.vocab_size = {merged['vocab_size']}: the tokenizer has {vocab_size} ids; "
            f"set it to {vocab_size} or more"
        )
    return ModelShape(
        **{key: merged[key] for key in _SIZES},
        norm_eps=float(merged["norm_eps"]),
        rope_theta=float(merged["rope_theta"]),
        rope_scaling=_rope_scaling(merged),
        tied_embeddings=merged["tied_embeddings"],
        qkv_bias=merged["qkv_bias"],
        qk_norm=merged["qk_norm"],
        attention_mask=config.attention_mask,
        window_size=merged["window_size"],
        full_attention_every=merged["full_attention_every"],
    )


def known_sizes(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Sizes and windows as `resolve` has them; 0 for those that the settings have wrong, and what follows from them."""
    blamed = {problem.key for problem in config.problems()}
    sound = {key: "auto" if key in blamed else value for key, value in _merge(config).items()}
    filled = _fill(sound, vocab_size)
    unknown = {key for key in filled if key in blamed or filled[key] == "auto"}
    if "flavor" in blamed:  # it may say anything else
        unknown |= {key for key in filled if not _given(getattr(config, key))}
    return {key: 0 if key in unknown else filled[key] for key in (*_SIZES, "window_size", "full_attention_every")}


def _fill(merged: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """What a merge leaves "auto" by the rules of the keys' help, as far as the sizes in them are known."""
    dim, heads = merged["dim"], merged["num_heads"]
    follows = {
        "vocab_size": vocab_size,
        "num_kv_heads": heads,
        "head_dim": dim // heads if _given(dim) and _given(heads) else "auto",
        "ffn_dim": 256 * math.ceil(8 * dim / 3 / 256) if _given(dim) else "auto",
    }
    return merged | {key: value for key, value in follows.items() if merged[key] == "auto"}


def _merge(config: ModelConfig) -> dict[str, Any]:
    """Every key's explicit value, else the flavour's, else the fixed default; "auto" where none of them has one."""
    flavor = dict(FLAVORS.get(config.flavor, {}))
    if _given(config.rope_scaling) and config.rope_scaling != flavor.get("rope_scaling", "none"):
        # A factor published for one kind of scaling means something else in another; only the length carries over.
        flavor = {
            k: v for k, v in flavor.items() if k not in _ROPE_KEYS or k == "rope_original_max_position_embeddings"
        }
    defaults = {
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": "none",
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "tied_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
        "window_size": 0,
        "full_attention_every": 0,
    }
    keys = (*_SIZES, *_ROPE_KEYS, *defaults)
    explicit = {key: getattr(config, key) for key in keys if _given(getattr(config, key))}
    return dict.fromkeys(keys, "auto") | defaults | flavor | explicit


def _rope_scaling(merged: dict[str, Any]) -> RopeScaling:
    kind = merged["rope_scaling"]
    read = {key.removeprefix("rope_"): merged[key] for key in _ROPE_KEYS_READ[kind]}
    if kind == "yarn" and read["attention_factor"] == "auto":
        read["attention_factor"] = 0.1 * math.log(read["factor"]) + 1.0  # arXiv:2309.00071, equation 22
    original = read.pop("original_max_position_embeddings", 0)
    return RopeScaling(
        kind=kind, original_max_position_embeddings=original, **{key: float(value) for key, value in read.items()}
    )


def _nearest_flavor(name: str) -> str:
    # Names are often written "Llama-3.1-8B" or "llama31_8b": compare without case and separators.
    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    by_plain = {plain(known): known for known in FLAVORS}
    close = difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=0.6)
    return (
        f'did you mean "{by_plain[close[0]]}"?'
        if close
        else f'set it to "{CUSTOM}" and give dim, num_layers, num_heads'
    )


def _given(value: Any) -> bool:
    return value != "auto"


def _positive(value: Any) -> bool:
    return value != "auto" and value >= 1
