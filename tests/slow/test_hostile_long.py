"""10^5 mutations of model files, guided by coverage; the files made by hand, whole, are lines S18 and S21."""

from pathlib import Path

import pytest

from scripts import fuzz_models


def test_mutations_of_model_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("atheris", reason="the fuzzer is in the extra `fuzz`, for Linux on x86-64")
    code = fuzz_models.main(["--runs", "100000", "--seed", "1", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    print(printed)
    assert code == 0, printed
    assert "by structure" not in printed
