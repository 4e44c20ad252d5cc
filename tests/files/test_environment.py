"""What a record says of the packages that its figures depend on."""

from __future__ import annotations

from importlib.metadata import version

from specdec.files.environment import version_of, versions


def test_packages_that_change_a_peers_figures_are_named():
    assert version_of("torch") == version("torch") and version_of("no-such-package") == "not installed"
    assert versions()["scikit-learn"] == version_of("scikit-learn")
