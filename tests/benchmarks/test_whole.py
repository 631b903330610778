"""`dsv32 bench whole` with servers that are none: what is measured, how it goes on, what is never a figure."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("httpx")

from dsv32_plugin.benchmarks import (
    dummy_weights,
    plots,
    records,
    report,
    serve,
    serve_client,
    views,
    whole,
    whole_needle,
)
from dsv32_plugin.benchmarks.serve_client import Answer
from dsv32_plugin.console import CommandError
from dsv32_plugin.tools import demo, serving, tiny

PLAN = whole.Plan(engine="vllm", sides=("plugin", "in-tree"))
LOADS = [(128, 1), (128, 2), (128, 4), (320, 1), (320, 2)]
"""Of a tiny model whose caches hold 800 tokens."""


class Server:
    """Starts at once, unless it is of a side that does not."""

    url = "http://nowhere"
    broken: ClassVar[set[str]] = set()
    started: ClassVar[list[str]] = []
    dies = False

    def __init__(self, model: Path, options: list[str], *, log_path: Path, env: dict[str, str]) -> None:
        self.command = ["python", "-m", "server", *options]
        self.side = "plugin" if env["DSV32_PLUGIN"] == "1" else "in-tree"

    def __enter__(self) -> Server:
        self.started.append(self.side)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_until_ready(self, timeout_s: float, on_wait: Any) -> float:
        if self.side in self.broken:
            raise serving.ServerError("the server ended with status 1")
        return 1.5

    def log(self) -> str:
        if self.side in self.broken:
            return "INFO all is well\n(Worker_TP1) ERROR torch.OutOfMemoryError: no memory\nRuntimeError: a rank ended"
        proof = "dsv32: serving with these kernels\n" if self.side == "plugin" else ""
        sizes = "Model loading took 57.5 GiB memory and 3 seconds\nGPU KV cache size: 800 tokens, Maximum"
        return f"{proof}{dummy_weights.SAID}\n{sizes}"

    def log_tail(self) -> str:
        return "the end of the log"

    def check_running(self) -> None:
        if self.dies:
            raise serving.ServerError("the server ended")


@dataclasses.dataclass
class Client:
    """What was sent; from some load on it fails."""

    sent: list[list[serve_client.Request]] = dataclasses.field(default_factory=list)
    cut_at: float = float("inf")
    answered: float = 1.0
    stagger_s: float = 0.0

    def drive(self, url: str, model: str, plan: Any, **options: Any) -> tuple[list[Answer], float]:
        if len(self.sent) >= self.cut_at:
            raise SystemExit(143)
        self.sent.append(list(plan))
        answers = [
            Answer(len(r.prompt), r.answer_tokens, 0.1 + i * self.stagger_s, 1.1 + i * self.stagger_s)
            for i, r in enumerate(plan)
        ]
        lost = len(answers) - round(self.answered * len(answers))
        return [*answers[lost:], *([Answer(error="status 500")] * lost)], 2.0


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    found = Client()
    monkeypatch.setattr(serve_client, "drive", found.drive)
    monkeypatch.setattr(tiny, "write_without_weights", lambda config, folder: None)
    monkeypatch.setattr(whole, "check", lambda plan: None)
    fresh = type("Fresh", (Server,), {"broken": set(), "started": []})
    monkeypatch.setitem(serving.SERVERS, "vllm", fresh)
    return found


def fresh() -> Any:
    return serving.SERVERS["vllm"]


def loads(record: records.Record, side: str) -> list[tuple[int, int]]:
    """Those with a figure."""
    rows = [row for row in record["rows"] if row["side"] == side and "figures" in row and "L" in row["case"]]
    return [(row["case"]["L"], row["case"]["B"]) for row in rows]


def errors(record: records.Record, side: str) -> list[str]:
    return [row["error"] for row in record["rows"] if row["side"] == side and "error" in row]


def test_each_side_is_started_and_asked_and_a_second_run_has_nothing_to_do(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    record = whole.run(PLAN, path)
    assert record == records.read(path, "whole")
    assert loads(record, "plugin") == loads(record, "in-tree") == LOADS, "no batch is larger than what the caches hold"
    start = record["rows"][0]
    assert {name: value["median"] for name, value in start["figures"].items()} == {
        "ready_s": 1.5, "pool_tokens": 800, "weights_gib": 57.5,
    }  # fmt: skip
    assert start["served_by"].startswith("dsv32: serving")
    assert not whole.unfinished(PLAN, record)
    assert fresh().started == ["plugin", "in-tree"]
    count = len(client.sent)
    assert whole.run(PLAN, path)["rows"] == record["rows"]
    assert (fresh().started, len(client.sent)) == (["plugin", "in-tree"], count)


def test_prompts_alone_are_new_and_those_of_a_batch_are_cached(client: Client, tmp_path: Path) -> None:
    whole.run(dataclasses.replace(PLAN, sides=("plugin",), only="L=128"), tmp_path / "whole.json")
    warm, alone, filled, two, *_ = client.sent
    assert {r.prompt for r in alone}.isdisjoint({r.prompt for r in warm})
    assert [r.prompt for r in filled] == [r.prompt for r in two]
    assert len({r.prompt for r in two}) == 2
    assert {r.prompt[:-1] for r in two} == {r.prompt for r in (*warm, *alone[:1])}


def test_a_run_that_is_cut_goes_on_where_it_was(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    client.cut_at = 5
    with pytest.raises(SystemExit):
        whole.run(PLAN, path)
    before = records.read(path, "whole")
    assert loads(before, "plugin") == LOADS[:2]
    assert whole.unfinished(PLAN, before)
    client.cut_at = float("inf")
    client.sent.clear()
    after = whole.run(PLAN, path)
    assert (loads(after, "plugin"), loads(after, "in-tree")) == (LOADS, LOADS)
    assert after["rows"][:3] == before["rows"], "what was measured is not measured again"
    assert fresh().started == ["plugin", "plugin", "in-tree"]
    assert len(client.sent[0]) == 4, "it began with the load that it was cut in"


def test_no_time_is_no_failure(client: Client, tmp_path: Path) -> None:
    record = whole.run(dataclasses.replace(PLAN, seconds=-1), tmp_path / "whole.json")
    assert record["rows"] == []
    assert fresh().started == []


@pytest.mark.parametrize("broken", ["plugin", "in-tree"])
def test_a_side_that_does_not_start_says_which_rank_and_is_no_figure(
    client: Client, tmp_path: Path, broken: str
) -> None:
    path = tmp_path / "whole.json"
    other = ({"plugin", "in-tree"} - {broken}).pop()
    fresh().broken.add(broken)
    record = whole.run(PLAN, path)
    (error,) = errors(record, broken)
    assert error.startswith("(Worker_TP1) ERROR torch.OutOfMemoryError: no memory\nthe server ended")
    assert not any("figures" in row for row in record["rows"] if row["side"] == broken)
    assert loads(record, other) == LOADS
    assert not whole.unfinished(PLAN, record)
    fresh().broken.clear()
    assert errors(whole.run(PLAN, path), broken) == [error], "a failure is tried again only when asked for"
    record = whole.run(dataclasses.replace(PLAN, retry=True), path)
    assert (loads(record, broken), errors(record, broken)) == (LOADS, [])


def test_a_server_that_ends_keeps_what_was_measured(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    plan = dataclasses.replace(PLAN, sides=("plugin",))
    whole.run(dataclasses.replace(plan, only="B=1"), path)
    fresh().dies = True
    record = whole.run(plan, path)
    assert loads(record, "plugin") == [(128, 1), (320, 1)]
    assert errors(record, "plugin")[0].endswith("the server ended")
    # One that starts no more: the start that there was stays.
    fresh().broken.add("plugin")
    record = whole.run(plan, path)
    assert "figures" in record["rows"][0]
    assert len(errors(record, "plugin")) == 2


def test_what_was_not_answered_or_not_together_is_no_figure(client: Client, tmp_path: Path) -> None:
    client.answered = 0.5
    record = whole.run(dataclasses.replace(PLAN, sides=("plugin",)), tmp_path / "lost.json")
    assert (128, 2) not in loads(record, "plugin")
    assert "1 of 2 answered: status 500" in errors(record, "plugin")
    client.answered, client.stagger_s = 1.0, 0.05
    record = whole.run(dataclasses.replace(PLAN, sides=("plugin",)), tmp_path / "apart.json")
    assert loads(record, "plugin") == [(128, 1), (128, 2), (320, 1), (320, 2)]
    assert "all 4 decoded together for 0.85 s of 1.00" in errors(record, "plugin")[0]


def test_a_record_of_another_commit_is_not_added_to(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole.run(PLAN, tmp_path / "whole.json")
    monkeypatch.setattr(records, "commit", lambda: "another")
    with pytest.raises(CommandError, match="expected a record with commit another"):
        whole.run(PLAN, tmp_path / "whole.json")


def test_ranks_answer_a_needle_before_they_are_measured(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(engine: str, side: str, options: list[str], ranks: int, start_s: float) -> int:
        asked.append((side, options[:2]))
        raise serving.ServerError("expected abcd=1, got 'zzz'")

    asked: list[Any] = []
    monkeypatch.setattr(whole_needle, "ask", ask)
    record = whole.run(dataclasses.replace(PLAN, gpus=2), tmp_path / "whole.json")
    assert asked == [(side, ["--tensor-parallel-size", "2"]) for side in ("plugin", "in-tree")]
    assert (fresh().started, loads(record, "plugin")) == (["in-tree"], [])
    assert [error.partition("expected")[0] for error in errors(record, "plugin")] == ["", "the needle: "]
    assert loads(record, "in-tree") == LOADS
    rates = [row["case"]["load"] for row in record["rows"] if row["case"].get("workload") == "chat"]
    assert rates == ["2/s", "4/s"]


REAL = dataclasses.replace(PLAN, chip="H200", experts=16)


def test_the_launch_is_the_one_that_plan_says() -> None:
    command = " ".join(REAL.launch("TP", "plugin", 135168))
    assert command.startswith("--tensor-parallel-size 1 --kv-cache-dtype fp8 --max-model-len 135168")
    dense = REAL.launch("TP", "dense", 135168)
    assert "--kv-cache-dtype" not in dense
    assert len(dense) == len(command.split()) - 2
    sglang = dataclasses.replace(REAL, engine="sglang", gpus=8, model="GLM-5").launch("DP", "in-tree", 135168)
    assert sglang[:5] == ["--tp-size", "8", "--dp-size", "8", "--enable-dp-attention"]
    with pytest.raises(serving.ServerError, match=r"does not fit.*give fewer --experts"):
        dataclasses.replace(REAL, experts=256).launch("TP", "plugin", 135168)


@pytest.mark.parametrize(("model", "layers"), [("V3.2", 61), ("GLM-5", 78)])
def test_the_real_sizes_are_whole(model: str, layers: int) -> None:
    plan = dataclasses.replace(REAL, model=model)
    sizes = plan.sizes("plugin")
    assert (sizes["num_hidden_layers"], sizes["n_routed_experts"]) == (layers, 16)
    assert sizes["quantization_config"]["quant_method"] == "fp8"
    assert not [key for key in plan.sizes("dense") if key.startswith("index")]
    way = plan.way("TP", 135168)
    assert way is not None
    cases = [(case["L"], case["B"]) for case in plan.cases(way.tokens)]
    most = [(32768, 32), (131072, 8)] if model == "V3.2" else [(131072, 4)]
    always = [(2048, 1), (2048, 16), (2048, 64), (32768, 1), (32768, 16), (131072, 1)]
    assert cases == sorted([*always, *most])


def test_heads_that_repeat_leave_the_model_as_it_was(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from dsv32_plugin.training import checkpoint

    whole_needle.widened(demo.TRAINED, tmp_path / "wide", 8)
    narrow, wide = checkpoint.load(demo.TRAINED), checkpoint.load(tmp_path / "wide")
    assert wide.config.num_heads == 8 == 2 * narrow.config.num_heads
    tokens = torch.randint(8, 264, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            wide.head(wide(tokens).hidden), narrow.head(narrow(tokens).hidden), atol=1e-3, rtol=1e-3
        )


def test_a_record_takes_the_place_of_what_was_extended(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results" / "h200"
    record = whole.run(PLAN, folder / "whole-vllm.json")
    text = views.markdown(views.VIEWS["whole"]([record]))
    assert "| tiny | 4 | 16 | vLLM | TP1 | start |" in text
    assert [path.name for path in plots.draw(record, folder / "whole-vllm.json")] == ["whole-vllm.png"]
    real = records.CHECKOUT / "benchmarks" / "results" / "h200" / "serve-vllm.json"
    (folder / real.name).write_bytes(real.read_bytes())
    blocks = report.blocks(tmp_path / "results", tmp_path)
    assert "Extended to" not in blocks["serve"]()
    assert "All layers" in blocks["whole"]()
    (folder / "whole-vllm.json").unlink()
    blocks = report.blocks(tmp_path / "results", tmp_path)
    assert "Extended to" in blocks["serve"]()
    assert blocks["whole"]() == ""


def test_the_command_says_that_it_is_not_complete(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv32_plugin import cli

    command = ["bench", "whole", "--engine", "vllm", "--backend", "plugin", "--output", str(tmp_path / "whole.json")]
    assert cli.main([*command, "--seconds", "0"]) == 1
    assert "is not complete: the same command goes on" in " ".join(capsys.readouterr().out.split())
    assert cli.main(command) == 0
    assert cli.main([*command, "--gpus", "0"]) == 2
    assert cli.main([*command, "--layout", "EP"]) == 2


def test_serve_leaves_the_whole_model_to_this() -> None:
    pytest.importorskip("vllm")
    with pytest.raises(CommandError, match="dsv32 bench whole"):
        serve.check(serve.Plan(layers=(61,)))


def test_dummy_weights_are_neither_zero_nor_equal() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.ParameterDict(
        {
            "norm": torch.empty(64), "norm_bias": torch.empty(64), "gate": torch.empty(16, 64),
            "experts": torch.empty(2, 128, 128).to(torch.float8_e4m3fn), "experts_scale_inv": torch.empty(2, 1, 1),
            "k_scale": torch.full((1,), 7.0),
        }
    )  # fmt: skip
    for weight in model.values():
        weight.requires_grad_(False)
    dummy_weights.fill(model, "an engine's own argument")
    assert torch.equal(model["norm"], torch.ones(64))
    assert torch.equal(model["norm_bias"], torch.zeros(64))
    assert model["k_scale"].item() == 7
    values = model["experts"].float() * model["experts_scale_inv"]
    for spread in (values.std().item(), model["gate"].std().item()):
        assert spread == pytest.approx(dummy_weights.SPREAD, rel=0.15)
    assert (model["experts"].float() != 0).float().mean() > 0.98
    assert not torch.equal(values[0], values[1])


def test_the_engines_draw_them(tmp_path: Path) -> None:
    import subprocess
    import sys

    name = dummy_weights.MODULES[0]
    module = tmp_path / f"{name.replace('.', '/')}.py"
    for folder in (*module.relative_to(tmp_path).parents,)[:-1]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    module.write_text("def initialize_dummy_weights(model): ...\n")
    path = dummy_weights.variables(tmp_path)["PYTHONPATH"]
    ask = f"from {name} import initialize_dummy_weights as f; print(f.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", ask], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == dummy_weights.__name__, done.stderr
    module.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert "expected one of initialize_dummy_weights" in done.stderr


def test_gpus_that_are_not_there_are_said_before_a_server_starts() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    count = torch.cuda.device_count()
    plan = dataclasses.replace(REAL, gpus=count + 8, sides=("in-tree",))
    with pytest.raises(CommandError, match=f"expected at most the {count} that torch sees here, got {count + 8}"):
        whole.check(plan)


@pytest.mark.parametrize("name", dummy_weights.MODULES)
def test_the_engine_has_what_is_replaced(name: str) -> None:
    from importlib.util import find_spec

    package, _, rest = name.partition(".")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    source = Path(spec.origin).parent / f"{rest.replace('.', '/')}.py"
    assert re.search(r"^def initialize_(dummy_weights|single_dummy_weight\((.|\n)*name: str)", source.read_text(), re.M)
