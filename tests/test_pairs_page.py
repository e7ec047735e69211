"""docs/pairs.md says what benchmarks/pairs.py finds; the cheap part of it is tried again here."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHEAP = ("retinanet", "faster_rcnn", "ssdlite")


def _load():
    spec = importlib.util.spec_from_file_location("drkd_benchmark_pairs", ROOT / "benchmarks" / "pairs.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _read(text):
    """By method and (student, teacher): the reason, empty where the pair works."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    found = {}
    for block in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, *lines = block.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        for student, *marks in rows[2:]:
            for teacher, mark in zip(rows[0][1:], marks, strict=True):
                number = re.fullmatch(r"no \[(\d+)\]", mark)
                for method in title.split(", "):
                    found[method, student, teacher] = reasons[number[1]] if number else ""
                assert number or mark == "works"
    return found


def test_the_page_is_up_to_date():
    pairs = _load()
    page = _read(pairs.PAGE.read_text(encoding="utf-8").split(pairs.MARK)[1])
    assert {method for method, _, _ in page} == set(pairs.methods())
    assert {student for _, student, _ in page} == {teacher for _, _, teacher in page} == set(pairs.BUILDERS)
    methods = ("DRKD", "FGD", "DeFeat", "LogitKD", "CrossKD", "LD")
    for method, cells in pairs.run(CHEAP, CHEAP, methods).items():
        for (student, teacher), reason in cells.items():
            assert page[method, student, teacher] == reason, (method, student, teacher)
    works = {key for key, reason in page.items() if not reason}
    assert all(("DRKD", student, teacher) in works for student in pairs.BUILDERS for teacher in pairs.BUILDERS)


def test_the_page_is_up_to_date_with_other_libraries():
    pytest.importorskip("transformers")
    pytest.importorskip("ultralytics")
    pairs = _load()
    page = _read(pairs.PAGE.read_text(encoding="utf-8").split(pairs.MARK)[1])
    names = ("rt_detr", "yolo")
    for method, cells in pairs.run(names, names, ("DRKD", "LogitKD", "CrossKD", "LD")).items():
        for (student, teacher), reason in cells.items():
            assert page[method, student, teacher] == reason, (method, student, teacher)


def test_a_step_leaves_the_teacher_alone():
    pairs = _load()
    for student, teacher in (("ssdlite", "mask_rcnn"), ("mask_rcnn", "ssdlite")):
        pairs.check_step(pairs.build(student, seed=0), pairs.build(teacher, seed=1), pairs.batch())
