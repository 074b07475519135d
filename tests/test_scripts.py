"""The scripts, run as a user runs them: small, on the CPU."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.attention import SDPBackend

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))  # behind tests: both have an accuracy.py

import baselines
import benchmark
import counters
import hopper
import short_sequences
import tables
from baselines import Rival, load_rivals, sdpa_rival
from cases import Case, make_inputs

from cosattn.bench import SDPA_BACKENDS, Stopwatch, Timing

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


class SlowHost:
    """A GPU on which a sample is late as long as the host has had less than 300 us of a head start."""

    def __init__(self) -> None:
        self.head_starts: list[int] = []  # cycles

    def _sleep(self, cycles: int) -> None:
        self.head_starts.append(cycles)

    def Event(self, enable_timing: bool) -> SlowHost:
        return self

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return self.head_starts[-1] < 300e-6 * 2e9

    def elapsed_time(self, after: SlowHost) -> float:
        return 99.0 if self.query() else 1.0


def test_a_sample_does_not_count_when_the_gpu_was_there_before_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch, gpu = Stopwatch(torch.device("cpu"), least=3, most=3), SlowHost()
    stopwatch._flush = torch.empty(1)
    monkeypatch.setattr(torch, "cuda", gpu)
    times = stopwatch.compare({"one": lambda: None, "other": lambda: None})
    assert [timing.milliseconds for timing in times.values()] == [1.0, 1.0]
    assert sum(cycles >= 300e-6 * 2e9 for cycles in gpu.head_starts) == 6, "what was learned holds for all that follow"
    assert len(gpu.head_starts) < 10


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
    assert parts == {
        "extension",
        "tests",
        "sanitizer",
        "accuracy",
        "hopper",
        "today",
        "flat",
        "product",
        "speed",
        "windows",
        "short",
        "memory",
        "host",
        "tables",
        "train",
    }
    for line in lines:
        for word in line.split():
            assert not word.endswith(".py") or Path(word).exists()
    written = {Path(word).name for line in lines for word in line.split() if word.endswith(".json")}
    assert {path.name for path in (ROOT / "docs" / "results").glob("*.json")} <= written


def test_versions_are_compared_in_one_process(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in ("cosattn", "kernels_templates"):
        shutil.copytree(ROOT / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    wrong = other / "cosattn" / "cpu.py"
    doubled = """
right = forward


def forward(*tensors, **options):
    out, lse = right(*tensors, **options)
    return 2 * out, lse
"""
    wrong.write_text(wrong.read_text() + doubled)
    small = ["--device", "cpu", "--dtype", "float32", "--head-dim", 16, "--seq-len", 32, "--heads", 2, "--budget", 0.01]
    lines = run("scripts/compare.py", "--with", f"other={other}", f"same={ROOT}", "--full-only", *small).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[0] == "float32 b1 h2 d16 S32 forward"
    assert len(cells) == 7
    assert float(cells[4]) < 1e-5 < float(cells[5])
    assert cells[6] == cells[4]
    command = [sys.executable, "scripts/compare.py", "--with", "x=/nowhere"]
    assert "NAME=DIR" in subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stderr


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


CPU = torch.device("cpu")
SMALL_CASE = Case("float32", 1, 2, 16, 32, "forward")


def grid_row(head_dim: int, length: int, ours: float | None, causal: bool = False, **theirs: float | None) -> dict:
    """A row of the grid from TFLOP/s; None is a contender that failed."""
    rates = {"cosattn": ours} | theirs
    case = hopper.square_case(head_dim, length, causal, "forward")
    timings = {
        name: {"milliseconds": 1 / rate, "note": "", "sm_clock_mhz": 1600.0, "power_w": 690.4}
        if rate
        else {"milliseconds": None, "note": "JITError: shape"}
        for name, rate in rates.items()
    }
    return {
        "case": vars(case),
        "timings": timings,
        "tflops": {name: rate for name, rate in rates.items() if rate},
        "ratios": {name: ours / rate for name, rate in theirs.items() if ours and rate},
    }


GRID = [
    grid_row(64, 512, 400.0, FA3=200.0, FA4=320.0),
    grid_row(64, 512, 300.0, causal=True, FA3=375.0, FA4=None),
    grid_row(128, 4096, 700.0, FA3=700.0, FA4=560.0, **{hopper.NO_NORM: 770.0}),
    grid_row(128, 65536, None, FA3=650.0),
]


def arguments(*words: str) -> object:
    return benchmark.parser().parse_args(list(words))


def test_cases_of_the_hopper_grid() -> None:
    cases = hopper.hopper_cases(arguments())
    assert len(cases) == len(set(cases)) == 70
    assert {case.direction for case in cases} == {"forward"}
    assert {case.batch * case.seq_len for case in cases} == {16384, 65536}
    assert {case.head_dim: case.heads for case in cases} == {32: 64, 64: 32, 96: 21, 128: 16, 256: 8}
    few = arguments("--head-dim", "64", "96", "--seq-len", "1024", "--causal-only", "--direction", "backward", "both")
    assert [(c.head_dim, c.causal, c.direction) for c in hopper.hopper_cases(few)] == [
        (64, True, "backward"),
        (96, True, "backward"),
        (64, True, "both"),
        (96, True, "both"),
    ]
    today = hopper.today_cases(arguments("--full-only"))
    assert len(today) == 5 * 4 * 2
    assert max(case.seq_len for case in today) == 4096


def test_long_cases_are_bounded() -> None:
    cases = hopper.flat_cases(arguments())
    assert {case.seq_len for case in cases} == {1 << power for power in range(16, 21)}
    for case in cases:
        work = 4 * case.heads * case.seq_len**2 * case.head_dim
        assert work <= hopper.LONG_WORK or case.heads == 1
        assert case.heads * case.seq_len >= 1 << 20  # tiles enough for every multiprocessor


def test_a_matrix_product_has_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "PRODUCT_SIZE", 64)
    stopwatch = Stopwatch(torch.device("cpu"))
    monkeypatch.setattr(stopwatch, "compare", lambda contenders: {name: Timing(2.0, 1) for name in contenders})
    row = hopper.run_product(Case("bfloat16", 1, 2, 16, 32, "forward", causal=True), stopwatch)
    assert row["tflops"][hopper.PRODUCT] == pytest.approx(2 * 64**3 / 2e-3 / 1e12)
    assert row["tflops"][hopper.OURS] == pytest.approx(0.5 * 4 * 2 * 32 * 32 * 16 / 2e-3 / 1e12)
    assert {case.seq_len for case in hopper.product_cases(arguments("--full-only"))} == {4096, 8192, 16384}


def test_the_suites_refuse_what_makes_no_sense() -> None:
    run("scripts/benchmark.py", "--suite", "hopper", "--causal-only", "--full-only", status=2)
    run("scripts/benchmark.py", "--suite", "hopper", "--rivals", "fa5", status=2)


def test_summary_of_a_grid() -> None:
    found = {f"{standing.direction}, {standing.group}": standing for standing in hopper.standings(GRID)}
    assert list(found) == ["forward, d ≤ 64", "forward, d 128", "forward, all"]
    narrow, wide, every = found.values()
    assert narrow.mean == pytest.approx(1.0)  # of 1.25 and 0.8
    assert narrow.mean_without is every.mean_without is None  # one of three was timed without the norm
    assert wide.mean == pytest.approx(1.0)
    assert wide.mean_without == pytest.approx(1.1)
    header, _, first, second, _ = hopper.summary_table(GRID).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, first, second)]
    assert cells[0][-1] == "mean without its norm"
    assert cells[1] == ["forward, d ≤ 64", "2", "1.000×", "0.800×", "d 64 S 512 causal, FA3", "-"]
    assert cells[2] == ["forward, d 128", "1", "1.000×", "1.000×", "d 128 S 4096, FA3", "1.100×"]
    assert "norm" not in hopper.summary_table(GRID[:2])
    assert "failed in 1 of 4 cases: FA4: JITError: shape" in hopper.summary(GRID)
    assert hopper.best_rival(GRID[0]) == ("FA4", 1.25)
    assert hopper.best_rival(GRID[3]) is None
    line = hopper.rates_line(GRID[1])
    assert "FA4 failed (JITError: shape)" in line
    assert "0.80× FA3; 1600 MHz 690 W" in line
    assert "nothing" not in hopper.flat_summary(GRID)
    assert hopper.flat_summary([grid_row(64, 1 << 16, 600.0), grid_row(64, 1 << 20, 570.0)]).endswith("|   5.0% |")


def test_a_contender_that_fails_is_recorded_and_the_others_go_on() -> None:
    calls = []

    def late(*inputs: object) -> object:
        calls.append(inputs)
        if len(calls) > 5:
            raise RuntimeError("illegal shape\nmore")
        return torch.zeros(1)

    def never(*inputs: object) -> object:
        raise ValueError("no kernel")

    fakes = [Rival("late", late, "1"), Rival("never", never, "1"), Rival("one way", never, "1", backward=False)]
    stopwatch = Stopwatch(CPU, budget_s=0.01, least=4, heat_s=0.01, probe=lambda: (1.0, 2.0))
    row = hopper.run_hopper(SMALL_CASE, stopwatch, [sdpa_rival("fine", "math"), *fakes])
    notes = {name: timing["note"] for name, timing in row["timings"].items()}
    assert notes == {
        "cosattn": "",
        "cosattn, no norm": "",
        "fine": "",
        "late": "RuntimeError: illegal shape",
        "never": "ValueError: no kernel",
        "one way": "ValueError: no kernel",
    }
    assert set(row["ratios"]) == {"fine", "cosattn, no norm"}
    assert row["timings"]["fine"]["repeats"] >= 4
    backward = hopper.run_hopper(replace(SMALL_CASE, direction="backward"), stopwatch, fakes)
    assert set(backward["timings"]) == {"cosattn", "late", "never"}


def test_a_rival_that_can_not_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.RIVALS, "fa3", lambda: baselines.flash_rival("FA3", "no_such", "no-such", False))
    rivals, missing = load_rivals(["cudnn", "fa3"])
    assert [rival.name for rival in rivals] == ["cuDNN"]
    assert missing["fa3"].startswith("ModuleNotFoundError")


def test_a_rival_with_its_own_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_of_tests.py").write_text(
        "def flash_attn_func(q, k, v, softmax_scale, causal):\n    return v * softmax_scale, None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rival = baselines.flash_rival("F", "flash_of_tests", "no-such-package", True)
    v = torch.randn(1, 2, 3, 4)
    assert torch.equal(rival.attention(v, v, v, 2.0, False), 2 * v)


def test_the_compiled_rivals_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}

    def compare(case: Case, x: object, stopwatch: Stopwatch, theirs: dict) -> dict:
        results.update({name: work() for name, work in theirs.items()})
        return {}

    monkeypatch.setattr(hopper, "compare", compare)
    math = sdpa_rival("whole", "math")
    hopper.run_today(SMALL_CASE, Stopwatch(CPU), [math, replace(math, name="norm alone", compiles=False)])
    whole, norm = results.values()
    assert torch.allclose(whole, norm, atol=1e-5)


def test_what_is_compiled_ahead_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters as compiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rival = sdpa_rival("whole", "math")
    hopper.compile_today(SMALL_CASE, CPU, lambda: rival)
    compiler.clear()
    works = hopper.compiled_works(SMALL_CASE, make_inputs(SMALL_CASE, CPU, heads_last=True), [rival])
    works["whole, compiled"]()
    found = compiler["inductor"]
    assert (found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]) == (1, 0)


def test_work_in_processes_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.in_processes(math.sqrt, [4.0, -1.0], str) > 0
    assert capsys.readouterr().out == "-1.0 failed: math domain error\n"


def test_a_suite_stops_when_the_gpu_no_longer_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, stopwatch: Stopwatch) -> dict:
        if case.seq_len > 512:
            raise RuntimeError("an illegal memory access was encountered")
        return GRID[0]

    monkeypatch.setitem(benchmark.TIMED, "flat", benchmark.GRID(hopper.hopper_cases, broken))
    output = tmp_path / "r.json"
    words = ("--suite", "flat", "--head-dim", "64", "--full-only", "--output", str(output))
    result = benchmark.run_suite(arguments(*words), CPU)
    assert not result["complete"]
    saved = json.loads(output.read_text())
    assert saved["rows"] == [GRID[0]]
    assert not saved["complete"]
    assert "<svg" in benchmark.plot_of(GRID, rates=True)


def test_the_tables_of_a_grid(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- begin {name} -->\n\n<!-- end {name} -->\n" for name in ("hopper", "hopper-short")))
    run("scripts/tables.py", "--check", "--results", results, page)  # not measured: not there
    facts = {"date": "2026-01-01", "torch": "2", "cosattn": "0", "commit": "abc", "gpu": "NVIDIA H200"}
    result = {"environment": facts, "rivals": {"FA3": "fa3 1"}, "missing": {"fa4": "ImportError: no"}, "rows": GRID}
    (results / "hopper_forward.json").write_text(json.dumps(result))
    other = result | {"environment": facts | {"commit": "def"}, "rows": [grid_row(256, 512, 600.0)]}
    (results / "hopper_forward_wide.json").write_text(json.dumps(other))  # another run: its own table and note
    run("scripts/tables.py", "--results", results, page)
    text = re.sub(" +", " ", page.read_text())
    assert [re.findall(f"at `({commit})`", text) for commit in ("abc", "def")] == [["abc"] * 2, ["def"] * 2]
    assert "| d 256 | 600 |" in text
    first = "| d 64, S 512 | 400 | 320 FA4 | 1.25× | 1600 MHz 690 W | 300 | 375 FA3 | 0.80× | 1600 MHz 690 W |"
    assert first in text
    assert "| d 128, S 65536 | did not run | 650 FA3 | - | - | - | - | - | - |" in text
    assert "| d 64, causal | 300 (0.80×) | - | - |" in text
    assert "Not measured: fa4." in text
    assert "geometric means: d ≤ 64 1.000×, d 128 1.000×, all 1.000×" in text

    page.write_text("<!-- begin today -->\n\n<!-- end today -->\n")
    both = [{**row, "case": {**row["case"], "direction": "both"}} for row in GRID[:1]]
    (results / "today.json").write_text(json.dumps(result | {"rows": [*GRID, *both]}))
    run("scripts/tables.py", "--results", results, page)
    text = re.sub(" +", " ", page.read_text())
    for line in ("| forward, TFLOP/s | S 512 |", "| d 64, causal | 300 (0.80×) |"):
        assert line in text
    assert "| d 64 | 400 (1.25×) |" in text[text.index("| both, TFLOP/s | S 512 |") :]

    page.write_text("<!-- begin headline -->\n\n<!-- end headline -->\n")
    for name, speed in (("cosattn", 150.0), ("sdpa", 100.0), ("plain", None)):
        training = {"tokens_per_second": speed, "curve": [], "config": {"compile": True}}
        (results / f"train-{name}.json").write_text(json.dumps(training))
    run("scripts/tables.py", "--results", results, page)
    assert ": forward 1.00× at d ≤ 64, 1.00× at d 128.\n" in page.read_text()
    assert "trains 1.50× as fast as with normalise + SDPA, both compiled." in page.read_text()

    page.write_text("<!-- begin flat -->\n\n<!-- end flat -->\n")
    (results / "flat.json").write_text(json.dumps({"environment": facts, "rows": [grid_row(128, 1 << 20, 700.0)]}))
    run("scripts/tables.py", "--results", results, page)
    assert "| d 128 | 700 |" in re.sub(" +", " ", page.read_text())

    page.write_text("<!-- begin product -->\n\n<!-- end product -->\n")
    product = {"suite": "product", "environment": facts, "rows": [grid_row(128, 8192, 700.0, product=750.0)]}
    (results / "product.json").write_text(json.dumps(product))
    run("scripts/tables.py", "--results", results, page)
    assert "| d 128 | 700 (0.93×) |" in re.sub(" +", " ", page.read_text())


REPORT = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
"","","nsecond","%","inst","inst","inst"
"0","at::cuda::<unnamed>::spin_kernel(long)","1,500","n/a","9","9","9"
"1","normalize_k(Params)","20,500","0","1.5","1","0.25"
"2","void cosattn::forward<64>(Params)","1,234,500","77.7","0.5","1","2.25"
"3","at::cuda::<unnamed>::spin_kernel(long)","1,500","n/a","9","9","9"
""".replace("\\\n", "")


def test_counters_of_a_report() -> None:
    first, second = counters.calls_of(REPORT)
    assert second == []  # a contender that failed
    lines = [re.sub(" +", " ", line) for line in counters.table_of(first).splitlines()]
    assert lines[0] == "| | normalize_k | forward |"
    assert lines[2:] == [
        "| time, µs | 20.5 | 1234.5 |",
        "| tensor instructions, % | 0.0 | 77.7 |",
        "| stall 1 | wait 1.50 | barrier 2.25 |",
        "| stall 2 | barrier 0.25 | wait 0.50 |",
    ]
    assert counters.calls_of("==ERROR== no permission") == []


def test_metrics_that_are_not_known_are_not_asked_for() -> None:
    listing = "Device NVIDIA H200\nMetric Name   Type\nsm__cycles_active   Counter  cycle\n"
    asked = ["sm__cycles_active.avg", "sm__pipe_of_tomorrow.avg", "launch__grid_size"]
    assert counters.known(asked, listing) == ["sm__cycles_active.avg", "launch__grid_size"]
    assert counters.known(asked, "") == asked
    run("scripts/counters.py", "--head-dim", 64, status=2)


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


def test_short_sequences_are_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = short_sequences.short_cases(arguments("--suite", "short", "--head-dim", "32"))
    assert len(cases) == len(set(cases)) == 4 * 3 * 3
    assert {case.batch * case.heads for case in cases} == {64, 1024, 8192}
    assert short_sequences.floor_ms(replace(cases[0], batch=1, heads=1, seq_len=43, head_dim=1000)) == 43e3 * 8 / 4.3e9

    monkeypatch.setattr(short_sequences, "compiled_normalize", short_sequences.normalize)
    monkeypatch.setitem(SDPA_BACKENDS, "cudnn", SDPBackend.MATH)  # on a CPU
    monkeypatch.setitem(SDPA_BACKENDS, "flash", SDPBackend.MATH)
    rows = [
        short_sequences.run_short(replace(SMALL_CASE, direction=direction), Stopwatch(CPU, budget_s=0.01))
        for direction in ("forward", "backward")
    ]
    assert all(short_sequences.GRAPH in row["timings"] for row in rows)
    assert {*short_sequences.COMPILED.values(), *short_sequences.BARE.values()} <= set(rows[0]["ratios"])
    (tmp_path / "short.json").write_text(json.dumps({"environment": benchmark.environment(CPU), "rows": rows}))
    block = tables.short_sequences_block(tables.Results(tmp_path, tmp_path / "page.md"))
    (line,) = [line for line in block.splitlines() if line.startswith(f"| d {SMALL_CASE.head_dim}")]
    assert line.count("of the copy rate") == 2
    assert re.search(r"\d of 2 at 3× eager or more, \d of 2 at 1.5× compiled", block)
    assert line.rstrip(" |").endswith("-"), "forward and backward together were not measured"
    fewer = {**rows[0], "case": {**rows[0]["case"], "batch": 1, "heads": 1}}
    (tmp_path / "short.json").write_text(
        json.dumps({"environment": benchmark.environment(CPU), "rows": [*rows, fewer]})
    )
    whole, short = (
        [line for line in text.splitlines() if line.startswith("| d ")]
        for show in (tables.short_sequences_block, tables.few_short_sequences_block)
        for text in [show(tables.Results(tmp_path, tmp_path / "page.md"))]
    )
    assert (len(whole), len(short)) == (2, 1)
    assert set(short) < set(whole)
