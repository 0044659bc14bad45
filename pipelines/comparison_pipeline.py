"""Algorithms x settings x seeds from one warm start: `python pipelines/comparison_pipeline.py compile|run STUDY`.

`compile` writes a KFP pipeline whose cells run side by side in a ParallelFor; `run` does the same on this machine in a pool of
processes, one thread each, and goes on where an earlier call with the same folder stopped. Both end in results.json, tables, figures
and an HTML report, and in one MLflow parent run with a child per cell.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # loaded as a file (python FILE, kfp dsl compile): the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kfp import dsl

from components.comparison_cell.component import comparison_cell
from components.comparison_report.component import comparison_report
from components.comparison_start.component import comparison_start
from dfpo_core import comparison
from dfpo_core.config import parse_config
from dfpo_core.errors import UserError
from pipelines.dfpo_pipeline import configure_pod, configure_training, place_on_gpu_node

DEFAULT_STUDY = Path(__file__).parent / "configs" / "robustness.yaml"


def make_pipeline(study: comparison.ComparisonConfig, parallelism: int = 0):
    """The pipeline function of one study; at most `parallelism` cells at once, 0 for no limit."""
    cluster = parse_config(study.base).cluster
    keys = [cell.key for cell in comparison.cells(study)]

    @dsl.pipeline(name=f"dfpo-{study.name}", description="Algorithms under noisy supervision, compared over seeds.")
    def comparison_pipeline(study: str = study.model_dump_json()):
        """Args:
        study: The whole study as JSON; its cells are compiled in.
        """
        started = comparison_start(study=study)
        with dsl.ParallelFor(items=keys, parallelism=parallelism, name="cells") as key:
            # A cell finds the parent by the study's hash: KFP's local runner (2.17) hands the item over for every output of a step.
            cell = comparison_cell(study=study, cell=key, warm_start=started.outputs["warm_start"])
        report = comparison_report(study=study, parent_run_id=started.outputs["parent_run_id"], cell_runs=dsl.Collected(cell.output))
        for task in (started, cell):
            task.set_container_image(cluster.gpu_image)
            if cluster.gpu_count:
                task.set_accelerator_type(cluster.gpu_type).set_accelerator_limit(str(cluster.gpu_count))
            place_on_gpu_node(task, cluster)
        report.set_container_image(cluster.image)
        for task in (started, cell, report):
            configure_pod(task, cluster)
        configure_training(cell, cluster)

    return comparison_pipeline


def compile_study(study: comparison.ComparisonConfig, path: str | Path, parallelism: int = 0) -> None:
    """Write the compiled pipeline and its platform spec, two YAML documents, to `path`."""
    from kfp import compiler

    compiler.Compiler().compile(make_pipeline(study, parallelism), str(path))


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(prog="comparison_pipeline.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, action, text in (("compile", _compile, "write the compiled pipeline"), ("run", _run, "run the cells on this machine")):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("study", metavar="STUDY", nargs="?", default=str(DEFAULT_STUDY), help="YAML file (robustness.yaml)")
        sub.add_argument("-o", "--output", required=True, help="file to write" if name == "compile" else "folder of the cells and results")
        sub.add_argument("--width", type=int, default=0 if name == "compile" else 1, help="cells at once (compile: 0 sets no limit)")
        sub.add_argument("--settings", metavar="NAME", nargs="+", default=[], help="only the cells of these settings (all)")
        sub.set_defaults(action=action)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit code 0; 2 with one line for a user's mistake; 130 after Ctrl-C."""
    parsed = make_parser().parse_args(arguments)
    try:
        if parsed.width < (1 if parsed.action is _run else 0):
            raise UserError("--width", f"{parsed.width} is too small", "give the number of cells at once")
        return parsed.action(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the cells that are left", file=sys.stderr)
        return 130


def _study(parsed: argparse.Namespace) -> comparison.ComparisonConfig:
    study = comparison.load(parsed.study)
    return comparison.limited(study, parsed.settings) if parsed.settings else study


def _compile(parsed: argparse.Namespace) -> int:
    compile_study(_study(parsed), parsed.output, parsed.width)
    print(f"wrote {parsed.output}")
    return 0


def _run(parsed: argparse.Namespace) -> int:
    from tqdm import tqdm

    study = _study(parsed)
    parent = comparison.open_parent(study)
    done = len(comparison.finished(study, parsed.output))
    with tqdm(total=len(comparison.cells(study)), initial=done, unit="cell", disable=None) as bar:

        def show(record: dict) -> None:
            end = record["curve"][-1]
            name = ".".join(filter(None, (record["setting"], record["algorithm"], record["point"], str(record["seed"]))))
            bar.write(f"{name}: {json.dumps({k: round(end[k], 4) for k in ('id_test', 'ood_test') if k in end})}", file=sys.stderr)
            bar.update()

        records = comparison.run(study, parsed.output, parsed.width, parent, show)
    comparison.write(study, records, parsed.output)
    comparison.close(study, parent, parsed.output)
    print((Path(parsed.output) / "summary.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
