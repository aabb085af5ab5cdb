"""A set of operations that writes down what each call costs while passing it through.

On the ``meta`` device, over `ops.reference()`, this prices a whole step of a network without computing it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels import cost, reference
from ..kernels.cost import Cost
from .parts import Part, cut

if TYPE_CHECKING:
    from .sets import Feature, Ops

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One call of one operation. ``shapes`` are [N, C, H, W] of its inputs by name, and of its result, "out"."""

    operation: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype
    detail: str  # what else sets calls of one shape apart: "3x3 stride 2", "with time and statistics"
    cost: Cost

    @property
    def out(self) -> tuple[int, ...]:
        return self.shapes[-1][1]


def recording(
    ops: Ops,
    form: str = "fused",
    parts: Mapping[int, int] | None = None,  # norm_act number -> parts that it runs in, with what reads it
) -> tuple[Ops, list[Record]]:
    """``ops``, and a list that grows by one `Record` a call, or one a part.

    form: "fused" prices each call as the kernels run it, "plain" as a chain of eager torch operations; a call
    that ``ops`` hands to the reference operation (`Ops.falls_back`) is priced plain in either. parts: of plain tensors.
    """
    recorder = _Recorder(ops, form, parts or {})
    recorded: Any = {name: recorder.around(name) for name in _PRICES if getattr(ops, name) is not None}
    return replace(ops, **recorded), recorder.log


class _Recorder:
    def __init__(self, ops: Ops, form: str, cuts: Mapping[int, int]):
        self.ops, self.form, self.cuts = ops, form, cuts
        self.log: list[Record] = []
        self.norms = 0
        self.postponed: tuple[_Call, Record, int] | None = None  # until it is known what reads it
        # Statistics parts of each feature map whose producer made statistics. Weak: recording keeps no pixels.
        self.parts = WeakIdKeyDictionary()

    def around(self, name: str) -> Callable[..., Any]:
        operation = getattr(self.ops, name)
        signature = inspect.signature(_definition(name))
        price = _PRICES[name]

        def recorded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            form = "plain" if self.ops.falls_back(name, arguments) else self.form
            call = _Call(arguments, form, self.parts, arguments)
            entry = price(call)
            y = operation(*args, **kwargs)
            if arguments.get("with_stats") and form == "fused":
                self.parts[y] = _parts(name, tuple(y.shape))
            self.write(name, call, entry.record(name, y))
            return y

        return recorded

    def write(self, name: str, call: _Call, record: Record) -> None:
        before, self.postponed = self.postponed, None
        if before is not None:
            norm, whole, parts = before
            cuts = self.cut(name, norm, call, parts)
            for p in cuts:
                self.write_part("norm_act", norm, p.of_norm(norm.arguments, whole.out[0]), whole.out, p.images, p.read)
                read = {"x": call["x"][p.images, :, p.read]}
                given = p.of_conv(call.arguments, whole.out[0]) | read
                self.write_part(name, call, given, record.out, p.images, p.written)
            if cuts:
                return
            self.log.append(whole)
        if name == "norm_act":
            self.norms += 1
            if (parts := self.cuts.get(self.norms - 1, 1)) > 1:
                self.postponed = call, record, parts
                return
        self.log.append(record)

    def cut(self, name: str, norm: _Call, call: _Call, parts: int) -> list[Part]:
        """As triton_set cuts the two."""
        if name not in ("conv", "upsample_conv"):
            return []
        measured = norm.form == "fused" and norm.parts("x") and (norm["skip"] is None or norm.parts("skip"))
        if len(call["x"]) == 1 and not measured:
            return []
        return cut(name, call["x"].shape, weight_shape(call["weight"])[2], call.arguments, parts)

    def write_part(
        self, name: str, call: _Call, arguments: Arguments, whole: tuple[int, ...], images: slice, rows: slice
    ) -> None:
        n, channels, h, w = whole
        y = torch.empty(n, channels, h, w, device="meta")[images, :, rows]
        entry = _PRICES[name](replace(call, arguments=arguments))
        self.log.append(entry.record(name, y))


def _definition(name: str) -> Callable[..., Any]:
    """Whose signature the operation has."""
    if name != "conv_step":
        return getattr(reference, name)
    from ..kernels import conv_step

    return conv_step.conv_step


@dataclass(frozen=True)
class _Call:
    arguments: Arguments
    form: str
    made: WeakIdKeyDictionary  # feature map -> parts of its statistics
    whole: Arguments  # where `arguments` are those of a part

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def parts(self, name: str) -> int:
        feature = self.whole[name]
        return 0 if feature is None else self.made.get(feature, 0)

    def rows(self, name: str) -> int:
        """How many rows of a time table [R, C] are read: one that ``row`` names, or all."""
        table = self.arguments[name]
        return 0 if table is None else 1 if self.arguments["row"] is not None else len(table)


@dataclass(frozen=True)
class _Entry:
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype
    detail: str
    cost: Cost

    def record(self, name: str, y: Feature) -> Record:
        return Record(name, (*self.shapes, ("out", tuple(y.shape))), self.dtype, self.detail, self.cost)


def _channels(feature: Feature | None) -> int:
    return 0 if feature is None else feature.shape[1]


def _shapes(call: _Call, *names: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(call[name].shape)) for name in names if call[name] is not None)


def _with(**present: object) -> str:
    names = [name for name, value in present.items() if value]
    return ("+ " + ", ".join(names)) if names else ""


def _parts(operation: str, y: tuple[int, ...]) -> int:
    """P of the statistics [N, P, 3, K] that the fused convolution writes beside y [N, K, H, W]."""
    from ..kernels import launch_conv

    phases = 4 if operation == "upsample_conv" else 1
    step = 2 if phases == 4 else 1
    height, width = y[2] // step, y[3] // step
    return phases * -(-height * width // launch_conv.part_pixels(height, width))


def weight_shape(weight: Any) -> tuple[int, int, int]:
    """(K, C, taps an axis) of convolution weights, a tensor [K, C, k, k] or what a set has packed of one."""
    if isinstance(weight, torch.Tensor):
        return weight.shape[0], weight.shape[1], weight.shape[2]
    channels = getattr(weight, "in_channels", None) or sum(weight.channels)  # only conv_pack's may be padded
    return weight.out_channels, channels, 3 if weight.phases == 4 else weight.size


def _norm_act(call: _Call) -> _Entry:
    x, skip = call["x"], call["skip"]
    before, parts, skip_parts = Cost(), call.parts("x"), call.parts("skip")
    if call.form == "fused":
        before, parts, skip_parts = _statistics(x, skip, call["groups"], parts, skip_parts)
    priced = before + cost.norm_act(
        x.shape,
        x.dtype,
        skip_channels=_channels(skip),
        affine=call["weight"] is not None,
        act=call["act"] != "none",
        bias_rows=call.rows("bias_row"),
        shift_rows=call.rows("scale_shift"),
        residual=call["residual"] is not None,
        parts=parts,
        skip_parts=skip_parts,
        form=call.form,
    )
    detail = f"{call['groups']} groups, {call['act']} " + _with(
        skip=skip is not None, bias_row=call["bias_row"] is not None, scale_shift=call["scale_shift"] is not None
    )
    if call.form == "fused" and priced.launches > 1:
        detail += f" in {priced.launches} launches"
    return _Entry(_shapes(call, "x", "skip"), x.dtype, detail.strip(), priced)


def _statistics(x: Feature, skip: Feature | None, groups: int, parts: int, skip_parts: int) -> tuple[Cost, int, int]:
    """What statistics cost that no producer left, and the parts of both: nothing where a tile holds whole groups."""
    from ..kernels import launch

    channels, pixels = _channels(x) + _channels(skip), x.shape[2] * x.shape[3]
    if not (parts or skip_parts) and launch.norm_tile_launch(channels, groups, pixels, x.dtype.itemsize) is not None:
        return Cost(), 0, 0
    before = Cost()
    if not parts:
        parts = launch.stats_launch(_channels(x), pixels).meta["PARTS"]
        before += cost.channel_stats(x.shape, x.dtype, parts)
    if skip is not None and not skip_parts:
        skip_parts = launch.stats_launch(_channels(skip), pixels).meta["PARTS"]
        before += cost.channel_stats(skip.shape, skip.dtype, skip_parts)
    return before, parts, skip_parts


def _epilogue(call: _Call) -> dict[str, Any]:
    shortcut = call["shortcut"]
    return {
        "bias": call["bias"] is not None,
        "time_rows": call.rows("time"),
        "residual": call["residual"] is not None,
        "shortcut_channels": 0 if shortcut is None else _channels(shortcut.x) + _channels(shortcut.skip),
        "scale": call["scale"],
        "form": call.form,
    }


def _convolution(call: _Call, priced: Cost, kind: str) -> _Entry:
    shapes = _shapes(call, *(("x", "skip") if "skip" in call.arguments else ("x",)))
    shortcut = call["shortcut"]
    if shortcut is not None:
        width = _channels(shortcut.x) + _channels(shortcut.skip)
        shapes += (("shortcut", (shortcut.x.shape[0], width, *shortcut.x.shape[2:])),)
    detail = f"{kind} " + _with(
        time=call["time"] is not None,
        shortcut=shortcut is not None,
        residual=call["residual"] is not None,
        statistics=call["with_stats"],
    )
    return _Entry(shapes, call["x"].dtype, detail.strip(), priced)


def _conv(call: _Call) -> _Entry:
    x, (k, c, kernel) = call["x"], weight_shape(call["weight"])
    skip, stride = _channels(call["skip"]), call["stride"]
    shape = (x.shape[0], c - skip, *x.shape[2:])  # of channels that exist: conv_in's image may lie padded
    top, bottom, left, right = reference.sides(call["padding"], kernel)
    sides = ((side - kernel) // stride + 1 for side in (shape[2] + top + bottom, shape[3] + left + right))
    priced = cost.conv(
        shape,
        k,
        x.dtype,
        kernel=kernel,
        skip_channels=skip,
        stride=stride,
        padding=call["padding"],
        parts=_parts("conv", (shape[0], k, *sides)) if call["with_stats"] else 0,
        **_epilogue(call),
    )
    entry = _convolution(call, priced, f"{kernel}x{kernel}" + (f" stride {stride}" if stride > 1 else ""))
    return replace(entry, shapes=(("x", shape), *entry.shapes[1:]))


def _upsample_conv(call: _Call) -> _Entry:
    x, k = call["x"], weight_shape(call["weight"])[0]
    y = (x.shape[0], k, 2 * x.shape[2], 2 * x.shape[3])
    parts = _parts("upsample_conv", y) if call["with_stats"] else 0
    priced = cost.upsample_conv(x.shape, k, x.dtype, parts=parts, **_epilogue(call))
    return _convolution(call, priced, "nearest x2, 3x3")


def _attention(call: _Call) -> _Entry:
    qkv = call["qkv"]
    return _Entry(_shapes(call, "qkv"), qkv.dtype, f"{call['heads']} heads", cost.attention(qkv.shape, qkv.dtype))


def _upsample(call: _Call) -> _Entry:
    return _Entry(_shapes(call, "x"), call["x"].dtype, "", cost.upsample(call["x"].shape, call["x"].dtype))


def _downsample(call: _Call) -> _Entry:
    return _Entry(_shapes(call, "x"), call["x"].dtype, "", cost.downsample(call["x"].shape, call["x"].dtype))


def _fir_upsample(call: _Call) -> _Entry:
    return _fir(call, cost.upsample)


def _fir_downsample(call: _Call) -> _Entry:
    return _fir(call, cost.downsample)


def _fir(call: _Call, resampling: Callable[..., Cost]) -> _Entry:
    """The padding and one resampling launch: at least. Torch's operations take several."""
    x = call["x"]
    image = math.prod(x.shape) * x.dtype.itemsize
    return _Entry(
        _shapes(call, "x"), x.dtype, "filter (1, 3, 3, 1)", Cost(0, image, image, 1) + resampling(x.shape, x.dtype)
    )


def _sampler_step(call: _Call) -> _Entry:
    x, out, low = call["x"], call["out"], call["low"]
    priced = cost.sampler_step(
        x.shape,
        out.dtype,
        variance=call["variance"],
        low_channels=None if low is None else low.shape[1],
        given_noise=call["noise"] is not None,
        form=call.form,
    )
    return _Entry(_shapes(call, "x"), out.dtype, f"{call['variance']} variance", priced)


def _conv_step(call: _Call) -> _Entry:
    x, x_t, low = call["x"], call["x_t"], call["low"]
    priced = cost.conv_step(
        x.shape,
        x_t.shape[1],
        x.dtype,
        variance=call["variance"],
        low_channels=None if low is None else low.shape[1],
        form=call.form,
    )
    return _Entry(_shapes(call, "x", "x_t"), x.dtype, f"3x3, {call['variance']} variance", priced)


_PRICES: dict[str, Callable[[_Call], _Entry]] = {
    "norm_act": _norm_act,
    "conv": _conv,
    "upsample_conv": _upsample_conv,
    "upsample": _upsample,
    "downsample": _downsample,
    "fir_upsample": _fir_upsample,
    "fir_downsample": _fir_downsample,
    "attention": _attention,
    "sampler_step": _sampler_step,
    "conv_step": _conv_step,
}
