"""The scripts, run as a user runs them: small, on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, status: int = 0) -> str:
    """Standard output of a Python program that must end with ``status``."""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables, cwd=ROOT, timeout=300)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


SMALL_MODEL = [
    "--depth",
    1,
    "--dim",
    32,
    "--heads",
    2,
    "--head-dim",
    16,
    "--seq-len",
    32,
    "--batch",
    4,
    "--bytes",
    200_000,
]
SMALL_RUN = ["--steps", 12, "--validate-every", 6, "--validation-batches", 2, "--learning-rate", 1e-2, "--rise", 2]


def train(results: Path, *arguments: object) -> dict:
    run("scripts/train.py", *SMALL_MODEL, *SMALL_RUN, "--sample-bytes", 8, "--results", results, *arguments)
    return json.loads(results.read_text())


def test_training_is_the_same_with_every_attention(tmp_path: Path) -> None:
    runs = {name: train(tmp_path / f"{name}.json", "--attention", name) for name in ("cosattn", "sdpa", "plain")}
    for result in runs.values():
        losses = [point["validation_loss"] for point in result["curve"]]
        assert [point["step"] for point in result["curve"]] == [0, 6, 12]
        assert losses[-1] < losses[0] - 0.5
        assert result["outcome"] == "finished"
        assert result["tokens_per_second"] > 0
        assert losses == pytest.approx([p["validation_loss"] for p in runs["plain"]["curve"]], abs=1e-3)


def test_training_on_a_file(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"abcdefgh" * 5000)
    result = train(tmp_path / "r.json", "--data", text, "--steps", 40, "--attention", "sdpa")
    assert result["curve"][-1]["validation_loss"] < 2.0  # eight letters in a fixed order: far below ln 256
    assert "abc" in result["sample"]


def test_training_fails_when_the_loss_does_not_fall(tmp_path: Path) -> None:
    run("scripts/train.py", *SMALL_MODEL, *SMALL_RUN, "--learning-rate", 0, "--sample-bytes", 0, status=1)


def test_benchmark_prints_a_table_and_writes_json_and_a_plot(tmp_path: Path) -> None:
    output = tmp_path / "tables.json"
    shape = ["--batch", 1, "--heads", 2, "--head-dim", 16, "--seq-len", 32, 64, "--dtype", "float32", "--budget", 0.01]
    printed = run("scripts/benchmark.py", *shape, "--causal", "--only-forwards", "--output", output)
    result = json.loads(output.read_text())
    assert [row["case"]["seq_len"] for row in result["rows"]] == [32, 64]
    for row in result["rows"]:
        assert row["case"]["causal"]
        assert row["case"]["direction"] == "forward"
        times = {name: timing["milliseconds"] for name, timing in row["timings"].items()}
        assert set(times) == {"cosattn", "plain", "normalize + SDPA"}
        assert all(ms > 0 for ms in times.values())
        assert row["ratios"]["plain"] == pytest.approx(times["plain"] / times["cosattn"])
        assert f"{times['cosattn']:.3f}" in printed
    assert result["environment"]["torch"]
    drawing = ElementTree.parse(output.with_suffix(".svg"))
    assert len(drawing.findall(".//{*}path[@stroke-width]")) == 3


@pytest.mark.parametrize("extra", [["--mask-prob", "0.25"], ["--mask-prob", "0.25", "--causal"], ["--only-backwards"]])
def test_benchmark_variants_run(extra: list[str], tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    shape = ["--batch", 1, "--heads", 2, "--head-dim", 16, "--seq-len", 32, "--dtype", "float32", "--budget", 0.01]
    run("scripts/benchmark.py", *shape, *extra, "--output", output)
    (row,) = json.loads(output.read_text())["rows"]
    assert all(timing["milliseconds"] is not None for timing in row["timings"].values()), row["timings"]


def test_suites_that_need_a_gpu_say_so() -> None:
    run("scripts/benchmark.py", "--suite", "speed", status=2)
    assert "no GPU" in run("scripts/gpu_check", status=2)


def test_bench_module() -> None:
    shape = ["--batch", 1, "--heads", 1, "--head-dim", 16, "--seq-len", 32]
    rows = json.loads(run("-m", "cosattn.bench", *shape, "--json"))["rows"]
    assert rows[0]["timings"]["cosattn"]["milliseconds"] > 0
    assert "normalize + SDPA" in run("-m", "cosattn.bench", *shape)


def test_accuracy_table(tmp_path: Path) -> None:
    output = tmp_path / "accuracy.json"
    printed = run("scripts/accuracy.py", "--dtype", "float32", "--head-dim", 32, "--seq-len", 50, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2
    assert all(0 < row["cosattn"]["dq"] < 5e-6 and row["ratios"]["dq"] > 0 for row in rows)
    assert "0 cases break a limit" in printed


def test_sanitizer_targets_are_right_on_the_cpu() -> None:
    lines = run("scripts/sanitize_target.py", "--device", "cpu").splitlines()
    assert len(lines) >= 10
    assert all("error" in line for line in lines)


def test_every_part_of_gpu_check_is_a_command_that_exists() -> None:
    lines = run("scripts/gpu_check", "--list").splitlines()
    parts = {line.split()[0].split("/")[0] for line in lines}
    assert parts == {"tests", "sanitizer", "accuracy", "speed", "windows", "memory", "host", "tables", "train"}
    for line in lines:
        for word in line.split():
            assert not word.endswith(".py") or Path(word).exists()


def test_generated_parts_are_up_to_date() -> None:
    run("scripts/tables.py", "--check")


def test_tables_are_written_from_results(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- begin tables -->\nold\n<!-- end tables -->\nafter\n<!-- begin speed -->\n<!-- end speed -->\n"
    )
    shape = ["--batch", 1, "--heads", 1, "--head-dim", 16, "--seq-len", 32, "--dtype", "float32", "--budget", 0.01]
    run("scripts/benchmark.py", *shape, "--output", results / "tables.json")
    assert str(page) in run("scripts/tables.py", "--check", "--results", results, page, status=1)
    assert "old" in page.read_text()
    run("scripts/tables.py", "--results", results, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- begin tables -->\n|")
    assert "old" not in text
    assert re.search(r"\| float32, S 32 +\|", text)
    assert "Not measured yet" in text
    run("scripts/tables.py", "--check", "--results", results, page)


def test_an_unknown_marker_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin nonsense -->\n<!-- end nonsense -->\n")
    run("scripts/tables.py", "--check", page, status=1)
    assert "nonsense" in page.read_text()


def test_links_of_the_documents_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(example: str) -> None:
    assert run(f"examples/{example}")


def test_the_quick_start_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    program = tmp_path / "quick_start.py"
    program.write_text("import torch\n" + "\n".join(blocks))
    run(program)
