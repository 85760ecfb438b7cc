"""Sites: the places of a model where a method can act, and how targets name them.

A site is a module call (a *call* site) or an array leaf (a *leaf* site). Sites are plain, frozen,
hashable data, so a transform that receives them can be jitted with the sites static.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Targets = str | tuple[str, ...] | list[str]


class Role(NamedTuple):
  """Where a role lives in one model family, and which placement serves it there.

  Attributes:
    pattern: a glob on whole path components, matching the full path or any tail of it.
    placement: how a bypass sits there (`"after"`, `"before"`, `"prefix"`, ...), None for weights.
    tap: what the branch reads (see `Call.tap`), None for the placement's own input.
    residual: where the residual stream enters the sublayer, if that is another place.
  """

  pattern: str
  placement: str | None = None
  tap: str | None = None
  residual: str | None = None


class Served(NamedTuple):
  """One role that a site serves."""

  role: str
  placement: str | None
  tap: str | None
  residual: str | None = None


Roles = Mapping[str, Iterable[Role]]


@dataclasses.dataclass(frozen=True)
class Site:
  """A place where a method can act.

  Attributes:
    path: keys of the params tree joined by `/`: a module's path (`""` is the root) or a leaf's.
    kind: `"call"` or `"leaf"`.
    module: class name of the module, or of the module that owns the leaf.
    shape: leaf: its shape without stacked axes; call: the first array argument's shape.
    dtype: dtype name of the leaf or of that argument.
    inputs: call: the shapes of all positional array arguments; leaf: `()`.
    out: call: shape of the (first) output; leaf: `()`.
    equations: leaf: the products it took part in, e.g. `"...i,io->...o"`, or `"lookup"`.
    stacked: lengths of the leading axes that scan or vmap added.
    called: whether the traced arguments reached it.
    roles: the roles it serves.
  """

  path: str
  kind: str
  module: str
  shape: tuple[int, ...]
  dtype: str
  inputs: tuple[tuple[int, ...], ...] = ()
  out: tuple[int, ...] = ()
  equations: tuple[str, ...] = ()
  stacked: tuple[int, ...] = ()
  called: bool = True
  roles: tuple[Served, ...] = ()

  @property
  def parent(self) -> str:
    """Path of the enclosing module."""
    return self.path.rpartition("/")[0]

  @property
  def name(self) -> str:
    """Last component of the path."""
    return self.path.rpartition("/")[2]

  @property
  def layer(self) -> int | None:
    """The first whole number among the path's components (`layers/3/...`, `h_3/...`)."""
    return layer_of(self.path)


def layer_of(path: str) -> int | None:
  """The first whole number among a path's components (`layers/3/...`, `h_3/...`)."""
  found = (re.fullmatch(r"(?:.*_)?(\d+)", part) for part in path.split("/"))
  return next((int(f.group(1)) for f in found if f), None)


def matches(pattern: str, path: str) -> bool:
  """Whether a glob on whole components matches the full path or any tail of it."""
  want, have = pattern.strip("/").split("/"), path.split("/")
  if len(want) > len(have):
    return False
  return all(fnmatch.fnmatchcase(h, w) for h, w in zip(have[-len(want) :], want, strict=True))


def with_roles(sites: Iterable[Site], roles: Roles | None) -> tuple[Site, ...]:
  """Attaches to every call site the roles whose patterns match it, to every leaf its module's."""
  entries = [(role, Role(*entry)) for role, some in (roles or {}).items() for entry in some]

  def served(path: str) -> tuple[Served, ...]:
    return tuple(Served(r, *e[1:]) for r, e in entries if matches(e.pattern, path))

  return tuple(
    dataclasses.replace(s, roles=served(s.path) + (served(s.parent) if s.kind == "leaf" else ()))
    for s in sites
  )


class Target(NamedTuple):
  """A site that a target named, and the role entry that served it (None for a pattern)."""

  site: Site
  served: Served | None


def find(sites: tuple[Site, ...], targets: Targets, *, kind: str, layers=None) -> list[Target]:
  """Resolves roles and path patterns to sites of one kind, in the order of the sites.

  Args:
    sites: what `pelt.sites` returned.
    targets: a role (`"query"`, `"all-linear"`, ...) or a path pattern, or a tuple of them.
    kind: `"call"`: modules; `"leaf"`: the leaves matched, and those of the modules matched.
    layers: None for all layers, else the layer numbers to keep.

  Raises:
    ValueError: if a target matches nothing, naming the nearest paths; if `layers` is empty, or
      given for layers that are stacked by a scan, where one program serves them all.
  """
  targets = (targets,) if isinstance(targets, str) else tuple(targets)
  if not targets:
    raise ValueError("targets is empty; name at least one role or path pattern")
  if not isinstance(sites, tuple) or not all(isinstance(s, Site) for s in sites):
    raise TypeError(f"sites must be what pelt.sites(model, ...) returned, got {type(sites)}")
  found: dict[str, Target] = {}
  for target in targets:
    # A role's name may also be that of leaves ("embedding"): then it means the role.
    by_role = any(served.role == target for s in sites for served in s.roles)
    hits = [t for s in sites if s.kind == kind for t in [_hit(s, target, by_role)] if t]
    if not hits:
      raise ValueError(_nothing(sites, target, kind))
    for hit in hits:
      found.setdefault(hit.site.path, hit)
  picked = [found[s.path] for s in sites if s.kind == kind and s.path in found]
  if layers is None:
    return picked
  if isinstance(layers, int) or not (layers := tuple(layers)):
    raise ValueError(f"layers must be at least one layer number, such as [0, 1]; got {layers!r}")
  return _of_layers(picked, layers, targets)


def _hit(site: Site, target: str, by_role: bool) -> Target | None:
  if target == "all-linear":
    linear = site.kind == "leaf" and any(e != "lookup" for e in site.equations)
    apart = {"head", "embedding"} & {s.role for s in site.roles}
    return Target(site, None) if linear and not apart and "lookup" not in site.equations else None
  for served in site.roles:
    if served.role == target:
      return Target(site, served)
  if by_role:
    return None
  if matches(target, site.path) or (site.kind == "leaf" and matches(target, site.parent)):
    return Target(site, None)
  return None


def _of_layers(picked: list[Target], layers: tuple[int, ...], targets) -> list[Target]:
  scanned = [t.site.path for t in picked if t.site.stacked]
  if scanned:
    raise ValueError(
      f"layers={layers} cannot choose among layers stacked by a scan ({scanned[0]}, stacked "
      f"{picked[0].site.stacked}); load the model with scan=False, or use to_looped first"
    )
  kept = [t for t in picked if t.site.layer in layers]
  missing = sorted(set(layers) - {t.site.layer for t in picked})
  if missing:
    have = sorted({t.site.layer for t in picked if t.site.layer is not None})
    what = f"it has layers {have}" if have else "it is in no numbered layer: leave out layers"
    raise ValueError(f"layers={layers}: {targets} has no layer {missing}; {what}")
  return kept


def _nothing(sites: tuple[Site, ...], target: str, kind: str) -> str:
  known = sorted({s.role for site in sites for s in site.roles})
  paths = sorted({s.path for s in sites if s.kind == kind})
  tails = {"/".join(p.split("/")[-target.count("/") - 1 :]): p for p in paths}
  near = [tails[n] for n in difflib.get_close_matches(target, tails, n=3, cutoff=0.3)]
  near += difflib.get_close_matches(target, paths, n=2, cutoff=0.3)
  near = list(dict.fromkeys(near))
  meant = difflib.get_close_matches(target, [r for r in (*known, "all-linear") if r != target], n=2)
  return (
    f"target {target!r} matches no {kind} site. "
    f"{f'Nearest roles: {meant}. ' if meant else ''}Nearest paths: {near or paths[:5]}. "
    f"Roles of this model: {known or 'none stated (pass roles= to pelt.sites)'}"
  )
