"""What the flow head costs: its forward and backward over those of a Llama critic backbone of the same hidden size, in one process.

`python tests/benchmarks/critic_cost.py --hidden 576 --layers 30` prints the ratio (a median over repeats); the bar is 0.05 at K = 32.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaModel

from dfpo_core.critics.flow import FlowConfig, FlowCritic
from dfpo_core.types import CriticBatch


def seconds(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    h, shape = arguments.hidden, (arguments.rows, arguments.tokens)
    heads = {576: (9, 3, 1536), 1536: (12, 2, 8960)}.get(h, (h // 64, h // 64, 3 * h))
    model = LlamaModel(
        LlamaConfig(
            hidden_size=h, num_hidden_layers=arguments.layers, vocab_size=100, num_attention_heads=heads[0], num_key_value_heads=heads[1],
            intermediate_size=heads[2],
        )
    )  # fmt: skip
    critic = FlowCritic(h, FlowConfig())
    ids, hidden, mask = torch.randint(0, 100, shape), torch.randn(*shape, h, requires_grad=True), torch.ones(shape)
    batch = CriticBatch(hidden, hidden.detach(), torch.zeros(shape), mask, float(mask.sum()), torch.zeros(*shape, 32))

    def rollout_pass() -> None:
        critic.sample_returns(hidden), critic.value(hidden), critic.uncertainty(hidden)

    backbone = seconds(lambda: model(ids).last_hidden_state.square().mean().backward(), arguments.repeats)
    loss = seconds(lambda: critic.loss(batch).loss.backward(), arguments.repeats)
    reading = seconds(rollout_pass, arguments.repeats)
    ratios = f"loss / backbone {loss / backbone:.3f}, K = 32 samples, value and uncertainty / backbone {reading / backbone:.3f}"
    print(f"hidden {h}, {arguments.layers} layers, {shape[0]} x {shape[1]} tokens: backbone {backbone:.3f} s; {ratios}")


if __name__ == "__main__":
    main()
