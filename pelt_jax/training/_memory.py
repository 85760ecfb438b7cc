"""Host memory of a run without an accelerator."""

import ctypes
import os

# glibc's mallopt: blocks of any size come from the heap; its end is not given back; one heap for
# all threads, since the others' are of 64 MB at most.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_KEEP = ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
  """Lets the C library keep what the process frees, for the next training step to use.

  On CPU, XLA asks for all of a step's temporary memory at its start and frees it at its end. glibc
  hands blocks of that size back to the kernel, and the next step faults every page in anew: a
  tenth to a fifth of the time of a small model's step. The process then stays as large as it was
  at its largest.

  Call it before JAX's first computation (importing is none): a thread keeps the heap it began with.
  `experiments/finetune.py` does.

  Returns:
    Whether it is done. False without glibc, and where `GLIBC_TUNABLES` or a `MALLOC_` variable of
    the environment says what is wanted.

  >>> keep_freed_memory()  # doctest: +SKIP
  True
  """
  if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
    return False
  try:
    libc = ctypes.CDLL("libc.so.6")
    libc.gnu_get_libc_version  # noqa: B018  (an attribute that only glibc has)
  except (OSError, AttributeError):
    return False
  return all(libc.mallopt(option, value) for option, value in _KEEP)
