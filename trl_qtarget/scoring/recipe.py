"""How `trl-qtarget cache` scores: the rows a trainer would make of the data, a teacher on them, file by file."""

import random
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from ..cache import offline
from ..cache.sequences import by_name, indexed, sequences
from ..cache.shards import Settings
from ..cache.store import CacheWriter, TeacherCache, readable
from ..data.known_ids import KnownIds
from ..data.loading import load_splits
from ..model.adapters import base_model
from ..options.parsing import fail
from ..teachers.loading import load_teacher
from ..teachers.vocab import common_columns
from ..training.checks import compare_tokenizers
from ..training.trainer import TargetSFTTrainer
from .score import fingerprint, score


TRIAL_BATCHES = 3  # that a dry run times
VERIFY_TOLERANCE = 0.05  # nats: what half precision and other padding may change


class Scorer:
    """A teacher, and the rows that a student's trainer would make of the data."""

    def __init__(self, script_args, training_args, model_args, dataset_args, cache_args):

        self.args, self.options = training_args, cache_args
        self.name, self.folder = training_args.teacher_model_name_or_path, training_args.teacher_cache
        trust = {"trust_remote_code": training_args.trust_remote_code}
        student = model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(student, revision=model_args.model_revision, **trust)
        teacher = load_teacher(self.name, training_args)
        columns = AutoConfig.from_pretrained(student, revision=model_args.model_revision, **trust)
        columns = columns.get_text_config().vocab_size
        theirs = len(teacher.get_output_embeddings().weight)
        # the trainer prepares the data as the student's would, and places the model; it has nothing else to do
        elsewhere = ("model_name_or_path", "cache", "ema_decay", "offload", "batch_size")
        for option in ("loss_kwargs", "model_init_kwargs", *(f"teacher_{name}" for name in elsewhere)):
            setattr(training_args, option, None)
        training_args.loss, training_args.push_to_hub, training_args.report_to = "nll", False, []
        train, evaluation = load_splits(script_args, training_args, dataset_args)
        agreement = compare_tokenizers(student, self.name, tokenizer, training_args, train)
        shared, report = common_columns(agreement, len(tokenizer), columns, theirs)
        self.columns = columns if shared is None else shared
        trainer = TargetSFTTrainer(
            teacher, training_args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer
        )
        self.tokenizer, self.accelerator = trainer._tokenizer, trainer.accelerator
        self.model = base_model(trainer.model).to(self.accelerator.device).eval()
        # a stream is read once
        self.datasets = {
            name: dataset if isinstance(dataset, Dataset) else Dataset.from_list(list(dataset))
            for name, dataset in by_name(trainer.train_dataset, trainer.eval_dataset).items()
        }
        self.accelerator.print(report)
        known = KnownIds(None, {"labels": self.columns, "input_ids": theirs}, tokenizer)
        for name, dataset in self.datasets.items():
            known.scan(name, dataset)
        self.rows = self._index()

    def _index(self) -> dict[str, tuple[str, int, int, int, int]]:
        """(dataset, row, part, tokens, labels) of every distinct sequence, by its key."""
        found, quiet = {}, not self.accelerator.is_main_process
        for name, dataset in self.datasets.items():
            for key, row, part, sequence in indexed(dataset, name, disable=quiet):
                found.setdefault(key, (name, row, part, len(sequence.ids), sequence.labels))
        return found

    def sequence(self, key: str) -> Any:
        name, row, part, *_ = self.rows[key]
        return sequences(self.datasets[name][row])[part]

    def score(self, keys: list[str]) -> list:
        return score(self.model, [self.sequence(key) for key in keys], self.k, self.columns)

    @property
    def k(self) -> int:
        return min(self.options.top_k, self.columns)

    def batches(self, keys: list[str]) -> Iterator[list[str]]:
        """Keys of ascending length, as many at a time as `batch_tokens` allows when padded to the longest."""
        batch: list[str] = []
        for key in keys:
            if batch and self.rows[key][3] * (len(batch) + 1) > self.options.batch_tokens:
                yield batch
                batch = []
            batch.append(key)
        if batch:
            yield batch

    def dtype(self) -> str:
        """The asked one, or float16 if that moves less than a thousandth of the mass of some rows."""

        if self.options.cache_dtype != "auto":
            return self.options.cache_dtype
        moved = []
        for entry in self.score(next(self.batches(sorted(self.rows, key=lambda key: self.rows[key][3:])))):
            rounded = readable(entry._replace(log_probs=entry.log_probs.astype(np.float16)))[1]
            moved.append(0.5 * np.abs(np.exp(rounded) - np.exp(readable(entry)[1])).sum(-1))
        error = float(np.concatenate(moved).mean())
        self.accelerator.print(f"float16 moves {error:.1e} of the mass of a token")
        return "float16" if error < 1e-3 else "float32"

    def settings(self) -> Any:
        return Settings(
            teacher=self.name,
            teacher_revision=self.args.teacher_model_revision,
            teacher_fingerprint=fingerprint(self.model),
            tokenizer_fingerprint=offline.tokenizer_fingerprint(self.tokenizer),
            template_fingerprint=offline.template_fingerprint(self.tokenizer),
            vocab_size=self.columns,
            k=self.k,
            dtype=self.dtype(),
            max_length=self.args.max_length,
        )


def dry_run(scorer: Scorer) -> None:
    """Print what a cache would take, from the rows and the time of a few batches."""
    tokens, labels = (sum(row[3] for row in scorer.rows.values()), sum(row[4] for row in scorer.rows.values()))
    keys = sorted(scorer.rows, key=lambda key: scorer.rows[key][3])
    batches = list(scorer.batches(keys))
    some = batches[:: max(len(batches) // TRIAL_BATCHES, 1)][:TRIAL_BATCHES]
    scorer.score(some[0])  # warms up
    start = time.perf_counter()
    for batch in some:
        scorer.score(batch)
    rate = sum(scorer.rows[key][3] for batch in some for key in batch) / (time.perf_counter() - start)
    width = {"float16": 6, "float32": 8}[scorer.dtype()] * scorer.k + 12
    # a process does whole files
    processes = min(scorer.accelerator.num_processes, -(-labels // scorer.options.shard_tokens))
    scorer.accelerator.print(
        f"{len(scorer.rows)} distinct sequences, {tokens} tokens, {labels} labels; "
        f"about {labels * width / 2**20:.1f} MiB at {width} bytes a label; "
        f"about {tokens / rate / processes:.0f} s at {rate:.0f} tokens/s on {processes} process(es)"
    )


def fill(scorer: Scorer) -> None:
    """Score what the cache lacks, each process its part of the shards."""

    accelerator = scorer.accelerator
    settings = scorer.settings()
    with accelerator.main_process_first():
        writer = CacheWriter(scorer.folder, settings, disable=not accelerator.is_main_process)
    shards = writer.plan(((key, row[3], row[4]) for key, row in scorer.rows.items()), scorer.options.shard_tokens)
    accelerator.wait_for_everyone()  # all have planned from the same files
    mine = [shard for shard in shards[accelerator.process_index :: accelerator.num_processes] if not shard.done]
    tokens = sum(scorer.rows[key][3] for shard in mine for key in shard.keys)
    with tqdm(total=tokens, unit=" tokens", desc="Scoring", disable=not accelerator.is_main_process) as bar:
        for shard in mine:
            entries = []
            for batch in scorer.batches(list(shard.keys)):
                entries += scorer.score(batch)
                bar.update(sum(scorer.rows[key][3] for key in batch))
                bar.set_postfix(rows=len(entries), shard=shard.name)
            writer.write(shard, entries)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.commit({name: version(name) for name in ("trl-qtarget", "transformers", "torch")})
        rows = sum(len(shard.keys) for shard in shards if not shard.done)
        print(f"{scorer.folder}: {rows} sequences scored, {len(scorer.rows)} of this recipe are there")
    accelerator.wait_for_everyone()


def verify(scorer: Scorer, prog: str) -> None:
    """Score random rows again, one at a time, and stop with exit code 1 if they differ."""

    cache = TeacherCache(scorer.folder)
    keys = random.sample(sorted(scorer.rows), min(scorer.options.verify, len(scorer.rows)))
    worst = moved = 0.0
    for key in keys:
        (again,), kept = scorer.score([key]), cache[key]
        worst = max(worst, float(np.abs(again.log_p_y - kept.log_p_y).max()))
        (ids, ours), (kept_ids, theirs) = readable(again), readable(kept)
        for row in range(len(ids)):
            new, old = (
                dict(zip(i[row].tolist(), np.exp(p[row]).tolist(), strict=True))
                for i, p in ((ids, ours), (kept_ids, theirs))
            )
            moved = max(moved, 0.5 * sum(abs(new.get(i, 0) - old.get(i, 0)) for i in new.keys() | old.keys()))
    print(f"{len(keys)} rows scored again: log p(y) differs by at most {worst:.1e} nats, the mass by {moved:.1e}")
    if max(worst, moved) > VERIFY_TOLERANCE:
        fail(prog, f"the cache {scorer.folder} is not what this teacher says: make it in another folder", code=1)
