PYTHON ?= python3

.PHONY: demo test test-oldest lint clean

demo: .venv/installed
	.venv/bin/mediation demo

test: lint
	.venv/bin/python -m pytest --cov --numprocesses auto --dist worksteal

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest --numprocesses auto --dist worksteal

lint: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check

clean:
	rm -rf .venv .venv-oldest mediation-demo .coverage .hypothesis .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: constraints.txt
.venv-oldest/installed: constraints-oldest.txt

# torch comes first: on its own, a range in another package could pick a newer build with CUDA.
.venv/installed .venv-oldest/installed: setup.cfg setup.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -c $(filter constraints%,$^) torch setuptools
	$(@D)/bin/pip install -c $(filter constraints%,$^) --use-pep517 --no-build-isolation -e .[test]
	touch $@
