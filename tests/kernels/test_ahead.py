"""What is compiled ahead is what a launch then finds. Triton is told that the CPU is an H100; nothing is launched."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from triton import knobs

from dsv32_plugin.kernels.runtime import ahead

PROBE = """
import os
from pathlib import Path
import torch
from triton.runtime import driver
import cases
from dsv32_plugin.kernels.runtime import aot
from dsv32_plugin.kernels.runtime.ahead import Launches
from dsv32_plugin.kernels.ops.index_query.triton import _index_query_kernel as kernel, index_query
from dsv32_plugin.kernels.ops.sparse_mla import hopper

class Hopper(aot.Driver):
    def launcher_cls(self, source, metadata):
        Path(os.environ["LAUNCHERS"], metadata.name).touch()

driver.set_active(Hopper(aot.TARGETS["sm90"]))
query = cases.index_query_inputs(3, dtype=torch.bfloat16, quantize=True, rotate=True)

launches = Launches()
with launches.record():
    index_query(**query)
    index_query(**query)
assert len(launches) == 1, len(launches)
launches.compile(jobs=2).wait()
loaded = len(os.listdir(os.environ["TRITON_CACHE_DIR"]))
assert loaded, "the other process has written to the disk"
assert os.listdir(os.environ["LAUNCHERS"]) == [kernel.__name__], "and has compiled what launches it"
launches.load()
assert len(os.listdir(os.environ["TRITON_CACHE_DIR"])) == loaded, "this one has found it there"
assert len(launches) == 0
compiled, *_ = kernel.device_caches["sm90"]
assert len(compiled) == 1, compiled
(key,) = compiled
with launches.record():
    index_query(**{**query, "interleaved": True})
assert len(launches) == 1, "another variant is wanted"
assert key not in {key for _, key in launches._wanted}

launches = Launches()
with launches.record():
    for heads in (16, 128):
        hopper.sparse_mla(
            torch.zeros(2, heads, 512, dtype=torch.bfloat16), torch.zeros(2, heads, 64, dtype=torch.bfloat16),
            torch.zeros(1, 64, 656, dtype=torch.uint8), torch.zeros(2, 2048, dtype=torch.int32), 1.0,
        )
wanted = list(launches._wanted)
assert len(wanted) == 2
launches.compile(jobs=2).wait()
launches.load()
for kernel, key in wanted:
    assert key in kernel.device_caches["sm90"][0], "Gluon's kernels, too"
"""


def test_what_a_run_wants_is_compiled(tmp_path):
    (tmp_path / "launchers").mkdir()
    env = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "LAUNCHERS": str(tmp_path / "launchers"),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_kernel_that_was_not_ready_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    ahead.report_late(logging.getLogger("server"))
    for module in (ahead.PACKAGE + ".ops.index_query.triton", "sglang.srt.layers.moe"):
        knobs.runtime.jit_post_compile_hook(fn=SimpleNamespace(module=module, name=f"{module}.kernel"), key="")
    assert caplog.messages == [f"dsv32: kernel {ahead.PACKAGE}.ops.index_query.triton.kernel was not ready"]
