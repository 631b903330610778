"""Reading, comparing, pricing, drawing and documenting records needs no GPU and no run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import synthetic

from dsv32_plugin import cli
from dsv32_plugin.benchmarks import compare, cost, plots, records, report, views
from dsv32_plugin.benchmarks.layer_record import crossovers, curves
from dsv32_plugin.console import CommandError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def layer_path(tmp_path: Path) -> Path:
    path = tmp_path / "layer.json"
    records.write(synthetic.layer(), path)
    return path


def test_a_record_survives_being_written(tmp_path: Path) -> None:
    for record in (synthetic.layer(), {**synthetic.kernels(), "rows": []}):
        records.write(record, tmp_path / "record.json")
        assert records.read(tmp_path / "record.json") == record


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "layer"}'], ids=["no JSON", "no kind", "another kind"])
def test_what_is_not_the_record_asked_for_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(CommandError, match="expected a record"):
        records.read(path, "kernels")


def test_a_record_of_an_older_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    path.write_text('{"kind": "layer", "rows": [{"mode": "decode", "total": {"median_us": 1.0}}]}')
    with pytest.raises(CommandError, match=r"expected rows with a case, .* got those of a version before 0\.2\.0"):
        records.read(path)


def test_the_crossover_is_interpolated_on_log_axes() -> None:
    # Dense takes as many microseconds as the context has tokens, ours 1000: they meet at 1000 tokens exactly.
    found = crossovers(curves(synthetic.layer()["rows"]))
    decode, prefill = found[("decode", 16, 128), "ours"], found[("prefill", 1, 128), "ours"]
    assert decode.context == prefill.context == 1000
    assert decode.gain_at_longest == 8.192
    assert not decode.from_start


@pytest.mark.parametrize(
    ("ours", "context", "from_start"),
    [((2.0, 2.0), None, False), ((0.5, 0.5), 1024.0, True), ((0.5, 2.0), None, False)],
    ids=["slower", "faster everywhere", "faster only while short"],
)
def test_sides_that_do_not_cross(ours: tuple[float, float], context: float | None, from_start: bool) -> None:
    rows = []
    for length, us in zip((1024, 4096), ours, strict=True):
        rows += [synthetic.layer_row("decode", 1, length, "dense", 1.0)]
        rows += [synthetic.layer_row("decode", 1, length, "ours", us)]
    (found,) = crossovers(curves(rows)).values()
    assert (found.context, found.from_start) == (context, from_start)


def test_compare_tells_a_change_from_the_spread() -> None:
    def verdict(us: float, spread: float) -> str:
        pairs = compare.compare(synthetic.kernels(10.0, spread), synthetic.kernels(us, spread))
        return next(pair.verdict for pair in pairs if pair.name == "select_topk B=1 L=8192 ours cold_us")

    assert verdict(10.5, 0.01) == "slower"
    assert verdict(9.5, 0.01) == "faster"
    assert verdict(10.5, 0.05) == "same"


def test_compare_refuses_records_of_different_kinds() -> None:
    with pytest.raises(CommandError, match="one kind"):
        compare.compare(synthetic.kernels(), synthetic.layer())


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, us in (("a", 10.0), ("b", 20.0)):
        records.write(synthetic.kernels(us), tmp_path / f"{name}.json")
    command = ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--only", "ours cold"]
    assert cli.main(command) == 0
    assert "0 faster, 0 same, 1 slower" in capsys.readouterr().out


def test_a_comparison_is_recorded_and_reported(tmp_path: Path) -> None:
    for name, us in (("a", 10.0), ("b", 10.6)):
        records.write(synthetic.kernels(us), tmp_path / f"{name}.json")
    output = tmp_path / "h100" / "compare.json"
    assert (
        cli.main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--output", str(output)]) == 0
    )
    record = records.read(output, "compare")
    assert [row["verdict"] for row in record["rows"]] == ["slower", "slower", "same", "same"]
    text = report.blocks(tmp_path, tmp_path)["repeat"]()
    assert (
        "`dsv32 bench kernels` twice on NVIDIA H100 made up, commit abc1234, 2026-01-01: 4 times: 0 faster, 2 same, 2"
        in text
    )
    # 10.1 is the highest before, 10.494 the lowest after.
    assert "at most 3.9% apart" in text


def test_cost_is_time_times_price(layer_path: Path) -> None:
    assert cli.main(["bench", "cost", str(layer_path), "--price", "3.6", "--rest-decode-us", "100"]) == 0
    record = records.read(layer_path.with_name("cost.json"), "cost")
    usd = {(*row["case"].values(), row["side"]): records.median(row, "usd_per_million") for row in record["rows"]}
    # 61 layers of 8192 us / 512 tokens, at a thousandth of a dollar a second and a millionth of it a microsecond.
    assert usd["prefill", 8192, "dense"] == pytest.approx(61 * 16 * 1e-3)
    assert usd["decode", 512, "ours"] == pytest.approx((61 * 1000 / 16 + 100) * 1e-3)
    assert "100 in decode" in record["method"]


def test_cost_without_the_rest_says_that_it_is_left_out() -> None:
    assert "experts, head, communication and idle time are not in it" in cost.compute(synthetic.layer())["method"]


def test_cost_names_what_the_record_has() -> None:
    with pytest.raises(CommandError, match="lacks decode batch 3 heads 128; it has prefill batch 1 heads 128, decode"):
        cost.compute(synthetic.layer(), batch=3)


def test_every_kind_of_record_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    given = []
    for gpu, us in (("h100", 1000.0), ("h200", 500.0)):
        layer = synthetic.layer(us, f"NVIDIA {gpu}")
        for record in (layer, cost.compute(layer), synthetic.kernels(us / 100), synthetic.serve()):
            given.append(tmp_path / gpu / f"{record['kind']}.json")
            records.write(record, given[-1])
    assert cli.main(["bench", "plot", *map(str, given)]) == 0
    alone = [f"{gpu}/{name}.png" for gpu in ("h100", "h200") for name in ("layer-operations", "serve")]
    together = [f"h100/{name}.png" for name in ("kernels", "layer", "cost")]
    pictures = [tmp_path / name for name in alone + together]
    assert capsys.readouterr().out.split() == [str(picture) for picture in pictures]
    assert all(picture.stat().st_size > 5000 for picture in pictures)
    # One GPU's picture is another than that of both.
    for path, picture in zip(given[:3], ("layer", "cost", "kernels"), strict=True):
        both = (tmp_path / "h100" / f"{picture}.png").read_bytes()
        assert cli.main(["bench", "plot", str(path)]) == 0
        assert (tmp_path / "h100" / f"{picture}.png").read_bytes() != both


def test_backends_stand_side_by_side_with_what_the_plugin_is_ahead() -> None:
    record = synthetic.serve()
    ours, theirs = record["rows"]
    figures = {**ours["figures"], "ttft_ms": {"median": 30.0}, "tokens_per_s": {"median": 75.0}}
    theirs |= {"figures": figures, "completed": 3}
    record["rows"].append({"case": ours["case"], "side": "dense", "error": "no memory"})
    record["rows"].append({**ours, "case": {**ours["case"], "engine": "sglang"}})
    *_, line, other = views.markdown(views.servers([record])).splitlines()
    assert other.startswith("| SGLang | chat | 2/s | 2 | 20 |")
    missing = "3 of 4 answered"
    cells = ["vLLM", "chat", "2/s", "2", "20", f"30, {missing}, 1.50 ×", "failed"]
    cells += ["20.00", f"20.00, {missing}, 1.00 ×", "failed", "150", f"75, {missing}, 2.00 ×", "failed"]
    assert line == "| " + " | ".join(cells) + " |"


def test_an_unanswered_request_fails_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    record = synthetic.serve()
    assert views.show(record) == 0
    record["rows"][0] |= {"completed": 3, "errors": ["status 503"]}
    assert views.show(record) == 1
    assert "status 503" in capsys.readouterr().out


def test_a_record_without_results_has_no_picture(tmp_path: Path) -> None:
    record = synthetic.kernels()
    record["rows"] = [{"case": {"operation": "x"}, "side": "ours", "error": "wrong"}]
    assert plots.draw_together([record], tmp_path / "kernels.png") == []


def test_plots_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CommandError, match=r"pip install 'dsv32-plugin\[bench\]'"):
        plots.draw(synthetic.layer(), tmp_path / "layer.json")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Documents and results of a project that has measured on two GPUs; pictures are empty files."""
    results = tmp_path / "benchmarks" / "results"
    for gpu, us in (("h100", 1000.0), ("h200", 500.0)):
        layer = synthetic.layer(us, f"NVIDIA {gpu.upper()} made up", commit=f"abc-{gpu}")
        repeated = compare.record(*2 * (synthetic.kernels(),), compare.compare(*2 * (synthetic.kernels(),)))
        made = (layer, cost.compute(layer), synthetic.kernels(), synthetic.serve(), synthetic.whole(), repeated)
        for record in made if gpu == "h100" else made[:2]:
            path = results / gpu / f"{record['kind']}.json"
            records.write(record, path)
            for picture in plots.paths(record, path):
                picture.touch()
    for kind in plots.TOGETHER:
        (results / f"{kind}.png").touch()
    for name in ("recall.json", "h100/engine.json"):  # nothing made up has their form
        shutil.copy(ROOT / "benchmarks" / "results" / name, results / name)
    (tmp_path / "docs" / "notes").mkdir(parents=True)
    for name in (name for name in report.DOCUMENTS if (ROOT / name).exists()):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def test_report_writes_every_block_from_the_records(checkout: Path) -> None:
    report.write(checkout, check=False)
    page = (checkout / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "![One attention layer: where the time goes](../benchmarks/results/h100/layer-operations.png)" in page
    assert "| vLLM | chat | 2/s | 2 | 20 | 20, 1.00 × | 20.00 | 20.00, 1.00 × | 150 | 150, 1.00 × |" in page
    assert (
        "| V3.2 | 61 | 16 | vLLM | TP1 | start | 200 | 200, 1.00 × | 58.0 | 58.0 | 57.4 | 57.4 | 125.0 | 125.0 |"
        in page
    )
    assert "Extended to" not in page
    assert "Missing: torch (not here)." in page
    assert report.NOT_MEASURED not in page
    notes = (checkout / "docs" / "notes" / "kernels.md").read_text(encoding="utf-8")
    assert "| select_topk | B=1 L=8192 | 10.0 |" in notes


def test_report_shows_gpus_side_by_side_each_with_its_commit(checkout: Path) -> None:
    report.write(checkout, check=False)
    page = (checkout / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "| decode | 16 | 8192 | 8192.0 |  | 1000.0 | 8.19 |  | 8192.0 |  | 500.0 | 16.38 |  |" in page
    assert "| decode | 16 | 128 | 1000 (8.19 ×) | always (16.38 ×) |" in page
    front = (checkout / "README.md").read_text(encoding="utf-8")
    assert "| decode, 128 heads, batch 16 | 8K | 1000 | 8.19 × (1.0K) |  | 500 | 16.38 × (0.5K) |  |" in front
    for gpu in ("h100", "h200"):
        assert f"NVIDIA {gpu.upper()} made up, commit abc-{gpu}, 2026-01-01, `dsv32 bench`, 7 s." in page
        assert f"commit abc-{gpu}" in front


def test_report_check_finds_a_document_that_is_out_of_date(checkout: Path) -> None:
    report.write(checkout, check=False)
    assert report.write(checkout, check=True) == []
    page = checkout / "docs" / "benchmarks.md"
    page.write_text(page.read_text(encoding="utf-8").replace("8.19", "9.19"), encoding="utf-8")
    assert report.write(checkout, check=True) == [page]


def test_report_misses_a_picture(checkout: Path) -> None:
    (checkout / "benchmarks" / "results" / "layer.png").unlink()
    with pytest.raises(CommandError, match=r"layer\.png is missing"):
        report.write(checkout, check=False)


def test_the_documentation_of_this_checkout_is_current() -> None:
    """Otherwise: dsv32 bench report."""
    assert report.write(ROOT, check=True) == []


RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=[f"{path.parent.name}/{path.stem}" for path in RECORDS])
def test_every_record_of_this_checkout_can_be_read(path: Path) -> None:
    record = records.read(path, *views.VIEWS)
    assert all(run["commit"] for run in record.get("runs", [record]))
    for row in record["rows"]:
        assert isinstance(row["case"], dict)
        assert row["side"]
        assert row.get("figures") or row.get("error") or row.get("missing"), "a row without figures has a reason"
        assert all("median" in figure for figure in row.get("figures", {}).values())
    assert views.markdown(views.VIEWS[record["kind"]]([record]))
