#!/bin/sh
# compute-sanitizer over every kernel, or over a short run of the engine:
#     sh tests/kernels/sanitize.sh [memcheck|racecheck|initcheck|synccheck] [kernels|engine]
# Exits with another status than 0 if a launch fails or the tool finds anything.
set -eu
tool=${1:-memcheck}
cd "$(dirname "$0")/../.."
case ${2:-kernels} in
kernels)
    # Every tensor an allocation of its own, so that an access beside it is seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    set -- tests/kernels/sanitize.py
    ;;
engine)
    set -- -P -m pytest -q -p no:cacheprovider -m gpu -k test_short_run tests/engine/gpu
    ;;
*)
    echo "expected kernels or engine, got $2" >&2
    exit 2
    ;;
esac
# Without the tool first: the kernels are then in Triton's cache, and the tool watches no compiler.
python3 "$@"
exec compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all python3 "$@"
