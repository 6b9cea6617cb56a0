"""JSON from a denoiser: the structure of the answer is written, the model fills in the values (S³, arXiv 2507.04504).

    python examples/schema_decoding.py
    python examples/schema_decoding.py --model <checkpoint or hub id>

By default this asks the demo's small denoiser, which knows nothing but puzzles: what it writes makes no sense, yet it
is JSON of the schema, as it is from any model. With an instruction-tuned one the values come from the text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from rl4dlm import DecodingConfig, RolloutEngine, load_denoiser, load_tokenizer
from rl4dlm.rollout.constraints.schema import Scaffold, Scaffolder

TEXT = "Ada Lovelace, born in London in 1815, wrote the first program. She had three children and no house in Paris."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "integer"},
        "city": {"enum": ["London", "Paris", "Vienna"]},
        "programmer": {"type": "boolean"},
        "phone": {"type": ["string", "null"]},
    },
}
TEMPLATE = "{name} was born in {city:8} and had {children:6} children."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "demo_checkpoint"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args(argv)

    model, tokenizer = load_denoiser(arguments.model), load_tokenizer(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine, scaffolder = RolloutEngine(model), Scaffolder(tokenizer)

    def decode(scaffold: Scaffold, *, constrained: bool) -> str:
        question = f"{scaffold.instruction}\n\nText: {TEXT}"
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        config = DecodingConfig(
            canvas_length=scaffold.canvas_length,
            schedule="schema",
            steps=arguments.steps,
            temperature=arguments.temperature,
        )
        rollout = engine.generate(
            [prompt],
            config,
            hints=[scaffold.hints],
            choices=[scaffold.choices],
            constraint=scaffold.language if constrained else None,
        )
        canvas = rollout.canvas[0].tolist()
        print(f"  written, in {int(rollout.nfe)} forwards: {tokenizer.decode(canvas)}")
        return scaffold.read(canvas)

    scaffold = scaffolder.json(SCHEMA, budgets={"born": 4})
    print(f"{scaffold.canvas_length} tokens, of which {len(scaffold.choices)} are left to the model.")
    print("Each slot may hold what its type can hold; reading makes JSON of it, whatever was drawn:")
    print(f"  read: {json.loads(decode(scaffold, constrained=False))}")
    print("With the language of the schema as constraint, what is written is JSON, too:")
    print(f"  read: {json.loads(decode(scaffold, constrained=True))}")
    print("A template of text has places instead of values:")
    print(f"  read: {json.loads(decode(scaffolder.template(TEMPLATE), constrained=False))}")


if __name__ == "__main__":
    main()
