"""LoRA on meshes of eight virtual devices: same losses, right placement, no wasted traffic."""

import pytest

from tests.support import on_devices

WORKER = "from tests.test_sharding import worker as w\n"


@pytest.mark.parity
@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=8"])
def test_scanned_and_rematerialized(mesh):
  on_devices(f"{WORKER}w.check_trees(*w.check_training({mesh!r}, scan=True, remat=True))")


@pytest.mark.parity  # the same again, on the other form of the model
@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=8", "data=2,fsdp=2,model=2"])
def test_looped(mesh):
  on_devices(f"{WORKER}w.check_trees(*w.check_training({mesh!r}, scan=False, remat=False))")


@pytest.mark.parity
@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=8"])
def test_the_check_sees_the_gradients_of_kernels_that_train(mesh):
  on_devices(f"{WORKER}w.check_detector({mesh!r})")
