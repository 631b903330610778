#!/bin/sh
# compute-sanitizer over a small set of the GPU tests:
#     sh benchmarks/sanitize.sh [memcheck|racecheck|initcheck|synccheck] [kernels|engine]
# Run the tests without it first: the kernels are then in Triton's cache. Exits with another status than 0 if a test fails or the tool finds anything.
set -eu
tool=${1:-memcheck}
case ${2:-kernels} in
kernels)
    tests=${SANITIZE_TESTS:-"(test_layer and 7-fp8) or (test_gather and mixed-fp8) or absent or not_selected or query_into"}
    folder=tests/kernels
    # Every tensor an allocation of its own, so that an access beside it is seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    ;;
engine)
    tests=test_short_run
    folder=tests/engine/gpu
    ;;
*)
    echo "expected kernels or engine, got $2" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
exec compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
    python3 -P -m pytest -q -p no:cacheprovider -m gpu -k "$tests" "$folder"
