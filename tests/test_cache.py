"""The store of an offline teacher: nothing is lost, invented or half-written, whatever stops a run."""

import contextlib
import errno
import io
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import cache_victim
import numpy as np
import pytest
from cache_victim import SETTINGS, VERSIONS, fill, made_up_entry, made_up_rows
from hypothesis import given
from hypothesis import strategies as st

from trl_qtarget import files
from trl_qtarget.cache import foreign_file, shards
from trl_qtarget.cache.fingerprints import row_key
from trl_qtarget.cache.reader import TeacherCache, readable
from trl_qtarget.cache.shards import CacheError, Entry
from trl_qtarget.cache.writer import CacheWriter, alone
from trl_qtarget.locking import LOCK


FILLS_THE_GAP = r": delete it and run `trl-qtarget cache` again, which fills the gap\.$"
ROWS = made_up_rows()


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """No waiting for a disk, but in the processes that are killed."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def make(folder: Path, rows=ROWS, settings=SETTINGS) -> Path:
    writer = CacheWriter(folder, settings)
    fill(writer, rows)
    writer.commit(VERSIONS)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished cache. Read only."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def keys_of(folder: Path) -> list[str]:
    """The keys of every shard there is, whether the manifest lists it or not."""
    return [key for path in folder.glob("*.arrow") for key in shards.Shard(path, SETTINGS.k).keys.astype(str)]


def assert_same(entry: Entry, other: Entry) -> None:
    for ours, theirs in zip(entry, other, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def victim(folder: Path, rank: int = 0, world: int = 1, commit: int = 1, seed: int = 0) -> subprocess.Popen:
    command = [sys.executable, cache_victim.__file__, folder, *map(str, (rank, world, commit, seed))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_a_row_is_its_tokens_and_labels():
    key = row_key([1, 2, 3], [False, True, True])
    assert re.fullmatch("[0-9a-f]{32}", key)
    assert key == row_key(np.array([1, 2, 3]), np.array([0, 1, 1]))
    others = [row_key([1, 2, 4], [0, 1, 1]), row_key([1, 2, 3], [0, 0, 1]), row_key([1, 2], [0, 1]), row_key([], [])]
    assert len({key, *others}) == 5
    with pytest.raises(ValueError, match="one of each a token"):
        row_key([1, 2], [True])


@given(data=st.data())
def test_what_is_written_is_read(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    vocab = data.draw(st.integers(1, 12))
    settings = replace(
        SETTINGS,
        vocab_size=vocab,
        k=data.draw(st.integers(1, vocab)),
        dtype=data.draw(st.sampled_from(["float16", "float32"])),
    )
    row = st.lists(st.tuples(st.integers(0, vocab - 1), st.booleans()), min_size=1, max_size=6)
    sequences = [tuple(zip(*row, strict=True)) for row in data.draw(st.lists(row, max_size=8))]
    rows = [(row_key(ids, mask), len(ids), sum(mask)) for ids, mask in sequences]
    log_prob = st.sampled_from([-np.inf, -7e4, -0.0, -1e-3]) | st.floats(-20, 0)
    entries = {}
    for key, _, n in rows:
        entry = made_up_entry(key, n, settings.k, vocab, "float32")
        if n:  # whatever a teacher may say
            entry.log_probs[-1, -1] = entry.log_tail[0] = entry.log_p_y[0] = data.draw(log_prob)
        entries[key] = entry

    writer = CacheWriter(folder, settings)
    plan = writer.plan(rows, budget := data.draw(st.integers(1, 10)))
    assert plan == CacheWriter(folder, settings).plan(data.draw(st.permutations(rows + rows[:2])), budget)
    for shard in data.draw(st.permutations(plan)):
        assert sum(shard.labelled) <= budget or sum(n > 0 for n in shard.labelled) == 1
        writer.write(shard, [entries[key] for key in shard.keys])
    writer.commit(VERSIONS)

    cache = TeacherCache(folder)
    assert cache.settings == settings
    assert len(cache) == cache.rows == len(entries)
    assert cache.tokens == sum(len(entry.ids) for entry in entries.values())
    assert cache.missing([*entries, "0" * 32, "0" * 32]) == writer.missing(["0" * 32]) == ["0" * 32]
    with np.errstate(over="ignore"):
        for key, entry in entries.items():
            assert key in cache
            assert_same(cache[key], entry._replace(log_probs=entry.log_probs.astype(settings.dtype)))


@given(seed=st.integers(0, 2**32), k=st.integers(1, 50), scale=st.sampled_from([0.1, 1.0, 5.0, 100.0]))
def test_rounding_neither_invents_nor_loses_a_tail(seed, k, scale):
    draw = np.random.default_rng(seed)
    log_p = draw.normal(size=(4, 50)) * scale
    log_p = -np.sort(-(log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True)), axis=-1)
    tail = np.logaddexp.reduce(log_p[:, k:], axis=-1) if k < 50 else np.full(4, -np.inf)
    rest = tail.astype(np.float32)
    ids = np.tile(np.arange(k, dtype=np.int32), (4, 1))
    ids, log_probs = readable(Entry(ids, log_p[:, :k].astype(np.float16), rest, rest, rest))
    assert (ids.dtype, log_probs.dtype) == (np.int32, np.float32)
    left, tail = 1 - np.exp(log_probs.astype(float)).sum(-1), np.exp(rest.astype(float))
    np.testing.assert_allclose(left[tail < 0.5], tail[tail < 0.5], atol=1e-6)
    np.testing.assert_allclose(left, tail, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(log_probs, log_p[:, :k], rtol=2e-3, atol=2e-3)


def test_impossible_ids_and_rows_that_are_all_tail_stay_so():
    log_probs = np.array([[-np.inf, -1.0], [-np.inf, -np.inf], [-9.0, -np.inf]], np.float16)
    tail = np.array([-np.inf, 0, 0], np.float32)
    _, read = readable(Entry(np.zeros((3, 2), np.int32), log_probs, tail, tail, tail))
    np.testing.assert_array_equal(read, [[-np.inf, 0], [-np.inf, -np.inf], [-9, -np.inf]])


def test_an_entry_is_a_view_of_the_file(made):
    cache = TeacherCache(made)
    key = next(key for key, (_, n) in ROWS.items() if n)
    assert not any(part.flags.owndata or part.flags.writeable for part in cache[key])
    assert np.shares_memory(cache[key].ids, cache[key].ids)
    with pytest.raises(KeyError):
        cache["0" * 32]


def test_kill_at_any_moment(made, tmp_path):
    """Twenty kills and more; each cache that is finished in the end is the one that nobody disturbed."""
    draw, kills, finished, takes = random.Random(0), 0, 0, float("inf")
    while kills < 20 or not finished:
        folder = tmp_path / str(finished)
        process = victim(folder)
        process.stdout.readline()  # it is about to begin
        start = time.perf_counter()
        if takes == float("inf"):  # the first may finish, to see how long that takes
            process.wait()
            takes = time.perf_counter() - start
        time.sleep(draw.uniform(0, takes))
        process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), "what a killed run has left stops no later one"
        kills += process.returncode != 0
        if process.returncode == 0:
            assert contents(folder) == contents(made)
            finished += 1


def ended(process: subprocess.Popen) -> int:
    process.communicate()
    return process.returncode


def holding(folder: Path, **options) -> subprocess.Popen:
    """A process that writes into the folder, stopped right after it has begun to."""
    process = victim(folder, **options)
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n", b"holds\n"]
    process.send_signal(signal.SIGSTOP)
    return process


def test_two_runs_on_one_folder(tmp_path):
    """The second run is refused while the first one writes, and adds its rows afterwards: no row of either is lost."""
    first, other = holding(tmp_path), made_up_rows(seed=1)
    second = victim(tmp_path, seed=1)
    said = second.communicate()[0].decode().splitlines()[-1]
    first.send_signal(signal.SIGCONT)
    assert (ended(first), second.returncode) == (0, 2)
    start, _, rest = said.partition(", since ")
    assert start == (
        f"Another `trl-qtarget cache` writes into {tmp_path} (process {first.pid} on {socket.gethostname()}"
    )
    time_of, _, rest = rest.partition(")")
    assert 0 <= (datetime.now().astimezone() - datetime.fromisoformat(time_of)).total_seconds() < 600
    assert rest == ": wait until it has ended, or choose another folder."
    assert not TeacherCache(tmp_path).missing(ROWS)
    assert len(TeacherCache(tmp_path).missing(other)) == len(other)
    assert ended(victim(tmp_path, seed=1)) == 0
    assert not TeacherCache(tmp_path).missing(ROWS | other)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("moment", [0, 0.05, 0.2])
def test_a_killed_run_holds_nothing(tmp_path, made, moment):
    first = holding(tmp_path)
    first.send_signal(signal.SIGCONT)
    time.sleep(moment)
    first.kill()
    assert ended(first) == -signal.SIGKILL
    assert f"process {first.pid} on " in (tmp_path / LOCK).read_text()
    assert ended(victim(tmp_path)) == 0
    assert contents(tmp_path) == contents(made)


def test_a_run_without_a_shard_leaves_nothing(tmp_path, copied):
    """Neither a folder that was made for it, nor settings that another run would have to share."""
    folder = tmp_path / "a" / "b"
    with pytest.raises(CacheError, match="keeps 1 to 50"), alone(folder):
        CacheWriter(folder, SETTINGS).settings = replace(SETTINGS, k=51)
    assert not folder.exists()
    (tmp_path / "c").mkdir()
    CacheWriter(tmp_path / "c", SETTINGS)  # as a killed run leaves it
    with alone(tmp_path / "c"):
        make(tmp_path / "c", settings=replace(SETTINGS, teacher_fingerprint="f9"))
    assert len(TeacherCache(tmp_path / "c")) == len(ROWS)
    before = contents(copied)
    with pytest.raises(OSError, match="no luck"), alone(copied):
        raise OSError("no luck")
    assert contents(copied) == before


def test_a_folder_as_a_run_killed_at_its_start_leaves_it(tmp_path, made):
    for name in (LOCK, ".manifest.json.0123456789abcdef0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    assert foreign_file(tmp_path) is None
    with alone(tmp_path):
        make(tmp_path)
    assert contents(tmp_path) == contents(made)
    assert foreign_file(tmp_path) is None
    assert foreign_file(tmp_path / "nowhere") is None
    (tmp_path / "manifest.json").unlink()
    assert foreign_file(tmp_path) == "README.md"


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(operation, made, tmp_path, monkeypatch):
    wanted, working, at = contents(made), getattr(os, operation), 0
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return working(*args)

    monkeypatch.setattr(os, operation, failing)
    while True:  # at every call there is
        at += 1
        calls.clear()
        folder = tmp_path / str(at)
        with contextlib.suppress(OSError):
            make(folder)
        if len(calls) < at:
            break
        assert not list(folder.glob(".*"))
        assert all(wanted[path.name] == path.read_bytes() for path in folder.glob("*.arrow"))
        assert contents(make(folder)) == wanted
    assert at > 14


def test_a_disk_that_is_full_amid_a_shard(made, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", Full, raising=False)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path)
    assert set(contents(tmp_path)) == {"manifest.json"}
    assert contents(make(tmp_path)) == contents(made)


def test_every_flipped_bit_is_found(copied):
    draw = random.Random(0)
    for path in copied.glob("*[!d]"):  # the card is for the user to edit
        whole = path.read_bytes()
        step = 1 if path.name == "manifest.json" else 16
        for start in range(0, len(whole), step):
            flipped = bytearray(whole)
            flipped[min(start + draw.randrange(step), len(whole) - 1)] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(CacheError, match=re.escape(str(path))) as error:
                TeacherCache(copied)
            assert re.search(r"[^.]\.$", str(error.value))
        path.write_bytes(whole)
    assert len(TeacherCache(copied)) == len(ROWS)


@pytest.mark.parametrize("fault", ["missing", "truncated", "damaged"])
def test_a_damaged_shard_is_named_and_made_again(fault, copied, made):
    path = copied / "shard-00002.arrow"
    whole = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if fault == "truncated" else whole[:-9] + b"?" + whole[-8:])
    with pytest.raises(CacheError, match=re.escape(str(path)) + ".*" + FILLS_THE_GAP):
        TeacherCache(copied)
    with pytest.warns(UserWarning, match=rf"{path.name} .*: its rows will be scored again"):
        writer = CacheWriter(copied, SETTINGS)
    assert 0 < len(writer.missing(ROWS)) < len(ROWS)
    fill(writer, ROWS)
    writer.commit(VERSIONS)
    assert contents(copied) == contents(made)


def test_damage_to_an_unfinished_run_costs_its_shard_only(made, tmp_path):
    fill(CacheWriter(tmp_path, SETTINGS), ROWS)
    with pytest.raises(CacheError, match="is not finished: run its `trl-qtarget cache` again"):
        TeacherCache(tmp_path)
    (tmp_path / "shard-00001.json").write_bytes((tmp_path / "shard-00001.json").read_bytes().replace(b"rows", b"rowz"))
    (tmp_path / "shard-00003.arrow").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match=r"shard-00001.json is damaged: the rows"),
        pytest.warns(UserWarning, match=r"shard-00003.arrow has 0 bytes instead of \d+: its rows"),
    ):
        writer = CacheWriter(tmp_path, SETTINGS)
    plan = writer.plan([(key, *counts) for key, counts in ROWS.items()], cache_victim.SHARD_TOKENS)
    assert [shard.done for shard in plan] == [i not in (1, 3) for i in range(len(plan))]
    fill(writer, ROWS)
    writer.commit(VERSIONS)
    assert contents(tmp_path) == contents(made)


@pytest.mark.parametrize("moment", ["manifest", "card", "half of the sidecars"])
def test_a_commit_that_was_stopped(moment, made, tmp_path):
    fill(CacheWriter(tmp_path, SETTINGS), ROWS)
    before = contents(tmp_path)
    CacheWriter(tmp_path, SETTINGS).commit(VERSIONS)
    for name in sorted(before)[1 if moment != "half of the sidecars" else 6 :]:
        (tmp_path / name).write_bytes(contents(made).get(name, before[name]))
    if moment == "manifest":
        (tmp_path / "README.md").unlink()
    (tmp_path / ".shard-00009.arrow.0123456789abcdef0123456789abcdef.tmp").write_bytes(b"half")
    assert len(TeacherCache(tmp_path)) == len(ROWS)
    assert contents(make(tmp_path)) == contents(made)


def test_two_processes_write_what_one_does(made, tmp_path):
    processes = [victim(tmp_path, rank, 2, commit=0) for rank in range(2)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    CacheWriter(tmp_path, SETTINGS).commit(VERSIONS)
    assert contents(tmp_path) == contents(made)


def test_a_cache_grows_and_its_shards_stay(copied):
    def state():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in copied.glob("*.arrow")}

    old = state()
    card = (copied / "README.md").read_text()
    (copied / "README.md").write_text(card.replace("---\n\n#", "license: mit\n---\n\n#").replace("Not stated", "MIT"))
    more = made_up_rows(25, seed=1) | ROWS
    make(copied, more)
    assert old.items() < state().items()
    assert not TeacherCache(copied).missing(more)
    card = (copied / "README.md").read_text()
    assert re.search(rf"(?s)license: mit\n---.* {len(more)} rows.*MIT yet", card)
    before = contents(copied)
    assert contents(make(copied, more)) == before


def test_rows_that_change_between_two_attempts(tmp_path):
    """What the first attempt has finished stays; the second, interrupted as well, ends as if it had not been."""
    first, second = ROWS, dict(list(ROWS.items())[20:]) | made_up_rows(25, seed=1)

    def attempt(rows, folder, part=slice(None)):
        writer = CacheWriter(folder, SETTINGS)
        plan = writer.plan([(key, *counts) for key, counts in rows.items()], cache_victim.SHARD_TOKENS)
        for shard in [shard for shard in plan if not shard.done][part]:
            writer.write(shard, [made_up_entry(*row) for row in zip(shard.keys, shard.labelled, strict=True)])
        return writer, plan

    attempt(first, tmp_path / "a", slice(1, 4, 2))  # one process of two
    kept = contents(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    attempt(second, tmp_path / "a")[0].commit(VERSIONS)
    attempt(second, tmp_path / "b", slice(1))
    attempt(second, tmp_path / "b", slice(2))
    writer, plan = attempt(second, tmp_path / "b")
    assert [shard.done for shard in plan] == [True] * 3 + [False] * (len(plan) - 3)
    assert len(set(keys_of(tmp_path / "b"))) == len(keys_of(tmp_path / "b"))
    attempt(first, tmp_path / "b")  # and the first once more, beside the second's shards
    assert len(set(keys_of(tmp_path / "b"))) == len(keys_of(tmp_path / "b")) == len(first | second)
    writer = CacheWriter(tmp_path / "b", SETTINGS)
    writer.commit(VERSIONS)
    ends = [contents(tmp_path / name) for name in "ab"]
    for name in kept.keys() & ends[0].keys() - {"manifest.json"}:
        assert kept[name] == ends[0][name] == ends[1][name]
    assert not TeacherCache(tmp_path / "b").missing(first | second)


def test_a_repair_that_was_stopped(copied):
    """What it has written under the name of a damaged shard counts, though the manifest still lists that one."""
    (copied / "shard-00002.arrow").write_bytes(b"")
    more = made_up_rows(25, seed=1) | ROWS
    with pytest.warns(UserWarning, match=r"shard-00002.arrow has 0 bytes"):
        writer = CacheWriter(copied, SETTINGS)
    shard = writer.plan([(key, *counts) for key, counts in more.items()], cache_victim.SHARD_TOKENS)[0]
    assert shard.name == "shard-00002.arrow"
    writer.write(shard, [made_up_entry(*row) for row in zip(shard.keys, shard.labelled, strict=True)])
    assert set(shard.keys) <= set(keys_of(make(copied, more)))
    assert not TeacherCache(copied).missing(more)


def test_another_cache_is_left_alone(copied):
    before = contents(copied)
    with pytest.raises(CacheError, match="k=5 and not 4, dtype='float16' and not 'float32': choose another folder"):
        CacheWriter(copied, replace(SETTINGS, k=4, dtype="float32"))
    assert contents(copied) == before


@pytest.mark.parametrize("name", ["manifest.json", "thesis.tex"])
def test_a_foreign_folder_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CacheError, match=f"{name}.*another"):
        CacheWriter(tmp_path, SETTINGS)
    assert contents(tmp_path) == {name: b"{}"}


def test_a_later_format_is_refused(copied, monkeypatch):
    monkeypatch.setattr(shards, "FORMAT", "version 2")
    for use in (TeacherCache, lambda folder: CacheWriter(folder, SETTINGS)):
        with pytest.raises(CacheError, match="not of the format 'version 2'"):
            use(copied)


def test_settings_and_entries_that_cannot_be(tmp_path):
    for wrong in ({"dtype": "bfloat16"}, {"k": 0}, {"k": 51}):
        with pytest.raises(CacheError, match=r"choose one|change k"):
            replace(SETTINGS, **wrong)
    writer = CacheWriter(tmp_path, SETTINGS)
    (shard,) = writer.plan([(row_key([1, 2], [False, True]), 2, 1)], 10)
    good = made_up_entry(shard.keys[0], 1)
    for wrong, message in [
        ([], "has 1 rows, not 0"),
        ([good._replace(ids=good.ids[:, :3])], "1 labels of 5 ids"),
        ([good._replace(mass=good.mass * np.nan)], "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(shard, wrong)
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_a_run_with_other_settings_is_told_so(made):
    cache = TeacherCache(made)
    cache.check(tokenizer_fingerprint="f1", template_fingerprint="f2", vocab_size=50, max_length=64)
    with pytest.raises(CacheError, match=r"max_length=64, and this run has max_length=128: make it again"):
        cache.check(tokenizer_fingerprint="f1", max_length=128)


def test_a_pickled_reader_reads_the_same(made):
    cache = TeacherCache(made)
    code = """
import pickle, sys
cache, keys = pickle.load(sys.stdin.buffer)
pickle.dump([cache[key] for key in keys], sys.stdout.buffer)
"""
    sent = pickle.dumps((cache, list(ROWS)))
    assert len(sent) < 64 * len(ROWS)  # where it is, not what it holds
    told = subprocess.run([sys.executable, "-c", code], input=sent, stdout=subprocess.PIPE, env=environment())
    assert told.returncode == 0
    for key, entry in zip(ROWS, pickle.loads(told.stdout), strict=True):
        assert_same(entry, cache[key])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12, for any process with threads
def test_a_forked_reader_reads_the_same(made):
    cache = TeacherCache(made)
    keys = list(ROWS)
    first = cache[keys[0]]  # mapped before the fork
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send([cache[key] for key in keys]))
    process.start()
    read = receive.recv()
    process.join()
    assert_same(first, read[0])
    for key, entry in zip(keys, read, strict=True):
        assert_same(entry, cache[key])


def test_a_shard_is_an_ordinary_dataset(made, tmp_path):
    from datasets import Dataset, load_dataset

    cache = TeacherCache(made)
    mapped = Dataset.from_file(str(made / "shard-00003.arrow"))
    loaded = load_dataset(str(made), cache_dir=str(tmp_path), split="train")  # as the card says where the data is
    assert len(loaded) == len(cache)
    for row in (*mapped, *loaded):
        entry = cache[row["key"]]
        assert row["n"] == len(entry.ids)
        for name, part in entry._asdict().items():
            np.testing.assert_array_equal(np.array(row[name], part.dtype), part.reshape(-1))


def test_a_cache_on_the_hub(copied, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(copied))
    assert len(TeacherCache("somebody/cache")) == len(ROWS)
    assert asked == [(("somebody/cache",), {"repo_type": "dataset"})]
    (copied / "shard-00000.arrow").unlink()
    with pytest.raises(CacheError, match=r"shard-00000.arrow is missing: .* it is downloaded again"):
        TeacherCache("somebody/cache", verify=False)


def test_no_cache(tmp_path):
    with pytest.raises(CacheError, match=r"has no manifest.json: make the cache"):
        TeacherCache(tmp_path)
    with pytest.raises(CacheError, match=r"is no folder, and no dataset that the Hub gives \(.*\): check its name"):
        TeacherCache("nobody/nothing")


def test_an_empty_cache(tmp_path):
    cache = TeacherCache(make(tmp_path, rows={}))
    assert len(cache) == 0
    assert "0" * 32 not in cache
    assert cache.missing(["b", "a", "b"]) == ["b", "a"]


def test_a_large_cache_shows_its_check(made, monkeypatch, capsys):
    monkeypatch.setattr(shards, "LARGE", 1)
    TeacherCache(made, disable=True)
    assert not capsys.readouterr().err
    TeacherCache(made)
    assert "Checking the cache" in capsys.readouterr().err
