"""Files and folders appear whole or not at all, wherever the disk or the process fails; damage is always found."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import files
from espalier.errors import DataError, ResourceError

OLD, NEW = {"a": b"old", "sub/b": b"old too"}, {"a": b"new and longer", "sub/c": b"new", "sub/manifest.json": b"{}"}
SYSTEM_CALLS = ("fsync", "rename", "replace", "mkdir")
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


@pytest.fixture
def folder():
    """Where to write: in memory if the system has that, since there flushing takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as parent:
        yield Path(parent) / "folder"


def replace_file(folder: Path) -> None:
    files.write_bytes(folder / "file", b"new")


def replace_folder(folder: Path) -> None:
    with files.whole_folder(folder / "folder") as partial:
        fill(partial, NEW)


def fill(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def begin(folder: Path, *, old: bool) -> None:
    """Start anew, with an old file and an old folder or with neither."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old:
        files.write_bytes(folder / "file", b"old")
        with files.whole_folder(folder / "folder") as partial:
            fill(partial, OLD)


def read_folder(folder: Path) -> dict[str, bytes] | None:
    """What is in a folder with a manifest that it matches; None when there is no folder."""
    if not folder.exists():
        return None
    assert files.damage(folder) is None
    own = folder / files.MANIFEST
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != own}


def require_old_or_new(folder: Path, *, old: bool) -> None:
    """After recovery: whole, old or new, and nothing beside it."""
    files.remove_partials(folder)
    file = (folder / "file").read_bytes() if (folder / "file").exists() else None
    assert file in (b"old" if old else None, b"new")
    assert read_folder(folder / "folder") in (OLD if old else None, NEW)
    assert {path.name for path in folder.iterdir()} <= {"file", "folder"}


def require_new(work, folder: Path) -> None:
    if work is replace_file:
        assert (folder / "file").read_bytes() == b"new"
    else:
        assert read_folder(folder / "folder") == NEW


def fail_calls(patch: pytest.MonkeyPatch, numbers: range, error: int) -> list[str]:
    """Make the system calls with these numbers, counted from 0 over all kinds, fail; the list of those that did."""
    count, failed = itertools.count(), []

    def failing(name: str, real):
        def call(*arguments, **words):
            if next(count) in numbers:
                failed.append(name)
                raise OSError(error, os.strerror(error))
            return real(*arguments, **words)

        return call

    for name in SYSTEM_CALLS:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return failed


def killed_before(number: int, work) -> bool:
    """Do `work` in a forked process that is killed before file call `number`; whether it came so far."""
    child = os.fork()
    if not child:
        count = itertools.count()

        def call(event: str) -> None:
            if event in FILE_EVENTS and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(descriptor: int, real=os.fsync) -> None:
            call("open")
            real(descriptor)

        try:
            os.fsync = fsync
            sys.addaudithook(lambda event, _: call(event))
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("work", [replace_file, replace_folder])
def test_a_disk_error_at_any_call_is_told_and_leaves_the_old_or_the_new(work, old, error, lasting, folder):
    for k in itertools.count():
        begin(folder, old=old)
        done = False
        with pytest.MonkeyPatch.context() as patch:
            failed = fail_calls(patch, range(k, 10**6 if lasting else k + 1), error)
            try:
                work(folder)
                done = True
            except ResourceError as refusal:
                assert str(folder) in refusal.where
        if not lasting:
            assert not list(folder.glob(f"{files.PARTIAL}*"))
            assert read_folder(folder / "folder") in (OLD if old else None, NEW), "gone until recovery"
        require_old_or_new(folder, old=old)
        if done:
            require_new(work, folder)
        if not failed:
            break
    assert k >= 3 and done, "the disk never failed"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("work", [replace_file, replace_folder])
def test_a_kill_at_any_call_leaves_the_old_or_the_new(work, old, folder):
    for k in itertools.count():
        begin(folder, old=old)
        killed = killed_before(k, lambda: work(folder))
        require_old_or_new(folder, old=old)
        if not killed:
            break
    assert k >= 4, "the writer was never killed"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_kill_at_any_call_of_the_recovery_from_a_kill_loses_nothing(folder):
    for k in itertools.count():
        begin(folder, old=True)
        (folder / "folder").rename(folder / f"{files.RETIRED}folder")
        (folder / f"{files.PARTIAL}folder-7").mkdir()
        fill(folder / f"{files.PARTIAL}folder-7", NEW)
        killed = killed_before(k, lambda: files.remove_partials(folder))
        require_old_or_new(folder, old=True)
        if not killed:
            break
    assert k >= 4, "the recovery was never killed"


@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("work", [replace_file, replace_folder])
def test_what_gets_its_name_is_on_the_disk_and_then_its_name_is(work, old, folder, flushed, monkeypatch):
    renamed = []

    def checked(real):
        def rename(source, target):
            renamed.append(target)
            assert flushed.all_below(source), f"{target} would be torn"
            real(source, target)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    begin(folder, old=old)
    work(folder)
    assert flushed.all_below(folder) and renamed


def test_the_names_of_folders_that_were_made_are_on_the_disk(folder, flushed):
    folder.mkdir()
    files.make_folder(folder / "and" / "those" / "below")
    assert flushed.all_below(folder)


def test_what_a_journal_or_a_manifest_records_is_on_the_disk(folder, flushed):
    with files.resumable_folder(folder, "key") as journal:
        for name in NEW:
            fill(journal.folder, {name: NEW[name]})
            journal.add(name, hashlib.sha256(NEW[name]).hexdigest())
            assert flushed.content(journal.folder / name) and flushed.name(journal.folder / name)
        fill(journal.folder, {"b": b"new"})
        entry = files.written(journal.folder / "b", hashlib.sha256(b"new").hexdigest())
        assert flushed.content(journal.folder / "b") and entry["bytes"] == 3


@pytest.mark.parametrize("content, found", [(None, "No such file"), ("é".encode("latin-1"), "UTF-8")])
def test_a_text_that_cannot_be_read_is_refused_as_the_caller_says(tmp_path, content, found):
    path = tmp_path / "text"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match=found) as refused:
        files.read_text(path, expected="a poem", mend="Write one.")
    assert (refused.value.where, refused.value.expected, refused.value.mend) == (str(path), "a poem", "Write one.")
    path.write_text("é", encoding="utf-8")
    assert files.read_text(path, expected="a poem", mend="Write one.") == "é"


def test_a_folder_killed_between_its_renames_can_be_written_again_without_recovery(folder):
    begin(folder, old=True)
    (folder / "folder").rename(folder / f"{files.RETIRED}folder")
    replace_folder(folder)
    require_new(replace_folder, folder)
    shutil.copytree(folder / "folder", folder / f"{files.RETIRED}folder")
    replace_folder(folder)
    require_new(replace_folder, folder)


@pytest.mark.parametrize("work", [replace_file, replace_folder])
def test_a_finished_write_leaves_the_new_and_nothing_else(work, folder):
    begin(folder, old=True)
    work(folder)
    assert {path.name for path in folder.iterdir()} == {"file", "folder"}
    require_new(work, folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_block_that_raises_changes_nothing(error, folder):
    begin(folder, old=True)
    with pytest.raises(error), files.whole_folder(folder / "folder") as partial:
        fill(partial, NEW)
        raise error
    assert {path.name for path in folder.iterdir()} == {"file", "folder"}
    assert read_folder(folder / "folder") == OLD


def test_remove_partials_names_what_it_removed_and_touches_nothing_else(folder):
    begin(folder, old=True)
    (folder / f"{files.PARTIAL}file-1").write_bytes(b"ha")
    (folder / f"{files.PARTIAL}folder-2").mkdir()
    assert files.remove_partials(folder) == [f"{files.PARTIAL}file-1", f"{files.PARTIAL}folder-2"]
    assert files.remove_partials(folder) == []
    assert {path.name for path in folder.iterdir()} == {"file", "folder"}


def resume_folder(folder: Path, key: str = "key") -> list[str]:
    """Write NEW, taking up what is there of it; the names of the files that were written."""
    written = []
    with files.resumable_folder(folder / "folder", key) as journal:
        for name in [name for name in NEW if name not in journal.finished]:
            fill(journal.folder, {name: NEW[name]})
            written.append(name)
            if name != "sub/c":
                journal.add(name, hashlib.sha256(NEW[name]).hexdigest())
    return written


def in_journal(folder: Path) -> set[str]:
    """The files that wait beside `folder / "folder"` for the rest."""
    journal = folder / f"{files.RESUMABLE}folder" / "journal.json"
    return set(json.loads(journal.read_text())["files"]) if journal.exists() else set()


def require_resumed(folder: Path, *, old: bool) -> set[str]:
    """After a failure: old or new; after another call, which writes only the rest: new. What had been finished."""
    files.remove_partials(folder)
    renamed = read_folder(folder / "folder") == NEW
    assert renamed or read_folder(folder / "folder") == (OLD if old else None)
    finished = in_journal(folder)
    assert resume_folder(folder) == [name for name in NEW if renamed or name not in finished]
    assert read_folder(folder / "folder") == NEW
    assert {path.name for path in folder.iterdir()} <= {"file", "folder"}
    return finished


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
def test_after_a_disk_error_at_any_call_a_resumable_folder_goes_on(old, error, lasting, folder):
    finished = []
    for k in itertools.count():
        begin(folder, old=old)
        with pytest.MonkeyPatch.context() as patch:
            failed = fail_calls(patch, range(k, 10**6 if lasting else k + 1), error)
            with contextlib.suppress(ResourceError):
                resume_folder(folder)
        finished.append(require_resumed(folder, old=old))
        if not failed:
            break
    assert set() in finished and {"a", "sub/manifest.json"} in finished


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
def test_after_a_kill_at_any_call_a_resumable_folder_goes_on(old, folder):
    finished = []
    for k in itertools.count():
        begin(folder, old=old)
        killed = killed_before(k, lambda: resume_folder(folder))
        finished.append(require_resumed(folder, old=old))
        if not killed:
            break
    assert set() in finished and {"a"} in finished and {"a", "sub/manifest.json"} in finished


@pytest.fixture
def half(folder) -> Path:
    """A folder beside which a resumable one waits, with `a` finished."""
    begin(folder, old=True)
    with pytest.raises(KeyboardInterrupt), files.resumable_folder(folder / "folder", "key") as journal:
        fill(journal.folder, NEW)
        journal.add("a", hashlib.sha256(NEW["a"]).hexdigest())
        raise KeyboardInterrupt
    return folder


def test_an_interrupted_block_keeps_the_old_folder_and_what_is_finished_of_the_new(half):
    assert read_folder(half / "folder") == OLD
    kept = half / f"{files.RESUMABLE}folder"
    assert {str(path.relative_to(kept)) for path in kept.rglob("*")} == {"journal.json", "folder", "folder/a"}
    assert files.remove_partials(half) == [], "it waits for the next call"
    assert resume_folder(half) == ["sub/c", "sub/manifest.json"]
    assert read_folder(half / "folder") == NEW


def test_another_key_starts_anew_and_a_third_finds_nothing_of_the_first(half):
    assert resume_folder(half, "other key") == list(NEW)
    assert resume_folder(half) == list(NEW)


@pytest.mark.parametrize("content", [b"old and longer", b"new", None], ids=["another hash", "another size", "missing"])
def test_a_finished_file_that_was_damaged_is_written_again(half, content):
    path = half / f"{files.RESUMABLE}folder" / "folder" / "a"
    path.unlink() if content is None else path.write_bytes(content)
    assert resume_folder(half) == list(NEW)
    assert read_folder(half / "folder") == NEW


def test_a_journal_that_cannot_be_read_starts_anew(half):
    (half / f"{files.RESUMABLE}folder" / "journal.json").write_text("{")
    assert resume_folder(half) == list(NEW)


def test_the_end_does_not_read_finished_files_again(half, monkeypatch):
    hashed = []
    with files.resumable_folder(half / "folder", "key") as journal:
        fill(journal.folder, {"sub/c": NEW["sub/c"]})
        real = files.sha256
        monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or real(path))
    assert hashed == ["c"]
    assert read_folder(half / "folder") == {name: NEW[name] for name in ("a", "sub/c")}


def test_space_is_needed_only_for_what_is_not_finished(half, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    finished = len(NEW["a"])
    with files.resumable_folder(half / "folder", "key", need_bytes=100 + finished):
        pass
    with pytest.raises(ResourceError, match="full disk"), files.resumable_folder(half / "else", "key", need_bytes=101):
        pass
    assert {path.name for path in half.iterdir()} == {"file", "folder"}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_second_writer_is_refused_whatever_its_key_and_disturbs_nothing(half):
    with files.resumable_folder(half / "folder", "key") as journal:
        fill(journal.folder, NEW)
        for key in ("key", "other key"):
            with pytest.raises(ResourceError, match="another process"):
                resume_folder(half, key)
        child = os.fork()
        if not child:
            try:
                resume_folder(half)
            except ResourceError:
                os._exit(3)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert read_folder(half / "folder") == NEW
    assert {path.name for path in half.iterdir()} == {"file", "folder"}


FULL_DISK = """
import sys
from pathlib import Path
from espalier import files
from espalier.errors import DataError, ResourceError
folder = Path(sys.argv[1])
files.write_bytes(folder / "file", b"old")
with files.whole_folder(folder / "folder") as partial:
    files.write_bytes(partial / "a", b"old")
def write_file():
    files.write_bytes(folder / "file", bytes(3_000_000))
def write_folder():
    with files.whole_folder(folder / "folder") as partial:
        (partial / "a").write_bytes(bytes(3_000_000))
def write_too_much():
    with files.whole_folder(folder / "folder", need_bytes=10**15):
        raise AssertionError("the block was entered")
for work in [write_file, write_folder, write_too_much]:
    try:
        work()
    except ResourceError as error:
        assert "full disk" in error.found, error
    else:
        raise AssertionError("written")
    assert (folder / "file").read_bytes() == b"old"
    assert (folder / "folder" / "a").read_bytes() == b"old" and files.damage(folder / "folder") is None
    assert sorted(path.name for path in folder.iterdir()) == ["file", "folder"]
print("kept")
"""


def test_a_really_full_disk_is_told_and_keeps_the_old_files(tmp_path):
    mount = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"', str(tmp_path)]
    python = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    can_mount = shutil.which("unshare") and not subprocess.run([*mount, "true"], capture_output=True).returncode
    done = subprocess.run(
        [*mount, *python] if can_mount else python,
        # Where nothing can be mounted, a limit on the size of files stands in for the disk.
        preexec_fn=None if can_mount else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20,) * 2),
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("kept\n", "")


def test_a_parent_that_cannot_be_made_is_told(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        fail_calls(patch, range(10**6), errno.ENOSPC)
        with pytest.raises(ResourceError, match="full disk"), files.whole_folder(tmp_path / "not" / "there" / "yet"):
            pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("damage") / "whole"
    with files.whole_folder(path) as folder:
        (folder / "trainer" / "inner").mkdir(parents=True)
        for name, size in {"model.bin": 400, "config.json": 30, "trainer/state.bin": 90, "trainer/none.bin": 0}.items():
            (folder / name).write_bytes(rng.randbytes(size))
        fill(folder / "trainer" / "inner", {"manifest.json": b'{"files": {}}'})
    return path


@given(st.randoms(use_true_random=False), st.sampled_from(["flip", "cut", "grow", "remove", "swap"]))
@settings(deadline=None, max_examples=500)
def test_every_mutation_of_a_file_is_found_and_named(whole, rng, mutation):
    path = rng.choice([p for p in sorted(whole.rglob("*")) if p.is_file() and p.stat().st_size])
    content = path.read_bytes()
    place = rng.randrange(len(content))
    if mutation == "remove":
        path.unlink()
    elif mutation == "swap":
        path.write_bytes(content[::-1] if content != content[::-1] else content + b"x")
    else:
        byte = bytes([content[place] ^ (1 << rng.randrange(8))])
        changed = {
            "flip": content[:place] + byte + content[place + 1 :],
            "cut": content[:place],
            "grow": content + b"0",
        }
        path.write_bytes(changed[mutation])
    try:
        found = files.damage(whole)
        assert found is not None
        assert path == whole / files.MANIFEST or str(path.relative_to(whole)) in found
    finally:
        path.write_bytes(content)
    assert files.damage(whole) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
@settings(deadline=None, max_examples=50)
def test_a_manifest_of_any_other_form_is_damage_and_no_crash(whole, value):
    path = whole / files.MANIFEST
    content = path.read_bytes()
    try:
        for manifest in (value, {"files": value}, {"files": {"config.json": value}}):
            path.write_text(json.dumps(manifest, indent=2) + "\n")
            assert files.damage(whole) or not manifest["files"]
    finally:
        path.write_bytes(content)


def test_a_folder_without_a_manifest_was_never_finished(tmp_path):
    assert "never finished" in files.damage(tmp_path)
    assert "never finished" in files.damage(tmp_path / "missing")


@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=2))
def test_a_digest_ignores_the_order_of_keys_and_nothing_else(value):
    assert files.digest(dict(reversed(value.items()))) == files.digest(value)
    key = next(iter(value))
    assert files.digest({**value, key: [value[key]]}) != files.digest(value)


@given(st.binary())
@settings(deadline=None, max_examples=20)
def test_sha256_is_that_of_the_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    files.write_bytes(path, content)
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()


def test_home_is_where_the_environment_says(monkeypatch, tmp_path):
    assert files.home() == tmp_path / "home"
    monkeypatch.delenv("ESPALIER_HOME")
    assert files.home() == Path.home() / ".cache" / "espalier"
