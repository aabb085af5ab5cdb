"""What the time embedding adds at each step, on the device: a table by step, or projected for a batch of labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.reference import ACTIVATIONS
from ..ops import Ops
from ..unet import TimeRows, UNet

_INTO = {
    "silu": torch.ops.aten.silu.out,
    "swish": torch.ops.aten.silu.out,
    "mish": torch.ops.aten.mish.out,
    "gelu": torch.ops.aten.gelu.out,
}


class TableRows:
    """Every block's projection at every step, evaluated once; the counter names the row."""

    def __init__(self, prepared: UNet, times: Tensor, counter: Tensor):
        widths = [block.time_emb_proj.out_features for block in prepared.residual_blocks()]
        table = prepared.time_table(times)  # [S, total]
        # A block's rows in memory of their own: the kernels read them as a matrix.
        self.parts = [part.contiguous() for part in table.split(widths, dim=1)]
        self._rows = TimeRows(parts=self.parts, row=counter, t=times)

    def now(self, ops: Ops) -> TimeRows:
        return self._rows

    def tables(self) -> list[Tensor]:
        return self.parts

    def static(self) -> list[Tensor]:
        return []


class ClassRows:
    """One row an image: time and class embeddings meet before the activation, so no table holds their projection.

    Once a batch the labels are embedded; each step adds the step's own embedding and projects for all blocks at
    once, by the set's own 1x1 convolution, in float32, so that an image's row does not depend on the batch. The
    result [images, total] is cut into a matrix a block by one copy for all blocks of a width. (Torch's operation for
    that, split_with_sizes_copy, reads addresses from the host's memory, in a captured step at each replay.)
    """

    def __init__(self, prepared: UNet, times: Tensor, counter: Tensor, images: int):
        c = prepared.config
        self.prepared, self.counter, self.times, self.act = prepared, counter, times, c.act_fn
        blocks = prepared.residual_blocks()
        widths = [block.time_emb_proj.out_features for block in blocks]
        self.embeddings = prepared.time_embedding(prepared._time_features(times))  # [S, E]
        wide, device = self.embeddings.dtype, self.embeddings.device
        order = sorted(range(len(blocks)), key=widths.__getitem__)
        weight = torch.cat([blocks[i].time_emb_proj.weight for i in order])[:, :, None, None]
        assert prepared.ops is not None
        lying = prepared.ops.input_channels(c.time_width, wide)
        channels = (lying,) if lying != c.time_width else None
        self._weight = prepared.ops.pack_conv(weight, dtype=wide, channels=channels)
        self._bias = torch.cat([blocks[i].time_emb_proj.bias for i in order])
        self.classes = torch.zeros(images, c.time_width, dtype=wide, device=device)
        self._sum = torch.zeros_like(self.classes)
        self._row = torch.zeros(1, c.time_width, dtype=wide, device=device)
        self._same = [  # by width: [blocks, images, width]
            torch.zeros(widths.count(width), images, width, dtype=wide, device=device) for width in sorted({*widths})
        ]
        in_order = [part for same in self._same for part in same.unbind()]
        self.parts = [in_order[order.index(i)] for i in range(len(blocks))]
        self._t = torch.zeros(1, dtype=times.dtype, device=device)
        self._rows = TimeRows(parts=self.parts, t=self._t)

    def label(self, labels: Tensor) -> None:
        """Embed the labels of a batch: [images], or [images, E] where the model takes embeddings."""
        assert self.prepared.class_embedding is not None
        if self.prepared.config.class_embed_type == "timestep":
            # Its MLP is torch's, whose products depend on the number of rows: one at a time, once a batch.
            for i, features in enumerate(self.prepared._time_features(labels).split(1)):
                self.classes[i : i + 1].copy_(self.prepared.class_embedding(features))
        else:
            self.classes.copy_(self.prepared.class_embedding(labels))

    def now(self, ops: Ops) -> TimeRows:
        n, width = self.classes.shape
        torch.index_select(self.embeddings, 0, self.counter[:1], out=self._row)
        torch.index_select(self.times, 0, self.counter[:1], out=self._t)
        torch.add(self._row, self.classes, out=self._sum)
        if self.act in _INTO:
            _INTO[self.act](self._sum, out=self._sum)
        else:
            self._sum.copy_(ACTIVATIONS[self.act](self._sum))
        projected = ops.leave(ops.conv(ops.enter(self._sum.view(n, width, 1, 1)), self._weight, self._bias))
        flat = projected.permute(0, 2, 3, 1).view(n, -1)
        if flat.is_meta:  # a dry run
            return self._rows
        start = 0
        for same in self._same:
            blocks, _, width = same.shape
            stop = start + blocks * width
            same.copy_(flat[:, start:stop].view(n, blocks, width).transpose(0, 1))
            start = stop
        return self._rows

    def tables(self) -> list[Tensor]:
        return [self.embeddings]

    def static(self) -> list[Tensor]:
        return [self.classes, self._sum, self._row, *self.parts]
