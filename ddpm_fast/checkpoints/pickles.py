"""Tells what a pickle holds by the names in it, without unpickling anything."""

from __future__ import annotations

import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

MAX_OPCODES = 1_000_000
_MAX_SEARCHED = 300  # values in an object that is left out
_MAX_TEXT = 200  # characters of a string that could be a name
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a torch.save file from before torch 1.6
_STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
# What a state dict itself is made of: not what a pickle is "of".
_CONTAINERS = re.compile(
    r"(collections\.(OrderedDict|defaultdict|Counter|deque)|_codecs\.encode|copyreg\.(_reconstructor|__newobj__)"
    r"|(__builtin__|builtins)\.(list|dict|set|frozenset|tuple|int|long|float|complex|bool|str|unicode|bytes|bytearray"
    r"|slice|x?range|object))$"
)
_TENSORS = re.compile(r"(torch\._utils\.|torch\.\w*Storage$|torch\.storage\.|torch\.Tensor$|torch\.nn\.parameter\.)")
_ARRAYS = re.compile(r"numpy\b")
_DICTS = re.compile(
    r"(collections\.defaultdict|easydict\.EasyDict|addict\.(\w+\.)?Dict|yacs\.config\.CfgNode|munch\.Munch"
    r"|(pytorch_)?lightning[\w.]*\.AttributeDict)"
)
# Classes that hold plain data in training scripts' files: settings, paths, dates, NumPy's numbers.
_SETTINGS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.\w+|datetime\.\w+|uuid\.UUID|typing\.Any"
    r"|(__builtin__|builtins)\.(list|dict|set|frozenset|tuple|int|float|complex|bool|str|bytes|slice|x?range)"
    r"|numpy(\._?core\.multiarray)?\.(scalar|_reconstruct|ndarray|dtype)|numpy\.dtypes\.\w+"
    rf"|(omegaconf|ml_collections)\.[\w.]+|{_DICTS.pattern}"
)


class Names(NamedTuple):
    """What a pickle names."""

    imports: list[str]  # globals, "module.name", in the order in which they come
    texts: list[str]  # its strings, cut short
    by_torch: bool  # torch.save wrote it, in its format from before torch 1.6


def names_in(stream: IO[bytes]) -> Names:
    """The names in a pickle, read as far as it is sound. Opcodes are parsed; nothing is executed."""
    names = Names([], [], False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in a damaged file's strings
            names = _read(stream, names)
            for _ in range(4 * names.by_torch):  # magic number, protocol, system; then the content and its keys
                names = _read(stream, names)
    except Exception:  # damaged: what came before still says what it was
        pass
    return names._replace(imports=list(dict.fromkeys(names.imports)))


def _read(stream: IO[bytes], names: Names) -> Names:
    """Adds the names of the next pickle in the stream."""
    pushed: list[str] = []  # the last strings, for STACK_GLOBAL
    memo: dict[int, str] = {}
    memoized, on_top = 0, False
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            break
        if opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            if on_top:  # a string was the last thing pushed
                memo[memoized if argument is None else int(argument)] = pushed[-1]
            memoized += 1
            continue
        on_top = opcode.name in _STRINGS
        if on_top:
            text = str(argument)[:_MAX_TEXT]
            pushed = [*pushed[-7:], text]
            names.texts.append(text)
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET") and argument in memo:
            pushed = [*pushed[-7:], memo[argument]]
        elif opcode.name in ("GLOBAL", "INST"):
            names.imports.append(str(argument)[: 2 * _MAX_TEXT].replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL" and len(pushed) > 1:
            names.imports.append(".".join(pushed[-2:]))
        elif argument == _TORCH_MAGIC:
            names = names._replace(by_torch=True)
    return names


def stand_ins(imports: list[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """For settings, paths, numbers of NumPy and the like: an inert class in place of each, for torch's safe_globals.

    The real classes are not imported. Empty where a pickle names anything else, which then stays refused.
    """
    return [
        (type("LeftOut", (_stand_in(name),), {}), alias)
        for name in imports
        if _SETTINGS.fullmatch(name)
        for alias in {name, name.replace("__builtin__.", "builtins.")}
    ]


def _stand_in(name: str) -> type:
    if _DICTS.fullmatch(name):
        return _Dict
    if name.startswith("numpy"):
        return {"_reconstruct": Array, "dtype": _ArrayType}.get(name.rpartition(".")[2], LeftOut)
    return LeftOut


class _Dict:
    """In place of a class of dicts. It makes OrderedDicts: torch's unpickler puts items into no other class."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class LeftOut:
    """Takes whatever a pickle does to build an object, and keeps only whether there are weights in it."""

    has_weights = False

    def __new__(cls, *values: Any, **__: Any) -> LeftOut:
        made = object.__new__(cls)
        made.has_weights = _has_weights(values)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.has_weights = self.has_weights or _has_weights(state)


class _ArrayType(LeftOut):
    """In place of NumPy's dtype."""

    letters, order = "", ""

    def __init__(self, letters: Any = "", *_: Any) -> None:
        self.letters = str(letters)

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1]) if isinstance(state, tuple) and len(state) > 1 else ""


class Array(LeftOut):
    """In place of a NumPy array: the tensor of its bytes, where it is one of plain numbers."""

    tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        self.has_weights = True
        try:
            _, shape, kind, by_columns, data = state
            dtype = _ARRAY_TYPES.get(kind.letters)
            if dtype is not None and kind.order in ("<", "|", "=") and len(data) and isinstance(data, bytes):
                flat = torch.frombuffer(bytearray(data), dtype=dtype)
                by_rows = flat.reshape(shape[::-1] if by_columns else shape)
                self.tensor = by_rows.permute(*reversed(range(len(shape)))) if by_columns else by_rows
                self.has_weights = self.tensor.is_floating_point() and self.tensor.ndim > 0
        except (TypeError, ValueError, AttributeError, RuntimeError):  # not as NumPy writes it
            pass


_ARRAY_TYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool, "u1": torch.uint8},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64},
}


def _has_weights(value: Any) -> bool:
    """Whether there is a tensor of weights in it, as far as a bounded search goes: a pickle can hold itself."""
    waiting, seen = [value], 0
    while waiting and seen < _MAX_SEARCHED:
        value, seen = waiting.pop(), seen + 1
        if isinstance(value, dict):
            waiting += islice(value.values(), _MAX_SEARCHED)
        elif isinstance(value, (list, tuple)):
            waiting += value[:_MAX_SEARCHED]
        elif value.has_weights if isinstance(value, LeftOut) else _is_weight(value):
            return True
    return False


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def tensor_of(value: Any) -> Tensor | None:
    """The value if it is a tensor, or the tensor of a NumPy array's bytes."""
    if isinstance(value, Array):
        return value.tensor
    return value if isinstance(value, Tensor) else None


def kind_of(found: Names) -> str | None:
    """What a pickle with these names is, if it is more than plain values in containers."""
    names, texts = found.imports, found.texts
    edm = next((t for t in texts if re.fullmatch(r"EDM\w*|\w*Precond|SongUNet|DhariwalUNet", t)), None)
    if any("persistence" in name or name.startswith("dnnlib.") for name in names):
        if edm is not None:
            return (
                f"an EDM snapshot ({edm}), pickled with its own source code; an EDM network has continuous noise "
                "levels and is no DDPM: draw from it with EDM's own code"
            )
        return (
            "a snapshot of EDM or StyleGAN (torch_utils.persistence), pickled with its own source code; draw from it "
            "with the code that it came from"
        )
    others = [name for name in names if not _CONTAINERS.match(name)]
    own = next((name for name in others if not _TENSORS.match(name) and not _ARRAYS.match(name)), None)
    if own is not None and own.startswith(("__builtin__.", "builtins.", "os.", "posix.", "nt.", "subprocess.")):
        return f"a pickle that would run {own}, which no state dict does; do not open it unless you trust who wrote it"
    if own is not None and own.startswith("sklearn."):
        return f"a pickle of scikit-learn ({own}), no network"
    if own is not None:
        return f"a pickle of {own}, a whole object and not a state dict"
    if any(_TENSORS.match(name) for name in others):
        return (
            "a pickle of tensors that pickle.dump wrote; save it with torch.save, which can be read without running it"
        )
    if any(_ARRAYS.match(name) for name in others):
        return "a pickle of NumPy arrays; save them as tensors with torch.save or safetensors"
    return None
