PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
COMPILERS := .venv-compilers
BIN := $(VENV)/bin
# Processes of the test suite: compiling, which takes most of its time, is done by one core each.
WORKERS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test parity plans lint docs dist clean

demo: $(VENV)/.installed
	$(BIN)/slt-jax demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The loader and from_torch against transformers on torch, in an environment of its own that also sees the first one: the
# suite stays without torch. Takes a torch wheel of 200 MB or more. Compiling is most of the time, so with less of it.
parity: $(PARITY)/.installed
	XLA_FLAGS=--xla_backend_optimization_level=0 $(PARITY)/bin/python -m pytest -q -n $(WORKERS) \
		tests/models/test_parity.py tests/models/test_torch.py tests/models/test_revisions.py \
		tests/scaling/test_accelerator_script.py

# Programs compiled for TPUs that are not there, in an environment of its own that also sees the first one: where the
# compiler is installed, JAX looks for TPUs at every start. Takes a wheel of 137 MB.
plans: $(COMPILERS)/.installed
	$(COMPILERS)/bin/python -m pytest -q tests/estimators/test_described_devices.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The pages in docs/, whose examples are run; what has not changed is taken from the last build. Open build/docs/index.html.
docs: $(VENV)/.installed-docs
	rm -rf build/docs  # outputs of the examples are kept in build/notebooks
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs
	$(BIN)/python docs/_ext/check_links.py build/docs

# The wheel and the sdist of a release, in dist/.
dist: $(VENV)/.installed
	$(PIP) build
	rm -rf build/lib dist
	$(BIN)/python -m build

# The install is editable: only a changed pyproject.toml asks for a new one.
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[docs]'
	@touch $@ $(VENV)/.installed

EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["torch"])
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
$(PARITY)/.installed $(COMPILERS)/.installed: $(VENV)/.installed-test
	@test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" \
		> "$$($(@D)/bin/python -c '$(SITE)')/first.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(MORE)
	@touch $@
$(PARITY)/.installed: MORE = $$($(BIN)/python -c '$(EXTRA)')
$(COMPILERS)/.installed: MORE = 'jax[tpu]'

clean:
	rm -rf $(VENV) $(PARITY) $(COMPILERS) .venv312 .pytest_cache .ruff_cache .hypothesis build dist *.egg-info demo-run
	find slt_jax kernels scaling tests -name __pycache__ -type d -prune -exec rm -rf {} +
