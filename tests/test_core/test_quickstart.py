"""The documented first session, word for word, after a preamble for the folder and the batch."""

import jax
import jax.numpy as jnp
import optax
import pytest

import pelt_jax as pelt
import pelt_jax.models

SESSION = """
model, base = pelt.models.from_pretrained(folder, task="classification", num_labels=6)
method = pelt.chain(pelt.lora(rank=8, alpha=16, targets=("query", "value")), pelt.train("head"))
params = method.init(jax.random.key(0), base, pelt.sites(model, batch["input_ids"], batch["attention_mask"]))
apply = pelt.bypass(model.apply)
trainable, frozen = pelt.partition(params)
tx = optax.adamw(1e-3); state = tx.init(trainable)

def loss_fn(params, batch, key):
    logits = apply({"params": params}, batch["input_ids"], batch["attention_mask"], deterministic=False, rngs={"dropout": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

@jax.jit
def step(trainable, frozen, state, batch, key):
    loss, grads = pelt.value_and_grad(loss_fn)(trainable, frozen, batch, key)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, loss
...
for i in range(8): trainable, state, loss = step(trainable, frozen, state, batch, jax.random.key(i)); losses.append(float(loss))
params = pelt.combine(trainable, frozen)
pelt.save("adapter/", params)                     # safetensors + JSON: node types, static fields, fingerprints of the base
params = pelt.load("adapter/", base)              # bit for bit; needs neither model nor sites
pelt.interop.peft.export("peft/", params, model); pelt.models.save_pretrained("merged/", model, pelt.merge(params))
"""  # noqa: E501


@pytest.mark.parity  # the README's session, which runs in every suite, is nearly the same
def test_quickstart(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = dict(
    model_type="bert", vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=8,
  )  # fmt: skip
  tiny = pelt.models.from_config(config, task="classification", num_labels=6)
  ids = jax.random.randint(jax.random.key(1), (6, 8), 0, 31)
  pelt.models.save_pretrained("tiny", tiny, tiny.init(jax.random.key(2), ids)["params"])
  batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": jnp.arange(6)}
  names = dict(pelt=pelt, jax=jax, optax=optax, folder="tiny", batch=batch, losses=[])
  # Readers run with JAX's defaults, and Adam raises a float to an integer power.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(compile(SESSION, "quickstart", "exec"), names)
  assert names["losses"][-1] < names["losses"][0]
  for file in ("adapter/adapter.json", "peft/adapter_config.json", "merged/model.safetensors"):
    assert (tmp_path / file).is_file(), file
  same = jax.tree.map(
    lambda a, b: bool((a == b).all()),
    names["params"],
    pelt.combine(names["trainable"], names["frozen"]),
  )
  assert all(jax.tree.leaves(same))


def test_importing_allocates_no_array(capfd):
  from tests.support import on_devices

  on_devices(
    """
    import jax._src.xla_bridge as bridge
    import pelt_jax
    assert not bridge.backends_are_initialized()
    import jax
    assert not jax.live_arrays()
    """,
    devices=1,
  )
