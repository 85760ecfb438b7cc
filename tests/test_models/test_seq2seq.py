import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import pelt_jax as pelt
from pelt_jax import models
from pelt_jax._node import BYPASS
from pelt_jax.models._seq2seq import shift_right
from pelt_jax.models._shards import insert
from pelt_jax.models._t5 import bucket_table
from pelt_jax.nodes import Prefix
from tests.test_models.helpers import (
  PAD,
  SEQ2SEQ,
  VOCAB,
  build,
  built,
  close,
  padded,
  random_params,
  tokens,
  trees_close,
)

slow = functools.partial(pytest.param, marks=pytest.mark.parity)
each = pytest.mark.parametrize("name", ["t5", slow("bart")])
START = 5


def run(model, params, *args, **kwargs):
  return jax.jit(model.apply, static_argnames=("cache_length", "mutable", "last_only"))(
    {"params": params}, *args, **kwargs
  )


def test_targets_shifted_right():
  labels = jnp.array([[36, 25, 38, 27, 33, -100, -100]])
  assert shift_right(labels, 0, 0).tolist() == [[0, 36, 25, 38, 27, 33, 0]]
  assert shift_right(jnp.array([[18, 34, -100, -100]]), 2, 1).tolist() == [[2, 18, 34, 1]]


def test_buckets_of_distances():
  # Pairs of distance (key - query) and bucket with T5's 32 buckets up to 128, by the reference.
  both = {
    -128: 15, -91: 15, -90: 14, -64: 14, -46: 13, -23: 11, -16: 10, -12: 9, -11: 8, -7: 7, 0: 0,
    1: 17, 7: 23, 8: 24, 16: 26, 64: 30, 128: 31,
  }  # fmt: skip
  past = {-113: 31, -112: 30, -64: 26, -32: 21, -19: 17, -18: 16, -16: 16, -15: 15, 0: 0, 5: 0}
  for wanted, bidirectional in ((both, True), (past, False)):
    table = bucket_table(129, bidirectional, 32, 128)
    assert {d: int(table[128 + d]) for d in wanted} == wanted


@pytest.mark.parametrize("name", [slow("t5"), "t5-gated", "bart", slow("bart-scaled")])
def test_scanned_equals_looped(name):
  model, params = built(name, "seq2seq")
  ids, mask = padded(tokens(2, 9), [9, 6], "right")
  targets = tokens(2, 7, seed=1)
  looped = models.to_looped(params, model)
  got = run(model, params, ids, mask, decoder_input_ids=targets)
  close(got, run(model.clone(scan=False), looped, ids, mask, decoder_input_ids=targets), 5e-6)
  back = models.to_scanned(looped)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@each
def test_labels_give_the_losses_of_the_shifted_targets(name):
  model, params = built(name, "seq2seq")
  ids, labels = tokens(2, 9), np.array(tokens(2, 7, seed=1))
  labels[1, 4:] = -100
  inputs = np.concatenate([np.full((2, 1), START), labels[:, :-1]], axis=1)
  logits = run(model, params, ids, decoder_input_ids=np.where(inputs == -100, PAD, inputs))
  want = models.token_losses(logits, jnp.asarray(labels))
  close(run(model, params, ids, labels=labels), want, 5e-6)
  assert (np.asarray(want)[1, 4:] == 0).all()
  chunked = run(model.clone(loss_chunk=4), params, ids, labels=labels)
  close(chunked, want, 5e-6)


@pytest.mark.parity
@each
def test_scan_and_remat_change_no_gradients(name):
  model, params = built(name, "seq2seq", scan=False)
  ids, labels = tokens(2, 9), tokens(2, 7, seed=1)

  def gradient(model, params):
    return jax.jit(jax.grad(lambda p: model.apply({"params": p}, ids, labels=labels).sum()))(params)

  other = build(name, "seq2seq", scan=True, remat=True)
  got = models.to_looped(gradient(other, models.to_scanned(params)), other)
  want = gradient(model, params)
  trees_close(got, want, 2e-5)
  zero = {"/".join(str(k.key) for k in p) for p, g in _leaves(want) if not np.any(g)}
  # A key's bias moves all scores of a query alike; BART's bias of the logits is a constant.
  assert zero - {"final_logits_bias"} == set()
  assert ("final_logits_bias" in zero) == (name == "bart")


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


@each
def test_padding_of_the_source_is_not_seen(name):
  model, params = built(name, "seq2seq")
  ids, targets = tokens(2, 9), tokens(2, 6, seed=1)
  batch, mask = padded(ids, [9, 5], "right")
  out = run(model, params, batch, mask, decoder_input_ids=targets)
  close(out[1:], run(model, params, ids[1:, :5], decoder_input_ids=targets[1:]), 5e-6)
  batch[1, 5:] = 50  # what stands there does not matter
  close(run(model, params, batch, mask, decoder_input_ids=targets), out, 5e-6)


@each
def test_the_decoder_sees_no_future_and_the_encoder_does(name):
  model, params = built(name, "seq2seq")
  ids, targets = tokens(1, 8), tokens(1, 6, seed=1)
  out = run(model, params, ids, decoder_input_ids=targets)
  later = targets.copy()
  later[0, 4] = (later[0, 4] + 9) % VOCAB
  changed = run(model, params, ids, decoder_input_ids=later)
  np.testing.assert_array_equal(changed[0, :4], out[0, :4])
  assert (changed[0, 4:] != out[0, 4:]).any(axis=-1).all()
  source = ids.copy()
  source[0, 7] = (source[0, 7] + 9) % VOCAB
  assert (run(model, params, source, decoder_input_ids=targets)[0, 0] != out[0, 0]).any()


@pytest.mark.parametrize(
  ("name", "scan"),
  [("t5", False), slow("t5-gated", True), slow("bart", False), ("bart-scaled", True)],
)
def test_cached_decoding_equals_the_full_forward(name, scan):
  model, params = built(name, "seq2seq", scan)
  ids, mask = padded(tokens(2, 9), [9, 6], "right")
  targets = tokens(2, 8, seed=1)
  want = run(model, params, ids, mask, decoder_input_ids=targets)
  step = jax.jit(functools.partial(model.apply, cache_length=10, mutable=["cache"]))
  out, cache = step({"params": params}, ids, mask, decoder_input_ids=targets[:, :5])
  parts = [out]
  for part in (slice(5, 6), slice(6, 7), slice(7, 8)):
    out, cache = step({"params": params, **cache}, None, decoder_input_ids=targets[:, part])
    parts.append(out)
  close(np.concatenate(parts, 1), want, 5e-6)


@each
def test_later_steps_do_not_project_the_source_again(name):
  model, params = built(name, "seq2seq")
  apply = functools.partial(model.apply, cache_length=6, mutable=["cache"])
  first = tokens(2, 1)
  _, cache = jax.eval_shape(apply, {"params": params}, tokens(2, 9), decoder_input_ids=first)
  seen = []

  def spy(next_fun, args, kwargs, context):
    seen.append("/".join(context.module.path))
    return next_fun(*args, **kwargs)

  from flax import linen as nn

  def step(variables):
    with nn.intercept_methods(spy):
      return apply(variables, None, decoder_input_ids=first)

  jax.eval_shape(step, {"params": params, **cache})
  called = set(seen)
  assert not any("encoder/" in p for p in called if "decoder" not in p)
  cross = {p.rpartition("/")[2] for p in called if "EncDec" in p or "encoder_attn/" in p}
  assert cross & {"q", "q_proj"} and not cross & {"k", "v", "k_proj", "v_proj"}


ROLES = {
  "t5": {
    "query": 7, "key": 7, "value": 7, "attention_out": 7, "ffn_in": 5, "ffn_out": 5, "ffn": 5,
    "attention": 7, "embedding": 1, "norm": 14,
    "attention_heads": 7, "layer": 5, "attention_block": 5, "cross_attention_block": 2,
  },
  "t5-gated": {
    "query": 7, "key": 7, "value": 7, "attention_out": 7, "ffn_in": 10, "ffn_out": 5, "ffn": 5,
    "attention": 7, "embedding": 1, "norm": 14, "head": 1,
    "attention_heads": 7, "layer": 5, "attention_block": 5, "cross_attention_block": 2,
  },
  "bart": {
    "query": 8, "key": 8, "value": 8, "attention_out": 8, "ffn_in": 5, "ffn_out": 5, "ffn": 5,
    "attention": 8, "embedding": 1, "norm": 15, "positions": 2,
    "attention_heads": 8, "layer": 5, "attention_block": 5, "cross_attention_block": 3,
    "attention_sum": 5, "cross_attention_sum": 3, "ffn_sum": 5,
  },
}  # fmt: skip


@pytest.mark.parametrize("name", list(ROLES))
def test_every_role_names_its_modules(name):
  found: dict[str, set] = {}
  for site in pelt.sites(build(name, "seq2seq"), tokens(1, 4)):
    if site.kind == "call":
      for served in site.roles:
        found.setdefault(served.role, set()).add(site.path)
  assert {r: len(p) for r, p in found.items()} == ROLES[name]


@each
@pytest.mark.parametrize("scan", [slow(False), True])
def test_lora_merges_in_both_stacks(name, scan):
  model, params = built(name, "seq2seq", scan)
  ids, labels = tokens(2, 7), tokens(2, 5, seed=1)
  method = pelt.lora(rank=2, targets=("query", "value"))
  nodes = method.init(jax.random.key(1), params, pelt.sites(model, ids))
  plain = run(model, params, ids, labels=labels)
  nodes = jax.tree.map(lambda x: x + 0.1 if x.shape[-2:-1] == (2,) else x, nodes)
  got = jax.jit(pelt.bypass(model.apply))({"params": nodes}, ids, labels=labels)
  close(got, run(model, pelt.merge(nodes), ids, labels=labels), 2e-5)
  assert np.abs(got - plain).max() > 0.05


@each
def test_the_file_holds_the_embedding_once_and_hugging_faces_names(name, tmp_path):
  model, params = built(name, "seq2seq")
  models.save_pretrained(tmp_path, model, params)
  file = tmp_path / "model.safetensors"
  tensors = {k: v.copy() for k, v in safetensors.numpy.load_file(file).items()}
  table = [n for n, t in tensors.items() if t.shape == (VOCAB, 32)]
  prefix = "model." if name == "bart" else ""
  assert table == [f"{prefix}shared.weight"]
  bias = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  if name == "t5":
    assert {bias.format("encoder"), bias.format("decoder")} < set(tensors)
  # Copies that older files hold besides, or instead.
  for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
    tensors[copy if copy == "lm_head.weight" else prefix + copy] = tensors[table[0]]
  if name == "t5":
    unused = bias.format("decoder").replace("0.SelfA", "1.EncDecA")
    tensors[unused] = tensors[bias.format("decoder")]
  safetensors.numpy.save_file(tensors, file)
  loaded, got = models.from_pretrained(tmp_path, task="seq2seq", scan=True)
  assert loaded == model
  jax.tree.map(np.testing.assert_array_equal, got, params)
  shared = tensors.pop(table[0])
  safetensors.numpy.save_file(tensors, file)
  _, got = models.from_pretrained(tmp_path, task="seq2seq", scan=True)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  tensors[table[0]] = shared + 1
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight differs from shared.weight"):
    models.from_pretrained(tmp_path, task="seq2seq")


def test_bart_without_prefix_and_bias(tmp_path):
  model, params = built("bart", "seq2seq")
  models.save_pretrained(tmp_path, model, params)
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  bare = {n.removeprefix("model."): t.copy() for n, t in tensors.items()}
  del bare["final_logits_bias"]
  safetensors.numpy.save_file(bare, file)
  _, got = models.from_pretrained(tmp_path, task="seq2seq", scan=True)
  jax.tree.map(np.testing.assert_array_equal, got["model"], params["model"])
  assert got["final_logits_bias"].shape == (1, VOCAB) and not got["final_logits_bias"].any()


def test_t5s_head_is_its_own_where_the_file_has_another(tmp_path):
  model, params = built("t5-gated", "seq2seq")
  models.save_pretrained(tmp_path, model, params)
  config = tmp_path / "config.json"
  # As the reference writes it since version 5.
  text = config.read_text().replace(
    '"tie_word_embeddings": false', '"tie_word_embeddings": true, "scale_decoder_outputs": false'
  )
  assert "scale_decoder" in text
  config.write_text(text)
  loaded, got = models.from_pretrained(tmp_path, task="seq2seq", scan=True)
  assert loaded.config == model.config
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_t5s_own_head_is_never_invented(tmp_path):
  model, params = built("t5-gated", "seq2seq")
  models.save_pretrained(tmp_path, model, params)
  file = tmp_path / "model.safetensors"
  tensors = {k: v.copy() for k, v in safetensors.numpy.load_file(file).items()}
  del tensors["lm_head.weight"]
  tensors["encoder.block.1.layer.0.SelfAttention.q.weight"] = np.zeros((2, 2), np.float32)
  tensors["encoder.block.0.layer.2.DenseReluDense.wi.weight"] = np.zeros((2, 2), np.float32)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError) as error:
    models.from_pretrained(tmp_path, task="seq2seq")
  text = str(error.value)
  assert f"lm_head.weight is missing, expected shape ({VOCAB}, 32)" in text
  assert (
    "encoder.block.1.layer.0.SelfAttention.q.weight has shape (2, 2), expected (48, 32)" in text
  )
  assert "encoder.block.0.layer.2.DenseReluDense.wi.weight (2, 2) is unexpected" in text


@each
def test_bad_calls_are_named(name):
  model, params = built(name, "seq2seq")
  ids = tokens(2, 5)
  call = functools.partial(model.apply, {"params": params})
  with pytest.raises(ValueError, match="decoder_input_ids are needed"):
    call(ids, cache_length=4, mutable=["cache"])
  with pytest.raises(ValueError, match="cache_length is needed"):
    call(None, decoder_input_ids=ids)
  with pytest.raises(ValueError, match="the cache holds no source"):
    call(None, decoder_input_ids=ids, cache_length=8, mutable=["cache"])
  with pytest.raises(ValueError, match=r"attention_mask must be \(2, 5\)"):
    call(ids, np.ones((2, 5, 5)))
  with pytest.raises(ValueError, match=r'mutable=\["cache"\]'):
    call(ids, decoder_input_ids=ids, cache_length=8)


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("t5", {"feed_forward_proj": "swiglu-gelu"}, "feed_forward_proj='swiglu-gelu'"),
    ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder=False"),
    ("bart", {"decoder_attention_heads": 5}, r"d_model \(32\) .* decoder_attention_heads \(5\)"),
    ("bart", {"normalize_before": True}, "normalize_before=True"),
    ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, message):
  with pytest.raises(ValueError, match=message):
    models.from_config(SEQ2SEQ[name] | change, task="seq2seq")


def test_an_encoder_decoder_has_one_task():
  with pytest.raises(ValueError, match="task 'lm' is not one of those known for t5: seq2seq"):
    models.from_config(SEQ2SEQ["t5"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each
def test_half_precision(name, dtype):
  model = build(name, "seq2seq", dtype=dtype, scan=True)
  params = random_params(model)
  out = run(model, params, tokens(2, 5), labels=tokens(2, 4))
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
  assert out.dtype == jnp.float32 and jnp.isfinite(out).all()


@each
def test_prefixes_stand_before_all_three_kinds_of_attention(name):
  model, params = built(name, "seq2seq", scan=False)
  ids, mask = padded(tokens(2, 7), [7, 4], "right")
  targets = tokens(2, 5, seed=1)
  cores = [
    s.path
    for s in pelt.sites(model, ids)
    if any(r.role == "attention" and r.placement == "prefix" for r in s.roles)
  ]
  heads, width = (4, 12) if name == "t5" else (None, None)
  rng = np.random.default_rng(0)

  def with_prefixes(order):
    tree = jax.tree.map(lambda x: x, params)
    for path in cores:
      c = model.config
      h = heads or (c.decoder_heads if "decoder" in path else c.num_attention_heads)
      keys, values = rng.normal(size=(2, 3, h, width or 32 // h)).astype(np.float32)[:, order]
      insert(tree, f"{path}/{BYPASS}", Prefix(keys=jnp.asarray(keys), values=jnp.asarray(values)))
    return tree

  assert len(cores) == ROLES[name]["attention"]
  apply = pelt.bypass(model.apply)
  rng = np.random.default_rng(0)
  nodes = with_prefixes([0, 1, 2])
  want = jax.jit(apply)({"params": nodes}, ids, mask, decoder_input_ids=targets)
  assert np.abs(want - run(model, params, ids, mask, decoder_input_ids=targets)).max() > 0.1
  # No position: their order does not matter.
  rng = np.random.default_rng(0)
  turned = with_prefixes([2, 0, 1])
  close(jax.jit(apply)({"params": turned}, ids, mask, decoder_input_ids=targets), want, 5e-6)
  step = jax.jit(functools.partial(apply, cache_length=6, mutable=["cache"]))
  out, cache = step({"params": nodes}, ids, mask, decoder_input_ids=targets[:, :4])
  last, _ = step({"params": nodes, **cache}, None, decoder_input_ids=targets[:, 4:])
  close(np.concatenate([out, last], 1), want, 5e-6)
