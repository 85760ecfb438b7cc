"""A small model in Flax and, where torch is asked for, the same one in torch, with PEFT cases."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

DATA = pathlib.Path(__file__).parent / "data"
IDS = np.array([[1, 4, 10, 0], [3, 3, 9, 2]])
COTANGENT = np.linspace(-1.0, 1.5, 2 * 4 * 3).reshape(2, 4, 3)


@dataclasses.dataclass(frozen=True)
class Case:
  """A PEFT configuration, and what the model needs for it."""

  config: dict
  kind: str = "LORA"
  conv: bool = False
  experts: bool = False
  matrix: bool = False

  @property
  def start(self) -> bool:
    """Whether PEFT takes the base apart, which it does in float32 alone."""
    return "init_lora_weights" in self.config

  @property
  def atol(self) -> float:
    """Sums of at most 11 products of numbers near 1, a few layers deep, in float64 or float32."""
    return 5e-6 if self.start else 1e-12


BOTH = dict(target_modules=["lin", "lin2"])
CASES = {
  "plain": Case(dict(r=2, lora_alpha=6, target_modules=["lin", "lin2"])),
  "rslora": Case(dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["lin", "lin2"])),
  "patterns": Case(
    dict(
      r=2,
      lora_alpha=6,
      target_modules=["lin", "lin2", "head"],
      rank_pattern={"lin2": 3, "^head": 1},
      alpha_pattern={"lin.": 5, "lin": 7},
    )
  ),
  "regex": Case(dict(r=2, lora_alpha=3, target_modules=r"lin\d?|emb", exclude_modules=["lin2"])),
  "embedding": Case(dict(r=2, lora_alpha=6, target_modules=["emb", "lin"])),
  "saved": Case(
    dict(r=2, lora_alpha=6, target_modules=["lin"], modules_to_save=["head"], bias="lora_only")
  ),
  "biases": Case(
    dict(r=2, lora_alpha=6, target_modules=["lin2"], modules_to_save=["head"], bias="all")
  ),
  "conv1d": Case(dict(r=2, lora_alpha=6, target_modules=["lin", "lin2"]), conv=True),
  "experts": Case(
    dict(
      r=2,
      lora_alpha=6,
      target_modules=["lin"],
      target_parameters=["experts.up", "experts.down"],
      rank_pattern={r"experts\.up": 3},
    ),
    experts=True,
  ),
  "matrix": Case(dict(r=3, lora_alpha=6, target_parameters=["mix.w"]), matrix=True),
  "dora": Case(dict(BOTH, r=2, lora_alpha=6, use_dora=True)),
  "pissa": Case(dict(BOTH, r=2, lora_alpha=6, init_lora_weights="pissa")),
  "olora": Case(dict(BOTH, r=2, lora_alpha=6, init_lora_weights="olora")),
  "adalora": Case(dict(BOTH, init_r=3, target_r=2, lora_alpha=6, total_step=10), "ADALORA"),
  "ia3": Case(dict(BOTH, feedforward_modules=["lin2"]), "IA3"),
  "vera": Case(dict(BOTH, r=4), "VERA"),
  "loha": Case(dict(BOTH, r=2, alpha=6), "LOHA"),
  "lokr": Case(dict(BOTH, r=2, alpha=6), "LOKR"),
  "miss": Case(dict(BOTH, r=2), "MISS"),
  "hira": Case(dict(BOTH, r=2), "HIRA"),
}


class Experts(nn.Module):
  """Two experts per token, all used: raw parameters (E, out, in) as PEFT expects them."""

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(0.5)
    down = self.param("down", init, (2, 5, 8), x.dtype)
    up = self.param("up", init, (2, 8, 5), x.dtype)
    hidden = jnp.tanh(jnp.einsum("...i,eoi->...eo", x, down))
    return x + jnp.einsum("...eo,eio->...i", hidden, up)


class Mix(nn.Module):
  """A raw square matrix (out, in): only its orientation tells a change from its transpose."""

  @nn.compact
  def __call__(self, x):
    return x @ self.param("w", nn.initializers.normal(0.5), (8, 8), x.dtype).T


class Model(nn.Module):
  """emb (11, 6) -> lin (6, 10) -> lin2 (10, 8) -> head (8, 3), tanh between."""

  bias2: bool = False  # torch's Conv1D always has one
  experts: bool = False
  matrix: bool = False
  dtype: str = "float64"

  @nn.compact
  def __call__(self, ids):
    dense = lambda n, name, bias: nn.Dense(n, use_bias=bias, name=name, param_dtype=self.dtype)
    x = nn.Embed(11, 6, name="emb", param_dtype=self.dtype)(ids)
    x = jnp.tanh(dense(10, "lin", True)(x))
    x = jnp.tanh(dense(8, "lin2", self.bias2)(x))
    if self.experts:
      x = Experts(name="experts")(x)
    if self.matrix:
      x = Mix(name="mix")(x)
    return dense(3, "head", True)(x)


def flax_model(case: Case, dtype: str = "float64") -> Model:
  return Model(bias2=case.conv, experts=case.experts, matrix=case.matrix, dtype=dtype)


def base_params(values: dict, dtype: str = "float64") -> dict:
  """Our params from stored `base/<torch name>` arrays."""
  params: dict = {}
  for key, value in values.items():
    if not key.startswith("base/"):
      continue
    module, _, name = key.removeprefix("base/").rpartition(".")
    kernel = module in ("lin", "lin2", "head") and name == "weight"
    leaf = "embedding" if module == "emb" else "kernel" if kernel else name
    # Conv1D keeps (in, out), as we do.
    conv = kernel and module != "head" and "conv" in values
    value = value.T if kernel and not conv else value
    params.setdefault(module, {})[leaf] = jnp.asarray(value, dtype)
  return params


def read_values(folder: pathlib.Path) -> dict:
  with np.load(folder / "values.npz") as file:
    return dict(file)


def our_gradients(grads: dict) -> dict:
  """Gradients of a trainable tree under PEFT's names and in torch's orientation."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
    keys = [k for k in keys if k != "base"]
    module, leaf_name, field = ".".join(keys[:-2]), keys[-2], keys[-1]
    value = np.asarray(leaf)
    name = f"base_model.model.{module}."
    if field == "magnitude":
      found[f"{name}lora_magnitude_vector.weight"] = value
    elif leaf_name == "embedding":
      found[f"{name}lora_embedding_{field.upper()}"] = value.T
    elif leaf_name in ("up", "down"):
      name += "base_layer." if leaf_name == "up" else ""
      if field == "a":
        value = value.transpose(0, 2, 1).reshape(-1, value.shape[1])
      else:
        value = value.transpose(2, 1, 0).reshape(value.shape[2], -1)
      found[f"{name}lora_{field.upper()}.weight"] = value
    elif field == "value":
      found[name + {"kernel": "weight"}.get(leaf_name, leaf_name)] = value.T
    else:
      found[f"{name}lora_{field.upper()}.weight"] = value.T
  return found
