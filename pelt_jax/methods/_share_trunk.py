"""Several tasks' adapters over one batch, the layers below them run once (arXiv:2010.11918)."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pelt_jax._node import Bypass, Weight
from pelt_jax._site import Site
from pelt_jax._transform import add_bypass
from pelt_jax._tree import fold
from pelt_jax._walk import get_at, update_at, walk
from pelt_jax.methods._adapter_drop import stack_of, without_adapters
from pelt_jax.methods._named import check_tasks
from pelt_jax.nodes import EachTask, Guard, Shared
from pelt_jax.nodes._bank import bank


def share_trunk(
  tasks: Mapping[str, dict], sites: tuple[Site, ...], *, drop: int | None = None
) -> dict:
  """One tree that answers a batch for several tasks, the layers without adapters run once.

  The tasks' adapters start at one layer n of one frozen model, as `adapter_drop(n)` trains them.
  Of a batch of B rows, layers below n see B, the others N B: each row once for each task, with that
  task's adapters and head. The answers are those of N separate runs. It is for whole forward
  passes, not for generation.

  Args:
    tasks: params by name, all over one frozen model, with nodes at the same sites. A head that
      trains (`pelt.train("head")`) is the task's own and may have its own number of labels.
    sites: what `pelt.sites` returned for the model.
    drop: n. By default the lowest layer in which a task has a node; given, adapters below n are
      taken out first, which makes robust adapters those of a fixed n.

  Returns:
    Params for `pelt.bypass(model.apply)`, which then returns `{name: (B, ...)}`. Arguments whose
    first axis is the batch are repeated.

  Raises:
    ValueError: if no task is given, layers are stacked by a scan, n is out of range or 0, the tasks
      have other sites or another base; when run, if something that differs by task runs before the
      layers, or `rows` is given.

  Example:
    >>> import jax, jax.numpy as jnp, pelt_jax as pelt
    >>> raw = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    >>> raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 4}
    >>> model, ids = pelt.models.from_config(raw, task="encoder"), jnp.array([[1, 2, 3]])
    >>> base, sites = model.init(jax.random.key(0), ids)["params"], pelt.sites(model, ids)
    >>> method = pelt.adapter_drop(1, bottleneck=2)
    >>> tasks = {n: method.init(jax.random.key(i), base, sites) for i, n in enumerate("ab")}
    >>> out = pelt.bypass(model.apply)({"params": pelt.share_trunk(tasks, sites)}, ids)
    >>> {name: hidden.shape for name, hidden in out.items()}
    {'a': (1, 3, 8), 'b': (1, 3, 8)}
  """
  check_tasks("tasks", tasks)
  layers = stack_of(sites, "share_trunk")
  if layers[0].stacked:
    raise ValueError(
      f"share_trunk runs some layers on fewer rows, but a scan stacks them at {layers[0].path!r}; "
      "unstack first: models.to_looped(params, model), model.clone(scan=False)"
    )
  members = [fold(params) for params in tasks.values()]
  if drop is not None:
    if isinstance(drop, bool) or not isinstance(drop, int) or not 0 < drop <= len(layers):
      raise ValueError(f"drop={drop!r}: expected 1 to {len(layers)}, the number of layers")
    members = [without_adapters(params, range(drop), robust=False) for params in members]
  held = [{path for path, value in walk(params) if _adds(value)} for params in members]
  below = lambda site: any(p.startswith(f"{site.path}/") for paths in held for p in paths)
  start = next((i for i, site in enumerate(layers) if below(site)), len(layers))
  if start == 0 or (drop is not None and start < drop):
    raise ValueError(
      f"the tasks have nodes in layer {start}, so layers from {start} on cannot be shared; train "
      "with adapter_drop(n), or take adapters out of robust ones by drop=n"
    )
  heads = _heads(tuple(tasks), members)
  widths = next(iter(heads.values()), None)
  params = bank(dict(zip(tasks, (_widened(m, heads) for m in members), strict=True)))
  upper = tuple(f"{site.path}/" for site in layers[start:])
  apart = {p.rpartition("/")[0] for p in set().union(*held) if not p.startswith(upper)}
  for number, site in enumerate(layers[:start]):
    node = Shared(len(members), tuple(sorted(apart)) if number == 0 else (), group=None)
    params = add_bypass(params, sites, site.path, node)
  return add_bypass(params, sites, "", EachTask(tuple(tasks), widths, group=None))


def _adds(value: object) -> bool:
  """Whether a method put something there, besides guards."""
  while isinstance(value, Guard):
    value = value.base
  return isinstance(value, Bypass | Weight)


def _heads(names: tuple[str, ...], members: list[dict]) -> dict[str, tuple[int, ...]]:
  """The leaves whose shapes differ by task, those of a head, and the lengths of their last axes."""
  tables = [{p: v.shape for p, v in walk(m) if isinstance(v, Weight)} for m in members]
  shapes = {path: [t.get(path) for t in tables] for path in tables[0]}
  found = {p: tuple(s[-1] for s in some if s) for p, some in shapes.items() if len(set(some)) > 1}
  if len(set(found.values())) > 1:
    raise ValueError(
      f"leaves of {names} differ in other ways than by a number of labels: {found}; only the last "
      "axis of a head may"
    )
  return found


def _widened(params: dict, heads: Mapping[str, tuple[int, ...]]) -> dict:
  """Params whose head has as many labels as the widest; those it lacks are zeros."""

  def wider(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])

  changes = {}
  for path, widths in heads.items():
    node = get_at(params, path)
    changes[path] = jax.tree.map(functools.partial(wider, width=max(widths)), node)
  return update_at(params, changes)
