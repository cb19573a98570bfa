import doctest
import subprocess
import sys

import pytest

import hybridopt


def test_public_names_are_the_promised_ones_and_resolve():
    assert sorted(hybridopt.__all__) == [
        "HybridConfig",
        "HybridError",
        "HybridPredictOptimizer",
        "Phase",
    ]
    for name in hybridopt.__all__:
        assert getattr(hybridopt, name).__name__ == name
    assert hybridopt.__version__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nonsense"):
        hybridopt.nonsense


def test_package_example_runs():
    results = doctest.testmod(hybridopt)
    assert results.attempted >= 5
    assert results.failed == 0


def test_help_does_not_import_torch():
    code = (
        "import sys; from hybridopt.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    ...\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
