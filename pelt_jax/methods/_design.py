"""The unified view: methods by their design dimensions (arXiv:2110.04366, table 1)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from pelt_jax._site import Site, Targets
from pelt_jax._transform import Transform, chain, check_whole
from pelt_jax._walk import every_node, map_nodes
from pelt_jax.methods._adapter import adapter
from pelt_jax.methods._gates import drawn_gate, rewrapped
from pelt_jax.methods._lora import lora
from pelt_jax.methods._prefix_tuning import prefix_tuning
from pelt_jax.nodes import Before, Bottleneck, Mixed
from pelt_jax.nodes._branches import ACTIVATIONS

FORMS = ("attention", "linear", *(a for a in ACTIVATIONS if a != "identity"))
INSERTIONS = ("sequential", "parallel")
COMPOSITIONS = ("simple", "scaled", "gated")
# Sublayers and their roles; what else is named are projections or paths.
BLOCKS = {
  "attention_heads": "attention_heads",
  "attention": "attention_block",
  "cross_attention": "cross_attention_block",
  "ffn": "ffn",
}
# The options of each method that are no design dimension.
OPTIONS = {
  "prefix_tuning": ("reparametrize", "hidden", "embed_dim", "init", "dropout", "shift_positions"),
  "lora": ("init", "dropout", "fused"),
  "adapter": ("init", "tap", "dropout", "norm"),
}


class Design(NamedTuple):
  """A method's place in the table of design dimensions; the arguments of `design` in order.

  Attributes:
    form: functional form of the change.
    insertion: insertion form.
    representation: what is modified.
    composition: composition function.
  """

  form: str
  insertion: str
  representation: Targets
  composition: str


# Table 1 of the paper. Its LoRA modifies "attn key/val" there and query and value in its code.
DESIGNS = {
  "prefix_tuning": Design("attention", "parallel", "attention_heads", "gated"),
  "adapter": Design("relu", "sequential", ("attention", "ffn"), "simple"),
  "lora": Design("linear", "parallel", ("query", "value"), "scaled"),
  "parallel_adapter": Design("relu", "parallel", "ffn", "simple"),
  "multi_head_parallel_adapter": Design("relu", "parallel", "attention_heads", "simple"),
  "scaled_parallel_adapter": Design("relu", "parallel", "ffn", "scaled"),
}


def design(
  form: str,
  insertion: str,
  representation: Targets,
  composition: str,
  *,
  size: int,
  scaling: float | str | None = None,
  layers: Iterable[int] | None = None,
  dtype: Any = None,
  group: str | None = "trainable",
  **options: Any,
) -> Transform:
  """Builds a method from the four dimensions in which the unified view tells methods apart.

  h is what is modified, x what the sublayer that makes it reads, D the change, D(x) if inserted in
  parallel, D(h) if sequentially:

  - functional form: `"attention"`, softmax(x W_q P_k^T) P_v; `"linear"`, x W_down W_up; or an
    activation f, f(x W_down + b_down) W_up + b_up.
  - composition: `"simple"`, h + D; `"scaled"`, h + s D; `"gated"`, (1 - g) h + g D. The gate of
    the attention form is the prefix's share of the softmax. That of others is
    sigmoid(x w + b), a number per token that trains from about 0.02, so such a method is nearly
    but not exactly the identity at the start.

  `DESIGNS` holds the paper's table: `design(*DESIGNS["lora"], size=8, scaling=2.0)` is `lora(8,
  16)`, the other rows are `prefix_tuning`, `adapter` and its parallel styles, and what is in no row
  is built all the same. `mam` is a chain of two rows. On a projection the linear form in parallel
  is a LoRA, which merges unless it is gated.

  Args:
    form: `"attention"`, `"linear"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"` or `"tanh"`.
    insertion: `"sequential"` or `"parallel"`.
    representation: `"attention_heads"` (before their projection), `"attention"`,
      `"cross_attention"`, `"ffn"`; projections (`"query"`, `"value"`, `"ffn_in"`, ...) or paths of
      modules; or a tuple of them.
    composition: `"simple"`, `"scaled"` or `"gated"`.
    size: the prefix's length l, or the bottleneck dimension r.
    scaling: s, for `"scaled"`; by default 4 as in the paper. `"learned"` and `"channel"` as for
      `adapter`.
    layers: layer numbers to keep; all by default.
    dtype: dtype of the arrays.
    group: label of the arrays; None freezes them.
    **options: further ones of the method that the form rests on: `prefix_tuning` for
      `"attention"`, `lora` for linear changes of projections, else `adapter`.

  Returns:
    A `Transform`.

  Raises:
    ValueError: for an unknown value; an attention form that is not parallel, on attention heads and
      gated, since the prefix's softmax is the attention's own; an option the method does not have;
      at init, as that method.

  Example:
    A branch beside the feed-forward network that takes over where its gate opens, a row that no
    paper has:

    >>> import pelt_jax as pelt
    >>> method = pelt.design("relu", "parallel", "ffn", "gated", size=16)
    >>> same_as_lora = pelt.design(*pelt.DESIGNS["lora"], size=8, scaling=2.0)
  """
  _check_member("form", form, FORMS)
  _check_member("insertion", insertion, INSERTIONS)
  _check_member("composition", composition, COMPOSITIONS)
  check_whole(size=size)
  if scaling is not None and composition != "scaled":
    raise ValueError(f'scaling={scaling!r} is for composition="scaled", not {composition!r}')
  scaling = 4.0 if scaling is None and composition == "scaled" else scaling
  names = (representation,) if isinstance(representation, str) else tuple(representation)
  if not names:
    raise ValueError("representation is empty; name what is modified, such as 'ffn'")
  common = {"layers": layers, "dtype": dtype, "group": group}
  if form == "attention":
    _check_attention(insertion, names, composition)
    _check_options("prefix_tuning", form, options)
    return prefix_tuning(size, **options, **common)
  projections = tuple(n for n in names if n not in BLOCKS)
  if form != "linear" or insertion != "parallel" or composition == "gated":
    projections = ()  # a change that no weight could hold
  made = []
  if projections:
    _check_options("lora", form, options)
    if isinstance(scaling, str):
      raise ValueError(f"scaling={scaling!r}: that of a LoRA is a number; it does not train")
    alpha = None if scaling is None else scaling * size
    made.append(lora(size, alpha, targets=projections, **options, **common))
  rest = tuple(n for n in names if n not in projections)
  if rest:
    _check_options("adapter", form, options)
    method = adapter(
      "houlsby" if insertion == "sequential" else "parallel",
      bottleneck=size,
      activation="identity" if form == "linear" else form,
      scaling=scaling,
      targets=tuple(BLOCKS.get(n, n) for n in rest),
      train_norms=False,
      **options,
      **common,
    )
    made.append(_composed(method, form, composition, group))
  return chain(*made) if len(made) > 1 else made[0]


def _composed(method: Transform, form: str, composition: str, group: str | None) -> Transform:
  """An adapter without biases if it is linear, mixed by a gate if asked."""
  if form != "linear" and composition != "gated":
    return method

  def initialize(key: jax.Array, params: dict, sites: tuple[Site, ...]) -> dict:
    def changed(path: str, node: Any) -> Any:
      branch = map_nodes(_unbiased, node.branch) if form == "linear" else node.branch
      if composition != "gated":
        return node.replace(branch=branch)
      (down,) = (n.array("down") for n in every_node(branch) if isinstance(n, Bottleneck))
      gate = drawn_gate(
        key,
        path,
        down,
        down.shape[-2],
        start=-4.0,
        mask=None,
        pool="token",
        group=group,
        stacked=node.stacked,
      )
      return Mixed(
        gate,
        branch,
        node.tap,
        isinstance(node, Before),
        group=group,
        stacked=node.stacked,
      )

    return rewrapped(params, method.init(key, params, sites), changed)

  return Transform(initialize)


def _unbiased(node: Any) -> Any:
  return node.replace(down_bias=None, up_bias=None) if isinstance(node, Bottleneck) else node


def _check_member(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _check_attention(insertion: str, names: tuple[str, ...], composition: str) -> None:
  have = {"insertion": insertion, "representation": names, "composition": composition}
  need = {"insertion": "parallel", "representation": ("attention_heads",), "composition": "gated"}
  if odd := {name: value for name, value in have.items() if value != need[name]}:
    raise ValueError(
      f"form='attention' cannot have {odd}: a prefix shares the softmax of the attention it stands "
      "in, so it is parallel, on 'attention_heads' and 'gated' by its share"
    )


def _check_options(method: str, form: str, options: dict) -> None:
  if odd := sorted(set(options) - set(OPTIONS[method])):
    raise ValueError(
      f"form={form!r} here rests on {method}, which has no option {odd} besides the dimensions; it "
      f"has {OPTIONS[method]}"
    )
