# `make demo` shows the product at work, `make test` proves it; both do all their set-up.
PY := .venv/bin/python
.PHONY: setup demo test crash serve lint bench openapi lock clean

setup:
	@sh deploy/setup.sh

demo: setup
	@$(PY) deploy/demo.py $(if $(FILE),--file "$(FILE)")

test: setup
	$(PY) -m pytest -n 2 --dist loadfile -q

crash: setup ## 1,000 kills under load
	CRASH_KILLS=1000 $(PY) -m pytest -q tests/end_to_end/test_crash.py

serve: setup ## a development node in .dev, in the foreground
	$(PY) -m service.cli.main dev up --dir .dev

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: setup
	$(PY) bench/parts.py
	$(PY) bench/encrypt.py

openapi: setup ## write the API document from the route table
	$(PY) -m service.protocols.openapi > openapi.yaml

lock: setup ## resolve dependencies anew
	$(PY) -m pip install --quiet uv
	.venv/bin/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 pyproject.toml --extra postgres -o requirements.lock
	.venv/bin/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 pyproject.toml --extra postgres --extra dev -o requirements-dev.lock

clean:
	rm -rf .venv .dev build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
