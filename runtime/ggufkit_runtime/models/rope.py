"""Rotary position embedding: the frequencies, and the ways to stretch them to longer contexts.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); YaRN (arXiv 2309.00071); the
frequency-dependent factors of Llama 3.1, which GGUF stores as the tensor `rope_freqs.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ggufkit_formats.errors import FormatError, UnsupportedError

from .base import Keys, plain, shown


@dataclass(frozen=True, slots=True)
class Rope:
    """Settings of the rotary embedding. `factors` are Llama 3.1's three numbers, used by convert only."""

    n_rot: int  # rotated dimensions of a head
    base: float = 10000.0
    scaling: str = "none"  # none, linear, yarn
    factor: float = 1.0  # context stretched by
    n_ctx_orig: int = 0  # yarn: context of the original training
    ext_factor: float | None = None  # yarn
    yarn_attn_factor: float | None = None  # yarn; llama.cpp heeds it only where ext_factor is 0, and so does this
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    llama3: tuple[float, float, float, int] | None = None  # factor, low, high, original context
    attn_factor: float = 1.0  # cos and sin are multiplied by it, whatever the scaling

    def frequencies(self, factors: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        """Radians per position, float64 (n_rot / 2,), and the factor on cos and sin.

        `factors` (n_rot / 2,) divide the frequencies: the values of `rope_freqs.weight`, or None.
        """
        freqs = self.base ** (-np.arange(0, self.n_rot, 2, dtype=np.float64) / self.n_rot)
        if factors is not None:
            freqs = freqs / np.asarray(factors, dtype=np.float64)
        if self.scaling == "linear":
            return freqs / self.factor, self.attn_factor
        if self.scaling == "yarn":
            freqs, scale = self._yarn(freqs)
            return freqs, scale * self.attn_factor
        return freqs, self.attn_factor

    def _yarn(self, freqs: np.ndarray) -> tuple[np.ndarray, float]:
        ext = 1.0 if self.ext_factor is None or self.ext_factor < 0 else self.ext_factor
        if ext == 0:
            return freqs / self.factor, 1.0 if self.yarn_attn_factor is None else self.yarn_attn_factor

        def dimension(rotations: float) -> float:
            """The dimension pair that turns that often within the original context."""
            return self.n_rot * math.log(self.n_ctx_orig / (rotations * 2 * math.pi)) / (2 * math.log(self.base))

        low = max(0.0, math.floor(dimension(32.0 if self.beta_fast is None else self.beta_fast)))
        high = min(self.n_rot - 1.0, math.ceil(dimension(1.0 if self.beta_slow is None else self.beta_slow)))
        ramp = (np.arange(self.n_rot // 2) - low) / max(0.001, high - low)
        keep = (1 - np.clip(ramp, 0, 1)) * ext  # 1: fast pair, left as it is; 0: slow pair, interpolated
        mixed = freqs / self.factor * (1 - keep) + freqs * keep
        return mixed, yarn_scale(self.factor)

    def llama3_factors(self) -> np.ndarray | None:
        """The values of `rope_freqs.weight`, float32 (n_rot / 2,), for Llama 3.1's scaling; None without it."""
        if self.llama3 is None:
            return None
        factor, low, high, n_ctx = self.llama3
        # float32 throughout, and reciprocals where torch takes them: so are the bytes of llama.cpp's converter
        f32 = np.float32
        dims = np.arange(0, self.n_rot, 2, dtype=f32) / f32(self.n_rot)
        freqs = f32(1) / f32(self.base) ** dims
        out = np.ones(len(freqs), f32)
        for i, freq in enumerate(freqs):
            wavelength = f32(1) / freq * f32(2 * math.pi)
            if wavelength > n_ctx / low:
                out[i] = factor
            elif wavelength >= n_ctx / high:
                smooth = (f32(1) / wavelength * f32(n_ctx) - f32(low)) / f32(high - low)
                out[i] = f32(1) / ((f32(1) - smooth) / f32(factor) + smooth)
        return out

    # -- GGUF ------------------------------------------------------------------------------------

    @classmethod
    def from_keys(cls, keys: Keys, head_dim: int, n_ctx: int) -> Rope:
        """Read from GGUF metadata."""
        n_rot = keys.integer("rope.dimension_count", head_dim)
        if n_rot != head_dim:
            raise UnsupportedError(
                f"{keys.where}: rotary embedding of {n_rot} of {head_dim} dimensions is not supported"
            )
        old = keys.number("rope.scale_linear", 1.0)
        factor = keys.number("rope.scaling.factor", old, positive=False) or 1.0
        scaling = keys.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
        if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn"):
            raise UnsupportedError(
                f"{keys.where}: rope scaling {shown(scaling)} is not supported (only none, linear, yarn)"
            )
        keys.get("rope.scaling.finetuned", None)
        rope = cls(
            n_rot=n_rot,
            base=keys.number("rope.freq_base", 10000.0),
            scaling="none" if (scaling, factor) == ("linear", 1.0) else scaling,
            factor=factor,
            n_ctx_orig=keys.integer("rope.scaling.original_context_length", n_ctx),
            ext_factor=keys.number("rope.scaling.yarn_ext_factor", None, positive=False),
            yarn_attn_factor=keys.number("rope.scaling.yarn_attn_factor", None),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", None),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", None),
            attn_factor=keys.number("rope.scaling.attn_factor", 1.0),
        )
        rope.check(keys.where)
        return rope

    def check(self, where: str) -> None:
        if self.n_rot % 2:
            raise FormatError(f"{where}: {self.n_rot} rotated dimensions are not pairs")
        if not 1.0 < self.base <= 1e30:
            raise FormatError(f"{where}: rope base {self.base:g} makes no sense")
        for name in ("factor", "attn_factor", "yarn_attn_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if value is not None and not 1e-6 <= value <= 1e6:  # so that no frequency overflows
                raise FormatError(f"{where}: rope {name} {value:g} makes no sense")
        if (self.ext_factor or 0.0) > 1e6 or not all(1e-6 <= x <= 1e10 for x in self.llama3 or ()):
            raise FormatError(f"{where}: rope ext_factor {self.ext_factor}, llama3 {self.llama3} make no sense")

    def metadata(self) -> dict[str, Any]:
        """Scaling keys without the architecture's prefix, as llama.cpp's converter writes them."""
        if self.scaling == "none":
            return {}
        out: dict[str, Any] = {
            "rope.scaling.type": self.scaling,
            "rope.scaling.factor": np.float32(self.factor),
        }
        if self.scaling == "yarn":
            out["rope.scaling.original_context_length"] = np.uint32(self.n_ctx_orig)
            extra = {"yarn_ext_factor": self.ext_factor, "yarn_attn_factor": self.yarn_attn_factor,
                     "yarn_beta_fast": self.beta_fast, "yarn_beta_slow": self.beta_slow}  # fmt: skip
            out |= {f"rope.scaling.{k}": np.float32(v) for k, v in extra.items() if v is not None}
            if self.attn_factor != 1.0:
                out["rope.scaling.attn_factor"] = np.float32(self.attn_factor)
        return out

    # -- Hugging Face ----------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, keys: Keys, head_dim: int, n_ctx: int) -> Rope:
        """Read from a config.json: `rope_theta` with `rope_scaling`, or the newer `rope_parameters`."""
        scaling = keys.get("rope_scaling", None)
        settings = keys.get("rope_parameters", scaling) or {}
        if not isinstance(settings, Mapping) or "full_attention" in settings:
            raise UnsupportedError(f"{keys.where}: rope settings that differ between layers are not supported")
        inner = Keys(settings, f"{keys.where}: rope")
        base = inner.number("rope_theta", keys.number("rope_theta", 10000.0))
        partial = inner.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise UnsupportedError(f"{keys.where}: partial_rotary_factor = {partial} is not supported (only 1)")
        kind = str(inner.get("rope_type", inner.get("type", "default"))).lower()
        original = inner.integer("original_max_position_embeddings",
                                 keys.integer("original_max_position_embeddings", n_ctx))  # fmt: skip
        factor = inner.number("factor", 1.0)
        if kind == "llama3":
            low, high = inner.number("low_freq_factor", 1.0), inner.number("high_freq_factor", 4.0)
            if low >= high:
                raise FormatError(f"{keys.where}: rope low_freq_factor {low} is not below high_freq_factor {high}")
            rope = cls(head_dim, base, llama3=(inner.number("factor", 8.0), low, high, original))
        elif kind == "yarn":
            inner.must_be("mscale", None)
            inner.must_be("mscale_all_dim", None)
            inner.must_be("truncate", None, True)
            # A config's attention_factor is all that multiplies cos and sin; llama.cpp's converter writes it under a
            # name that llama.cpp does not read for these architectures. What it lacks goes under the name that is.
            whole = inner.number("attention_factor", None)
            attn = 1.0 if whole is None else whole / yarn_scale(factor)
            rope = cls(head_dim, base, "yarn", factor, original,
                       inner.number("extrapolation_factor", None, positive=False),
                       inner.number("attn_factor", None) if whole is None else whole,
                       inner.number("beta_fast", None), inner.number("beta_slow", None),
                       attn_factor=1.0 if abs(attn - 1) < 1e-6 else attn)  # fmt: skip
        elif kind == "linear":
            rope = cls(head_dim, base, "linear", factor)
        elif kind == "default":
            rope = cls(head_dim, base)
        else:
            raise UnsupportedError(
                f"{keys.where}: rope scaling {shown(kind)} is not supported (only linear, llama3, yarn)"
            )
        rope.check(keys.where)
        return rope

    def hf_settings(self) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling` of a config.json. UnsupportedError for what transformers has no words for."""
        return {"rope_theta": plain(self.base), "rope_scaling": self._hf_scaling()}

    def _hf_scaling(self) -> dict[str, Any] | None:
        if self.scaling == "yarn":
            return self._hf_yarn()
        if self.attn_factor != 1.0:
            raise UnsupportedError(f"rope attn_factor {self.attn_factor:g} without YaRN: config.json cannot say it")
        if self.llama3 is not None:
            if self.scaling == "linear" and self.factor != 1.0:
                raise UnsupportedError(
                    "rope_freqs.weight with linear rope scaling: config.json has room for one of them"
                )
            factor, low, high, n_ctx = self.llama3
            return {"rope_type": "llama3", "factor": plain(factor), "low_freq_factor": plain(low),
                    "high_freq_factor": plain(high), "original_max_position_embeddings": n_ctx}  # fmt: skip
        if self.scaling == "linear" and self.factor != 1.0:
            return {"rope_type": "linear", "factor": plain(self.factor)}
        return None

    def _hf_yarn(self) -> dict[str, Any]:
        if self.llama3 is not None or (self.ext_factor is not None and 0 <= self.ext_factor != 1):
            raise UnsupportedError("YaRN with rope_freqs.weight or an ext_factor: config.json cannot say it")
        out = {"rope_type": "yarn", "factor": plain(self.factor), "original_max_position_embeddings": self.n_ctx_orig}
        said = {"extrapolation_factor": self.ext_factor, "beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        out |= {key: plain(value) for key, value in said.items() if value is not None}
        # attention_factor is all that multiplies cos and sin; GGUF has it whole under a name that is not heeded (see
        # `from_hf`), and what it is beyond the usual factor.
        whole, kept = yarn_scale(self.factor) * self.attn_factor, self.yarn_attn_factor
        if kept is not None and abs(kept - whole) <= 1e-5 * whole:
            out["attention_factor"] = plain(kept)
        elif self.attn_factor != 1.0:
            out["attention_factor"] = plain(whole)
        return out

    # -- Llama 3.1's factors -----------------------------------------------------------------------

    def with_factors(self, factors: np.ndarray) -> Rope:
        """With Llama 3.1's numbers for the values of `rope_freqs.weight` (n_rot / 2,): `llama3_factors` returns them.

        The numbers are those of Llama 3.1 and 3.2 where these fit; else a low_freq_factor is tried, and the other two
        follow from the factors between. UnsupportedError where no numbers give them.
        """
        factors = np.asarray(factors, np.float32)
        largest = float(factors.max(initial=1))
        if (factors == 1).all():
            return self
        for low, high, n_ctx in [(1.0, 4.0, 8192), *self._guesses(factors, largest)]:
            if not (0 < low < high < 1e10 and 1 <= n_ctx < 1 << 31):
                continue
            found = replace(self, llama3=(largest, low, high, n_ctx))
            made = found.llama3_factors()
            if made is not None and np.allclose(made, factors, rtol=1e-6, atol=0):
                return found
        raise UnsupportedError("the values of rope_freqs.weight do not come from Llama 3.1's rope scaling")

    def _guesses(self, factors: np.ndarray, largest: float) -> list[tuple[float, float, int]]:
        """low, high and context that may have made the factors."""
        turns = self.base ** (-np.arange(0, self.n_rot, 2) / self.n_rot) / (2 * math.pi)  # in a position
        between = (factors > 1) & (factors < largest)
        found = [(1.0, 4.0, 1 << bits) for bits in range(9, 24)]
        if between.sum() < 2:
            return found
        # 1 / f = (1 - s) / largest + s, and s = (n_ctx * turns - low) / (high - low): a line over the turns
        share = (1 / factors[between].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
        slope, at = np.polyfit(turns[between], share, 1)
        if slope > 0 > at:
            width = -1 / at  # high - low for low = 1; all three numbers may be multiplied
            lows = (1.0, 2.0, 3.0, 4.0, 5.0, 0.5)
            found += [(k, float(round(k * (1 + width), 3)), round(k * slope * width)) for k in lows]
        return found


def yarn_scale(factor: float) -> float:
    """What YaRN multiplies cos and sin with: the square root of the paper's 1 / t, section 3.4."""
    return 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
