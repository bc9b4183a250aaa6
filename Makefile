# make demo   run the whole pipeline on real images, then test its selections and baselines
# make test   check style and types, build the documentation, run the tests
# make docs   build the documentation only, in site/
# make test-export  import exports with Label Studio, CVAT's SDK, FiftyOne, datasets and webdataset themselves
# make chaos  strike the pipeline with faults and compare its bytes with those of an undisturbed run
# make audit  list known vulnerabilities of the dependencies
# Each creates .venv first, and again when pyproject.toml or constraints.txt is newer.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := elfs_ray jobs benchmarks tests docs

.PHONY: demo test docs types fast-tests test-slow test-gpu test-export chaos audit format clean

demo: .venv/ready
	$(BIN)/python jobs/quickstart.py

test: .venv/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(MAKE) --no-print-directory --jobs docs types fast-tests

types: .venv/ready
	$(BIN)/mypy

fast-tests: .venv/ready
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Strict: an unlisted page or a broken link fails the build.
docs: .venv/ready
	$(BIN)/mkdocs build --quiet --strict

test-slow: .venv/ready
	$(BIN)/pytest -m "slow and not gpu" --timeout 3600

test-gpu: .venv/ready
	$(BIN)/pytest -m gpu

# --group is known to pip 25.1 and newer.
test-export: .venv/ready
	$(BIN)/python -m venv .venv/export
	.venv/export/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv/export/bin/pip install --quiet --group test-export
	$(BIN)/pytest -m exporters tests/handover

chaos: .venv/ready
	$(BIN)/python -m tests.faults.chaos

# Strict, because a package that the database does not know would otherwise count as one without vulnerabilities.
audit: .venv/ready
	$(BIN)/python -m venv .venv/audit
	.venv/audit/bin/pip install --quiet pip-audit
	.venv/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

format: .venv/ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# compat: pip's other way leaves elfs_ray unimportable in the folder above a clone, which then counts as a package itself.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
