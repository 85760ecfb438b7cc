"""What the experiments read in a compiled program's text: bytes that travel, FLOPs, loops."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from tests.support import REPOSITORY

# As the TPU's compiler writes it, cut down: a loop of 5 turns (0, 2, ... 8) that says so nowhere.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%gather (p: bf16[2,8]) -> bf16[4,8] {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, chain_id="0"
}

%gather_goes_on (q: bf16[2,8]) -> bf16[4,8] {
  %q = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=1, chain_id="0"
}

%aside (r: f32[8,4]) -> f32[8,4] {
  %r = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %all-to-all.1 = f32[8,4]{1,0:T(8,128)} all-to-all(%r), channel_id=6, dimensions={0}
}

%body (c: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %c = (s32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %w = bf16[2,8]{1,0:T(8,128)(2,1)} get-tuple-element(%c), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %begun = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%gather
  %whole = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%gather_goes_on
  %dot = f32[2,4]{1,0:T(2,128)} convolution(%w, %whole), dim_labels=bf_oi->bf
  %ar = f32[2,4]{1,0:T(2,128)} all-reduce-start(%dot), channel_id=2, to_apply=%add
  %reduced = f32[2,4]{1,0:T(2,128)} all-reduce-done(%ar)
  ROOT %out = (s32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)}) tuple(%next, %w)
}

%more (d: (s32[], bf16[2,8])) -> pred[] {
  %d = (s32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(9)
  %at = s32[]{:T(128)} get-tuple-element(%d), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (a: bf16[2,8], s: f32[8,4]) -> (f32[2,4], bf16[2,8]) {
  %a = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %s = f32[8,4]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %mine = u32[2,8]{1,0} bitcast(%a)
  %copied = s32[]{:T(128)} copy(%zero)
  %first = (s32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)}) tuple(%copied, %a)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[2,8]{1,0}) while(%first), condition=%more, body=%body
  %cp = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=3
  %sent = bf16[2,8]{1,0} collective-permute-done(%cp)
  %zeros = u32[8,8]{1,0} broadcast(%zero), dimensions={}
  %dynamic-update-slice.7 = u32[8,8]{1,0} dynamic-update-slice(%zeros, %mine, %zero, %zero)
  %same = u32[8,8]{1,0} bitcast(%dynamic-update-slice.7)
  %codes = u32[8,8]{1,0} all-reduce(%same), channel_id=5, to_apply=%add
  %as = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[]) async-start(%s), calls=%aside
  %au = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[]) async-update(%as), calls=%aside
  %ad = f32[8,4]{1,0} async-done(%au), calls=%aside
  %part = f32[2,4]{1,0} reduce-scatter(%s), channel_id=4, dimensions={0}, to_apply=%add
  ROOT %result = (f32[2,4]{1,0}, bf16[2,8]{1,0}) tuple(%part, %sent)
}
"""


@pytest.fixture
def load(monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
  return importlib.import_module


def test_what_a_loop_moves_counts_as_often_as_it_runs_and_halves_count_once(load):
  module = load("collectives")
  move = lambda *args: module.Move(*args)
  assert sorted(module.collectives(PROGRAM)) == [
    move("all-gather", "bf16", (4, 8), 5),
    move("all-reduce", "f32", (2, 4), 5),
    move("all-reduce", "u32", (8, 8), 1, True),  # a shard among zeros
    move("all-to-all", "f32", (8, 4), 1),  # named by its start, its update and its done
    move("collective-permute", "bf16", (2, 8), 1),
    move("reduce-scatter", "f32", (2, 4), 1),
  ]
  sizes = {"all-gather": 5 * 64, "all-reduce": 5 * 32 + 256, "all-to-all": 128}
  assert module.traffic(module.collectives(PROGRAM)) == sizes | {
    "collective-permute": 32,
    "reduce-scatter": 32,
  }


def test_flops_of_a_loop(load):
  hlo = load("hlo")
  # A product of (2, 8) and (8, 4), the counter's sum; the condition compares.
  assert hlo.flops(PROGRAM) == {"products": 5 * 2 * 2 * 4 * 8, "other": 5 * 2}
  assert hlo.flops(PROGRAM, loops=False) == {"products": 2 * 2 * 4 * 8, "other": 2}
  with pytest.raises(ValueError, match="cannot tell how often loop runs"):
    hlo.flops(PROGRAM.replace("constant(9)", "parameter(1)"))
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.flops("")


@pytest.mark.parametrize(
  ("window", "labels", "shapes", "products"),
  [
    # Batched (3 batches): of the 3 windows each output meets one.
    ("size=3 stride=2 lhs_dilate=3", "0bf_0io->0bf", ("3,4,5", "3,5,6", "3,4,6"), 3 * 4 * 5 * 6),
    # One position, which each of the 3 outputs meets in one element of the window.
    ("size=3 pad=2_2 rhs_reversal=1", "bf0_0oi->0bf", ("4,5,1", "3,6,5", "3,4,6"), 3 * 4 * 5 * 6),
    # A real convolution of 3 over 8 positions without padding.
    ("size=3", "b0f_0io->b0f", ("2,8,5", "3,5,6", "2,6,6"), 2 * 6 * 3 * 5 * 6),
    # With padding: the two ends lack one product each.
    ("size=3 pad=1_1", "b0f_0io->b0f", ("2,8,5", "3,5,6", "2,8,6"), 2 * (8 * 3 - 2) * 5 * 6),
  ],
)
def test_flops_of_products_written_as_convolutions(load, window, labels, shapes, products):
  left, right, out = shapes
  text = f"""
ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}]{{2,1,0}} parameter(0)
  %b = f32[{right}]{{2,1,0}} parameter(1)
  ROOT %c = f32[{out}]{{2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
"""
  assert load("hlo").flops(text)["products"] == 2 * products


def test_here_too_the_count_agrees_with_xla_where_nothing_loops(load):
  function = lambda x, w: jnp.sum(jnp.where(x @ w > 0, x @ w, 0), axis=0)
  x, w = jnp.ones((8, 16)), jnp.ones((16, 4))
  compiled = jax.jit(function).lower(x, w).compile()
  found = load("hlo").flops(compiled.as_text())
  assert found["products"] == 2 * 8 * 16 * 4
  looped = jax.jit(
    lambda x, w: jax.lax.scan(lambda c, _: (c @ w @ w.T, None), x, None, length=7)[0]
  )
  text = looped.lower(x, w).compile().as_text()
  assert load("hlo").flops(text)["products"] == 7 * 2 * 2 * 8 * 16 * 4
