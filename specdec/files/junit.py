"""JUnit XML, which CI systems show as tests."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Case:
    """outcome: a "tie" is shown as skipped, with its message. seconds: None if it was not timed."""

    name: str
    outcome: Literal["passed", "tie", "failed"]
    message: str = ""
    details: str = ""
    seconds: float | None = None


def write_junit(path: Path, suite: str, cases: Sequence[Case]) -> None:
    count = {kind: str(sum(case.outcome == kind for case in cases)) for kind in ("failed", "tie")}
    numbers = {"tests": str(len(cases)), "failures": count["failed"], "errors": "0", "skipped": count["tie"]}
    root = ElementTree.Element("testsuites", numbers)
    suite_element = ElementTree.SubElement(root, "testsuite", {"name": suite, **numbers})
    for case in cases:
        attributes = {"classname": suite, "name": printable(case.name)}
        if case.seconds is not None:
            attributes["time"] = f"{case.seconds:.3f}"
        element = ElementTree.SubElement(suite_element, "testcase", attributes)
        if case.outcome != "passed":
            tag = "failure" if case.outcome == "failed" else "skipped"
            ElementTree.SubElement(element, tag, {"message": printable(case.message)}).text = printable(case.details)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def printable(text: str) -> str:
    """Remove control characters: tokens may decode to them, and XML cannot hold them."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
