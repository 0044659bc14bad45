"""The comparison pipeline: its compiled form, its command line, and the compiled YAML run locally to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_comparison import small

from pipelines import comparison_pipeline

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    values = small(
        folder / "home", seeds=[1, 2], settings={"wrong": {"noise": {"kind": "plausible", "rate": 0.5}}}, algorithms={"dfpo": {}}
    )
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return folder / "study.yaml"


def test_the_compiled_pipeline_runs_every_cell_in_a_parallel_loop_with_a_limit(study, tmp_path):
    assert comparison_pipeline.main(["compile", str(study), "-o", str(tmp_path / "p.yaml"), "--width", "3"]) == 0
    spec = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))
    loop = next(task for task in spec["root"]["dag"]["tasks"].values() if "parameterIterator" in task)
    assert json.loads(loop["parameterIterator"]["items"]["raw"]) == ["wrong.dfpo.1", "wrong.dfpo.2"]
    assert loop["iteratorPolicy"]["parallelismLimit"] == 3
    cell = next(e for name, e in spec["deploymentSpec"]["executors"].items() if "comparison-cell" in name)
    assert cell["container"]["image"] == "dfpo-gpu:0.1.0" and cell["container"]["resources"]["resourceMemoryRequest"] == "8Gi"


def test_the_compiled_pipeline_run_locally_ends_in_a_report_of_all_cells(study, tmp_path):
    comparison_pipeline.main(["compile", str(study), "-o", str(tmp_path / "p.yaml"), "--width", "1"])
    code = (
        "from kfp import components, local\n"
        f"local.init(local.SubprocessRunner(use_venv=False), pipeline_root={str(tmp_path / 'root')!r})\n"
        f"components.load_component_from_file({str(tmp_path / 'p.yaml')!r})()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads(next((tmp_path / "root").glob("*/comparison-report/results/results.json")).read_text())
    assert [(r["algorithm"], r["seed"]) for r in results["records"]] == [("dfpo", 1), ("dfpo", 2)]
    page = next((tmp_path / "root").glob("*/comparison-report/report")).read_text()
    assert "Where each algorithm ends" in page and "Learning curves" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml", "-o", "x"], "config: cannot read nowhere.yaml"),
        (["run", "{study}", "-o", "x", "--width", "0"], "--width: 0 is too small"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(study, capsys, arguments, words):
    assert comparison_pipeline.main([argument.format(study=study) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
