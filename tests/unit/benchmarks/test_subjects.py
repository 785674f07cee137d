"""Who may enter which case, and what a cached result depends on."""

import pytest

from benchmarks import subjects
from benchmarks.subjects import SUBJECTS, Case


def test_against_keeps_ours_and_the_named_rivals():
    assert all(s.ours for s in subjects.chosen(()).values())
    names = subjects.chosen(("hqq",))
    assert "hqq" in names
    assert "llm-compressor awq" not in names
    assert set(subjects.chosen(None)) == set(SUBJECTS)


def test_reasons_not_to_enter_a_case(monkeypatch, tmp_path):
    case, widths = Case("m", 4, 128), {576, 1536}
    monkeypatch.setenv("PLANISH_RIVALS", str(tmp_path / "absent"))
    assert "make rivals" in subjects.unable(SUBJECTS["hqq"], case, widths, encoder=False)
    python = tmp_path / "python"
    python.touch()
    monkeypatch.setenv("PLANISH_RIVALS", str(python))
    assert "groups of 128" in subjects.unable(SUBJECTS["hqq"], case, widths, encoder=False)
    assert subjects.unable(SUBJECTS["rtn"], case, widths, encoder=False) is None
    assert subjects.unable(SUBJECTS["hqq"], Case("m", 4, 64), widths, encoder=False) is None
    assert "post-norm" in subjects.unable(SUBJECTS["llm-compressor awq"], Case("m", 4, 64), widths, encoder=True)


def test_a_driver_that_fails_is_told_with_its_last_words(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="failed"):
        subjects.run(SUBJECTS["rtn"], Case("m", 4, 64), tmp_path, tmp_path / "none", None)
