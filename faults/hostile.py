"""Hostile artefacts: files that would run code, read or write elsewhere, or break their reader, and their benign twins.

`ARTEFACTS` is the table: how each is made, which real entry point opens it, and which refusal it must meet. `tried`
opens one in a child process under an audit hook that notes every program, socket, import of the artefact's own code
and file outside; so the hook, and whatever the artefact did, is gone with the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 60
CANARY = "canary"
SECRET = "secret"
SEEN = "seen"  # where the watch notes what an artefact does, in whichever process
# What a payload would do, or open; an artefact never has a reason to.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")
LOOKED_UP = ("socket.getaddrinfo", "socket.gethostbyname")
ROOM = 4 * 2**30  # address space that opening may take beyond what the process has


@dataclass(frozen=True)
class Artefact:
    """A file or folder to be opened.

    name   what is wrong with it
    fault  the row of the fault table, or "clean"
    make   writes it into an empty folder and gives its path; SECRET lies beside the folder, and CANARY may not
    open   the entry point that a user reaches it by
    error  the class of the refusal; None where it must be opened
    says   a word of the refusal
    """

    name: str
    fault: str
    make: Callable[[Path], Path]
    open: Callable[[Path], Any]
    error: str | None
    says: str = ""


@dataclass
class Told:
    """What came of opening an artefact: "opened" or the refusal's class, its four lines, what was seen meanwhile."""

    ended: str
    lines: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0


# Payloads ------------------------------------------------------------------------------------------------------------


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path, call: str = "system"):
        self.canary, self.call = canary, call

    def __reduce__(self) -> tuple[Any, ...]:
        line = f"open({str(self.canary)!r}, 'w').close()"
        calls: dict[str, tuple[Any, ...]] = {
            "system": (os.system, (f"touch {self.canary}",)),
            "exec": (exec, (line,)),
            "eval": (eval, (line,)),
            "open": (open, (str(self.canary), "w")),
        }
        return calls[self.call]


def canary(folder: Path) -> Path:
    """The file that no payload may make: beside the artefact's folder."""
    return folder.parent / CANARY


def secret(folder: Path) -> Path:
    """A file that no artefact may have read: beside its folder."""
    return folder.parent / SECRET


def code(folder: Path) -> str:
    """A module that would make the canary when it is imported."""
    return f"open({str(canary(folder))!r}, 'w').close()\nclass Model: pass\nclass Config: pass\n"


# Makers --------------------------------------------------------------------------------------------------------------

Make = Callable[[Path], Path]


def model(folder: Path) -> Path:
    """A clean model folder with a tokenizer and a chat template, copied from one that is made once."""
    shutil.copytree(_clean_model(), folder, dirs_exist_ok=True)
    return folder


_CLEAN: list[Path] = []


def _clean_model() -> Path:
    if not _CLEAN:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import AutoConfig, AutoModelForCausalLM

        path = Path(tempfile.mkdtemp(prefix="espalier-clean-"))
        sizes = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = AutoConfig.for_model("granite", **sizes, num_attention_heads=2, bos_token_id=0, eos_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        ids = {token: id for id, token in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        tokenizer = Tokenizer(models.BPE(ids, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|end|>"])
        tokenizer.save(str(path / "tokenizer.json"))
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|end|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(told))
        (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        _CLEAN.append(path)
    return _CLEAN[0]


def edited(name: str, **keys: Any) -> Make:
    """A model folder with keys added to one of its JSON files; "{}" in a value stands for the artefact's folder."""

    def make(folder: Path) -> Path:
        model(folder)
        text = json.dumps(keys).replace("{}", str(folder))
        old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(old | json.loads(text)))
        for file in ("code.py", "modeling_x.py"):
            (folder / file).write_text(code(folder))
        return folder

    return make


def replaced(name: str, content: bytes | Callable[[Path], bytes], *, without: tuple[str, ...] = ()) -> Make:
    """A model folder with one file's content given, and others removed."""

    def make(folder: Path) -> Path:
        model(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        for other in without:
            (folder / other).unlink()
        (folder / name).write_bytes(content(folder) if callable(content) else content)
        return folder

    return make


def pickled(call: str = "system", protocol: int = 2) -> Callable[[Path], bytes]:
    return lambda folder: pickle.dumps(Bomb(canary(folder), call), protocol)


def torch_saved(folder: Path) -> bytes:
    """The zip that torch.save writes, with a bomb in it."""
    import torch

    buffer = io.BytesIO()
    torch.save({"lm_head.weight": Bomb(canary(folder))}, buffer)
    return buffer.getvalue()


def instead(name: str, content: Callable[[Path], bytes]) -> Make:
    """A model whose only weights are in another format."""
    return replaced(name, content, without=("model.safetensors",))


def indexed(*names: str) -> Make:
    """A model whose index says that its weights are in these files; "{}" stands for the artefact's parent folder."""

    def make(folder: Path) -> Path:
        model(folder)
        weights = (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        shutil.copy(weights, folder.parent / "outside.safetensors")
        stated = {str(number): name.replace("{}", str(folder.parent)) for number, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": stated}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


def header(length: int | None = None, **entries: Any) -> bytes:
    """A safetensors file with this header, and 64 bytes of data."""
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 64


def tensor(*offsets: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def rows(*lines: bytes, good: int = 40) -> Make:
    """JSON lines with a few bad ones among good ones."""

    def make(folder: Path) -> Path:
        path = folder / "rows.jsonl"
        clean = [json.dumps({"text": f"row {number}"}).encode() for number in range(good)]
        path.write_bytes(b"\n".join([*clean[:5], *lines, *clean[5:]]) + b"\n")
        return path

    return make


def text(name: str, content: bytes | Callable[[Path], bytes]) -> Make:
    """One file alone in the folder."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content(folder) if callable(content) else content)
        return folder / name

    return make


def tar(mode: str = "w", **members: str) -> Callable[[Path], bytes]:
    """A tar archive of files, or of links where the value begins with ->."""

    def content(folder: Path) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:
            for name, held in members.items():
                member = tarfile.TarInfo(name.replace("PARENT", str(folder.parent)))
                if held.startswith("->"):
                    member.type, member.linkname = tarfile.SYMTYPE, held.removeprefix("->")
                member.size = 0 if held.startswith("->") else len(held)
                archive.addfile(member, io.BytesIO(held.encode()))
        return buffer.getvalue()

    return content


def zipped(**members: str) -> Callable[[Path], bytes]:
    def content(folder: Path) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, held in members.items():
                archive.writestr(name.replace("PARENT", str(folder.parent)), held)
        return buffer.getvalue()

    return content


def parquet(build: Callable[[Any], Any]) -> Make:
    def make(folder: Path) -> Path:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(build(pyarrow), folder / "rows.parquet", compression="zstd")
        return folder / "rows.parquet"

    return make


def arrow(spoil: Callable[[bytes], bytes] = lambda content: content, *, pad: bytes = b"") -> Make:
    """Rows as an Arrow stream, with its bytes spoilt."""

    def make(folder: Path) -> Path:
        import pyarrow

        table = pyarrow.table({"text": [f"row {number}" for number in range(40)]})
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        (folder / "rows.arrow").write_bytes(spoil(sink.getvalue().to_pybytes()) + pad)
        return folder / "rows.arrow"

    return make


def offset_beyond(content: bytes) -> bytes:
    """An Arrow stream in which the end of the last text lies two gigabytes behind it."""
    last = (sum(len(f"row {number}") for number in range(40))).to_bytes(4, "little")
    place = content.rindex(last)
    return content[:place] + (2**31 - 1).to_bytes(4, "little") + content[place + 4 :]


def hub(card: str) -> Make:
    """A dataset repository with this card beside harmless rows."""

    def make(folder: Path) -> Path:
        (folder / "own" / "rows").mkdir(parents=True)
        (folder / "own" / "rows" / "README.md").write_text(card.replace("{}", str(folder.parent)))
        (folder / "own" / "rows" / "rows.jsonl").write_text('{"text": "a"}\n')
        return folder

    return make


def checkpoint(spoil: Callable[[Path], None]) -> Make:
    """Somebody's checkpoint: spoilt, under a manifest that matches."""

    def make(folder: Path) -> Path:
        from espalier import files

        model(folder / "checkpoint-3")
        spoil(folder / "checkpoint-3")
        files.write_manifest(folder / "checkpoint-3")
        return folder / "checkpoint-3"

    return make


def _foreign_trainer(folder: Path) -> None:
    (folder / "trainer").mkdir()
    (folder / "trainer" / "optimizer.safetensors").write_bytes(pickled()(folder.parent))


def _foreign_config(folder: Path) -> None:
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    (folder / "code.py").write_text(code(folder.parent))


# Openers: the entry points by which a user's file comes in -----------------------------------------------------------


def load_model(path: Path) -> Any:
    """As every verb that takes a model."""
    from espalier.folder import ModelFolder
    from espalier.model import build

    return build.load(ModelFolder.open(path))


def load_unopened(path: Path) -> Any:
    """As a checkpoint is taken up, whose manifest vouched for it."""
    from espalier.folder import ModelFolder
    from espalier.model import build

    return build.load(ModelFolder(path))


def load_sharded(path: Path) -> Any:
    """As ranks take up a checkpoint: the config makes a skeleton, whose parts are read later."""
    from espalier.folder import ModelFolder
    from espalier.model import build

    return build.skeleton(ModelFolder(path).config)


def stream_model(path: Path) -> Any:
    """As growth from folder to folder, which reads the files itself."""
    from espalier.folder import ModelFolder
    from espalier.model.shards import Weights

    weights = Weights.open(ModelFolder.open(path))
    return [weights.read(name) for name in weights.names]


def chat(path: Path) -> Any:
    """As counting the rows of a conversation."""
    from espalier import template
    from espalier.budget.rows import count

    template.SECONDS = 2.0  # instead of 10: no clean one takes so long
    asked = path.parent / "chat.jsonl"
    asked.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    return count(asked, path, 64)


def choose_tokenizer(path: Path) -> Any:
    """As data.tokenizer=FOLDER."""
    from espalier.data import tokenizer

    tokenizer.check(path)
    return tokenizer.load(path).encode("hello").ids


def prepare(path: Path) -> Any:
    """As data.sources=PATH."""
    from espalier.data.prepare import DataRecipe, prepare

    recipe = DataRecipe.model_validate({"sources": str(path), "held_out": 0.3})
    dataset = prepare(recipe, home=path.parent / ".home", tell=lambda _: None)
    return sum(dataset.rows.values())


def prepare_hub(path: Path) -> Any:
    """As data.sources=hub:own/rows."""
    from espalier.data.sources import Quarantine, Source, read

    os.chdir(path)
    return list(read(Source.model_validate("hub:own/rows"), Quarantine()))


def count_rows(path: Path) -> Any:
    """As budget finetune, which counts a file's rows."""
    from espalier.budget.rows import count

    return count(path, _clean_model(), 64)


def read_recipe(path: Path) -> Any:
    from espalier import recipe
    from espalier.data.prepare import DataRecipe

    return recipe.load(DataRecipe, path, [])


def read_items(path: Path) -> Any:
    from espalier.evaluate.items import read_items

    return read_items(path)


# The watch -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """An empty folder for an artefact, with a secret beside it."""
    with tempfile.TemporaryDirectory(prefix="espalier-hostile-") as name:
        (Path(name) / SECRET).write_text("the secret line\n" * 3)
        (Path(name) / "artefact").mkdir()
        yield Path(name) / "artefact"


def tried(artefact: Artefact) -> Told:
    """Make an artefact, open it in a child process under watch, and say what came of it."""
    with workspace() as folder:
        path = artefact.make(folder)
        readable, writable = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(readable)
            _child(artefact, path, folder, writable)
        os.close(writable)
        with os.fdopen(readable) as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        told = Told(**json.loads(said)) if said else Told(f"died of signal {os.waitstatus_to_exitcode(status)}")
        told.seen += (folder.parent / SEEN).read_text().splitlines() if (folder.parent / SEEN).exists() else []
        if canary(folder).exists():
            told.seen.append("the canary was made")
        return told


def _child(artefact: Artefact, path: Path, folder: Path, writable: int) -> None:
    told, began = Told("opened"), time.monotonic()
    with contextlib.suppress(BaseException):
        os.setpgid(0, 0)
        signal.alarm(SECONDS)
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        os.environ.update(ESPALIER_HOME=str(folder / ".home"), HF_HUB_OFFLINE="1")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
        before = _from_here()
        _watch(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            artefact.open(path)
    except BaseException as error:
        told.ended = type(error).__name__
        told.lines = {key: str(value) for key, value in vars(error).items() if key != "__notes__"}
        if not told.lines:
            told.lines = {"trace": traceback.format_exc()[-2000:]}
    told.seconds, told.peak_bytes = time.monotonic() - began, max(_resident() - before, 0)
    with os.fdopen(writable, "w") as pipe:
        json.dump(vars(told), pipe)
    os._exit(0)


def _from_here() -> int:
    """Count the most memory from here on; what is free inside the process would hide what is taken, and is let go."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident()


def _resident() -> int:
    """The most memory that this process had so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _watch(folder: Path) -> None:
    """Note what an artefact has no reason to do. An audit hook stays for good: only in a child of its own."""
    outside, own, notes = str(folder.parent), str(folder), str(folder.parent / SEEN)

    def note(line: str) -> None:
        file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.replace("\n", " ").encode() + b"\n")
        os.close(file)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if args and args[0] == notes:
            return
        if event in FORBIDDEN or event in LOOKED_UP:
            note(f"{event} {args!r:.120}")
        elif event == "open" and isinstance(args[0], str | bytes):
            name = os.path.realpath(os.fsdecode(args[0]))
            writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
            beside = (
                name.startswith(outside + "/")
                and not (name + "/").startswith(own + "/")
                and not name.endswith(".jsonl")
            )
            own_work = ".home" in name and ("/.partial-" in name or not writes)
            if (beside and not own_work) or name in ("/etc/passwd", "/etc/shadow"):
                note(f"open {name}")
        elif event == "exec" and getattr(args[0], "co_filename", "").startswith(own):
            note(f"ran {args[0].co_filename}")

    sys.addaudithook(hook)


def warm() -> None:
    """Import what the openers need, so that each child starts with it."""
    for name in ("torch", "pyarrow.parquet", "datasets", "transformers", "lm_eval"):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    load_model(_clean_model())
    chat_at = Path(tempfile.mkdtemp(prefix="espalier-warm-")) / "model"
    chat(Path(shutil.copytree(_clean_model(), chat_at)))
    shutil.rmtree(chat_at.parent)


# The table -----------------------------------------------------------------------------------------------------------

CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": [None, "code.Model"]}
KERNEL = "owner/kernel"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
F20, F21, F22, F23, CLEAN = "F20", "F21", "F22", "F23", "clean"


def _jinja(template: str) -> Make:
    return replaced("chat_template.jinja", template.encode())


def _safetensors(content: bytes) -> Make:
    return replaced(WEIGHTS, content)


def _large_id(folder: Path) -> Path:
    """A tokenizer with one id so large that counting to it takes minutes."""
    model(folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"]["x" * 9] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(told))
    return folder


def _many(pa: Any) -> Any:
    """A table of 20000 rows that each are the same megabyte: 20 GB of text in a file of 2 KB."""
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["x" * 2**20])})


LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd") + "x" + "{% endfor %}" * 4
DOUBLED = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
ALIASES = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))

ARTEFACTS = (
    # Programs for the unpickler, wherever a library might fall back to one.
    Artefact(
        "pytorch_model.bin, a pickle", F20, instead("pytorch_model.bin", pickled()), load_model, "ModelError", "pickle"
    ),
    Artefact(
        "pytorch_model.bin, exec",
        F20,
        instead("pytorch_model.bin", pickled("exec")),
        load_model,
        "ModelError",
        "pickle",
    ),
    Artefact(
        "pytorch_model.bin by torch.save",
        F20,
        instead("pytorch_model.bin", torch_saved),
        load_model,
        "ModelError",
        "pickle",
    ),
    Artefact(
        "pytorch_model.bin, unopened",
        F20,
        instead("pytorch_model.bin", torch_saved),
        load_unopened,
        "ModelError",
        "pickle",
    ),
    Artefact("model.pt", F20, instead("model.pt", pickled("eval")), load_model, "ModelError", "pickle"),
    Artefact("model.pth", F20, instead("model.pth", torch_saved), load_model, "ModelError", "pickle"),
    Artefact("model.ckpt", F20, instead("model.ckpt", pickled("open", 4)), load_model, "ModelError", "pickle"),
    Artefact("model.pkl", F20, instead("model.pkl", pickled("open", 0)), load_model, "ModelError", "pickle"),
    Artefact(
        "a pickle called model.safetensors", F20, replaced(WEIGHTS, pickled()), load_model, "ModelError", "header"
    ),
    Artefact(
        "torch.save called model.safetensors", F20, replaced(WEIGHTS, torch_saved), stream_model, "ModelError", "header"
    ),
    Artefact("an index that names a .bin", F20, indexed("pytorch_model.bin"), load_model, "ModelError", "safetensors"),
    Artefact(
        "a pickle called config.json", F20, replaced("config.json", pickled()), load_model, "ModelError", "config.json"
    ),
    Artefact(
        "a pickle called tokenizer.json", F20, replaced("tokenizer.json", pickled()), choose_tokenizer, "DataError"
    ),
    Artefact(
        "a checkpoint's optimizer, a pickle",
        F20,
        checkpoint(_foreign_trainer),
        lambda path: _resume(path),
        "ModelError",
        "header",
    ),
    Artefact("rows.pkl", F20, text("rows.pkl", pickled()), prepare, "DataError"),
    Artefact(
        "rows.npy, an object array", F20, text("rows.npy", lambda folder: _object_array(folder)), prepare, "DataError"
    ),
    Artefact("a pickle called rows.parquet", F20, text("rows.parquet", pickled()), prepare, "DataError", "Parquet"),
    Artefact("a pickle called rows.arrow", F20, text("rows.arrow", pickled()), prepare, "DataError", "Arrow"),
    Artefact("Parquet with pickled objects", F20, parquet(lambda pa: _object_column(pa)), prepare, "DataError"),
    Artefact(
        "a Hub card that asks for pickles",
        F20,
        hub("---\nconfigs:\n- config_name: x\n  data_files: '*.pkl'\n---\n"),
        prepare_hub,
        "DataError",
    ),
    # Requests to run or fetch code, and names that lead elsewhere.
    Artefact(
        "auto_map in config.json", F21, edited("config.json", auto_map=CODE), load_model, "ModelError", "auto_map"
    ),
    Artefact("auto_map, unopened", F21, edited("config.json", auto_map=CODE), load_unopened, "ModelError", "auto_map"),
    Artefact(
        "auto_map, in a checkpoint whose hashes match",
        F21,
        checkpoint(_foreign_config),
        load_unopened,
        "ModelError",
        "auto_map",
    ),
    Artefact(
        "auto_map of an unknown kind",
        F21,
        edited("config.json", auto_map=CODE, model_type="x"),
        load_model,
        "ModelError",
        "auto_map",
    ),
    Artefact(
        "auto_map of a repository",
        F21,
        edited("config.json", auto_map={"AutoModelForCausalLM": "o/r--c.M"}),
        load_model,
        "ModelError",
        "auto_map",
    ),
    Artefact(
        "auto_map below text_config",
        F21,
        edited("config.json", text_config={"auto_map": CODE}),
        load_model,
        "ModelError",
        "text_config.auto_map",
    ),
    Artefact(
        "auto_map in tokenizer_config.json",
        F21,
        edited("tokenizer_config.json", auto_map=CODE),
        load_model,
        "ModelError",
        "auto_map",
    ),
    Artefact(
        "auto_map of an unknown tokenizer",
        F21,
        edited("tokenizer_config.json", auto_map=CODE, tokenizer_class="X"),
        chat,
        "ModelError",
        "auto_map",
    ),
    Artefact(
        "auto_map in generation_config.json",
        F21,
        edited("generation_config.json", auto_map=CODE),
        load_model,
        "ModelError",
        "auto_map",
    ),
    Artefact(
        "custom_pipelines",
        F21,
        edited("config.json", custom_pipelines={"x": {"impl": "code.Model"}}),
        load_model,
        "ModelError",
        "custom_pipelines",
    ),
    Artefact(
        "another config by configuration_files",
        F21,
        edited("config.json", configuration_files=["config.4.0.0.json"]),
        load_model,
        "ModelError",
        "configuration_files",
    ),
    Artefact(
        "another tokenizer by fast_tokenizer_files",
        F21,
        edited("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"]),
        chat,
        "ModelError",
        "fast_tokenizer_files",
    ),
    Artefact(
        "other weights by transformers_weights",
        F21,
        edited("config.json", transformers_weights="adapter_model.bin"),
        load_model,
        "ModelError",
        "transformers_weights",
    ),
    Artefact(
        "attn_implementation from the Hub",
        F21,
        edited("config.json", attn_implementation=KERNEL),
        load_model,
        "ModelError",
        "attn_implementation",
    ),
    Artefact(
        "attention from the Hub, on ranks",
        F21,
        edited("config.json", attn_implementation=KERNEL),
        load_sharded,
        "ModelError",
        "attn_implementation",
    ),
    Artefact("a clean model, on ranks", CLEAN, model, load_sharded, None),
    Artefact(
        "_attn_implementation from the Hub",
        F21,
        edited("config.json", _attn_implementation=f"{KERNEL}@main:f"),
        load_model,
        "ModelError",
        "_attn_implementation",
    ),
    Artefact(
        "experts_implementation from the Hub",
        F21,
        edited("config.json", _experts_implementation=KERNEL),
        load_model,
        "ModelError",
        "_experts_implementation",
    ),
    Artefact(
        "quantization_config",
        F21,
        edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        load_model,
        "ModelError",
        "quantization_config",
    ),
    Artefact(
        "an adapter of another repository",
        F21,
        edited("adapter_config.json", base_model_name_or_path="owner/base"),
        load_model,
        "ModelError",
        "adapter",
    ),
    Artefact(
        "a shard of a distributed checkpoint",
        F21,
        replaced("shard-00001-model-00001-of-00001.safetensors", pickled()),
        load_model,
        "ModelError",
        "shard",
    ),
    Artefact("an index that leaves by ..", F21, indexed("../outside.safetensors"), load_model, "ModelError", ".."),
    Artefact(
        "an index that leaves by a/../..", F21, indexed("a/../../outside.safetensors"), stream_model, "ModelError", ".."
    ),
    Artefact(
        "an index with an absolute path", F21, indexed("{}/outside.safetensors"), load_model, "ModelError", "outside"
    ),
    Artefact(
        "weights beside an index that leaves them out",
        F21,
        lambda folder: _two_weights(folder),
        load_model,
        "ModelError",
        "leaves out",
    ),
    Artefact(
        "an index of the wrong tensors", F21, indexed("model-00001.safetensors"), load_model, "ModelError", "index"
    ),
    Artefact(
        "a template that leaves the sandbox",
        F21,
        _jinja("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ raise_exception('x') }}"),
        chat,
        "DataError",
    ),
    Artefact(
        "a template that calls os.system",
        F21,
        _jinja("{{ cycler.__init__.__globals__.os.system('touch x') }}"),
        chat,
        "DataError",
    ),
    Artefact(
        "a template that reads by attr and format",
        F21,
        _jinja("{{ ('{0.__class__.__init__.__globals__}'|attr('format'))(messages) }}{{ raise_exception('x') }}"),
        chat,
        "DataError",
    ),
    Artefact("a template that includes a file", F21, _jinja("{% include '/etc/passwd' %}"), chat, "DataError"),
    Artefact("a template that imports", F21, _jinja("{% import 'os' as os %}{{ os.system('x') }}"), chat, "DataError"),
    Artefact("a template of loops in loops", F21, _jinja(LOOPS), chat, "ModelError", "more than 2 s"),
    Artefact("a template of a power of powers", F21, _jinja("{{ 10**(10**10) }}"), chat, "ModelError", "more than 2 s"),
    Artefact("a template that doubles a text", F21, _jinja(DOUBLED), chat, "ModelError", "memory"),
    Artefact(
        "a template with a range of 10^12", F21, _jinja("{% for i in range(10**12) %}{% endfor %}"), chat, "DataError"
    ),
    Artefact("a template that divides by zero", F21, _jinja("{{ 1 // 0 }}"), chat, "DataError"),
    Artefact(
        "a Hub card that names a local file",
        F21,
        hub("---\nconfigs:\n- config_name: default\n  data_files: '{}/secret'\n---\n"),
        prepare_hub,
        "DataError",
        "secret",
    ),
    Artefact(
        "a recipe with a Python object",
        F21,
        text("recipe.yaml", b"sources: !!python/object/apply:os.system ['touch x']\n"),
        read_recipe,
        "RecipeError",
    ),
    Artefact(
        "a recipe of a billion aliases",
        F21,
        text("recipe.yaml", ALIASES.encode()),
        read_recipe,
        "RecipeError",
        "stand for",
    ),
    Artefact(
        "a recipe inside itself", F21, text("recipe.yaml", b"sources: &a [*a]\n"), read_recipe, "RecipeError", "alias"
    ),
    Artefact(
        "a recipe of brackets", F21, text("recipe.yaml", b"sources: " + b"[" * 20_000), read_recipe, "RecipeError"
    ),
    Artefact(
        "a recipe with a number of 9000 digits",
        F21,
        text("recipe.yaml", b"seed: " + b"9" * 9000),
        read_recipe,
        "RecipeError",
    ),
    # Headers and configs that claim what isn't there.
    Artefact("a header of 2^60 bytes", F21, _safetensors(header(2**60)), load_model, "ModelError", "header"),
    Artefact(
        "a header of brackets",
        F21,
        _safetensors((90_000).to_bytes(8, "little") + b"[" * 90_000),
        load_model,
        "ModelError",
        "header",
    ),
    Artefact(
        "tensors that overlap",
        F21,
        _safetensors(header(a=tensor(0, 64, shape=[16]), b=tensor(32, 64, shape=[8]))),
        load_model,
        "ModelError",
        "start",
    ),
    Artefact(
        "a tensor beyond the file",
        F21,
        _safetensors(header(a=tensor(0, 2**40, shape=[2**38]))),
        load_model,
        "ModelError",
    ),
    Artefact(
        "a shape that overflows",
        F21,
        _safetensors(header(a=tensor(0, 64, shape=[2**32, 2**32, 2**4]))),
        load_model,
        "ModelError",
        "shape",
    ),
    Artefact(
        "a shape below zero",
        F21,
        _safetensors(header(a=tensor(0, 64, shape=[-4, -4]))),
        stream_model,
        "ModelError",
        "shape",
    ),
    Artefact(
        "offsets backwards",
        F21,
        _safetensors(header(a=tensor(64, 0, shape=[16]))),
        load_model,
        "ModelError",
        "data from",
    ),
    Artefact(
        "bytes that no tensor has",
        F21,
        _safetensors(header(a=tensor(0, 32, shape=[8]))),
        load_model,
        "ModelError",
        "after the last",
    ),
    Artefact(
        "an unknown dtype",
        F21,
        _safetensors(header(a=tensor(0, 64, shape=[16], dtype="O"))),
        load_model,
        "ModelError",
        "dtype",
    ),
    Artefact(
        "a config of brackets", F21, replaced("config.json", b'{"a":' * 20_000), load_model, "ModelError", "config.json"
    ),
    Artefact("an id of four billion", F21, _large_id, choose_tokenizer, "DataError", "id of"),
    Artefact(
        "a billion layers", F21, edited("config.json", num_hidden_layers=10**9), load_model, "ModelError", "layers"
    ),
    Artefact("a config that wants other weights", F21, edited("config.json", hidden_size=16), load_model, "ModelError"),
    Artefact("a config of wrong types", F21, edited("config.json", hidden_size={"a": []}), load_model, "ModelError"),
    # Archives: none is unpacked.
    Artefact(
        "a tar that leaves by ..", F22, text("data.tar", tar(**{"../canary": "x"})), prepare, "DataError", "archive"
    ),
    Artefact(
        "a tar with an absolute path",
        F22,
        text("data.tar.gz", tar("w:gz", **{"PARENT/canary": "x"})),
        prepare,
        "DataError",
        "archive",
    ),
    Artefact(
        "a tar with a link that leads out",
        F22,
        text("data.tgz", tar("w:gz", **{"a": "->..", "a/canary": "x"})),
        prepare,
        "DataError",
        "archive",
    ),
    Artefact(
        "a zip that leaves by ..", F22, text("data.zip", zipped(**{"../canary": "x"})), prepare, "DataError", "archive"
    ),
    Artefact(
        "a zip bomb", F22, text("data.zip", zipped(**{"rows.txt": "x" * 50_000_000})), prepare, "DataError", "archive"
    ),
    Artefact(
        "a gzip called rows.jsonl",
        F22,
        text("rows.jsonl", tar("w:gz", **{"../canary": "x" * 500})),
        prepare,
        "DataError",
        "UTF-8",
    ),
    Artefact(
        "a folder of archives",
        F22,
        lambda folder: text("data.tar", tar(**{"../canary": "x"}))(folder).parent,
        prepare,
        "DataError",
        "archive",
    ),
    # Rows that break their reader.
    Artefact("a line of 200 MB", F23, lambda folder: _long_line(folder), prepare, "DataError", "rows.jsonl:2"),
    Artefact("invalid UTF-8", F23, rows(b'{"text": "caf\xe9"}'), prepare, "DataError", "rows.jsonl:6 byte 13"),
    Artefact("a lone surrogate", F23, rows(b'{"text": "\\ud800"}'), prepare, "DataError", "rows.jsonl:6"),
    Artefact("null", F23, rows(b'{"text": null}'), prepare, "DataError", "no text"),
    Artefact("100000 brackets", F23, rows(b'{"text": ' + b"[" * 100_000), prepare, "DataError", "malformed"),
    Artefact("100000 objects", F23, rows(b'{"text":' * 100_000), prepare, "DataError", "malformed"),
    Artefact(
        "wrong types",
        F23,
        rows(b'{"text": {"a": 1}}', b'{"text": 1e999}', b'["text"]', b"17"),
        prepare,
        "DataError",
        "4 of 44",
    ),
    Artefact(
        "a number of 9000 digits",
        F23,
        rows(b'{"text": "a", "n": ' + b"9" * 9000 + b"}"),
        prepare,
        "DataError",
        "malformed",
    ),
    Artefact("a key twice", F23, rows(b'{"text": "a", "text": "b"}'), prepare, "DataError", "twice"),
    Artefact("NUL between rows", F23, rows(b"\0\0\0\0"), prepare, "DataError", "malformed"),
    Artefact("a row cut short", F23, rows(b'{"text": "abc'), prepare, "DataError", "malformed"),
    Artefact(
        "brackets, counted for fine-tuning",
        F23,
        rows(b'{"text": ' + b"[" * 100_000),
        count_rows,
        "DataError",
        "rows.jsonl:6",
    ),
    Artefact(
        "items of brackets", F23, rows(b'{"task": ' + b"[" * 100_000, good=0), read_items, "DataError", "rows.jsonl:1"
    ),
    Artefact(
        "Parquet cut short",
        F23,
        text("rows.parquet", b"PAR1" + b"\xff" * 200 + b"PAR1"),
        prepare,
        "DataError",
        "Parquet",
    ),
    Artefact(
        "Parquet that breaks off",
        F23,
        lambda folder: _broken_off(folder),
        prepare,
        "DataError",
        "200 rows could be read of 400; 200 are lost",
    ),
    Artefact(
        "a line of 200 MB, counted for fine-tuning",
        F23,
        lambda folder: _long_line(folder),
        count_rows,
        "DataError",
        "rows.jsonl:2",
    ),
    Artefact(
        "Parquet of one text of 100 MB",
        F23,
        parquet(lambda pa: pa.table({"text": ["x" * 100_000_000]})),
        prepare,
        "DataError",
        "16 MiB",
    ),
    Artefact(
        "an Arrow stream with an offset beyond its data", F23, arrow(offset_beyond), prepare, "DataError", "Arrow"
    ),
    Artefact(
        "an Arrow stream cut short",
        F23,
        arrow(lambda content: content[: len(content) // 2]),
        prepare,
        "DataError",
        "rows.arrow",
    ),
    # Benign twins: none of these may be refused.
    Artefact("a clean model", CLEAN, model, load_model, None),
    Artefact("a clean model, streamed", CLEAN, model, stream_model, None),
    Artefact("a clean tokenizer", CLEAN, model, choose_tokenizer, None),
    Artefact("a clean template", CLEAN, model, chat, None),
    Artefact("a native attention", CLEAN, edited("config.json", attn_implementation="eager"), load_model, None),
    Artefact(
        "a path of its author's machine in tokenizer_config.json",
        CLEAN,
        edited(
            "tokenizer_config.json", tokenizer_file="{}/../secret", vocab_file="{}/../secret", name_or_path="/root/x"
        ),
        chat,
        None,
    ),
    Artefact("code that nothing asks to run", CLEAN, lambda folder: _stray_code(folder), load_model, None),
    Artefact("a pickle beside the weights", CLEAN, replaced("pytorch_model.bin", pickled()), load_model, None),
    Artefact("weights that are links", CLEAN, lambda folder: _linked(folder), load_model, None),
    Artefact("a clean index", CLEAN, lambda folder: _sharded(folder), load_model, None),
    Artefact("clean rows", CLEAN, rows(), prepare, None),
    Artefact(
        "odd but good rows",
        CLEAN,
        rows(
            b'{"text": "a\\u2028b\\u0000c"}', '{"text": "a\u2028\u0085b"}'.encode(), b"", b'\xef\xbb\xbf{"text": "z"}'
        ),
        prepare,
        None,
    ),
    Artefact(
        "clean Parquet",
        CLEAN,
        parquet(lambda pa: pa.table({"text": [f"row {number}" for number in range(40)]})),
        prepare,
        None,
    ),
    Artefact("20 GB of text in a small Parquet file", CLEAN, parquet(_many), lambda path: _first_rows(path), None),
    Artefact("a clean Arrow stream", CLEAN, arrow(), prepare, None),
    Artefact("a clean recipe with an alias", CLEAN, text("recipe.yaml", b"sources: &a [stdlib]\n"), read_recipe, None),
)


def named(name: str) -> Artefact:
    """The artefact of the table with this name."""
    return next(artefact for artefact in ARTEFACTS if artefact.name == name)


def _resume(path: Path) -> Any:
    from espalier.train import checkpoint

    return checkpoint.load_file(path / checkpoint.TRAINER / "optimizer.safetensors")


def _first_rows(path: Path) -> Any:
    """The first rows of a source, as many as show that they are read a few at a time."""
    import itertools

    from espalier.data.sources import Quarantine, Source, read

    found = list(itertools.islice(read(Source(path=str(path)), Quarantine()), 300))
    assert len(found) == 300
    return found


def _object_array(folder: Path) -> bytes:
    import numpy

    buffer = io.BytesIO()
    numpy.save(buffer, numpy.array([Bomb(canary(folder))], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _object_column(pa: Any) -> Any:
    """Pickles as bytes, under the metadata by which pandas says that a column has objects."""
    pickles = [pickle.dumps(Bomb(Path(tempfile.gettempdir()) / CANARY), 4)] * 40
    told = json.dumps({"columns": [{"name": "text", "pandas_type": "object", "numpy_type": "object"}]})
    return pa.table({"text": pa.array(pickles, pa.binary())}).replace_schema_metadata({"pandas": told})


def _two_weights(folder: Path) -> Path:
    _sharded(folder)
    shutil.copy(_clean_model() / WEIGHTS, folder / WEIGHTS)
    return folder


def _sharded(folder: Path) -> Path:
    from safetensors import safe_open

    model(folder)
    (folder / WEIGHTS).rename(folder / "model-00001.safetensors")
    with safe_open(folder / "model-00001.safetensors", "pt") as file:
        weight_map = dict.fromkeys(file.keys(), "model-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _linked(folder: Path) -> Path:
    model(folder)
    (folder / "blobs").mkdir()
    (folder / WEIGHTS).rename(folder / "blobs" / "1")
    (folder / WEIGHTS).symlink_to(folder / "blobs" / "1")
    return folder


def _stray_code(folder: Path) -> Path:
    model(folder)
    (folder / "custom_generate").mkdir()
    for name in ("code.py", "modeling_granite.py", "custom_generate/generate.py", "__init__.py"):
        (folder / name).write_text(code(folder))
    return folder


def _broken_off(folder: Path) -> Path:
    """Parquet whose third group of rows is spoilt."""
    import pyarrow
    from pyarrow import parquet

    path, table = folder / "rows.parquet", pyarrow.table({"text": [f"row {number}" for number in range(400)]})
    parquet.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    with parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(2).column(0)
    content, middle = bytearray(path.read_bytes()), column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 12] = b"\xff" * 12
    path.write_bytes(content)
    return path


def _long_line(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n')
        file.writelines(json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(40))
    return path
