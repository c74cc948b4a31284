# Everything happens in .venv; `archive` is then .venv/bin/archive.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

PAGE := archive_pipeline/serving/page

.PHONY: setup demo viewer test test-slow test-soak lint clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,train,verify]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "compressai>=1.2.8"
	touch $@

# An invented flight over Galveston, Texas: archived, and a street corner of it restored.
demo: setup
	rm -rf $(DEMO)
	$(BIN)/python examples/make_flight.py $(DEMO)/flight
	$(BIN)/archive ingest $(DEMO)/flight --archive $(DEMO)/archive.zarr --ratio 48
	$(BIN)/archive info --archive $(DEMO)/archive.zarr
	$(BIN)/archive restore --archive $(DEMO)/archive.zarr -o $(DEMO)/restored \
		--bbox -94.7963 29.2842 -94.7958 29.2846
	$(BIN)/archive restore --archive $(DEMO)/archive.zarr -o $(DEMO)/restored --mosaic \
		--bbox -94.7963 29.2842 -94.7958 29.2846
	$(BIN)/python examples/side_by_side.py $(DEMO)/archive.zarr $(DEMO)/side_by_side.png
	@echo
	@echo "Restored windows (in a folder a flight) and mosaic.tif: $(DEMO)/restored"
	@echo "Original beside restored pixels: $(DEMO)/side_by_side.png"
	@echo "On a map: $(BIN)/archive serve --archive $(DEMO)/archive.zarr"

# What the page of `archive serve` ships of others, at the versions of its package-lock.json. Needs
# npm; nothing else does.
viewer:
	cd $(PAGE) && npm ci --ignore-scripts --no-audit --no-fund
	cp $(PAGE)/node_modules/ol/dist/ol.js $(PAGE)/node_modules/ol/ol.css $(PAGE)/vendor
	cp $(PAGE)/node_modules/ol/LICENSE.md $(PAGE)/vendor/ol.LICENSE.md
	cd $(PAGE)/node_modules && for file in `find * -maxdepth 2 -iname 'license*' -not -path 'ol/*' -not -path 'world-atlas/*' | sort`; do \
		echo "== $$file"; echo; cat $$file; echo; done > ../vendor/ol.dependencies.LICENSE
	cp $(PAGE)/node_modules/world-atlas/land-110m.json $(PAGE)/vendor
	cp $(PAGE)/node_modules/world-atlas/LICENSE $(PAGE)/vendor/world-atlas.LICENSE
	rm -r $(PAGE)/node_modules

# Each process takes up to 4 GB; a file's tests stay together, for what they share is made once.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" \
		--numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not soak"

# Two hours each on disk and on an S3 server; ARCHIVE_SOAK_MINUTES makes it shorter.
test-soak: setup
	$(BIN)/python -m pytest -m soak -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(DEMO) .venv
