"""Write docs/formats/blocks.md: the prose below and, for each registered tensor type, the docstring of its class.

python tools/block_docs.py            # write the file
python tools/block_docs.py --check    # exit 1 if it is not up to date
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from ggufkit_formats.blocks import TYPES, TensorType

TARGET = Path(__file__).parents[1] / "docs/formats/blocks.md"
HEAD = """\
# Tensor types

What a block of each type is, bit by bit. This file is made from the classes in `formats/ggufkit_formats/blocks` by
`tools/block_docs.py`; sizes are those of the fields that the code reads and writes.

Numbers are little endian. `d`, `dmin` and `m` are float16 unless a diagram says otherwise; formulas are evaluated in
float32, one rounding an operation, from left to right. Decoding equals ggml's `dequantize_row_*` bit for bit for all
bytes, scales that are NaN, infinite or denormal included (a NaN's payload aside).

NF4 has no number in GGUF and stands in a file as several tensors ([nf4.md](nf4.md)); its block here is the one in
memory.

## What encoding does

`TensorType.encode` is the definition, in NumPy; `ggufkit_kernels.cpu.encode.encode` gives the same bytes from compiled
loops. Without an importance matrix both give the bytes of `ggml_quantize_chunk` (for Q8_1 and Q8_K, which it does not
know, of `quantize_row_q8_1_ref` and `quantize_row_q8_K_ref`). With one they raise UnsupportedError, except for ternary
and 4-bit float types, Q1_0 and Q2_0, where it changes nothing. The order of every float32 operation counts for that;
some places where it shows:

- Legacy types multiply by 1 / d, K types divide by d; d is used before its rounding to float16 by the legacy types and
  after it by the K types.
- Q8_0 and Q8_1 round halves away from zero, Q4 and Q5 add a half and truncate, K types round halves to even, by adding
  1.5 · 2²³, and beyond 2²² they take whatever bits that gives.
- A block of zeros gets d = -0 in Q4_0 and Q5_0. Of zeros of both signs the first one's sign is stored as the minimum
  of Q4_1 and Q5_1.
- A group's codes come from the stored scales, except where those became 0: there from the search.
- Q3_K stores a block without scales as scale bytes 0, not as scales of 0.
- Groups whose largest weight is below 1e-15 count as zero in Q3_K and Q6_K.
- TQ1_0, TQ2_0 and Q2_0 multiply by 1 / d, with d before its rounding to float16, and round halves away from zero. Where
  1 / d overflows (d below 2.9e-39), all codes are 1 in TQ1_0 and TQ2_0 and 0 in Q2_0; the stored d is 0 anyway.
- Q1_0's d is a sum of 128 magnitudes, one after the other. Zeros of both signs count as positive.
- MXFP4's exponent is that of float32's log2, which is rounded: weights just below a power of two (up to 44 steps below
  2¹⁰⁰) already get the power's exponent. Below 2⁻¹²⁶ the exponent wraps around (241 for 1e-42) before all-zero codes.
- NVFP4's scales from 256 on become 448. Weights beyond 2688 become 2688; beyond 1.5e10, where float32 loses the
  difference of two levels, smaller levels, and at last 0: the first of equal errors counts.
- Q8_K's `bsums` of a block of zeros are 0; ggml leaves them unwritten.

## What encoding refuses

ggml writes any block and looks at it when a file is loaded with its tensors checked (`ggml_validate_row_data`: a `d`,
`dmin` or `m` that is infinite or NaN, an `e` of 255). We raise FormatError before anything is written, for a type with
scales, when

- a weight is NaN or infinite;
- a scale is not finite in its field's precision. That begins at weights of 65520 in Q4_1, Q5_1, TQ1_0, TQ2_0, Q1_0 and
  Q2_0, 5.2e5 in Q4_0, 9e5 in Q2_K, 1e6 in Q5_0, 4e6 in Q4_K, 7e6 in Q3_K, 8.3e6 in Q8_0, 2.6e8 in Q6_K (K types: about,
  by their signs; Q1_0: on average);
- MXFP4's exponent would be 255, which stands for NaN: blocks whose largest weight is from 2⁻¹²⁶ to 2⁻¹²⁵ (and only
  those: NVFP4, and MXFP4 otherwise, take any finite weight);
- a search for scales overflows float32 (Q3_K and Q6_K, weights beyond 1e12): ggml then writes a valid block that
  decodes to zeros, which is no answer to weights that large;
- the block does not divide the row.

## Speed

Million weights a second of one thread's processor time, on one machine (Zen 3, AVX2), normal random weights, rows of
2048, with other work on the machine; ggml is `ggml_quantize_chunk` of the pinned xllamacpp, which is as fast here as
one compiled on the machine (except Q4_0: 883). Bytes were compared in the same run. Threads share nothing, so two idle
processors give about twice as much. `python tools/bench_encode.py` prints the first columns again;
`--check 6000000` compares so many hard weights of each type with ggml's bytes (done, none differ).

| type | `kernels…encode` | ggml | ratio | NumPy encode | NumPy decode |
|---|---|---|---|---|---|
| Q4_0 | 1823 | 439 | 4.2 | 92 | 235 |
| Q4_1 | 2179 | 1088 | 2.0 | 78 | 274 |
| Q5_0 | 1503 | 325 | 4.6 | 118 | 299 |
| Q5_1 | 1885 | 575 | 3.3 | 68 | 220 |
| Q8_0 | 2293 | 334 | 6.9 | 66 | 556 |
| Q2_K | 170 | 15 | 11.3 | 6.8 | 298 |
| Q3_K | 450 | 71 | 6.3 | 8.7 | 157 |
| Q4_K | 161 | 13 | 12.2 | 4.2 | 249 |
| Q5_K | 195 | 15 | 12.9 | 5.4 | 189 |
| Q6_K | 318 | 29 | 11.0 | 6.6 | 190 |

The same on a Zen 4 (AVX-512) that other work was going on at:

| type | `kernels…encode` | ggml | ratio |
|---|---|---|---|
| TQ1_0 | 4181 | 353 | 11.8 |
| TQ2_0 | 4777 | 315 | 15.2 |
| Q1_0 | 4312 | 185 | 23.3 |
| Q2_0 | 4158 | 301 | 13.8 |
| MXFP4 | 1190 | 178 | 6.7 |
| NVFP4 | 1129 | 40 | 28.6 |

## All types

"""


def bits(t: TensorType) -> str:
    return f"{t.bits_per_weight:.5g}"


def text() -> str:
    types = sorted(TYPES.values(), key=lambda t: (t.id < 0, t.id))
    lines = ["| type | id | weights a block | bytes | bits a weight |", "|---|---|---|---|---|"]
    lines += [
        f"| {t.name} | {t.id if t.id >= 0 else 'none'} | {t.block} | {t.block_nbytes} | {bits(t)} |" for t in types
    ]
    for t in types:
        if not t.is_quantized:
            continue
        doc = inspect.cleandoc(type(t).__doc__ or "")
        formula, _, diagram = doc.partition("\n\n::\n\n")
        lines += ["", f"## {t.name}", "", formula]
        if diagram:
            lines += ["", "```", inspect.cleandoc("\n" + diagram), "```"]
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text() else 1
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
