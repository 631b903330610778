#!/bin/sh
# compute-sanitizer over every kernel: sh benchmarks/sanitize.sh [memcheck|racecheck|initcheck|synccheck]
# Exits with another status than 0 if a launch fails or the tool finds anything.
set -eu
tool=${1:-memcheck}
cd "$(dirname "$0")/.."
# Without the tool first: the kernels are then in Triton's cache, and the tool watches no compiler.
python3 -P benchmarks/sanitize.py > /dev/null
# Every tensor an allocation of its own, so that an access beside it is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
exec compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all python3 -P benchmarks/sanitize.py
