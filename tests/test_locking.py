"""The lock on a folder: who holds it, and what is left of it."""

import errno
import fcntl
import os
import sys
from types import SimpleNamespace

import pytest

from trl_qtarget import locking
from trl_qtarget.locking import LOCK, Held, held


def test_one_holder_at_a_time(tmp_path):
    for _ in range(2):
        with held(tmp_path):
            with pytest.raises(Held, match=rf"^process {os.getpid()} on \S+, since \d{{4}}-"), held(tmp_path):
                pass
            assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """A process that has opened the file of a holder that ends locks another file than a third process does."""
    (tmp_path / LOCK).write_text("process 1 on elsewhere, since then")
    lock, times = locking._lock, []

    def removed_first(file):
        if not times:
            (tmp_path / LOCK).unlink()
        times.append(file.name)
        lock(file)

    monkeypatch.setattr(locking, "_lock", removed_first)
    with held(tmp_path), pytest.raises(Held), held(tmp_path):
        pass
    assert len(times) == 3


def test_a_file_system_without_locks_is_said_to_have_none(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.warns(UserWarning, match=r"has no locks \(Function not implemented\): make sure"), held(tmp_path):
        pass
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(Held, match="another process"), held(tmp_path):  # as NFS says it
        pass


def test_without_fcntl_the_locks_of_windows_are_taken(tmp_path, monkeypatch):
    flock, asked = fcntl.flock, []

    def locking_of_windows(descriptor, mode, size):
        asked.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, size))
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EACCES, "Permission denied") from None

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking_of_windows, LK_NBLCK=2))
    with held(tmp_path), pytest.raises(Held, match=f"process {os.getpid()} "), held(tmp_path):
        pass
    assert asked == [(2**30, 2, 1)] * 2, "a byte that nobody reads"
