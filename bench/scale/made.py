"""Made trees of the size of a real round's: 8 candidates x 16 rollouts, about 680 nodes.

The search and the texts are those of `bench.storage`. A problem takes 6 to 10 code steps, and every
child is tried before one is tried again, as a PPM that is unsure of its siblings does: each of the
16 rollouts ends in an answer, most of them behind steps of its own.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from bench.storage import MAX_DEPTH, Writer, grade, load_problems
from rollout.prompt import END_OF_CODE, END_OF_STEP
from rollout.search import SearchConfig, run_search
from rollout.tree import Tree

STEPS = (6, 10)


class LongWriter(Writer):
    """Writes as many code steps as the problem takes."""

    def _step(self, question: str, depth: int, rng: random.Random) -> str:
        text = super()._step(question, depth, rng)
        if text.endswith(END_OF_CODE):
            text = text[: text.rindex("print(")] + END_OF_STEP
        if depth + 1 < random.Random(question).randint(*STEPS) or not text.endswith(END_OF_STEP):
            return text
        return f"{text.removesuffix(END_OF_STEP)}print(total)\n{END_OF_CODE}"


def made_trees(count: int) -> list[Tree]:
    """Trees of different problems, the same for the same count."""
    problems = load_problems(None, count)[0][:count]
    writer = LongWriter(problems, related=True)
    config = SearchConfig(
        num_candidates=8, num_rollouts=16, max_depth=MAX_DEPTH, unvisited="infinite"
    )

    async def search() -> list[Tree]:
        return [
            await run_search(
                replace(problem, id=f"p{number}"),
                config=config,
                policy=writer,
                preference=writer,
                sandbox=writer,
                round=1,
                seed=number,
                grade=grade,
            )
            for number, problem in enumerate(problems)
        ]

    return asyncio.run(search())
