"""Checks that hold of every method that changes a kernel as a matrix; each takes the method."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import pelt_jax as pelt
from pelt_jax._node import Generator, Weight
from pelt_jax._walk import every_node
from tests.test_core import tiny
from tests.test_core.tiny import values

IN, OUT = 6, 10


def model_of(features=OUT, bias=True, dtype=None, **options):
  kind = nn.DenseGeneral if options or isinstance(features, tuple) else nn.Dense
  dtype = dtype or jnp.result_type(float)
  return kind(features, use_bias=bias, param_dtype=dtype, **options)


def dense(method, inputs=IN, outputs=OUT, bias=True, dtype=None, key=1):
  """A Dense, its input, its plain params and those with nodes."""
  dtype = dtype or jnp.result_type(float)
  model, x = model_of(outputs, bias, dtype), values((5, inputs), 0, dtype)
  base = {"kernel": values((inputs, outputs), 1, dtype)}
  base |= {"bias": values((outputs,), 2, dtype)} if bias else {}
  return model, x, base, method.init(jax.random.key(key), base, pelt.sites(model, x))


def moved(params, seed=0, by=0.6):
  """Every trained array moved by numbers of order 0.3, so that no zero factor hides an error."""
  trainable, frozen = pelt.partition(params)
  flat, tree = jax.tree.flatten(trainable)
  flat = [x + by * values(x.shape, 100 * seed + i, x.dtype) for i, x in enumerate(flat)]
  return pelt.combine(jax.tree.unflatten(tree, flat), frozen)


def arrays(node):
  """The node's own arrays by field."""
  return {n: v for n, v in node.children() if node.kinds[n] == "own" and v is not None}


def close(got, want, atol=1e-12):
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def starts_as_the_base(method, moves, **sizes):
  """Bitwise what the plain model gives, and gradients at `moves` alone."""
  model, x, base, params = dense(method, **sizes)
  apply = pelt.bypass(model.apply)
  want = model.apply({"params": base}, x)
  np.testing.assert_array_equal(apply({"params": params}, x), want)
  g = values(want.shape, 3)
  trainable, frozen = pelt.partition(params)
  loss = lambda p: jnp.sum(apply({"params": p}, x) * g)
  _, grads = pelt.value_and_grad(loss)(trainable, frozen)
  sizes = {
    n: float(jnp.abs(v).max()) for n, v in arrays(grads["kernel"]).items() if hasattr(v, "shape")
  }
  assert {n for n, size in sizes.items() if size} == set(moves)
  assert min(sizes[n] for n in moves) > 1e-2


def computes(method, formula, trained, rank, **sizes):
  """y, the merged kernel and bias, and counts; `formula(kernel, bias, arrays)` gives the latter."""
  with jax.enable_x64(True):
    model, x, base, params = dense(method, **sizes)
    params = moved(params)
    node = params["kernel"]
    kernel, bias = formula(base["kernel"], base.get("bias", 0.0), {**arrays(node), "node": node})
    y = pelt.bypass(model.apply)({"params": params}, x)
    close(y, x @ kernel + jnp.broadcast_to(bias, y.shape[-1:])[None])
    merged = pelt.merge(params)
    close(merged["kernel"], kernel)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    close(model.apply({"params": merged}, x), y)
    count = pelt.count(params)
    assert (count.trainable, count.stored, count.rank) == (trained, trained, rank)
    change = np.linalg.svd(np.asarray(kernel - base["kernel"]), compute_uv=False)
    found = int((change > 1e-10 * change[0]).sum())
    assert found <= rank and float(jnp.abs(y - model.apply({"params": base}, x)).max()) > 0.05
    return found


def reads_axes(method):
  """Heads by widths, in or out, are one axis of the same matrix."""
  with jax.enable_x64(True):
    for shape, model, x in (
      ((IN, 2, 5), model_of((2, 5)), values((3, 4, IN), 0)),
      ((2, 3, OUT), model_of(OUT, axis=(-2, -1)), values((3, 4, 2, 3), 0)),
    ):
      plain, _, base, flat = dense(method)
      flat = moved(flat)
      general = {
        "kernel": base["kernel"].reshape(shape),
        "bias": base["bias"].reshape(model.features),
      }
      params = method.init(jax.random.key(1), general, pelt.sites(model, x))
      same = arrays(flat["kernel"])
      mine = arrays(params["kernel"])
      node = params["kernel"].replace(**{n: v.reshape(mine[n].shape) for n, v in same.items()})
      params = {**params, "kernel": node}
      got = pelt.bypass(model.apply)({"params": params}, x)
      rows = x.reshape(3, 4, IN)
      want = pelt.bypass(plain.apply)({"params": flat}, rows)
      close(got.reshape(3, 4, OUT), want)
      close(pelt.merge(params)["kernel"].reshape(IN, OUT), pelt.merge(flat)["kernel"])


def runs_over_codes(method):
  """Over 4 bits it computes what it computes over what those stand for."""
  both = pelt.chain(pelt.nf4(targets="kernel"), method)
  model, x, _, params = dense(both, 64, 32, dtype=jnp.float32)
  params = moved(params, by=0.2)
  whole = jnp.asarray(params["kernel"].inner.materialize())
  plain = {**params, "kernel": params["kernel"].replace(base=whole)}
  apply = pelt.bypass(model.apply)
  want = apply({"params": plain}, x)
  close(apply({"params": params}, x), want, 2e-5)  # 64 terms of order 1 in float32
  close(model.apply({"params": pelt.merge(params)}, x), want, 2e-5)
  loss = lambda p: jnp.sum(apply({"params": p}, x) ** 2)
  grads = [pelt.value_and_grad(loss)(*pelt.partition(p))[1] for p in (params, plain)]
  for got, other in zip(*map(jax.tree.leaves, grads), strict=True):
    close(got, other, 1e-5 * float(jnp.abs(other).max()))


def serves_rows(method):
  """Each row of a batch with its own member; the bank comes apart again."""
  with jax.enable_x64(True):
    model, x, base, params = dense(method)
    members = [moved(params, seed) for seed in range(3)]
    rows = jnp.array([2, 0, 1, 1, 0])
    bank = pelt.bank(members)
    apply = pelt.bypass(model.apply)
    got = apply({"params": bank}, x[:, None], rows=rows)[:, 0]
    for i, row in enumerate(rows):
      close(got[i], apply({"params": members[row]}, x)[i])
    again, apart = pelt.unbank(bank)
    assert jax.tree.structure(again) == jax.tree.structure(base)
    assert jax.tree.structure(apart[1]) == jax.tree.structure(members[1])
    jax.tree.map(np.testing.assert_array_equal, apart[1], members[1])
    with np.testing.assert_raises_regex(ValueError, "cannot be merged"):
      pelt.merge(bank)


def goes_through_files(method, folder, shared=0):
  """Bit for bit, and the file holds what trains, scalings, and `shared` numbers once."""
  _, _, base, params = dense(method)
  params = moved(params)
  pelt.save(folder, pelt.fold(params))
  again = pelt.load(folder, base)
  assert jax.tree.structure(again) == jax.tree.structure(pelt.fold(params))
  jax.tree.map(np.testing.assert_array_equal, again, pelt.fold(params))
  nodes = list(every_node(pelt.fold(params)))
  extra = sum(
    v.size for n in nodes for f, v in n.children() if n.kinds[f] == "extra" and hasattr(v, "size")
  )
  (file,) = folder.glob("*.safetensors")
  assert file.stat().st_size < 4 * (pelt.count(params).stored + extra) + 2000
  assert (
    sum(v.size for n in nodes if isinstance(n, Generator) for v in jax.tree.leaves(n)) == shared
  )


def stacks(method):
  """Scanned layers compute what looped ones do, with weights and changes of their own."""
  base, ids = tiny.looped_params(), tiny.inputs()
  model, scanned = (tiny.Model(mode=mode) for mode in ("loop", "scan"))
  params = moved(method.init(jax.random.key(1), base, pelt.sites(model, *ids)))
  want = jax.jit(pelt.bypass(model.apply))({"params": params}, *ids)
  got = jax.jit(pelt.bypass(scanned.apply))({"params": tiny.stack(params)}, *ids)
  close(got, want, 2e-5)  # float32 through three layers
  own = method.init(jax.random.key(1), tiny.stack(base), pelt.sites(scanned, *ids))
  shapes = lambda p: [(v.shape, v.dtype) for v in jax.tree.leaves(p)]
  assert shapes(own) == shapes(tiny.stack(params))
  assert jax.tree.structure(own) == jax.tree.structure(tiny.stack(params))


def specs_of(method, **sizes):
  """The partition spec of each own array, the kernel's axes lying over ("row", "model")."""
  _, _, _, params = dense(method, **sizes)
  mesh = jax.make_mesh((1, 1), ("row", "model"))
  found = pelt.shardings(params, {"kernel": P("row", "model"), "bias": P("model")}, mesh)
  assert jax.tree.structure(found) == jax.tree.structure(params)
  assert tuple(found["kernel"].base.spec) == ("row", "model")
  return {n: tuple(v.spec) for n, v in arrays(found["kernel"]).items()}


def is_bfloat16(method):
  """bfloat16 stays, and the change is as exact as its own numbers."""
  with jax.numpy_dtype_promotion("standard"):
    model, x, base, params = dense(method, dtype=jnp.bfloat16)
    params = moved(params)
    apply = pelt.bypass(model.apply)
    got = apply({"params": params}, x)
    assert got.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(pelt.partition(params)[0])} == {jnp.dtype("bfloat16")}
    wide = lambda t: jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), t)
    whole = pelt.bypass(model_of(dtype=jnp.float32).apply)
    delta = whole({"params": wide(params)}, wide(x)) - whole({"params": wide(base)}, wide(x))
    change = wide(got) - wide(model.apply({"params": base}, x))
    # a few roundings of 2^-9 of numbers up to 5
    close(change, delta, 0.08)


def refuses_bad_targets(method_of):
  """What no matrix method can change is named."""
  import pytest

  class Both(nn.Module):
    @nn.compact
    def __call__(self, ids):
      x = nn.Embed(11, 4, name="emb")(ids)
      w = self.param("w", nn.initializers.normal(1.0), (4, 4))
      heads = nn.DenseGeneral(3, axis=-1, batch_dims=(0,), name="batched")(x)
      return nn.Dense(4, name="lin")(x @ w), heads

  ids = jnp.array([[1, 2, 3]])
  params = Both().init(jax.random.key(0), ids)["params"]
  sites = pelt.sites(Both(), ids)
  init = lambda targets, params=params: method_of(targets).init(jax.random.key(0), params, sites)
  with pytest.raises(ValueError, match="only read by Both"):
    init("w")
  with pytest.raises(ValueError, match="batch of matrices"):
    init("batched/kernel")
  with pytest.raises(ValueError, match="matches no leaf site"):
    init("nothing")
  tuned = pelt.train("lin").init(jax.random.key(0), params, sites)
  with pytest.raises(ValueError, match="trains already"):
    init("lin/kernel", tuned)
  return init


def nodes_at(params, kind=Weight):
  return [n for n in every_node(params) if isinstance(n, kind)]
