"""Algorithms resolve to checked triples; nonsense is refused with the field and the reason."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dfpo_core import algorithms
from dfpo_core.config import TrainConfig
from dfpo_core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "triple"),
    [
        ("dfpo", ("flow", "gae", "ppo_clip")),
        ("ppo", ("scalar", "gae", "ppo_clip")),
        ("grpo", (None, "group", "ppo_clip")),
        ("reinforce_pp", (None, "reinforce_pp", "ppo_clip")),
        ("reinforce_pp_baseline", (None, "reinforce_pp", "ppo_clip")),
        ("dr_grpo", (None, "group", "ppo_clip")),
        ("flowrl", (None, "group", "flowrl")),
        ("dvpo", ("multi_quantile", "gae", "ppo_clip")),
        ("robust_ppo", ("ensemble", "gae", "ppo_clip")),
        ("sft_only", (None, "reinforce_pp", None)),
    ],
)
def test_an_algorithm_is_a_named_triple(name, triple):
    algorithm = algorithms.resolve(TrainConfig(algorithm=name, kl_in="loss"))
    assert (algorithm.critic_name, algorithm.advantage_name, algorithm.policy_loss_name) == triple
    assert "arXiv" in algorithm.citation


@pytest.mark.parametrize("name", sorted(algorithms.registry.names))
def test_every_default_of_a_recipe_reaches_the_configuration_of_its_part(name):
    recipe, algorithm = algorithms.registry.get(name), algorithms.resolve(TrainConfig(algorithm=name))
    for part in ("critic", "advantage", "policy_loss"):
        for key, value in getattr(recipe, f"{part}_options").items():
            assert getattr(getattr(algorithm, f"{part}_config"), key) == value


@pytest.mark.parametrize("critic", ["ensemble", "flow", "multi_quantile", "quantile", "scalar"])
def test_any_critic_can_drive_the_dfpo_policy_loss(critic):
    assert algorithms.resolve(TrainConfig(critic={"name": critic, "lam": 0.5})).critic_config.lam == 0.5


@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"algorithm": "dfop"}, "train.algorithm", "dvpo, flowrl, grpo, ppo"),
        ({"critic": {"foo": 1}}, "train.critic.foo", "unknown option of flow"),
        ({"critic": {"lam": 2}}, "train.critic.lam", "less than or equal to 1"),
        ({"critic": {"name": "flwo"}}, "train.critic.name", "flow, multi_quantile, q_function, quantile, scalar"),
        ({"critic": {"name": 3}}, "train.critic.name", "not a name"),
        ({"critic": {"anchor_weight": 0, "bellman_weight": 0}}, "train.critic", "cannot both be 0"),
        ({"critic": {"consistency_largest": 0.5, "jump_weight": 0}}, "train.critic", "leaves the jump to jump_weight, which cannot be 0"),
        ({"critic": {"return_range": [1, 0]}}, "train.critic", "increasing"),
        ({"policy_loss": {"kl_weight": 1}}, "train.policy_loss.kl_weight", "train.kl_coefficient"),
        ({"algorithm": "grpo", "critic": {"lam": 1}}, "train.critic", "no critic"),
        ({"algorithm": "grpo", "critic": {"name": "flow"}}, "train.critic.name", "does not read a critic"),
        ({"critic": {"name": "none"}}, "train.critic.name", "needs a critic"),
        ({"advantage": {"name": "none"}}, "train.advantage.name", "only the critic"),
        ({"algorithm": "grpo", "samples_per_prompt": 1}, "train.samples_per_prompt", "without others"),
        ({"algorithm": "grpo", "kl_coefficient": 0.1, "kl_in": "reward"}, "train.kl_in", "ignore the KL"),
        ({"algorithm": "ppo", "advantage": {"spectrum": "cvar"}}, "train.advantage.spectrum", "only a mean"),
        ({"critic": {"discount": 0.9}}, "train.advantage.discount", "differs"),
        ({"algorithm": "robust_ppo", "advantage": {"spectrum": "cvar"}}, "train.advantage.spectrum", "ensemble has only a mean"),
        ({"algorithm": "flowrl", "kl_coefficient": 0.1}, "train.kl_coefficient", "residual"),
        ({"algorithm": "flowrl", "advantage": {"name": "reinforce_pp"}}, "train.advantage.name", "group-normalised"),
        ({"policy_loss": {"name": "none"}}, "train.policy_loss.name", "sft_only"),
        ({"algorithm": "sft_only", "policy_loss": {"clip_low": 0.1}}, "train.policy_loss", "no policy loss"),
        ({"algorithm": "sft_only", "critic": {"name": "scalar"}}, "train.critic.name", "trains nothing"),
    ],
)
def test_nonsense_is_refused_with_its_field_and_reason(options, field, reason):
    with pytest.raises(UserError) as caught:
        algorithms.resolve(TrainConfig(**options))
    assert caught.value.field == field
    assert reason in str(caught.value)


def test_the_kl_weight_of_the_loss_comes_from_the_training_config():
    inside = algorithms.resolve(TrainConfig(kl_coefficient=0.2, kl_in="loss", kl_estimator="k2")).policy_loss_config
    assert (inside.kl_weight, inside.kl_estimator) == (0.2, "k2")
    assert algorithms.resolve(TrainConfig(kl_coefficient=0.2, kl_in="reward")).policy_loss_config.kl_weight == 0


def test_a_name_is_checked_without_torch():
    code = "import sys; from dfpo_core import algorithms; algorithms.check_name('dfpo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_of_algorithms_has_every_one_with_its_file_and_source():
    page = (ROOT / "dfpo_core" / "algorithms" / "README.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `") and "train.algorithm" not in row}
    assert set(rows) == set(algorithms.registry.names)
    for name, row in rows.items():
        assert f"[{name}.py]({name}.py)" in row
        assert re.search(r"arXiv [0-9.]+", row)[0] in registry_citation(name)
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "dfpo_core" / "algorithms" / link).exists(), link


def registry_citation(name: str) -> str:
    return algorithms.registry.get(name).citation


def test_the_example_of_a_new_algorithm_resolves():
    page = (ROOT / "dfpo_core" / "algorithms" / "README.md").read_text(encoding="utf-8")
    example = textwrap.dedent(re.search(r" *```python\n(.*?)```", page, re.DOTALL)[0]).strip("`").removeprefix("python")
    code = f"{example}\nfrom dfpo_core.critics import registry\nentry = registry.get(QuantilePPO.critic)\n"
    code += "print(entry.config_class(**QuantilePPO.critic_options).quantiles)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "64", done.stderr
