"""Static properties of the core."""

import ast
import pathlib

import pytest

import pelt_jax
from pelt_jax._node import Node, own

PACKAGE = pathlib.Path(pelt_jax.__file__).parent
FREE = [
  *(
    PACKAGE / f"{n}.py"
    for n in (
      "_node",
      "_leaf",
      "_walk",
      "_call",
      "_site",
      "_tree",
      "_shardings",
      "_transform",
      "_save",
    )
  ),
  *sorted((PACKAGE / "nodes").glob("*.py")),
  *sorted((PACKAGE / "methods").glob("*.py")),
]


@pytest.mark.parametrize("path", FREE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_backend_imports_a_module_system(path):
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{a.name}" for a in node.names]
    for name in names:
      if name.split(".")[0] == "flax":
        assert name == "flax.core.meta", f"{path.name}:{node.lineno} imports {name}"
      assert not name.startswith(("pelt_jax._linen", "pelt_jax._rules")), name


def test_undeclared_fields_are_refused():
  with pytest.raises(TypeError, match="Wrong.a is undeclared"):

    class Wrong(Node):
      a: int = 3

  with pytest.raises(TypeError, match="LoraWeight exists"):
    type("LoraWeight", (Node,), {"__annotations__": {"a": int}, "a": own(), "__module__": "else"})
