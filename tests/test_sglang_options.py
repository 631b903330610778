"""Every start-up option of SGLang is one that somebody has judged: nothing is ignored in silence."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from dsv32_plugin.sglang_adapter import options


def unpacked(root: Path, own: str, fields: str | None = None) -> Path:
    """As much of a release as declares options."""
    (root / "srt" / "arg_groups" / "fields").mkdir(parents=True)
    (root / "srt" / "server_args.py").write_text(own)
    if fields is not None:
        (root / "srt" / "arg_groups" / "fields" / "exec_.py").write_text(fields)
    return root


def test_no_option_is_judged_twice() -> None:
    names = options.judged()
    assert len(names) == len(set(names))


def test_every_option_of_the_installed_release_is_judged() -> None:
    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("sglang is not installed here")
    found = options.declared(Path(next(iter(spec.submodule_search_locations))))
    assert len(found) > 400, "it is read where SGLang declares them"
    assert not found - set(options.judged()), "look at it, then say in options.py what becomes of it"


@pytest.mark.parametrize("apart", [False, True], ids=["in-one-class", "in-classes-of-their-own"])
def test_an_option_that_nobody_has_judged_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], apart: bool
) -> None:
    declared = "class {}:\n    page_size: int = 1\n    sparse_but_new: bool = False\n    LIMIT = 3\n"
    other = "class PortArgs:\n    nccl_port_of_another_class: int\n"
    if apart:
        root = unpacked(tmp_path, other + "class ServerArgs: ...\n", declared.format("ExecKernel"))
    else:
        root = unpacked(tmp_path, other + declared.format("ServerArgs"))
    assert options.declared(root) == {"page_size", "sparse_but_new"}
    assert options.main([str(root)]) == 1
    assert capsys.readouterr().out.splitlines() == ["2 options, 1 that nobody has judged", "sparse_but_new"]
