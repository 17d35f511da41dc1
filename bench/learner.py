"""What packing, shared prefixes and a second rank are worth to the learner.

    python -m bench.learner [--examples N] [--nodes N] [--json FILE]
    python -m bench.learner --memory [--trajectories N] [--json FILE]
    python -m bench.learner --tokenizer DIR [--examples N] [--json FILE]
    python -m bench.learner --shape DIR [--length N] [--json FILE]

A small Llama is trained from one start for one epoch on made-up solutions whose lengths are spread
as those of MATH are (100 to 2,000 tokens, most a few hundred), one CPU thread a process:

    padded     transformers' Trainer, batches padded to their longest text
    grouped    the same with batches of like lengths (train_sampling_strategy=group_by_length)
    packed     this learner: rows without padding
    two ranks  this learner in two processes over gloo
    separate   a PPM on 2 x 2 candidates a node, each pair as two padded sequences (Trainer)
    shared     this learner: every node one tree with its prefix computed once

All see the same examples, batch size, optimiser and schedule, so that the held-out losses of
padded, packed and two ranks are comparable. Rates are useful tokens (no padding) or pairs per
second of training, set-up excluded; ratios are of wall time, and of CPU time beside it (`_cpu`) for
a machine that is shared.

`--memory` measures something else: how much memory it takes to select a round's data and to prepare
a fit on it, at N/4 and at N trajectories, each in a process of its own: `streamed` is what runs do,
`held` the same with all token ids in memory.

`--tokenizer` measures how many such texts a second a fit reads, tokenises and keeps, by one rank
and by two on this machine, with the tokenizer of a checkpoint and one thread a rank
(`tokenised_texts_per_s`; the lengths are those in tokens of the bench's own small vocabulary).

`--shape` measures fine-tuning and the fit of a PPM at the shape of a checkpoint (layers, widths,
heads, vocabulary; the weights are random and the architecture is Qwen2's), one row of N tokens a
step, one thread: tokens per second, and which share of the machine's float32 products, measured on
the spot, that is (`mfu`).

With a GPU, MFU of fine-tuning at the shape of Qwen2.5-Math-1.5B, 4,096-token examples, is measured
too. Prints a table, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bench.answers import hardware
from learner.batch import (
    PairGroup,
    PolicyBatch,
    TokenisedText,
    pack_policy,
    pack_preference,
    tokenise_pairs,
    tokenise_segments,
)
from learner.checkpoint import Kind
from learner.dataset import SFTExample, read_pairs, read_sft, writing_dataset
from learner.fit import FitRequest, FitResult, PolicyTrainConfig, PreferenceTrainConfig
from learner.losses import pairwise_loss
from learner.miniature import write_base_model
from learner.objectives import PolicyObjective, PreferenceObjective
from learner.packing import PlannedStep, Share
from learner.pairs import PairKind, PreferencePair
from learner.preference_model import new_preference_model
from learner.select import DatasetConfig, select_dataset
from learner.task import plan_fit, policy_task, preference_task
from learner.trainer import run_fit
from rollout.problem import Level, Problem
from rollout.problems.miniature import generate
from rollout.prompt import MARKERS, SHORT_TEMPLATE, Segment, parse_response, render_question
from rollout.tree import Node, Terminal, Tree, backup, expand

BATCH_EXAMPLES = 8
DEVICE_EXAMPLES = 4
"""Of the Trainer, which adds such batches up, as the released scripts do."""
BATCH_NODES = 4
SHAPE = {"hidden_size": 512, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2}
POLICY = PolicyTrainConfig(
    num_epochs=1.0,
    batch_examples=BATCH_EXAMPLES,
    learning_rate=5e-4,
    zero_stage=0,
    weight_decay=0.0,
    micro_batch_tokens=8192,
    save_every_steps=None,
)
PPM = PreferenceTrainConfig(
    num_epochs=1.0,
    batch_examples=4 * BATCH_NODES,
    learning_rate=3e-4,
    zero_stage=0,
    weight_decay=0.0,
    micro_batch_tokens=8192,
    save_every_steps=None,
)


def math_like_length(rng: random.Random) -> int:
    """Tokens of a question and its solution: a log-normal around 450, cut at 100 and 2,000."""
    return min(max(int(rng.lognormvariate(math.log(450), 0.75)), 100), 2000)


def write_world(folder: Path, *, examples: int, nodes: int, seed: int = 0) -> None:
    """A base model and a dataset of made-up solutions of MATH-like lengths."""
    from transformers import AutoTokenizer

    rng = random.Random(seed)
    source = generate(seed=seed, num_demonstrations=180, num_train=1, num_test=1).demonstrations
    texts = [text for problem in source for text in (problem.text, problem.solution)]
    write_base_model(folder / "base", seed=seed, texts=texts, max_position_embeddings=4096, **SHAPE)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def solution(length: int) -> tuple[str, list[str]]:
        """A question, and steps after it to about so many tokens in all."""
        steps: list[str] = []
        held = 0
        question = render_question(rng.choice(source).text, SHORT_TEMPLATE)
        held = len(tokenizer(question).input_ids)
        while held < length:
            for step in rng.choice(source).solution.split("<end_of_step>"):
                steps.append(step + "<end_of_step>")
                held += len(tokenizer(steps[-1]).input_ids)
                if held >= length:
                    break
        return question, steps

    def example(number: int) -> SFTExample:
        question, steps = solution(math_like_length(rng))
        return SFTExample(
            problem_id=f"p{number}",
            level="math",
            origin="tree",
            round=1,
            mean_q=1.0,
            segments=(
                Segment(text=question, trained=False),
                Segment(text="".join(steps), trained=True),
            ),
        )

    def pairs(number: int) -> list[PreferencePair]:
        """Two right and two wrong candidates after a prefix; of every fourth node whole ones."""
        kind = PairKind.ANSWER if number % 4 == 0 else PairKind.STEP
        question, steps = solution(math_like_length(rng))
        size = max(1, len(steps) // 6)
        depth = 0 if kind is PairKind.ANSWER else rng.randrange(0, len(steps))
        end = len(steps) if kind is PairKind.ANSWER else depth + size
        width = max(1, len(steps[depth:end]))

        def candidate(right: bool) -> str:
            words = [rng.choice(source).solution.split("<end_of_step>")[0] for _ in range(width)]
            mark = "# right" if right else "# wrong"
            return "".join(f"{mark}\n{text}<end_of_step>" for text in words)

        good, bad = [candidate(True) for _ in range(2)], [candidate(False) for _ in range(2)]
        return [
            PreferencePair(
                problem_id=f"p{number}",
                level="math",
                round=1,
                tree_index=0,
                node=number,
                kind=kind,
                shared_steps=depth,
                prefix=question + "".join(steps[:depth]),
                chosen=chosen,
                rejected=rejected,
                chosen_q=1.0,
                rejected_q=-1.0,
                weight=0.25,
            )
            for chosen in good
            for rejected in bad
        ]

    files: dict[str, list[Any]] = {
        "sft_train": [example(n) for n in range(examples)],
        "sft_validation": [example(-n) for n in range(1, 17)],
        "pairs_train": [pair for n in range(nodes) for pair in pairs(n)],
        "pairs_validation": [pair for n in range(8) for pair in pairs(1000 + n)],
    }
    with writing_dataset(folder / "data") as writer:
        for name, rows in files.items():
            for row in rows:
                writer.add(name, row)
        writer.commit(template=SHORT_TEMPLATE.name, counts={}, excluded={})


def request(
    folder: Path, config: PolicyTrainConfig | PreferenceTrainConfig, round: int
) -> FitRequest:
    return FitRequest(
        fit_id=f"bench/{round}",
        kind="policy" if isinstance(config, PolicyTrainConfig) else "ppm",
        round=round,
        base=str(folder / "base"),
        data=str(folder / "data"),
        checkpoints=str(folder / "checkpoints"),
        config=config,
    )


def train_two_ranks(folder: Path) -> FitResult:
    """The packed run in two processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    made = multiprocessing.spawn(_rank, args=(folder, answer), nprocs=2, join=False)
    result = answer.get()
    while not made.join():
        pass
    return result


def _rank(rank: int, folder: Path, answer: Any) -> None:
    _be_quiet()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2
    )
    result = run_fit(request(folder, POLICY, 2), rank=rank, world_size=2)
    if rank == 0:
        answer.put(result)
    dist.destroy_process_group()


def measure_tokenising(path: Path, examples: int) -> dict[str, Any]:
    """Texts per second of one rank and of two, with the tokenizer of a checkpoint."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, examples=examples, nodes=1)
        for num_ranks in (1, 2):
            arguments = (num_ranks, folder, path, answer)
            multiprocessing.spawn(_tokenise, args=arguments, nprocs=num_ranks)
            rates[num_ranks], tokens = answer.get()
            print(f"{num_ranks} ranks: {rates[num_ranks]:,.0f} texts/s", flush=True)
    return {"examples": examples, "tokens": tokens, "tokenised_texts_per_s": rates}


def _tokenise(rank: int, num_ranks: int, folder: Path, path: Path, answer: Any) -> None:
    from transformers import AutoTokenizer

    _be_quiet()
    os.environ["RAYON_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / f'{num_ranks}'}", rank=rank, world_size=num_ranks
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    wanted = request(folder, POLICY, 1)
    policy_task(tokenizer, wanted, "validation", spill=folder)  # what is loaded late is there
    begun = time.perf_counter()
    task = policy_task(tokenizer, wanted, "train", spill=folder)
    if rank == 0:
        answer.put((len(task) / (time.perf_counter() - begun), sum(task.tokens)))
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What a training run took."""

    wall: float
    cpu: float


def seconds_of(result: FitResult) -> Seconds:
    return Seconds(wall=result.seconds_train, cpu=result.seconds_cpu)


class Clock(TrainerCallback):
    """Takes the time of a Trainer's steps, without its set-up."""

    def __init__(self) -> None:
        self._wall = self._cpu = 0.0
        self.spent = Seconds(wall=0.0, cpu=0.0)

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_train_end(self, *given: Any, **named: Any) -> None:
        self.spent = Seconds(
            wall=time.perf_counter() - self._wall, cpu=time.process_time() - self._cpu
        )


def _trainer(
    folder: Path, model: Any, rows: list[Any], collate: Callable[..., Any], **settings: Any
) -> Seconds:
    """One epoch of transformers' Trainer on a model, in place."""
    loss = settings.pop("loss", None)

    class Quiet(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            if loss is None:
                return super().compute_loss(model, inputs, *given, **named)
            return loss(model, inputs)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=1,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
        **settings,
    )
    trainer = Quiet(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.spent


def train_padded(folder: Path, *, grouped: bool) -> tuple[Seconds, float]:
    """SFT by transformers' Trainer: what it took, held-out loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = [tokenise_segments(tokenizer, e.segments) for e in read_sft(folder / "data", "train")]
    rows = [
        {
            "input_ids": text.ids.tolist(),
            "labels": [
                int(i) if trained else -100
                for i, trained in zip(text.ids, text.trained, strict=True)
            ],
        }
        for text in texts
    ]
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    seconds = _trainer(
        folder,
        model,
        rows,
        DataCollatorForSeq2Seq(tokenizer, padding=True),
        per_device_train_batch_size=DEVICE_EXAMPLES,
        gradient_accumulation_steps=BATCH_EXAMPLES // DEVICE_EXAMPLES,
        learning_rate=POLICY.learning_rate,
        train_sampling_strategy="group_by_length" if grouped else "random",
    )
    return seconds, held_out_loss(folder, model)


@torch.no_grad()
def held_out_loss(folder: Path, model: Any) -> float:
    """Mean next-token loss on the validation examples, each computed alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    total = count = 0.0
    for example in read_sft(folder / "data", "validation"):
        text = tokenise_segments(tokenizer, example.segments)
        ids = torch.tensor(text.ids.tolist())[None]
        labels = torch.where(torch.tensor(text.trained), ids[0], -100)[None]
        total += float(model.eval()(input_ids=ids, labels=labels).loss) * text.num_trained
        count += text.num_trained
    return total / count


def train_separate_pairs(folder: Path) -> Seconds:
    """The PPM by transformers' Trainer, a pair two padded sequences."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [
        (group.texts[chosen].ids, group.texts[rejected].ids, weight)
        for group in tokenise_pairs(tokenizer, read_pairs(folder / "data", "train"))
        for chosen, rejected, weight in zip(
            group.chosen, group.rejected, group.weights, strict=True
        )
    ]

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        texts = [row[side].tolist() for side in (0, 1) for row in batch]
        padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        return {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "weights": torch.tensor([row[2] for row in batch]),
        }

    def loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = inputs.pop("weights")
        rewards = torch.tanh(model(**inputs).logits.squeeze(-1))
        numbers = torch.arange(len(weights), device=weights.device)
        total = pairwise_loss(rewards, numbers, numbers + len(weights), weights)
        return total / weights.sum() / (BATCH_NODES * 4 // DEVICE_EXAMPLES)

    return _trainer(
        folder,
        new_preference_model(folder / "base", seed=0, dtype=torch.float32),
        rows,
        collate,
        loss=loss,
        per_device_train_batch_size=DEVICE_EXAMPLES,
        gradient_accumulation_steps=4 * BATCH_NODES // DEVICE_EXAMPLES,
        learning_rate=PPM.learning_rate,
    )


QWEN_1_5B: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
"""Shape of Qwen2.5-Math-1.5B."""


def measure_shape(checkpoint: Path, length: int) -> dict[str, Any]:
    """Rate of both kinds of fit at the shape of a checkpoint, see `measure_fit`."""
    from transformers import AutoConfig

    described = AutoConfig.from_pretrained(checkpoint)
    shape = {key: getattr(described, key) for key in QWEN_1_5B}
    kinds: tuple[Kind, Kind] = ("policy", "ppm")
    return {
        f"{kind}_{name}": value
        for kind in kinds
        for name, value in measure_fit(
            kind, shape, length=length, row_tokens=length, rows=1
        ).items()
    }


def measure_mfu() -> dict[str, float]:
    """MFU and tokens per second of SFT at Qwen2.5-Math-1.5B's shape, on one GPU."""
    found = measure_fit("policy", QWEN_1_5B, length=4096, row_tokens=16384, rows=4)
    named = {"mfu_tokens_per_s": found["tokens_per_s"], "mfu": found["mfu"]}
    return {name: value for name, value in named.items() if value is not None}


def measure_fit(
    kind: Kind, shape: Mapping[str, Any], *, length: int, row_tokens: int, rows: int, steps: int = 6
) -> dict[str, Any]:
    """Rate of a fit's steps, the first two not counted, on random tokens; in bfloat16 on a GPU.

    Args:
        kind: what is trained, with the learner's own loss: a policy on texts of `length` tokens, or
            a PPM on nodes that take as many, half of them a prefix and the rest its four branches.
        row_tokens: of one forward pass; `rows` of them are an optimiser step.
    Returns:
        tokens of the texts and computed tokens per second; MFU against the data sheet's peak (on a
        CPU against the float32 products measured here), None where no peak is known.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    from learner.flops import flop_counter, peak_flops
    from learner.optimiser import forward_backward, make_engine, update
    from learner.prepare import choose_attention, training_dtype
    from learner.ranks import ensure_group
    from learner.task import Task

    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {"zero_stage": 1, "micro_batch_tokens": row_tokens}
    ensure_group(0, 1)
    per_row = row_tokens // length
    vocabulary = shape["vocab_size"]
    config: PolicyTrainConfig | PreferenceTrainConfig
    objective: PolicyObjective | PreferenceObjective
    with torch.device("cuda" if on_gpu else "cpu"):
        described = Qwen2Config(
            **shape,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
        described.num_labels = 1
        if kind == "policy":
            config = PolicyTrainConfig(**settings)
            objective = PolicyObjective(Qwen2ForCausalLM(described))
            texts = [_random_text(length, vocabulary) for _ in range(per_row)]
            row: PolicyBatch = pack_policy(texts)
            useful, outputs = per_row * length, len(row.targets)
        else:
            config = PreferenceTrainConfig(**settings)
            objective = PreferenceObjective(Qwen2ForSequenceClassification(described), config)
            groups = [_random_node(length, vocabulary) for _ in range(per_row)]
            row = pack_preference(groups)
            useful, outputs = sum(group.num_tokens for group in groups), 0
    objective.to(training_dtype(config))
    counter = flop_counter(objective.model)
    task = Task(
        tokens=[],
        computed=[],
        attended=[],
        counts=[],
        trained=[],
        pack=lambda share: row,
        denominator=lambda step: float(rows * (outputs or 4 * per_row)),
        left_out={},
    )
    engine, _ = make_engine(objective, config)
    choose_attention(objective, config, engine.device)
    step = PlannedStep(micro=tuple((Share(examples=()),) for _ in range(rows)))
    products = matmul_flops(engine.device)
    peak = peak_flops(engine.device, None) if on_gpu else products
    begun = 0.0
    for number in range(steps):
        if number == 2:
            begun = _now(engine.device)
        forward_backward(engine, task, step, config)
        update(engine, config)
    seconds = (_now(engine.device) - begun) / (steps - 2)
    flops = rows * counter.total(
        tokens=per_row * length, attended=row.layout.num_attended, outputs=outputs
    )
    return {
        "tokens_per_s": rows * useful / seconds,
        "computed_tokens_per_s": rows * per_row * length / seconds,
        "mfu": None if peak is None else flops / seconds / peak,
        "tflops": flops / seconds / 1e12,
        "peak_tflops": None if peak is None else peak / 1e12,
        "matmul_tflops": products / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
        if on_gpu
        else _peak_mib() / 1024,
        "attention": objective.backend,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu, one thread",
    }


def _random_text(length: int, vocabulary: int) -> TokenisedText:
    ids = np.random.default_rng(0).integers(0, vocabulary, length, dtype=np.int32)
    trained = np.ones(length, dtype=bool)
    trained[0] = False
    return TokenisedText(ids=ids, trained=trained)


def _random_node(length: int, vocabulary: int) -> PairGroup:
    """Two right and two wrong branches, each an eighth of the node's tokens, behind one prefix."""
    branch = length // 8
    shared = length - 4 * branch
    whole = _random_text(length, vocabulary)
    texts = []
    for start in range(shared, length, branch):
        own = np.r_[:shared, start : start + branch]
        texts.append(TokenisedText(ids=whole.ids[own], trained=whole.trained[own]))
    return PairGroup(
        texts=tuple(texts),
        chosen=(0, 0, 1, 1),
        rejected=(2, 3, 2, 3),
        weights=(0.25,) * 4,
        targets=(1.0, 1.0, -1.0, -1.0),
        kind=PairKind.STEP,
        num_shared=shared,
    )


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of plain matrix products, the best of ten: bfloat16 on a GPU, else float32."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    matrix = torch.randn(
        size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    best = math.inf
    for _ in range(10):
        begun = _now(device)
        matrix @ matrix
        best = min(best, _now(device) - begun)
    return 2 * size**3 / best


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------ memory


def made_trees(count: int, *, seed: int = 0) -> Iterator[Tree]:
    """Trees of two right solutions and a wrong one, of about 1,500 characters each."""
    rng = random.Random(seed)
    for number in range(count):
        problem = Problem(
            id=f"p{number:08d}",
            source="made",
            level=rng.choice(list(Level)),
            text=f"What comes of {number} when it is treated as the following steps say? "
            + "".join(rng.choices("abcdefgh ", k=200)),
            answer="7",
        )
        tree = Tree(problem=problem, round=1)
        paths = [_made_path(rng, number, branch, answer) for branch, answer in enumerate("778")]
        expand(tree, tree.root, [path[0] for path in paths])
        for path, answer in zip(paths, "778", strict=True):
            for above, below in pairwise(path):
                expand(tree, above, [below])
            backup(tree, path[-1], 1.0 if answer == "7" else -1.0)
        yield tree


def _made_path(rng: random.Random, number: int, branch: int, answer: str) -> list[Node]:
    """The nodes of a solution, not yet in a tree."""
    words = " ".join(f"{rng.randrange(10**6)}" for _ in range(60))
    steps = "<end_of_step>".join(
        f"\n# Step {step}: {words}\nx{step} = {number} * {branch} + {step}\n" for step in range(3)
    )
    text = (
        f"<code>{steps}<end_of_step>\nprint({answer})\n<end_of_code>\n<output>{answer}"
        f"<end_of_output>\n<answer>It is \\boxed{{{answer}}}<end_of_answer>"
    )
    path = [Node(id=-1, parent=-1, depth=-1, step=step) for step in parse_response(text)]
    path[-1].terminal = Terminal.ANSWER
    path[-1].correct = answer == "7"
    return path


def _select_streamed(folder: Path, trees: int) -> None:
    select_dataset(
        made_trees(trees), folder / "data", template=SHORT_TEMPLATE, config=DatasetConfig()
    )


def _prepare(folder: Path, config: PolicyTrainConfig | PreferenceTrainConfig) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    wanted = request(folder, config, 1)
    make = policy_task if isinstance(config, PolicyTrainConfig) else preference_task
    task = make(tokenizer, wanted, "train", spill=folder)
    for step in plan_fit(task, config, world_size=1, seed=0):
        for shares in step.micro:
            task.pack(shares[0])


def _prepare_sft(folder: Path, trees: int) -> None:
    _prepare(folder, POLICY.model_copy(update={"batch_examples": 128}))


def _prepare_ppm(folder: Path, trees: int) -> None:
    _prepare(folder, PPM.model_copy(update={"batch_examples": 512}))


def _prepare_held(folder: Path, trees: int) -> None:
    """The texts of a fit as a list of token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    examples = list(read_sft(folder / "data", "train"))
    texts = [tokenise_segments(tokenizer, example.segments) for example in examples]
    assert texts and examples


STAGES: dict[str, Callable[[Path, int], None]] = {
    "select, streamed": _select_streamed,
    "prepare SFT, streamed": _prepare_sft,
    "prepare PPM, streamed": _prepare_ppm,
    "prepare SFT, held": _prepare_held,
}


def _peak_of(stage: str, folder: Path, warm: Path, trees: int, answer: Any) -> None:
    """Body of a process: its largest memory over what it had after a tiny run, in MiB."""
    _be_quiet()
    # So that what libraries take for themselves is not counted.
    STAGES[stage](warm, 10)
    before, begun = _peak_mib(), time.perf_counter()
    STAGES[stage](folder, trees)
    answer.put((_peak_mib() - before, time.perf_counter() - begun))


def _peak_mib() -> float:
    """Largest resident memory of this process; what getrusage says a new one has of its parent."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) / 1024


def peak_memory(stage: str, folder: Path, warm: Path, trees: int) -> tuple[float, float]:
    """Peak memory of a stage over its start, in MiB, and its seconds; in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_peak_of, args=(stage, folder, warm, trees, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{stage} ended with {process.exitcode}")
    return answer.get()


def measure_memory(trajectories: int) -> dict[str, Any]:
    """Peak memory of every stage at a quarter of the trajectories and at all of them."""
    found: dict[str, Any] = {"trajectories": trajectories, "peak_mib": {}, "data_mib": []}
    print(f"{'peak memory, MiB':<24}{trajectories // 4:>10,}{trajectories:>10,}{'growth':>8}")
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        warm = Path(name) / "warm"
        for count in (10, trajectories // 8, trajectories // 2):
            folders[count] = warm if count == 10 else Path(name) / str(count)
            source = generate(seed=0, num_demonstrations=100, num_train=1, num_test=1)
            texts = [text for p in source.demonstrations for text in (p.text, p.solution)]
            write_base_model(folders[count] / "base", seed=0, texts=texts)
        _select_streamed(folders.pop(10), 10)
        for stage in STAGES:
            pair = [peak_memory(stage, folder, warm, count)[0] for count, folder in folders.items()]
            found["peak_mib"][stage] = pair
            growth = f"{pair[1] / pair[0]:>8.1f}" if pair[0] > 0 else ""
            print(f"{stage:<24}{pair[0]:>10,.1f}{pair[1]:>10,.1f}{growth}", flush=True)
        for folder in folders.values():
            texts_bytes = sum(
                len(segment.text)
                for e in read_sft(folder / "data", "train")
                for segment in e.segments
            ) + sum(
                len(p.prefix) + len(p.chosen) + len(p.rejected)
                for p in read_pairs(folder / "data", "train")
            )
            found["data_mib"].append(texts_bytes / 2**20)
    small, large = found["data_mib"]
    print(f"{'(texts of the dataset)':<24}{small:>10,.0f}{large:>10,.0f}{large / small:>8.1f}\n")
    return found


def _be_quiet() -> None:
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=64, help="solutions to train on")
    parser.add_argument("--nodes", type=int, default=8, help="nodes of 2 x 2 candidates")
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    parser.add_argument(
        "--memory", action="store_true", help="measure the memory of large sets instead"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="measure tokenising with that of a checkpoint instead"
    )
    parser.add_argument(
        "--shape", type=Path, help="measure fits at the shape of a checkpoint instead"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a row of --shape")
    parser.add_argument(
        "--trajectories", type=int, default=20_000, help="right solutions of --memory"
    )
    options = parser.parse_args()
    _be_quiet()
    begun = time.perf_counter()
    if options.memory or options.tokenizer or options.shape:
        if options.memory:
            found = measure_memory(options.trajectories)
        elif options.tokenizer:
            found = measure_tokenising(options.tokenizer, options.examples)
        else:
            found = measure_shape(options.shape, options.length)
        finish(found | {"seconds": time.perf_counter() - begun}, options.json)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, examples=options.examples, nodes=options.nodes)
        # The Trainer first: it would take a process group for a distributed run.
        padded, padded_loss = train_padded(folder, grouped=False)
        grouped, grouped_loss = train_padded(folder, grouped=True)
        separate = train_separate_pairs(folder)
        packed = run_fit(request(folder, POLICY, 1))
        ppm = run_fit(request(folder, PPM, 1))
        both = train_two_ranks(folder)
    report: dict[str, Any] = {}
    for name, slow, fast in (
        ("packed_vs_padded", padded, seconds_of(packed)),
        ("packed_vs_grouped", grouped, seconds_of(packed)),
        ("ppm_pairs_vs_separate", separate, seconds_of(ppm)),
        ("two_ranks_vs_one", seconds_of(packed), seconds_of(both)),
    ):
        report |= {name: slow.wall / fast.wall, f"{name}_cpu": slow.cpu / fast.cpu}
    losses = {
        "padded": padded_loss,
        "grouped": grouped_loss,
        "packed": packed.metrics["loss"],
        "two_ranks": both.metrics["loss"],
    }
    # Batches of like lengths are other batches: that loss is shown, but not held against the rest.
    spread = max(abs(losses[name] / padded_loss - 1.0) for name in ("packed", "two_ranks"))
    report |= {
        "loss": losses,
        "loss_spread": spread,
        "tokens_per_s": {
            "padded": packed.useful_tokens / padded.wall,
            "grouped": packed.useful_tokens / grouped.wall,
            "packed": packed.tokens_per_s,
            "two_ranks": both.tokens_per_s,
        },
        "pairs_per_s": {
            "separate": ppm.examples / separate.wall,
            "shared": ppm.examples / ppm.seconds_train,
        },
        "cpu_s": {
            "padded": padded.cpu,
            "grouped": grouped.cpu,
            "packed": packed.seconds_cpu,
            "two_ranks": both.seconds_cpu,
            "separate": separate.cpu,
            "shared": ppm.seconds_cpu,
        },
        "ppm_computed_share": ppm.computed_tokens / ppm.useful_tokens,
        "examples": options.examples,
        "tokens": packed.useful_tokens,
        "pairs": ppm.examples,
    }
    if torch.cuda.is_available():
        report |= measure_mfu()
    print_report(report)
    finish(report | {"seconds": time.perf_counter() - begun}, options.json)


def finish(report: dict[str, Any], file: Path | None) -> None:
    """Add where it was measured; to a file if there is one, and the last line."""
    report = report | {
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
    }
    text = json.dumps(report)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    print(text)


def print_report(report: dict[str, Any]) -> None:
    """The table for people."""
    print(f"\n{report['examples']} solutions, {report['tokens']:,} tokens, one epoch")
    print(f"{'run':<12}{'tokens/s':>12}{'held-out loss':>16}")
    for name, rate in report["tokens_per_s"].items():
        print(f"{name:<12}{rate:>12,.0f}{report['loss'][name]:>16.4f}")
    print(f"\n{report['pairs']} preference pairs, 2 x 2 candidates a node")
    print(f"{'run':<12}{'pairs/s':>12}")
    for name, rate in report["pairs_per_s"].items():
        print(f"{name:<12}{rate:>12.2f}")
    print(f"\n{'ratio':<24}{'wall':>8}{'CPU':>8}{'goal':>8}")
    for name, goal in (
        ("packed_vs_padded", 1.8),
        ("packed_vs_grouped", 1.1),
        ("ppm_pairs_vs_separate", 2.0),
        ("two_ranks_vs_one", 1.5),
        ("mfu", 0.45),
    ):
        if name in report:
            cpu = f"{report[f'{name}_cpu']:>8.2f}" if f"{name}_cpu" in report else f"{'':>8}"
            print(f"{name:<24}{report[name]:>8.2f}{cpu}{goal:>8}")
    print(f"losses within {100 * report['loss_spread']:.2f} %, goal 2 %\n")


if __name__ == "__main__":
    main()
