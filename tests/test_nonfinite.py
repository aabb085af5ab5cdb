"""Numbers end: images that are not finite are named, or drawn again in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batching_setup import SCHEDULE, SMALL, STEPS, generators, half, sampler
from models import unet
from tensors import same_chain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast as df


def poisoned(value: float, at: int, above: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A model whose output is ``value`` somewhere in the images whose first element is ``above`` something, at t."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = half(x, t)
        bad = (x[:, 0, 0, 0] > above) & (t == at)
        out[:, 1, 2, 3] = torch.where(bad, torch.full_like(out[:, 1, 2, 3], value), out[:, 1, 2, 3])
        return out

    return model


@pytest.mark.parametrize("batch_size", [4, 64])
def test_ids_and_steps_of_nan_are_named(batch_size: int):
    at, done = 7, STEPS - 7  # t = 7 is the step after which `done` are done
    before: list[Tensor] = []
    sampler().sample(20, first_id=30, callback=lambda k, x: before.append(x.clone()) if k == done - 1 else None)
    firsts = before[0][:, 0, 0, 0]
    above = float(firsts.sort().values[-4:-2].mean())  # between the third and the second largest
    bad = (firsts > above).nonzero().flatten().tolist()
    assert len(bad) == 3
    with pytest.raises(RuntimeError) as caught:
        sampler(poisoned(float("nan"), at, above), batch_size=batch_size).sample(20, first_id=30)
    named = ", ".join(f"id {30 + i} from step {done} of {STEPS} (t = 7)" for i in bad)
    assert str(caught.value) == f"images must be finite; in float32 these are not: {named}; look at the model's weights"


def test_unchecked_images_come_as_they_are():
    x = sampler(lambda x, t: x * float("nan")).sample(2, check_finite=False)
    assert x.isnan().all()


def test_many_ids_are_counted():
    with pytest.raises(RuntimeError, match=r"id 0 from step 1 of 12 \(t = 11\), .*id 7 from .* and 12 more; look"):
        sampler(lambda x, t: x * float("nan")).sample(20)


@pytest.mark.parametrize("kind", ["philox", "torch", "one", "list"])
def test_a_fault_that_does_not_come_again_is_only_warned_of(kind: str):
    """As of a bit that flipped: the image is drawn again, from the same noise, and is right."""
    noise = {"philox": "philox", "torch": "torch", "one": generators(1)[0], "list": generators(7)}
    same = {**noise, "one": generators(1)[0], "list": generators(7)}[kind]
    calls = []

    def once(x: Tensor, t: Tensor) -> Tensor:
        out = half(x, t)
        calls.append(0)
        if len(calls) == STEPS + 4:  # of the second batch
            out[1] = float("inf")
            out[1, 0, 0, 0] = float("nan")
        return out

    want = sampler(batch_size=3, noise=noise[kind]).sample(7, seed=1)
    with pytest.warns(RuntimeWarning, match="finite when drawn once more in the same way: 1 images, id 4 the first"):
        got = sampler(once, batch_size=3, noise=same).sample(7, seed=1)
    assert torch.equal(got, want)
    if isinstance(same, torch.Generator):
        assert torch.equal(same.get_state(), noise[kind].get_state())


def overflowing(n: int, keep: int, seed: int) -> tuple[df.UNet, list[int]]:
    """A U-Net whose first convolution passes float16's largest number for all but ``keep`` of n images, and which."""
    model = unet(SMALL)
    most = torch.zeros(n)

    def look(done: int, x: Tensor) -> None:
        if done < STEPS:
            torch.maximum(most, model.conv_in(x).abs().amax((1, 2, 3)), out=most)

    with torch.no_grad():
        model.conv_in.bias.zero_()
        df.Sampler(model, SCHEDULE, batch_size=n).sample(n, seed, callback=look)
        order = most.argsort()
        model.conv_in.weight.mul_(65504 / float(most[order[keep - 1 : keep + 1]].mean()))
    return model, sorted(order[keep:].tolist())


@pytest.mark.parametrize("batch_size", [2, 6])
def test_what_float16_cannot_hold_is_drawn_in_float32(batch_size: int):
    model, _ = overflowing(6, 4, seed=1)
    first: dict[int, int] = {}
    calls = []

    def look(done: int, x: Tensor) -> None:
        start = batch_size * (len(calls) // (STEPS + 1))
        calls.append(done)
        if start < 6 and len(calls) <= (STEPS + 1) * 6 // batch_size:
            for i in (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
                first.setdefault(start + i, done)

    low = df.Sampler(model, SCHEDULE, batch_size=batch_size, dtype=torch.float16)
    with pytest.warns(RuntimeWarning) as caught:
        got = low.sample(6, seed=1, callback=look)
    assert 0 < len(first) < 6
    named = ", ".join(f"id {i} from step {k} of {STEPS} (t = {STEPS - k})" for i, k in first.items())
    assert [str(w.message) for w in caught] == [f"not finite in float16, so drawn in float32: {named}"]
    exact = df.Sampler(model, SCHEDULE).sample(6, seed=1)
    bad = sorted(first)
    plain = df.Sampler(lambda x, t: model(x, t), SCHEDULE, image_shape=(3, 8, 8))
    assert same_chain(got[bad], exact[bad], model, lambda: plain.sample(6, seed=1)[bad])
    good = [i for i in range(6) if i not in first]
    assert got.isfinite().all() and not torch.equal(got[good], exact[good]), "these stay as float16 drew them"
    torch.testing.assert_close(got[good], exact[good], rtol=0, atol=0.2)


def test_noise_in_float32_is_that_of_the_run():
    """A generator draws other numbers in float16: the images are of those, by a network in float32."""
    model = unet(SMALL)
    with torch.no_grad():
        model.conv_in.weight.mul_(1e6)
    low = df.Sampler(model, SCHEDULE, batch_size=2, dtype=torch.float16, noise=generators(3))
    with pytest.warns(RuntimeWarning, match="so drawn in float32: id 0 .* id 1 .* id 2 from step 1 "):
        got = low.sample(3)
    exact = copy.deepcopy(model).double()

    @torch.no_grad()
    def draw() -> Tensor:
        images = []
        for g in generators(3):
            x = torch.randn(1, 3, 8, 8, generator=g, dtype=torch.float16).double()
            for t in SCHEDULE.timesteps():
                z = torch.randn(1, 3, 8, 8, generator=g, dtype=torch.float16).double() if t else None
                x = SCHEDULE.step(exact(x, t), t, x, z)
            images.append(x)
        return torch.cat(images)

    assert same_chain(got, draw(), exact, draw)


def test_what_float32_cannot_hold_either_is_an_error():
    model = unet(SMALL)
    with torch.no_grad():
        model.conv_in.weight.mul_(1e39)
    low = df.Sampler(model, SCHEDULE, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"in bfloat16 and again in float32 these are not: id 0 from step 1 of 12"):
        low.sample(2)


def test_a_model_that_was_changed_since_is_no_way_out():
    model, _ = overflowing(6, 4, seed=1)
    low = df.Sampler(model, SCHEDULE, dtype=torch.float16)
    with torch.no_grad():
        model.conv_out.bias += 1
    with pytest.raises(RuntimeError, match="in float16 these are not: id "):
        low.sample(6, seed=1)


def test_a_call_waits_once_and_not_in_its_loop():
    """Whether all is finite is asked at the end of the call, however many batches and steps it has."""

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked[-1] += any(w in func.name() for w in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
            return func(*args, **(kwargs or {}))

    asked: list[int] = []
    for n, steps in ((2, 3), (2, 12), (9, 12)):
        asked.append(0)
        drawing = sampler(batch_size=2, steps=steps)
        drawing.sample(n)  # makes its programs
        with Asked():
            drawing.sample(n)
    assert asked == [1, 1, 1]
