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
loops. Both give the bytes of `ggml_quantize_chunk` (for Q8_1 and Q8_K, which it does not know, of
`quantize_row_q8_1_ref` and `quantize_row_q8_K_ref`), with importance and without; ternary and 4-bit float types, Q1_0
and Q2_0 ignore it. The order of every float32 operation counts for that; some places where it shows:

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
- IQ4_NL and IQ4_XS put the largest weight on the level of -127, and try 15 scales around that. The codes come from
  the scale before its rounding to float16. A block of zeros gets d = -0 in IQ4_XS.
- IQ1, IQ2 and IQ3 are encoded without importance too, where ggml allows it (not IQ2_XXS, IQ2_XS and IQ1_S: UsageError).
  ggml's IQ3_S skips groups of zeros as it writes: the low bits and signs of the groups behind move up to their places,
  so such a block decodes to something else. We write the same.
- Groups count as zero below 1e-15 in IQ4, IQ2_XS and IQ2_XXS, 1e-12 in IQ1_S, 1e-8 in IQ2_S and IQ3_XXS, 1e-7 in IQ1_M.
- Q8_K's `bsums` of a block of zeros are 0; ggml leaves them unwritten.

With importance, a number for each column, other searches are made:

- An error counts importance · sqrt(s + x²), where s is the mean square of the row in the older types, of the block in
  Q2_K, twice that in Q3_K, Q4_K and Q5_K; in Q6_K it counts the importance alone. Q8_0 and plain numbers ignore it.
- Types with a minimum try 37 scales, with finer steps, and types without one the same 19. The older types get the codes
  of that search, which need not be nearest to the weights with the stored scale.
- The scales and minima of the groups of Q2_K, Q4_K and Q5_K, and the scales of Q3_K, are rounded by a search of
  their own, in which a group counts the sum of its weights. A scale below zero wraps around; in Q4_K its upper bits
  mix with those of another group's.
- Trials of types with a minimum hold quotients to the bounds before they are rounded (the pinned ggml does; older
  versions round first, which differs beyond 2²²).

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
- importance is NaN, infinite or negative (UsageError);
- a search for scales overflows float32 (Q3_K and Q6_K, weights beyond 1e12; with huge importance all types): ggml then
  writes a valid block that decodes to zeros, which is no answer to weights that large;
- ggml would abort: in IQ1, IQ2 and IQ3, where a search overflows and no point of the grid is near (1e12 and more);
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
| IQ4_NL | 105 | 3.2 | 33 |
| IQ4_XS | 111 | 3.2 | 35 |
| IQ3_S | 16 | 3.2 | 5.1 |
| IQ3_XXS | 9 | 2.2 | 4.1 |
| IQ2_S | 16 | 4.4 | 3.6 |
| IQ2_XS (with importance) | 6 | 1.2 | 5.2 |
| IQ2_XXS (with importance) | 11 | 3.0 | 3.7 |
| IQ1_S (with importance) | 44 | 6 | 7.4 |
| IQ1_M | 37 | 7 | 5.1 |

With an importance matrix, on another machine (Zen 4 with AVX-512, shared): `python tools/bench_encode.py --importance`,
million weights a second of one thread's processor time; `--importance --check 1000000` found no byte that differs.

| | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q2_K | Q3_K | Q4_K | Q5_K | Q6_K |
|---|---|---|---|---|---|---|---|---|---|
| `kernels…encode` | 134 | 77 | 132 | 77 | 99 | 312 | 124 | 122 | 361 |
| ggml | 36 | 8 | 38 | 8 | 7 | 27 | 8 | 8 | 33 |

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
