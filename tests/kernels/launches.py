"""Print every launch that is not in the list of its operation's `aot_cases`: launches.py TARGET OPERATION...

The operations run on the CPU with the sizes and dtypes of DeepSeek-V3.2. Triton is told that `TARGET` is the device,
and is stopped before it compiles, so nothing is launched. Needs no GPU; leaves Triton unusable, so it is a process.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

import cases
from dsv32_plugin.kernels.runtime import aot, launch

BF16, FP8 = torch.bfloat16, torch.uint8


class Device:
    """As much of a Triton driver as is asked before a kernel is compiled."""

    def __init__(self, target: aot.Target) -> None:
        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def norm_rope_cache(run: Callable) -> None:
    for latent, index, interleaved in ((FP8, FP8, False), (BF16, BF16, False), (FP8, FP8, True)):
        for q_rank in (1536, 2048):
            inputs = cases.norm_rope_cache_inputs(
                3, dtype=BF16, latent_dtype=latent, index_dtype=index, rotate=index is FP8, interleaved=interleaved,
                q_rank=q_rank,
            )  # fmt: skip
            run(**inputs)
    none = cases.norm_rope_cache_inputs(3, dtype=BF16, latent_dtype=FP8, with_index=False)
    run(**none)


def index_query(run: Callable) -> None:
    for quantize in (False, True):
        for interleaved in (False, True):
            run(**cases.index_query_inputs(3, dtype=BF16, quantize=quantize, rotate=quantize, interleaved=interleaved))


def rope_query(run: Callable) -> None:
    run(**cases.rope_query_inputs(3, heads=16, dtype=BF16))


def gather_index_keys(run: Callable) -> None:
    for cache_dtype in (FP8, BF16):
        run(**cases.gather_inputs([70, 3], which="index", cache_dtype=cache_dtype))


def gather_latents(run: Callable) -> None:
    for cache_dtype in (FP8, BF16):
        run(**cases.gather_inputs([70, 3], which="latent", cache_dtype=cache_dtype), dtype=BF16)


CALLS = {
    "norm_rope_cache": {"norm_rope_cache": norm_rope_cache},
    "index_query": {"index_query": index_query},
    "rope_query": {"rope_query": rope_query},
    "gather_cache": {"gather_index_keys": gather_index_keys, "gather_latents": gather_latents},
}
"""Folder -> operation -> the calls that a model makes."""


def main(target: aot.Target, folders: list[str]) -> None:
    driver.set_active(Device(target))
    launch.native_e4m3 = lambda device: launch.native_e4m3_on(target)
    launched = []

    def record(*, fn, compile, **_):
        # AMD's launches also mark tensors below 2 GiB; the compiled code differs only in its address arithmetic.
        attributes = {k: [a for a in v if a[0] != "tt.pointer_range"] for k, v in compile["configs"][0].items()}
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], attributes)
        launched.append((source, compile["num_warps"], compile["num_stages"]))
        return True

    knobs.runtime.jit_cache_hook = record
    for folder in folders:
        if folder not in CALLS or not find_spec(f"dsv32_plugin.kernels.ops.{folder}.triton"):
            continue
        module = import_module(f"dsv32_plugin.kernels.ops.{folder}.triton")
        default_stages = 3 if target.is_cuda else 2
        listed = {(c.source().hash(), c.num_warps, c.num_stages or default_stages) for c in module.aot_cases(target)}
        for operation, calls in CALLS[folder].items():
            launched.clear()
            calls(getattr(module, operation))
            assert launched, f"{operation} launched nothing"
            for source, warps, stages in launched:
                if (source.hash(), warps, stages) not in listed:
                    constants = {source.fn.arg_names[i]: value for (i,), value in source.constants.items()}
                    types = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
                    print(f"{operation}: {warps} warps, {stages} stages, {types}, {constants}, {source.attrs}")


if __name__ == "__main__":
    main(aot.TARGETS[sys.argv[1]], sys.argv[2:])
