"""Parameter-efficient fine-tuning of Flax models: every method a pure transform of the params."""

from pelt_jax import nodes as nodes
from pelt_jax._linen import bypass as bypass
from pelt_jax._linen import sites as sites
from pelt_jax._node import unbox as unbox
from pelt_jax._rules import rule as rule
from pelt_jax._site import Role as Role
from pelt_jax._site import Site as Site
from pelt_jax._transform import PostStep as PostStep
from pelt_jax._transform import Transform as Transform
from pelt_jax._transform import chain as chain
from pelt_jax._tree import Count as Count
from pelt_jax._tree import combine as combine
from pelt_jax._tree import count as count
from pelt_jax._tree import delta as delta
from pelt_jax._tree import fold as fold
from pelt_jax._tree import labels as labels
from pelt_jax._tree import merge as merge
from pelt_jax._tree import partition as partition
from pelt_jax._tree import penalty as penalty
from pelt_jax._tree import shardings as shardings
from pelt_jax._tree import value_and_grad as value_and_grad
from pelt_jax.methods._bitfit import bitfit as bitfit
from pelt_jax.methods._lora import lora as lora
from pelt_jax.methods._train import full as full
from pelt_jax.methods._train import train as train
from pelt_jax.nodes._bank import bank as bank
