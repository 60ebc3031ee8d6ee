"""Tensors come and go bit for bit, one in memory at a time; bad headers are refused; a killed writer is taken up."""

import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from espalier import files
from espalier.errors import ModelError, ResourceError
from espalier.folder import INDEX, WEIGHTS, ModelFolder
from espalier.model import build, shards
from espalier.model.mup import Parametrization
from espalier.model.shards import DTYPES, Planned, Weights
from espalier.spec import ModelSpec

Tensors = dict[str, torch.Tensor]

EVENTS = {"make", "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
SPEC = ModelSpec(vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits; for bool 0 and 1, which are all that it has."""
    size = dtype.itemsize
    values = torch.randint(256 if dtype != torch.bool else 2, (*shape, size), generator=torch.manual_seed(seed))
    return values.to(torch.uint8).view(dtype).view(shape)


def bits(tensors: Tensors) -> dict:
    """What is compared: NaN equals itself."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
        for name, tensor in tensors.items()
    }


def plan(tensors: Tensors) -> list[Planned]:
    return [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write(folder: Path, tensors: Tensors, **more) -> None:
    shards.write(folder, plan(tensors), tensors.__getitem__, **more)


def read(folder: Path) -> Tensors:
    weights = Weights.open(ModelFolder(folder))
    return {name: weights.read(name) for name in weights.names}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """For one example: in memory if the system has that, since there flushing takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture
def folder():
    with own_folder() as path:
        yield path


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
SIZES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(max_size=5).filter(str.isprintable),
    st.builds(random_tensor, st.sampled_from(list(DTYPES.values())), SHAPES, st.integers(0, 9)),
    min_size=1,
    max_size=6,
)


@given(TENSORS, st.integers(1, 500))
@settings(max_examples=60)
def test_what_is_written_is_read_bit_for_bit_here_and_by_safetensors(tensors, shard_bytes):
    with own_folder() as folder:
        write(folder, tensors, shard_bytes=shard_bytes)
        weights = Weights.open(ModelFolder(folder))
        assert {(n, weights.shape(n), weights.dtype(n)) for n in weights.names} == {
            (planned.name, planned.shape, planned.dtype) for planned in plan(tensors)
        }
        assert weights.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert bits(read(folder)) == bits(tensors)
        theirs = [load_file(path) for path in ModelFolder(folder).weight_files()]
        assert bits(dict(itertools.chain.from_iterable(each.items() for each in theirs))) == bits(tensors)


@given(TENSORS)
@settings(max_examples=30)
def test_what_safetensors_writes_is_read(tensors):
    with own_folder() as folder:
        save_file(tensors, folder / WEIGHTS)
        assert bits(read(folder)) == bits(tensors)


@given(st.sampled_from(list(DTYPES.values())), st.lists(SIZES, min_size=1, max_size=8), st.integers(1, 300))
@settings(max_examples=40)
def test_files_are_those_of_huggingface_hub_byte_for_byte(dtype, shapes, shard_bytes):
    tensors = {f"layers.{n}": random_tensor(dtype, shape, n) for n, shape in enumerate(shapes)}
    with own_folder() as ours, own_folder() as theirs:
        write(ours, tensors, shard_bytes=shard_bytes)
        save_torch_state_dict(tensors, theirs, max_shard_size=shard_bytes)
        found, expected = contents(ours), contents(theirs)
        # Theirs is in no order and has no new line at its end; transformers, like us, writes it sorted and with one.
        assert json.loads(found.pop(INDEX, "{}")) == json.loads(expected.pop(INDEX, "{}"))
        assert found == expected


def test_every_tensor_starts_at_a_multiple_of_its_elements_size(folder):
    tensors = {str(dtype): random_tensor(dtype, (3,)) for dtype in reversed(DTYPES.values())}
    write(folder, tensors)
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    for entry in header.values():
        assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_transformers_opens_what_is_written(folder, shard_bytes):
    model = build.build(SPEC, Parametrization(kind="standard"), seed=0)
    model.config.save_pretrained(folder)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    write(folder, weights, shard_bytes=shard_bytes)
    assert (folder / INDEX).exists() == (shard_bytes == 5000)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert bits(dict(opened.named_parameters())) == bits(weights)


def test_any_memory_layout_and_a_tensor_that_wants_gradients_can_be_written(folder):
    base = torch.randn(4, 6)
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": base[:1].expand(3, 6),
        "trained": torch.nn.Parameter(base),
    }
    write(folder, tensors)
    assert bits(read(folder)) == bits({name: tensor.detach().clone() for name, tensor in tensors.items()})


@pytest.mark.parametrize("made", [torch.zeros(3), torch.zeros(2, dtype=torch.float16)])
def test_a_tensor_that_was_not_made_as_planned_is_our_own_error(folder, made):
    with pytest.raises(AssertionError, match=r"a\.weight: .* not as planned"):
        shards.write(folder, [Planned("a.weight", (2,), torch.float32)], lambda name: made)


def with_header(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: object = 0, end: object = 8, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "empty": (b"", "header"),
    "no length": (b"\x08\0\0", "header"),
    "length beyond the file": (with_header({}, length=3), "header"),
    "length beyond any file": (with_header({}, length=2**64 - 1), "header"),
    "no JSON": (with_header(b"{'a'}"), "header"),
    "no UTF-8": (with_header(b'{"\xff": 1}'), "header"),
    "nested beyond measure": (with_header(b"[" * 200_000), "header"),
    "a list": (with_header([1]), "header"),
    "a name that is no text": (with_header({"\ud800": entry()}, bytes(8)), r"'\ud800'"),
    "a name that steers the terminal": (with_header({"\x1b[2J": entry()}, bytes(8)), r"'\x1b[2J'"),
    "an entry that is none": (with_header({"bad": 3}), "bad"),
    "an entry without offsets": (with_header({"bad": {"dtype": "F32", "shape": [2]}}), "bad"),
    "three offsets": (with_header({"bad": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)), "bad"),
    "offsets of text": (with_header({"bad": entry("0", "8")}, bytes(8)), "bad"),
    "an unknown dtype": (with_header({"bad": entry(dtype="F4")}, bytes(8)), "bad"),
    "a dtype that is none": (with_header({"bad": entry(dtype=["F32"])}, bytes(8)), "bad"),
    "another size than the shape's": (with_header({"bad": entry(shape=[3])}, bytes(8)), "bad"),
    "a negative size": (with_header({"bad": entry(shape=[-1, -2])}, bytes(8)), "bad"),
    "a size that is no number": (with_header({"bad": entry(shape=[True, 2.0])}, bytes(8)), "bad"),
    "empty, of more than memory": (with_header({"bad": entry(0, 0, [2**62, 2**62, 0])}), "bad"),
    "endless dimensions": (with_header({"bad": entry(shape=[2] + [1] * 1000)}, bytes(8)), "bad"),
    "an end before the start": (with_header({"bad": entry(8, 0)}, bytes(8)), "bad"),
    "a start in the header": (with_header({"bad": entry(-8, 0)}), "bad"),
    "data beyond the file": (with_header({"bad": entry(0, 8)}, bytes(7)), "bad"),
    "data of another": (with_header({"a": entry(0, 8), "bad": entry(4, 12)}, bytes(12)), "bad"),
    "the same data": (with_header({"bad": entry(), "bad too": entry()}, bytes(8)), "bad too"),
    "a hole": (with_header({"a": entry(0, 8), "bad": entry(12, 20)}, bytes(20)), "bad"),
    "a hole at the start": (with_header({"bad": entry(4, 12)}, bytes(12)), "bad"),
    "a hole at the end": (with_header({"bad": entry()}, bytes(9)), "bad"),
    "a hole instead of tensors": (with_header({}, bytes(9)), "header"),
}


@pytest.mark.parametrize(("content", "name"), HOSTILE.values(), ids=HOSTILE)
def test_a_bad_header_is_refused_with_file_and_tensor(tmp_path, content, name):
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError) as refusal:
        Weights.open(ModelFolder(tmp_path))
    assert refusal.value.where == f"{tmp_path / WEIGHTS}: {name}"


@given(st.data())
@settings(max_examples=300)
def test_a_file_with_any_damage_is_refused_or_can_be_read(data):
    with own_folder() as folder:
        write(folder, {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.ones(())})
        content = bytearray((folder / WEIGHTS).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(32, 126) | st.integers(0, 255))
        (folder / WEIGHTS).write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
        with contextlib.suppress(ModelError):
            read(folder)


def test_a_file_that_is_cut_after_it_was_opened_is_told(tmp_path):
    write(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)})
    weights = Weights.open(ModelFolder(tmp_path))
    os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size - 1)
    weights.read("a")
    with pytest.raises(ModelError, match=f"{WEIGHTS}: b"):
        weights.read("b")


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Three files of one tensor each, a, b and c."""
    write(tmp_path, {name: torch.ones(3) for name in "abc"}, shard_bytes=12)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda there: there.pop("b") and there.update(a=there["c"]), "a"),
        (lambda there: there.update(c=there["b"], b=there["c"]), "b"),
        (lambda there: there.update(d=there["c"]), "d"),
        (lambda there: there.update(b=f"./{there['a']}"), "a"),
    ],
    ids=["misses one", "mistakes two", "invents one", "names a file twice"],
)
def test_an_index_that_disagrees_with_the_files_is_refused(sharded, change, name):
    index = json.loads((sharded / INDEX).read_text())
    change(index["weight_map"])
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError) as refusal:
        Weights.open(ModelFolder(sharded))
    assert refusal.value.where.endswith(f": {name}")


def test_a_tensor_in_a_file_that_the_index_does_not_give_it_is_refused(sharded):
    first = ModelFolder(sharded).weight_files()[0]
    save_file({"a": torch.ones(3), "extra": torch.ones(3)}, first)
    with pytest.raises(ModelError, match=r"index\.json: extra"):
        Weights.open(ModelFolder(sharded))


def test_a_name_in_two_files_is_refused(sharded):
    second = ModelFolder(sharded).weight_files()[1]
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, second)
    with pytest.raises(ModelError, match=f"{second.name}: a"):
        Weights.open(ModelFolder(sharded))


COPY = """
import sys
from pathlib import Path
import torch
from espalier import files
from espalier.folder import ModelFolder
from espalier.model.shards import Planned, Weights, write

def peak_mb():
    # Not ru_maxrss: what a process had before it became this one would count.
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

def copy(source, out):
    weights = Weights.open(ModelFolder(source))
    planned = [Planned(name, weights.shape(name), weights.dtype(name)) for name in weights.names]
    with files.resumable_folder(out, "key") as journal:
        write(journal.folder, planned, weights.read, shard_bytes=20_000_000, done=journal)

folder = Path(sys.argv[1])
write(folder, [Planned("one", (2**18,), torch.float32)], lambda name: torch.zeros(2**18))
copy(folder, folder / "small")
write(folder, [Planned(f"{n:02}", (2**18,), torch.float32) for n in range(160)], lambda name: torch.zeros(2**18))
Path("/proc/self/clear_refs").write_text("5")
before = peak_mb()
copy(folder, folder / "large")
copied = peak_mb()
weights = Weights.open(ModelFolder(folder))
all_at_once = [weights.read(name) for name in weights.names]
print(int(copied - before), int(peak_mb() - before))
"""


def test_copying_a_model_takes_the_memory_of_a_few_tensors(folder):
    done = subprocess.run([sys.executable, "-c", COPY, str(folder)], capture_output=True, text=True)
    assert done.stderr == ""
    copied_mb, all_at_once_mb = map(int, done.stdout.split())
    # The allocator keeps up to 22 MB, of however many tensors.
    assert copied_mb <= 40 and all_at_once_mb >= 120, "160 tensors of 1 MB"


FOUR_SHARDS = {f"layers.{n}": random_tensor(torch.bfloat16, (5, 8), n) for n in range(7)}
SHARD_BYTES = 2 * 80


def grow(path: Path, tensors: Tensors = FOUR_SHARDS, *, key: str = "key", shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write tensors as a folder that can be taken up; the names of those that were made, also in `grow.made`."""
    made = grow.made = []

    def make(name: str) -> torch.Tensor:
        sys.audit("make")
        made.append(name)
        return tensors[name]

    with files.resumable_folder(path, key) as journal:
        shards.write(journal.folder, plan(tensors), make, shard_bytes=shard_bytes, done=journal)
    return made


def unfinished(path: Path) -> list[str]:
    """Those of the tensors whose shards wait beside `path` for the rest."""
    journal = path.with_name(f"{files.RESUMABLE}{path.name}") / "journal.json"
    finished = json.loads(journal.read_text())["files"] if journal.exists() and not path.exists() else {}
    return [name for n, name in enumerate(FOUR_SHARDS) if f"model-{n // 2 + 1:05}-of-00004.safetensors" not in finished]


def killed_at(number: int, work) -> bool:
    """Do `work` in a forked process that is killed at event `number`; whether it came so far."""
    child = os.fork()
    if not child:
        count = itertools.count()

        def hook(event: str, _) -> None:
            if event in EVENTS and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_kill_anywhere_costs_the_unfinished_shard_and_changes_no_byte(folder):
    assert grow(folder / "whole") == list(FOUR_SHARDS)
    whole, left = contents(folder / "whole"), []
    for k in itertools.count():
        path = folder / f"killed-{k}"
        killed = killed_at(k, lambda path=path: grow(path))
        if not killed:
            break
        if not path.exists():
            left.append(len(unfinished(path)))
        assert unfinished(path) == grow(path)
        assert contents(path) == whole and files.damage(path) is None
        assert not path.with_name(f"{files.RESUMABLE}{path.name}").exists()
    assert left == sorted(left, reverse=True) and set(left) == {7, 5, 3, 1, 0}


def test_another_key_starts_anew(folder):
    with pytest.raises(ZeroDivisionError), files.resumable_folder(folder / "model", "key") as journal:
        write(journal.folder, FOUR_SHARDS, shard_bytes=SHARD_BYTES, done=journal)
        raise ZeroDivisionError
    assert unfinished(folder / "model") == []
    assert grow(folder / "model", key="other key") == list(FOUR_SHARDS)


def test_a_full_disk_is_told_and_the_next_call_goes_on(folder):
    tensors = {"first": torch.ones(1000), "third": torch.ones(1000), "second, too large": torch.ones(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match="full disk"):
            grow(folder / "model", tensors, shard_bytes=4000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert grow.made == ["first", "second, too large"]
    assert grow(folder / "model", tensors, shard_bytes=4000) == ["second, too large", "third"]
    assert bits(read(folder / "model")) == bits(tensors)
