# `make demo` shows the product at work, `make test` proves it; both do all their set-up.
PY := .venv/bin/python
.PHONY: setup demo test test-postgres nodes rolling crash mutations exit-drill faults soak serve lint bench bench-audit bench-freeze bench-growth bench-keys bench-openbao bench-overload bench-policy bench-propagation bench-prune bench-search bench-shares bench-verify restore-drill charter-edits policy-mutants policy-oracle policy-replay openapi go-verifier sbom wheel image-context image lock clean

setup:
	@sh deploy/setup.sh

demo: setup
	@$(PY) deploy/demo.py $(if $(FILE),--file "$(FILE)")

test: setup
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not alone"
	$(PY) -m pytest -q -m alone # what is timed, without the load of the others

crash: setup ## 1,000 kills under load, then one at each of 200 steps of a writer and of a notary
	CRASH_KILLS=1000 $(PY) -m pytest -q tests/end_to_end/test_crash.py
	KILL_STEPS=200 $(PY) -m pytest -q tests/audit/test_kills.py

nodes: setup ## eight workers on two nodes over one PostgreSQL at full load for SECONDS (600), then every fault
	NODES_SECONDS=$(or $(SECONDS),600) NODES_WORKERS=4 NODES_THREADS=8 $(PY) -m pytest -q -s tests/end_to_end/test_nodes.py

test-postgres: setup ## the whole suite over PostgreSQL, nodes under a role that owns nothing
	SKMS_TEST_DATABASE=postgresql $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not alone"
	SKMS_TEST_DATABASE=postgresql $(PY) -m pytest -q -m alone

rolling: setup ## two nodes behind the proxy restarted in turn at 200 requests/s until REQUESTS (20,000): none may fail
	ROLLING_REQUESTS=$(or $(REQUESTS),20000) ROLLING_RATE=200 $(PY) -m pytest -q -s tests/deploy/test_compose.py -k R9

mutations: setup ## 10,000 random changes of stored columns on SQLite and on PostgreSQL, each must be found
	MUTATIONS=10000 MUTATIONS_POSTGRESQL=10000 $(PY) -m pytest -q tests/audit/test_mutations.py

faults: setup ## 200,000 pairs under faults on each vendor, 64 threads for ten minutes
	FAULT_PAIRS=200000 CROWD_SECONDS=600 $(PY) -m pytest -q -s tests/keystore/faults

soak: setup ## memory, descriptors and sessions over SECONDS (default eight hours)
	SOAK_SECONDS=$(or $(SECONDS),28800) $(PY) -m pytest -q -s tests/end_to_end/test_long_life.py

exit-drill: setup ## from one HSM vendor to another and back under traffic, 10,000 keys
	EXIT_DRILL_KEYS=$(or $(KEYS),10000) EXIT_DRILL_REQUESTS=20000 $(PY) -m pytest -q -s tests/end_to_end/test_exit_drill.py

restore-drill: setup ## a backup restored into an empty installation with a fresh token, 10,000 keys, each used again
	RESTORE_DRILL_KEYS=$(or $(KEYS),10000) $(PY) -m pytest -q -s tests/service/test_backup.py -k empty_installation

serve: setup ## a development node in .dev, in the foreground
	$(PY) -m service.cli.main dev up --dir .dev

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: setup
	$(PY) -m bench.parts
	$(PY) -m bench.encrypt

bench-audit: setup ## durable records a second beside bare inserts, on SQLite and PostgreSQL
	PYTHONPATH=.:tests $(PY) -m bench.audit_writer

bench-growth: setup ## what an encryption costs as keys, tenants, records and connections grow; OPTIONS=--full: to the largest
	PYTHONPATH=.:tests $(PY) -m bench.growth $(OPTIONS)

bench-keys: setup ## what 100,000 keys cost
	PYTHONPATH=.:tests $(PY) -m bench.keys

bench-openbao: setup ## each operation beside OpenBao's Transit engine, in turn; OPTIONS="--rounds 5 --connections 64 --seconds 3"
	$(PY) -m bench.openbao $(OPTIONS)

bench-overload: setup ## five times what a worker can do for SECONDS (60), and a neighbour at ten times its share
	$(PY) -m bench.overload $(or $(SECONDS),60)

bench-policy: setup ## decisions at 10 to 10,000 policies beside cedarpy, and a reload
	$(PY) -m bench.policy

bench-freeze: setup ## a freeze under load until the last worker obeys, 100 times
	PYTHONPATH=.:tests $(PY) -m bench.freeze

bench-prune: setup ## archived records deleted beside a writer that goes on, PostgreSQL
	PYTHONPATH=.:tests $(PY) -m bench.prune $(ROWS)

bench-propagation: setup ## until the last of four workers obeys: disable, enable, revoke, reload; TRIALS each (100)
	TRIALS=$(or $(TRIALS),100) PYTHONPATH=.:tests $(PY) -m bench.propagation

bench-search: setup ## searches of a log of a million records
	$(PY) -m bench.search $(RECORDS)

bench-shares: setup ## where a worker's processor time goes, single requests and batches
	PYTHONPATH=.:tests $(PY) -m bench.shares encrypt
	PYTHONPATH=.:tests $(PY) -m bench.shares batch

charter-edits: setup ## every small edit of the shipped charter: a case or a proof must notice each wrong one
	CHARTER_EDITS_EVERY=1 $(PY) -m pytest -q -s tests/policy/test_charter_edits.py

bench-verify: setup ## skms-verify at each level, by one process and two, beside SHA-256 alone
	$(PY) -m bench.verify

policy-oracle: setup ## a million random requests by both policy engines
	POLICY_ORACLE_REQUESTS=1000000 $(PY) -m pytest -q -s tests/policy/test_differential.py

policy-mutants: setup ## small wrong edits of the policy code, each tried by its tests: 85 of 100 must be noticed
	$(PY) bench/policy_mutants.py --count $(or $(COUNT),200)

policy-replay: setup ## 100,000 decisions of a node, made again under their recorded bundles: none may differ
	POLICY_REPLAY=100000 $(PY) -m pytest -q -s tests/service/test_explain.py -k recorded_period

openapi: setup ## write the API document from the route table
	$(PY) -m service.protocols.openapi > openapi.yaml

go-verifier: setup ## build/skms-go-verify, over the Go toolchain's own transparency log packages; no network
	@mkdir -p build
	@sh audit/independent/go/build.sh build/skms-go-verify

sbom: setup ## build/image/sbom.cdx.json: what the image installs, with hashes (CycloneDX)
	@mkdir -p build/image
	.venv/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --mc-type application \
		--output-reproducible --output-format JSON --output-file build/image/sbom.cdx.json

# Zip files know no time before 1980; without git it is that.
EPOCH = $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null),315532800)

wheel: setup ## build/image/sovereign_kms-….whl: the same bytes from the same commit
	@rm -rf build/lib build/bdist.* build/image/*.whl
	SOURCE_DATE_EPOCH=$(EPOCH) $(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/image .

image-context: sbom wheel ## build/image: all that the image is built from
	cp requirements.lock build/image/

# No provenance beside it: that names when it was built, and two builds of one commit would differ.
image: image-context ## build/sovereign-kms.oci.tar (docker buildx); BASE=…@sha256:…: the Python image
	SOURCE_DATE_EPOCH=$(EPOCH) docker buildx build --file deploy/image/Dockerfile --target runtime $(if $(BASE),--build-arg BASE=$(BASE)) \
		--provenance=false --output type=oci,dest=build/sovereign-kms.oci.tar,rewrite-timestamp=true build/image

lock: setup ## resolve dependencies anew
	$(PY) -m pip install --quiet uv
	.venv/bin/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 pyproject.toml --extra postgres --extra tracing -o requirements.lock
	.venv/bin/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 pyproject.toml --extra postgres --extra tracing --extra dev -o requirements-dev.lock

clean:
	rm -rf .venv .dev build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
