"""Collectives of compiled programs: how many, and how many bytes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from finetune_jax.parallel.collectives import Traffic, collectives

# One gather in two parts, one in a loop of seven, a sum of two arrays, and a reduction
# that a name like that of a collective must not make one more.
TEXT = """\
HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %x = f32[2]{0:T(8,128)} get-tuple-element(%p), index=1
  %all-gather.3 = f32[16]{0:T(8,128)} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], f32[2]) tuple(%i, %y)
}

%cond.1 (p: (s32[], f32[2])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9 (p0: f32[8]) -> f32[] {
  %all-gather-start = (f32[4]{0}, bf16[32]{0}) all-gather-start(%p0), dimensions={0}
  %all-gather-done = bf16[32]{0} all-gather-done(%all-gather-start)
  %w = (s32[], f32[2]) while(%t0), condition=%cond.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}
  %all-reduce = (f32[3]{0}, /*index=1*/pred[5]{0}) all-reduce(%a, %b), to_apply=%add
  ROOT %fusion = f32[] fusion(%all-reduce), kind=kLoop, calls=%add
}
"""


def test_collectives_of_a_text_are_counted_once_an_iteration():
    assert collectives(TEXT) == {
        "all-gather": Traffic(count=1 + 7, nbytes=2 * 32 + 7 * 4 * 16),
        "all-reduce": Traffic(count=1, nbytes=4 * 3 + 5),
    }


def compiled(function, *specs, shape=(8, 6)):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    arguments = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
        for spec in specs
    ]
    everywhere = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(function, out_shardings=everywhere)
    return collectives(jitted.lower(*arguments).compile().as_text())


def test_collectives_of_known_programs_are_counted():
    rows = PartitionSpec("model")
    assert compiled(lambda x: x * 2, PartitionSpec()) == {}
    found = compiled(lambda x: jnp.sum(x, axis=0), rows)
    assert found == {"all-reduce": Traffic(count=1, nbytes=6 * 4)}
    found = compiled(lambda x: x * 2, rows)
    assert found == {"all-gather": Traffic(count=1, nbytes=8 * 6 * 4)}

    def looped(x):
        # Each iteration needs the sum of the one before.
        return jax.lax.fori_loop(0, 5, lambda _, c: c + jnp.sum(x * c), jnp.ones(()))

    assert compiled(looped, rows)["all-reduce"] == Traffic(count=5, nbytes=5 * 4)
