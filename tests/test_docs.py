"""What README.md and pipelines/CLUSTER.md say exists: commands that parse, keys of the configuration, files, the texts of our errors."""

from __future__ import annotations

import re
import shlex
import types
import typing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from pydantic import BaseModel

from dfpo_core.config import PipelineConfig, load_config, parse_config
from pipelines import cli, comparison_pipeline
from pipelines.submission import check_for_cluster, warnings_for_cluster

PAGES = [ROOT / "README.md", ROOT / "pipelines" / "CLUSTER.md"]
CLUSTER = PAGES[1].read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: Path) -> list[str]:
    """Every `dfpo …` of the code blocks, and of the running text where it has arguments."""
    text = page.read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if line.startswith("    "))).splitlines()
    in_blocks = [part.strip() for line in lines for part in line.split("  #")[0].split(" && ")]
    in_text = [code for code in re.findall(r"`(dfpo [^`]+)`", text) if " " in code[5:]]
    return [command for command in in_blocks + in_text if command.startswith("dfpo ")]


@each_page
def test_every_command_parses(page, capsys):
    found = commands(page)
    assert len(found) >= 5
    for command in found:
        try:
            parsed = cli._parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")
        config = getattr(parsed, "config", "")
        if config.startswith("pipelines/"):
            assert (ROOT / config).is_file(), command
        for setting in getattr(parsed, "set", []):
            assert is_key(setting.partition("=")[0]), command


@each_page
def test_every_command_and_option_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    parser = cli._parser()._subparsers._group_actions[0].choices
    assert set(re.findall(r"`dfpo ([a-z]+)", text)) <= set(parser)
    studies = comparison_pipeline.make_parser()._subparsers._group_actions[0].choices
    options = {option for sub in [*parser.values(), *studies.values()] for option in sub._option_string_actions}
    unknown = set(re.findall(r"`(--[a-z-]+)", text)) - options
    assert unknown <= {"--allowed-hosts"}  # MLflow's


def is_key(name: str) -> bool:
    """Whether `a.b.c` is a field of the configuration; what lies inside a free-form mapping or a list index counts."""
    section: typing.Any = PipelineConfig
    for part in name.split("."):
        if section is None or part.isdigit():
            continue
        if part not in section.model_fields:
            return False
        section = _model_in(section.model_fields[part].annotation)
    return True


def _model_in(annotation: typing.Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def test_a_key_is_known_by_its_path():
    assert is_key("train.steps") and is_key("data.train.0.size") and is_key("cluster.node_selector.pool")
    assert not is_key("train.step") and not is_key("steps")


@each_page
def test_every_key_that_is_named_exists(page):
    sections = "|".join(name for name, field in PipelineConfig.model_fields.items() if _model_in(field.annotation))
    named = set(re.findall(rf"`(?:[^`]* )?((?:{sections})\.[a-z_][a-z_.0-9]*)", page.read_text(encoding="utf-8")))
    named = {name.rstrip(".") for name in named if not name.endswith((".py", ".yaml", ".jsonl"))}
    assert len(named) >= 5
    assert {name for name in named if not is_key(name)} == set()


@each_page
def test_every_linked_file_exists(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def yaml_blocks(text: str) -> list[list[typing.Any]]:
    return [list(yaml.safe_load_all(block)) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def test_the_configuration_of_the_page_can_be_submitted(tmp_path):
    (values,) = [block[0] for block in yaml_blocks(CLUSTER) if "cluster" in block[0]]
    config = parse_config(values)
    assert check_for_cluster(config, recurring=True) == []
    assert warnings_for_cluster(config) == []
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "my.yaml") == config


def test_the_mlflow_server_of_the_page_knows_the_name_that_the_configuration_uses():
    blocks = yaml_blocks(CLUSTER)
    (config,) = [block[0] for block in blocks if "cluster" in block[0]]
    (manifests,) = [block for block in blocks if "Deployment" in {document.get("kind") for document in block}]
    deployment, service, claim = (next(m for m in manifests if m["kind"] == k) for k in ("Deployment", "Service", "PersistentVolumeClaim"))
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    name = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    assert config["tracking"]["uri"] == f"http://{name}"
    assert name in container["args"][container["args"].index("--allowed-hosts") + 1].split(",")
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_errors_of_the_troubleshooting_table_are_in_the_code():
    sources = "".join(path.read_text(encoding="utf-8") for folder in ("pipelines", "dfpo_core") for path in (ROOT / folder).rglob("*.py"))
    table = CLUSTER.partition("## Troubleshooting")[2].partition("What the cluster shows")[0]
    rows = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        assert re.search(".*".join(re.escape(piece.strip()) for piece in row.split("…")), sources), row
