#!/usr/bin/env bash
# Packs vLLM for a machine that has torch, transformers and a GPU but no internet, in parts of at most 44 MB:
#
#     benchmarks/vllm_bundle.sh OUT                  # here: downloads, needs some GB under $TMPDIR and some minutes
#     benchmarks/vllm_bundle.sh --unpack OUT DIR     # there
#     PYTHONPATH=. python benchmarks/peer_vllm.py run --folder MODELS --vllm-path DIR --out results.json
#
# vLLM's wheel wants the torch it was built for: 0.25.1 wants 2.11. Packed is what offline decoding of dense bfloat16
# models imports (kernels for experts, quantised weights and FlashAttention 2 are left out), for CPython 3.12 on x86_64.
# torch, transformers, numpy, triton and what they bring along are the other machine's own.
set -euo pipefail

VLLM=0.25.1
PYTHON=3.12
PART=44000000 # bytes

# What vLLM imports besides the above; where it states a version, that one.
PACKAGES="
  annotated-types anthropic apache-tvm-ffi==0.1.9 astor blake3 cachetools cbor2 cloudpickle compressed-tensors==0.17.0
  depyf==0.20.0 dill diskcache==5.6.3 distro docstring-parser fastapi==0.136.0 gguf httpcore2 httptools httpx-sse httpx2
  ijson importlib-metadata interegular jiter jsonschema jsonschema-specifications lark==1.2.2
  llguidance<1.8.0,>=1.7.0 lm-format-enforcer==0.11.3 loguru mcp mistral_common model-hosting-container-standards
  msgspec nvtx==0.2.15 openai openai-harmony opentelemetry-api outlines_core==0.2.14 partial-json-parser
  prometheus-fastapi-instrumentator py-cpuinfo pybase64 pycountry pydantic pydantic-core pydantic-extra-types
  pydantic-settings python-dotenv python-json-logger python-multipart pyzmq referencing rpds-py setproctitle sniffio
  sse-starlette starlette truststore typing_inspection uvicorn watchfiles websockets xgrammar==0.2.1 zipp
"

# Parts of vLLM's wheel that dense bfloat16 models do not reach.
LEFT_OUT="third_party/deep_gemm third_party/fmha third_party/cutlass third_party/flash_attn
  third_party/triton_kernels _flashmla _qutlass _vllm_fa2_C _moe_C_stable vllm-rs static/swagger"

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# download FOLDER REQUIREMENT: one wheel for the other machine, without what it depends on.
download() {
  local platforms=() minor
  for minor in 39 35 34 33 32 31 30 28 27 26 24 17 12 5; do
    platforms+=(--platform "manylinux_2_${minor}_x86_64")
  done
  platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
  python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$1" \
    --python-version "$PYTHON" --implementation cp --abi "cp${PYTHON/./}" --abi abi3 --abi none \
    "${platforms[@]}" --platform any "$2"
}

pack() {
  local out work package skip=()
  out=$(realpath -m "$1")
  work=$(mktemp -d)
  trap "rm -rf '$work'" EXIT # by its name: the variable is gone by then
  mkdir -p "$out" "$work/vllm" "$work/packages"

  download "$work/wheels" "vllm==$VLLM"
  for package in $LEFT_OUT; do skip+=("*$package*"); done
  unzip -q "$work"/wheels/vllm-*.whl -x "${skip[@]}" -d "$work/vllm"
  tar c -C "$work/vllm" . | xz -T0 -6 | split -b "$PART" - "$out/vllm.xz."

  for package in $PACKAGES; do
    download "$work/others" "$package" || { echo "cannot be downloaded: $package" >&2; exit 1; }
  done
  for package in "$work"/others/*.whl; do unzip -q -o "$package" -d "$work/packages"; done
  # Large, and of no use to a decoder of token ids.
  rm -rf "$work"/packages/xgrammar/lib "$work"/packages/mistral_common/data/*.json "$work"/packages/pycountry/locales
  tar c -C "$work/packages" . | xz -T0 -6 | split -b "$PART" - "$out/packages.xz."
  ls -l "$out"
}

unpack() {
  mkdir -p "$2"
  cat "$1"/packages.xz.* | tar xJ -C "$2"
  cat "$1"/vllm.xz.* | tar xJ -C "$2"
}

case "${1:-}" in
  "" | -h | --help) usage ;;
  --unpack) [ $# -eq 3 ] || usage; unpack "$2" "$3" ;;
  *) [ $# -eq 1 ] || usage; pack "$1" ;;
esac
