"""A small transformer with an attention core, in four modes, and the same forward by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pelt_jax._node import Node
from pelt_jax._walk import update_at

LAYERS, BATCH, TIME, WIDTH, HEADS, HIDDEN = 3, 4, 5, 6, 2, 8
MODES = ("loop", "remat", "scan", "scan_remat")


class Core(nn.Module):
  """Attention without parameters."""

  @nn.compact
  def __call__(self, q, k, v, mask=None, bias=None):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else jnp.where(mask, scores, jnp.asarray(-1e30, scores.dtype))
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


class Attention(nn.Module):
  """Projections around the core."""

  dtype: Any

  @nn.compact
  def __call__(self, x, mask=None):
    heads = lambda name: nn.DenseGeneral(
      (HEADS, WIDTH // HEADS), dtype=self.dtype, param_dtype=self.dtype, name=name
    )(x)
    visible = None if mask is None else (mask > 0)[:, None, None, :]
    y = Core(name="core")(heads("query"), heads("key"), heads("value"), visible)
    return nn.DenseGeneral(
      WIDTH, axis=(-2, -1), dtype=self.dtype, param_dtype=self.dtype, name="out"
    )(y)


class Mlp(nn.Module):
  """Two matrices around a tanh."""

  dtype: Any

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(HIDDEN, dtype=self.dtype, param_dtype=self.dtype, name="up")(x)
    return nn.Dense(WIDTH, dtype=self.dtype, param_dtype=self.dtype, name="down")(jnp.tanh(h))


class Block(nn.Module):
  """One layer, its norms after the residual sums (post) or before the sublayers."""

  post: bool
  dtype: Any

  @nn.compact
  def __call__(self, x, mask=None, deterministic=True):
    norm = lambda name: nn.LayerNorm(1e-6, dtype=self.dtype, param_dtype=self.dtype, name=name)
    drop = nn.Dropout(0.1, deterministic=deterministic)
    attn, mlp = Attention(self.dtype, name="attn"), Mlp(self.dtype, name="mlp")
    if self.post:
      x = norm("ln_1")(x + drop(attn(x, mask)))
      return norm("ln_2")(x + mlp(x))
    x = x + drop(attn(norm("ln_1")(x), mask))
    return x + mlp(norm("ln_2")(x))


class Model(nn.Module):
  """Embedding, three layers, head. `declare` and `split` are its scan's."""

  post: bool = False
  mode: str = "loop"
  dtype: Any = jnp.float32
  declare: bool = True
  split: bool = True

  @nn.compact
  def __call__(self, ids, attention_mask=None, deterministic=True):
    x = nn.Embed(11, WIDTH, dtype=self.dtype, param_dtype=self.dtype, name="embed")(ids)
    remat = self.mode in ("remat", "scan_remat")
    block = nn.remat(Block, static_argnums=(3,)) if remat else Block
    if self.mode in ("loop", "remat"):
      for i in range(LAYERS):
        x = block(self.post, self.dtype, name=f"h_{i}")(x, attention_mask, deterministic)
    else:
      x, _ = nn.scan(
        lambda layer, x, _: (layer(x, attention_mask, deterministic), None),
        variable_axes={"params": 0, **({"intermediates": 0} if self.declare else {})},
        split_rngs={"params": True, "dropout": True} if self.split else {"params": True},
        length=LAYERS,
      )(block(self.post, self.dtype, name="h"), x, None)
    return nn.Dense(3, dtype=self.dtype, param_dtype=self.dtype, name="head")(x)


def inputs():
  """Token ids and a mask with padding on the right."""
  ids = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 11)
  lengths = jnp.array([5, 3, 4, 1])
  return ids, jnp.asarray(jnp.arange(TIME)[None] < lengths[:, None], jnp.int32)


def values(shape, seed, dtype=None):
  """Reproducible numbers of order one half."""
  drawn = np.random.default_rng(seed).normal(size=shape) / 2
  return jnp.asarray(drawn, dtype or jnp.result_type(float))


def looped_params(dtype=None, post=False):
  """Plain params in loop form, every leaf drawn (biases and scales too), all layers different."""
  ids, mask = inputs()
  model = Model(post=post, dtype=dtype or jnp.result_type(float))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, mask))["params"]
  flat, tree = jax.tree.flatten(shapes)
  return jax.tree.unflatten(tree, [values(x.shape, i, x.dtype) for i, x in enumerate(flat)])


def stack(params, added=None):
  """Loop form to scan form, nodes too."""
  layers = [params[f"h_{i}"] for i in range(LAYERS)]
  whole = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  is_node = lambda x: isinstance(x, Node)
  moved = lambda x: x.add_axis(0, {}) if is_node(x) else x
  whole = jax.tree.map(moved, whole, is_leaf=is_node)
  return {"h": whole, **{k: v for k, v in params.items() if not k.startswith("h_")}}


def in_mode(params, mode):
  """Params for a mode, from the loop form."""
  return params if mode in ("loop", "remat") else stack(params)


def layer(params, i):
  """One layer's params of either form."""
  if "h" in params:
    return jax.tree.map(lambda x: x[i], params["h"])
  return params[f"h_{i}"]


def at_layers(params, where, make):
  """Loop-form params with `make(i)` set under `h_i/<where>`."""
  return update_at(params, {f"h_{i}/{where}": make(i) for i in range(LAYERS)})


# The forward by hand. `edit` gives the pieces that an adapted layer changes.


def affine(x, p):
  return x @ p["kernel"] + p["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def norm(x, p):
  centred = x - x.mean(-1, keepdims=True)
  y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
  return y * p["scale"][None, None] + p["bias"][None, None]


def mlp(x, p):
  return affine(jnp.tanh(affine(x, p["up"])), p["down"])


def project(x, p):
  return jnp.einsum("btd,dhk->bthk", x, p["kernel"]) + p["bias"][None, None]


def core(q, k, v, visible):
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
  scores = jnp.where(visible[:, None, None], scores, -1e30)
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def attention(x, p, mask, heads=project, core=core):
  q, k, v = (heads(x, p[n]) for n in ("query", "key", "value"))
  y = core(q, k, v, mask > 0)
  return jnp.einsum("bthk,hkd->btd", y, p["out"]["kernel"]) + p["out"]["bias"][None, None]


def plain_layer(x, p, mask, post, attn=attention, norm2=norm, ffn=None):
  """One layer; `attn(x, p, mask)`, `norm2(s, p)` and `ffn(x, p, residual)` may be replaced."""
  ffn = ffn or (lambda x, p, residual: mlp(x, p))
  if post:
    x = norm(x + attn(x, p["attn"], mask), p["ln_1"])
    return norm2(x + ffn(x, p["mlp"], x), p["ln_2"])
  x = x + attn(norm(x, p["ln_1"]), p["attn"], mask)
  return x + ffn(norm2(x, p["ln_2"]), p["mlp"], x)


def forward(params, ids, mask, run):
  """Logits, with `run(i, x, layer params, mask)` for every layer."""
  x = params["embed"]["embedding"][ids]
  for i in range(LAYERS):
    x = run(i, x, layer(params, i), mask)
  return affine(x, params["head"])
