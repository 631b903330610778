"""The clock of a GPU: graphs come and go, launches may allocate, and a cold cache costs what it costs."""

from __future__ import annotations

import pytest
import torch

from dsv32_plugin.benchmarks.clock import GpuClock, ceilings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def clock() -> GpuClock:
    return GpuClock()


def test_one_clock_times_again_and_again(clock: GpuClock) -> None:
    x = torch.ones(1 << 20, device="cuda")
    for _ in range(3):
        times = clock.time({"one": lambda: x + 1, "four": lambda: x + 1 + 1 + 1 + 1})
        assert times["one"].low_us <= times["one"].median_us <= times["one"].high_us
        assert 2 < times["four"].median_us / times["one"].median_us < 8


def test_a_cold_cache_is_slower_than_a_warm_one(clock: GpuClock) -> None:
    x = torch.ones(1 << 22, device="cuda")  # 16 MiB, which fits the L2 cache of A100 and later ones of its kind
    out = torch.empty((), device="cuda")

    def read() -> None:
        torch.sum(x, dim=0, out=out)

    cold, warm = clock.time({"x": read})["x"], clock.time({"x": read}, cold=False)["x"]
    assert cold.low_us > warm.high_us


def test_a_cold_time_is_that_of_the_launch_alone(clock: GpuClock) -> None:
    x, y = (torch.ones(1 << 26, device="cuda") for _ in range(2))  # 256 MiB each, which no cache holds
    copy = {"copy": lambda: y.copy_(x)}
    cold, warm = clock.time(copy)["copy"], clock.time(copy, cold=False)["copy"]
    assert cold.median_us == pytest.approx(warm.median_us, rel=0.05)


def test_the_ceilings_are_those_of_a_gpu(clock: GpuClock) -> None:
    found = ceilings(clock)
    assert found["bytes_per_us"] > 2e5
    assert found["bf16_flops_per_us"] > 2e7
    if torch.cuda.get_device_capability() < (8, 9):
        assert "fp8_missing" in found
    else:
        assert found["fp8_flops_per_us"] >= 1.3 * found["bf16_flops_per_us"]
