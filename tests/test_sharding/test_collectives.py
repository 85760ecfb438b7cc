"""What moves, read from a program's text: closed form, and a compiled loop."""

import importlib

import pytest

from tests.support import REPOSITORY, on_devices

TEXT = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = u8[4,6]{1,0} all-gather(%a), channel_id=1, dimensions={0}
  %inner = (s32[], f32[8]) while(%t), condition=%cond, body=%twice, \
backend_config={"known_trip_count":{"n":"2"}}
}

%twice (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %moved = bf16[5]{0} collective-permute(%b), channel_id=2
}

%cond (t: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %both = (f32[3,2]{1,0}, pred[7]{0}) all-reduce(%c, %d), channel_id=3, to_apply=%add
  %start = (f32[2]{0}, f32[16]{0}) all-gather-start(%e), channel_id=4, chain_id="0"
  %again = (f32[2]{0}, f32[16]{0}) all-gather-start(%e), channel_id=4, chain_id="1"
  %loop = (s32[], f32[8]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


@pytest.fixture
def module(monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
  return importlib.import_module("collectives")


def test_tuples_loops_and_chains(module):
  Move, moves = module.Move, module.collectives(TEXT)
  assert moves == [
    Move("all-reduce", "f32", (3, 2), 1),
    Move("all-reduce", "pred", (7,), 1),
    Move("all-gather", "f32", (16,), 1),
    Move("all-gather", "u8", (4, 6), 3),
    Move("collective-permute", "bf16", (5,), 6),
  ]
  assert module.traffic(moves) == {
    "all-reduce": 24 + 7,
    "all-gather": 64 + 3 * 24,
    "collective-permute": 6 * 10,
  }
  assert module.largest(moves)["all-gather f32"] == {"count": 1, "largest": 64}


def test_a_compiled_loop():
  on_devices("""
    import sys, jax, jax.numpy as jnp
    sys.path.insert(0, "experiments")
    from collectives import collectives, traffic
    from jax.sharding import NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    def f(x, ws):  # the sum over split features is what moves: (3, 16) each of five times
      whole = lambda x: jax.lax.with_sharding_constraint(x, at())
      return jax.lax.scan(lambda x, w: (whole(jnp.tanh(x) @ w), None), x, ws)[0]
    x, ws = jnp.ones((3, 16)), jax.device_put(jnp.ones((5, 16, 16)), at(None, "data"))
    text = jax.jit(f, in_shardings=(at(), at(None, "data"))).lower(x, ws).compile().as_text()
    assert traffic(collectives(text)) == {"all-reduce": 5 * 3 * 16 * 4}, collectives(text)
  """)
