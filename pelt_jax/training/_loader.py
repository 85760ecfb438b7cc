"""The stream of training batches: shuffled, endless, and resumable at any batch."""

from collections.abc import Iterator, Sequence

import numpy as np

from pelt_jax.training._batch import Batch, buckets, collate
from pelt_jax.training._encoded import Encoded
from pelt_jax.training._extras import need

_WINDOW = 32  # batches whose rows are sorted by length together
_MANY = 1 << 30  # epochs; more than anybody runs


class Loader:
  """Batches of training rows, one epoch after another, prepared ahead by `grain`.

  Each epoch visits every row once, in an order that depends on seed and epoch only. Within windows
  of the shuffled order, rows of similar length share a batch. The last batch of an epoch is filled
  with rows without targets, which weigh nothing.

  Args:
    data: The rows.
    size: Rows per batch.
    seed: Of the order.
    lengths: As for `collate`.

  Attributes:
    steps_per_epoch: Batches in one epoch.
  """

  def __init__(self, data: Encoded, size: int, seed: int = 0, lengths: Sequence[int] | None = None):
    if size < 1:
      raise ValueError(f"size={size}: expected at least one row per batch")
    grain = need("grain")
    self.steps_per_epoch = -(-len(data) // size)
    source = _Epochs(data, size, seed, buckets(data) if lengths is None else tuple(lengths))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict:
    """Where the stream is, as JSON."""
    return dict(self._iterator.get_state())

  def set_state(self, state: dict) -> None:
    """Goes on where `state` was taken."""
    self._iterator.set_state(dict(state))


class _Epochs:
  """Random access to all batches of all epochs: what `grain` calls a source."""

  def __init__(self, data: Encoded, size: int, seed: int, lengths: tuple[int, ...]):
    self._data, self._size, self._seed, self._bucket_lengths = data, size, seed, lengths
    self._lengths = data.lengths()
    self._current: tuple[int, list[np.ndarray]] = (-1, [])  # one attribute: threads swap it whole

  def __len__(self) -> int:
    return -(-len(self._data) // self._size) * _MANY

  def __getitem__(self, index: int) -> Batch:
    epoch, at = divmod(int(index), -(-len(self._data) // self._size))
    current, plan = self._current
    if current != epoch:
      plan = self._make(epoch)
      self._current = (epoch, plan)
    return collate(self._data, plan[at], self._size, self._bucket_lengths)

  def _make(self, epoch: int) -> list[np.ndarray]:
    rng = np.random.default_rng((self._seed, epoch))
    order = rng.permutation(len(self._data))
    plan = []
    for start in range(0, len(order), self._size * _WINDOW):
      window = order[start : start + self._size * _WINDOW]
      window = window[np.argsort(self._lengths[window], kind="stable")]
      chunks = [window[i : i + self._size] for i in range(0, len(window), self._size)]
      plan += [chunks[i] for i in rng.permutation(len(chunks))]
    return plan
