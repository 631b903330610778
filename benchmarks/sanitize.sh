#!/bin/sh
# compute-sanitizer over a small set of the GPU tests: sh benchmarks/sanitize.sh [memcheck|racecheck|initcheck|synccheck]
# Each test is one process, so that a report names its test. Exits with 1 if any of them is not clean.
set -u
tool=${1:-memcheck}
cd "$(dirname "$0")/.." || exit 2
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
exec timeout "${SANITIZE_SECONDS:-600}" compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    python3 -m pytest -q -p no:cacheprovider -m sanitize tests/kernels
