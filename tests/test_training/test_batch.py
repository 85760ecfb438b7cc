"""Batches, the loader and its state."""

import numpy as np
import pytest

from pelt_jax import training


def dataset(lengths, task="classification"):
  rows = tuple(
    {"input_ids": np.full(n, i, np.int32), "labels": np.array(i % 3, np.int32)}
    for i, n in enumerate(lengths)
  )
  return training.Encoded(task, rows, ("a", "b", "c"), pad=99)


def rows_in(batch):
  return [int(i) for i in batch["input_ids"][batch["labels"] != -100, 0]]


def test_collate_pads_to_a_bucket_and_fills_with_empty_rows():
  batch = training.collate(dataset([2, 5, 3]), [2, 0], 3, (4, 8))
  assert batch["input_ids"].tolist() == [[2, 2, 2, 99], [0, 0, 99, 99], [99, 99, 99, 99]]
  assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
  assert batch["labels"].tolist() == [2, 0, -100]
  assert training.collate(dataset([2, 5, 3]), [1], 1, (4, 8))["input_ids"].shape == (1, 8)


def test_few_lengths():
  data = dataset([*range(1, 100), 300])
  assert training.buckets(data) == (56, 96, 304)
  shapes = {batch["input_ids"].shape for _, batch in training.batches(data, 8)}
  assert {shape[1] for shape in shapes} == {56, 96, 304}


def test_evaluation_sees_every_row_once():
  data = dataset([3, 1, 2, 9, 4])
  seen = [(indices.tolist(), rows_in(batch)) for indices, batch in training.batches(data, 2)]
  assert seen == [([1, 2], [1, 2]), ([0, 4], [0, 4]), ([3], [3])]


def take(loader, count):
  return [next(loader) for _ in range(count)]


def same(a, b):
  return all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x)


def test_epochs_visit_every_row_once_in_another_order():
  loader = training.Loader(dataset([4] * 10), 4, seed=1)
  assert loader.steps_per_epoch == 3
  epochs = [[rows_in(batch) for batch in take(loader, 3)] for _ in range(2)]
  orders = [[row for rows in epoch for row in rows] for epoch in epochs]
  assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
  assert orders[0] != orders[1] != list(range(10))


def test_the_seed_decides():
  data = dataset(range(1, 40))
  one, again, other = (take(training.Loader(data, 4, seed), 25) for seed in (0, 0, 1))
  assert same(one, again)
  assert [rows_in(b) for b in one] != [rows_in(b) for b in other]


@pytest.mark.parametrize("done", [0, 1, 9, 10, 23])
def test_a_resumed_loader_gives_the_same_stream(done):
  data = dataset(range(1, 40))
  loader = training.Loader(data, 4)
  take(loader, done)
  state = loader.get_state()
  expected = take(loader, 12)
  resumed = training.Loader(data, 4)
  take(resumed, 5)
  resumed.set_state(state)
  assert same(take(resumed, 12), expected)


def test_rows_of_similar_length_share_a_batch():
  lengths = np.random.default_rng(0).integers(1, 200, 640)
  loader = training.Loader(dataset(lengths), 8, lengths=tuple(range(8, 209, 8)))
  padded = sum(batch["input_ids"].size for batch in take(loader, 80))
  assert padded < 1.15 * lengths.sum()


def test_a_batch_has_rows():
  with pytest.raises(ValueError, match="size=0"):
    training.Loader(dataset([1]), 0)
