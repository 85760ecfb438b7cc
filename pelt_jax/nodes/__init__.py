"""The vocabulary of nodes: weights, placements, branches, generators. Methods are made of these."""

from pelt_jax.nodes._bank import Bank as Bank
from pelt_jax.nodes._bank import BankWeight as BankWeight
from pelt_jax.nodes._branches import Bottleneck as Bottleneck
from pelt_jax.nodes._branches import Closable as Closable
from pelt_jax.nodes._branches import Gated as Gated
from pelt_jax.nodes._branches import MeanGate as MeanGate
from pelt_jax.nodes._branches import Normalized as Normalized
from pelt_jax.nodes._drop import DropBelow as DropBelow
from pelt_jax.nodes._fusion import Fusion as Fusion
from pelt_jax.nodes._generators import PrefixMLP as PrefixMLP
from pelt_jax.nodes._lora import Dropout as Dropout
from pelt_jax.nodes._lora import FusedLora as FusedLora
from pelt_jax.nodes._lora import LoraWeight as LoraWeight
from pelt_jax.nodes._placements import After as After
from pelt_jax.nodes._placements import AroundNorm as AroundNorm
from pelt_jax.nodes._placements import Before as Before
from pelt_jax.nodes._placements import Mixed as Mixed
from pelt_jax.nodes._placements import Prefix as Prefix
from pelt_jax.nodes._placements import Shift as Shift
from pelt_jax.nodes._prompt import ExtendedEmbedding as ExtendedEmbedding
from pelt_jax.nodes._prompt_encoder import Affine as Affine
from pelt_jax.nodes._prompt_encoder import LstmCell as LstmCell
from pelt_jax.nodes._prompt_encoder import PromptEncoder as PromptEncoder
from pelt_jax.nodes._tuned import Guard as Guard
from pelt_jax.nodes._tuned import Tuned as Tuned
