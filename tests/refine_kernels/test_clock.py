"""The counted clock reads machine code right; and no launcher compiles anew for another number of tokens."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest

from refine_kernels import sass
from tests.refine_kernels.test_inspect import run_python

# Two loops, the second inside the first, as cuobjdump prints them
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/                   MOV R2, 0x10 ;           /* 0x00000a00ff017b82 */
        /*0020*/                   IMAD R3, R2, R2, RZ ;    /* 0x00000a00ff017b82 */
        /*0030*/                   FFMA R4, R4, R4, R4 ;    /* 0x00000a00ff017b82 */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P1 BRA 0x30 ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0070*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0080*/                   MUFU.EX2 R3, R3 ;
        /*0090*/               @P0 BRA 0x20 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_loops_and_what_they_hold():
    root = sass.read(CODE)
    (outer,) = root.inner
    (inner,) = outer.inner
    assert root.body.instructions == 4 and outer.body.instructions == 5 and inner.body.instructions == 3
    assert inner.body.pipes == Counter(fma=1, control=2) and inner.body.barriers == 1
    assert outer.body.pipes == Counter(imad=1, tensor=2, special=1, control=1) and outer.body.waits == 1
    assert outer.body.products == Counter({(16, 32, 16, 2): 1, (16, 8, 16, 2): 1})


def test_turns_multiply():
    root = sass.read(CODE)
    total, turn = sass.count(root, [(10, 4)])
    assert turn.instructions == 5 + 4 * 3
    assert total.instructions == 4 + 10 * (5 + 4 * 3) and total.barriers == 40
    assert sass.matches(root, [(10, 4)]) and not sass.matches(root, [10]) and not sass.matches(root, [1, 1])


@pytest.mark.parametrize(
    "name, shape",
    [
        ("HGMMA.64x64x8.F32.TF32", (16, 64, 8, 4)),
        ("HMMA.1688.F32.TF32", (16, 8, 8, 4)),
        ("HMMA.16816.F32.BF16", (16, 8, 16, 2)),
        ("UTCHMMA", None),
    ],
)
def test_shapes_of_products(name, shape):
    assert sass.product_shape(name) == shape


def test_no_code_is_an_error():
    with pytest.raises(ValueError, match="no instructions"):
        sass.read("nothing here")


def _count_variants() -> None:
    """Runs where kernels are defined for the compiler: print how many variants 40 lengths of each call need."""
    import torch

    from refine_kernels import launches
    from refine_kernels.chips import Chip
    from refine_kernels.delta_rule import triton_chunk, variants

    new, chip = partial(torch.empty, device="meta"), Chip("sm_90", 132)
    lengths = [1 + 397 * i for i in range(20)] + [64 * (i + 1) for i in range(20)]

    def keys(call) -> int:
        return len(
            {v.key for n in lengths for x in launches.in_order(partial(call, n), chip) for v in x.variants}
        )

    def rows(n: int) -> None:
        forward, _, backward = variants.clock_call(8, n, 3, 3, 128, 128, torch.bfloat16, True)
        forward(), backward()

    def packed(n: int) -> None:
        q, beta = new(1, n, 64, 128, dtype=torch.bfloat16), new(1, n, 64, dtype=torch.bfloat16)
        bounds = torch.tensor([0, n // 3, n])
        triton_chunk.forward(q, q.clone(), q.clone(), beta, None, None, bounds, 1.0, True, True, 0, False)

    print(json.dumps({"rows": keys(rows), "packed": keys(packed)}))


def test_no_launch_is_compiled_anew_for_another_number_of_tokens():
    done = run_python("-c", f"import {__name__} as tests; tests._count_variants()")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # inverse, scan, states, reverse and gradient; packed: inverse and scan
    assert found == {"rows": 5, "packed": 2}
